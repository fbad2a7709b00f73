"""Files are written completely or not at all, with the permissions of before, and killed writers leave nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import Mlp

from zest_fast.finetuning.delta_use import merge_delta
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.foundation.replacing import new_folder, replacing


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def write(path, text="new"):
    with replacing(path) as temporary:
        temporary.write_text(text)


WRITER = """
import sys, time
from pathlib import Path
from zest_fast.foundation.replacing import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_bytes(bytes(1000))
    temporary.with_name(".tmpAbCdE").write_bytes(bytes(1000))  # as safetensors does it
    print("half", flush=True)
    time.sleep(600)
"""


def half_written(path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    return process


def test_leftovers_of_killed_writers_are_removed_and_those_of_living_ones_stay(tmp_path):
    path, other = tmp_path / "delta", tmp_path / "delta2"
    path.write_text("old")
    path.chmod(0o600)
    dead, living, elsewhere = half_written(path), half_written(path), half_written(other)
    try:
        for process in (dead, elsewhere):
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert len(list(tmp_path.iterdir())) == 4  # three folders
        for folder in tmp_path.glob(".*"):  # whatever lies in them is as private as the file
            assert mode_of(folder) == 0o700
        write(path)
        assert path.read_text() == "new" and mode_of(path) == 0o600
        left = [folder.name for folder in tmp_path.glob(".*")]
        assert len(left) == 2 and any(f"-{living.pid}-"[1:] in name for name in left)
        write(other)  # removes its own
        assert len(list(tmp_path.glob(".*"))) == 1
    finally:
        living.kill()
        living.wait()
    write(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["delta", "delta2"]


def test_a_number_that_another_process_has_by_now_is_dead(tmp_path, monkeypatch):
    path = tmp_path / "delta"
    process = half_written(path)
    process.kill()
    process.wait()
    (left,) = tmp_path.iterdir()
    left.rename(tmp_path / left.name.replace(f"{process.pid}-", f"{os.getpid()}-"))  # begun at another time
    write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["delta"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664])
def test_permissions_are_those_of_the_file_from_the_beginning(mode, tmp_path):
    path = tmp_path / "delta"
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as temporary:
        assert mode_of(temporary) & 0o077 == mode & 0o077 and mode_of(temporary.parent) == 0o700
        temporary.write_text("new")
    assert mode_of(path) == mode and path.read_text() == "new"


def test_a_new_file_has_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "delta")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "delta") == 0o640


def special_files(folder):
    """Not those in /dev: who replaces one of them by mistake, and may, has changed the machine."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as unused:
        unused.bind(str(folder / "socket"))
    kinds = ["pipe", "folder", "socket"]
    with contextlib.suppress(PermissionError):  # of those who are not root
        os.mknod(folder / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 7))  # what /dev/full is
        kinds.append("device")
    return kinds


def test_what_is_no_file_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
    kinds = special_files(Path())
    before = {kind: stat.S_IFMT(os.stat(kind).st_mode) for kind in kinds}
    model = Mlp()
    tuned = SelectiveBackward(model, ["a"])
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    delta = tuned.save("delta")

    def merge(path):
        merge_delta(model, delta, path)

    for kind in kinds:
        for save in (
            tuned.save,
            lambda path: tuned.save_run(path, optimizer),
            merge,
        ):
            into_folder = kind == "folder" and save is merge  # which makes folders, too, and new ones only
            message = "it is there already" if into_folder else f"a {kind}, and a .*file is needed to replace it"
            with pytest.raises(OSError, match=message) as caught:
                save(kind)
            assert caught.value.filename == kind
    assert {kind: stat.S_IFMT(os.stat(kind).st_mode) for kind in kinds} == before
    assert sorted(os.listdir()) == sorted(["delta", *kinds])


def test_errors_name_the_file_and_not_the_temporary(tmp_path, monkeypatch):
    path = tmp_path / "delta"
    path.write_text("old")

    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.mkdir", refuse)  # tests may run as root, whom no folder refuses
        with pytest.raises(PermissionError) as caught:
            write(path)
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write(tmp_path / "missing" / "delta")
    with pytest.raises(OSError, match="too large") as caught, replacing(path) as temporary:
        raise OSError(errno.EFBIG, "File too large", str(temporary))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_a_name_can_be(tmp_path):
    path = tmp_path / ("é" * 127)
    write(path)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "delta", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink() and target.read_text() == "new" and len(list((tmp_path / "real").iterdir())) == 1


def test_an_interrupted_write_leaves_nothing(tmp_path):
    path = tmp_path / "delta"
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made"
    for error in (ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")):
        with pytest.raises(type(error)) as caught, new_folder(path) as temporary:
            (temporary / "inside").write_text("half")
            assert not path.exists() and temporary.parent == tmp_path
            raise error
        assert list(tmp_path.iterdir()) == []
    assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC
    with new_folder(path) as temporary:
        (temporary / "inside").write_text("whole")
    assert [file.read_text() for file in path.iterdir()] == ["whole"] and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o777 & ~_umask()
    for there, error in ((path, FileExistsError), (tmp_path / "no" / "made", FileNotFoundError)):
        with pytest.raises(error, match="made"), new_folder(there):
            raise AssertionError("nothing is to be written")


def test_what_a_killed_writer_of_a_folder_left_is_removed(tmp_path):
    code = (
        "import os, sys\n"
        "from zest_fast.foundation.replacing import new_folder\n"
        "with new_folder(sys.argv[1]) as temporary:\n"
        "    (temporary / 'inside').write_text('half')\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "made")]).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    with new_folder(tmp_path / "made"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]


def _umask():
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
