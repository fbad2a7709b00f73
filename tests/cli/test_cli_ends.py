"""How `zest-fast` ends: exit codes, outputs that cannot be written, Ctrl-C, and what foreign names do to a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import TEXTS, save_bert, save_jsonl
from profiles import make_profile
from typer.testing import CliRunner

from zest_fast.cli import app
from zest_fast.finetuning.delta_files import read_delta

ROOT = Path(__file__).parents[2]
COMMANDS = ("profile", "finetune", "rank", "export", "plan", "sweep", "train-ranker", "demo", "doctor")
COMMANDS += ("merge", "apply", "diff", "evaluate", "pack")

USER_MODULE = """
import os, shutil, time
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())

def net():
    torch.manual_seed(1)
    return Net()

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        named = {"[bold]x": nn.Linear(4, 6), "e\\x1b[31mvil": nn.Linear(6, 6), "head": nn.Linear(6, 2)}
        self.layers = nn.ModuleDict(named)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x

class Slow(Dataset):
    def __len__(self):
        return 40_000

    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.randn(4), index % 2

def slow():
    return DataLoader(Slow(), batch_size=4)

def slow_pair():
    return slow(), DataLoader(Slow(), batch_size=4)

class Stuck(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        print("running", flush=True)
        time.sleep(60)
        return self.net(x)

def batches():
    torch.manual_seed(2)
    targets = torch.arange(40) % 2
    return DataLoader(TensorDataset(torch.randn(40, 4) + targets[:, None], targets), batch_size=8)

def spawned():
    torch.manual_seed(2)
    return DataLoader(Slow(), batch_size=8, num_workers=1, multiprocessing_context="spawn")

class Vanishing(Dataset):
    '''Its folder of results is gone after a few samples.'''
    def __len__(self):
        return 40

    def __getitem__(self, index):
        shutil.rmtree("results", ignore_errors=True)
        return torch.randn(4), index % 2

def vanishing():
    return DataLoader(Vanishing(), batch_size=4)

class Failing(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index > 20:
            raise KeyError("speaker")  # line 86
        return torch.randn(4), index % 2

def failing():
    return DataLoader(Failing(), batch_size=4)

def complaining():
    raise ValueError("no such corpus")

def needy(path):
    return net()

def leaving():
    raise SystemExit(0)
"""
COMPLAINT = next(n for n, line in enumerate(USER_MODULE.split("\n"), 1) if "no such corpus" in line)


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "zest_ends_user.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "zest_ends_user", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("zest_ends_user", None)


@pytest.fixture
def run(home):
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def refused(result, *parts):
    assert result.exit_code == 2, result.stdout + result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line


NET, BATCHES = "zest_ends_user:net", "zest_ends_user:batches"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_no_error(command) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.stdout and result.stderr == ""


def test_the_command_itself_ends_well() -> None:
    for words, code in ((["--help"], 0), (["--version"], 0), ([], 2), (["profile"], 2), (["profiles"], 2)):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code, words
        assert "error: 0" not in result.output and "error: 2" not in result.output


def test_python_m_takes_nothing_from_the_current_folder(tmp_path) -> None:
    for name in ("typer", "rich", "lightgbm", "torch", "json"):
        (tmp_path / f"{name}.py").write_text("open('taken', 'w').close()\nraise SystemExit('shadowed')\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "zest_fast", "rank", "--help"]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "zest-fast rank" in result.stdout and not (tmp_path / "taken").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["processes", "jobs"])
def test_workers_take_nothing_from_the_current_folder(tmp_path, workers) -> None:
    """`python -c`, which starts a spawned process, and `python -m`, which starts a job, look there first."""
    for name in ("signal", "random", "socket", "tempfile", "secrets", "torch", "pickle", "uuid"):
        (tmp_path / f"{name}.py").write_text("open('taken', 'w').close()\nraise SystemExit('shadowed')\n")
    program = (
        "from zest_fast.sweeping import local_workers\n"
        "if __name__ == '__main__':\n"
        "    local_workers._can_fork = lambda threads: False\n"
        "    from zest_fast.cli import app\n"
        "    app(prog_name='zest-fast')\n"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "program.py").write_text(program)  # its folder is first on the path, as for zest-fast
    (tmp_path / "zest_ends_user.py").write_text(USER_MODULE)
    (tmp_path / "shared").mkdir()
    job = ("--slurm", "cluster=local", "--slurm", "folder=shared", "--slurm", "timeout_min=5")
    options = ("--workers", "2") if workers == "processes" else ("--workers", "slurm:1", *job)
    words = ("sweep", NET, BATCHES, "--steps", "2", "--batch-size", "4", "--seeds", "1", *options, "--json")
    result = subprocess.run(
        [sys.executable, "elsewhere/program.py", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "taken").exists()
    assert {row["layer"] for row in json.loads(result.stdout)["best"]} == {"a", "b"}


OUTPUTS = [
    (("profile", NET, BATCHES), "--out", ".json"),
    (("profile", NET, BATCHES), "--plot", ".png"),
    (("finetune", NET, BATCHES), "--out", ".safetensors"),
    (("sweep", NET, BATCHES), "--out", ".jsonl"),
    (("train-ranker",), "--out", ".json"),
    (("export", "profile.json", "--to", "peft"), "--out", ".json"),
]


@pytest.mark.parametrize(("words", "option", "ending"), OUTPUTS)
def test_outputs_are_tried_before_anything_is_loaded(run, home, words, option, ending) -> None:
    (home / "zest_ends_user.py").write_text("raise RuntimeError('loaded before the output was checked')")
    (home / "profile.json").write_text("loaded before the output was checked")
    (home / f"folder{ending}").mkdir()
    (home / "file").write_text("")
    (home / f"device{ending}").symlink_to("/dev/full")
    (home / f"lost{ending}").symlink_to(home / "gone" / "x")
    refused(run(*words, option, f"nosuch/x{ending}"), "nosuch", "does not exist")
    refused(run(*words, option, f"folder{ending}"), f"{option} folder{ending} is a folder")
    refused(run(*words, option, f"file/x{ending}"), f"{option} file/x{ending}: file is a file, not a folder")
    refused(run(*words, option, f"device{ending}"), f"{option} device{ending} is no ordinary file")
    refused(run(*words, option, f"lost{ending}"), "link to what does not exist")
    refused(run(*words, option, f"/proc/x{ending}"), f"{option} /proc/x{ending} cannot be written")
    refused(run(*words, option, "x" * 255 + ending), "name too long")
    refused(
        run(*words, option, "x" * (250 - len(ending)) + ending), "cannot be written"
    )  # what is written first is longer
    if words[0] != "export":
        refused(run(*words, option, "/dev/full"), "the ending '' is unknown here")
    left = {entry.name for entry in home.iterdir()}
    assert left == {"zest_ends_user.py", "profile.json", f"folder{ending}", "file", f"device{ending}", f"lost{ending}"}


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not hold for root")
def test_a_protected_file_or_folder_is_refused(run, home) -> None:
    (home / "kept.json").write_text("kept")
    (home / "kept.json").chmod(0o400)
    refused(run("profile", NET, BATCHES, "--out", "kept.json"), "write-protected")
    (home / "shut").mkdir(mode=0o500)
    refused(run("profile", NET, BATCHES, "--out", "shut/p.json"), "cannot be written")


def test_the_folder_of_the_demo_is_tried_too(run, home) -> None:
    (home / "file").write_text("")
    refused(run("demo", "--out", "file"), "--out file: file is not a folder")
    refused(run("demo", "--out", "file/in/it"), "is not a folder")


def test_no_output_takes_the_place_of_what_is_read(run, home) -> None:
    save_jsonl(home / "films.jsonl", TEXTS, ["a", "b"] * 3)
    before = (home / "films.jsonl").read_bytes()
    refused(run("sweep", NET, "films.jsonl", "--out", "films.jsonl"), "is what this command reads")
    make_profile({"a": 1.0, "b": 2.0, "head": 3.0}, heads=("head",)).save(home / "p.json")
    refused(run("export", "p.json", "--to", "axolotl", "--by", "snip", "--out", "p.json"), "is what this command reads")
    assert (home / "films.jsonl").read_bytes() == before


def test_a_folder_in_the_place_of_a_file_is_called_one(run, home) -> None:
    (home / "p").mkdir()
    refused(run("rank", "p"), "profile 'p' is a folder")
    refused(run("export", "p", "--to", "peft"), "profile 'p' is a folder")
    refused(run("train-ranker", "p", "--no-shipped"), "records 'p' are a folder")


def test_weights_that_cannot_be_saved_are_saved_elsewhere(run, home, monkeypatch) -> None:
    (home / "results").mkdir()
    (home / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(home / "temporary"))
    words = ("finetune", NET, "zest_ends_user:vanishing", "--layers", "b", "--steps", 3)
    result = run(*words, "--out", "results/delta.safetensors", "--json")
    assert result.exit_code == 2
    (saved,) = (home / "temporary").iterdir()
    found = json.loads(result.stdout)
    assert found["delta"] == str(saved) and "results" in found["not_saved"]
    assert f"what was trained is saved as {saved}" in result.stderr.splitlines()[-1]
    delta = read_delta(saved)
    assert set(delta.parameters) == {"b.weight", "b.bias", "head.weight", "head.bias"}
    assert delta.recipe["steps"] == delta.recipe["planned_steps"] == 3


def test_what_was_trained_before_an_error_is_kept_and_the_error_says_where_it_arose(run, home) -> None:
    result = run("finetune", NET, "zest_ends_user:failing", "--layers", "b", "--out", "delta.safetensors")
    last = result.stderr.splitlines()[-1]  # after what it was about to train
    assert result.exit_code == 2 and result.stdout == "" and last.startswith("error: "), result.stderr
    for part in ("speaker", "after step 5 of 10", "delta.interrupted.safetensors", "KeyError in", "zest_ends_user.py"):
        assert part in last
    assert not (home / "delta.safetensors").exists()
    assert read_delta(home / "delta.interrupted.safetensors").recipe["interrupted"] is True


def test_errors_of_the_users_functions_keep_their_place(run, home) -> None:
    place = f"zest_ends_user.py, line {COMPLAINT})"
    refused(run("profile", "zest_ends_user:complaining", BATCHES), "no such corpus (ValueError in", place)
    refused(run("profile", "zest_ends_user:needy", BATCHES), "needs path", "without arguments")
    refused(run("profile", "zest_ends_user:leaving", BATCHES), "called sys.exit(0) instead of returning")


def test_an_option_without_effect_is_named(run, home) -> None:
    result = run("profile", NET, BATCHES, "--batch-size", 3, "--metrics", "snip")
    assert result.exit_code == 0 and "--batch-size has no effect" in " ".join(result.stderr.split())
    assert "no effect" not in run("profile", NET, BATCHES, "--metrics", "snip").stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--layers", "a", "--by", "snip"), "--by chooses among ranked layers"),
        (("--layers", "a", "--top", 1), "--top chooses among ranked layers"),
        (("--layers", ","), "--layers ',' names nothing"),
        (("--layers", "a", "--head", ","), "--head ',' names nothing"),
        (("--layers", "a", "--device", "gpu"), "--device 'gpu' is unknown"),
    ],
)
def test_options_that_contradict_or_say_nothing(run, home, words, part) -> None:
    refused(run("finetune", NET, BATCHES, "--steps", 1, *words), part)
    assert not list(home.glob("*.safetensors"))


def test_messages_name_options(run, home) -> None:
    save_bert(home / "bert")
    refused(run("plan", "bert"), "pass --sequence-length")


def test_names_neither_move_the_cursor_nor_vanish(run, home) -> None:
    result = run("profile", "zest_ends_user:Named", BATCHES, "--metrics", "snip", "--out", "p.json")
    assert result.exit_code == 0, result.stderr
    assert "layers.[bold]x" in result.stdout and "layers.e\\x1b[31mvil" in result.stdout
    assert "\x1b" not in result.stdout
    ranked = run("rank", "p.json", "--by", "snip", "--top", 2).stdout
    assert "layers.[bold]x" in ranked and "\x1b" not in ranked
    refused(run("finetune", "zest_ends_user:Named", BATCHES, "--layers", "\x1b[31mred"), "\\x1b[31mred")


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def start(home, *words) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    code = "import sys; from zest_fast.cli import app; app(sys.argv[1:], prog_name='zest-fast')"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupted(process, when) -> tuple[str, str]:
    """Sends SIGINT once `when` yields true; what the process then says."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=120)


def read_until(process, words) -> None:
    """Reads lines of stderr up to one with these words; the process must not end before."""
    seen = []
    while not seen or words not in seen[-1]:
        seen.append(process.stderr.readline())
        assert seen[-1], seen


TELLING = """
from zest_ends_user import *

def telling():
    def step(self, *arguments, **options):
        open("stepped", "a").write("x")
        return old(self, *arguments, **options)
    old, torch.optim.AdamW.step = torch.optim.AdamW.step, step
    return net()
"""


@pytest.mark.parametrize("data", ["slow", "spawned"])
def test_ctrl_c_saves_what_was_trained_so_far(home, data) -> None:
    (home / "telling.py").write_text(TELLING)
    process = start(
        home, "finetune", "telling:telling", f"zest_ends_user:{data}", "--layers", "b", "--out", "d.safetensors"
    )
    stepped = home / "stepped"
    output, errors = interrupted(process, lambda: stepped.exists() and stepped.stat().st_size >= 3)
    assert process.returncode == 130 and output == "", errors
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("interrupted: ") and last.endswith("are saved as d.interrupted.safetensors")
    assert not (home / "d.safetensors").exists()
    delta = read_delta(home / "d.interrupted.safetensors")
    assert delta.recipe["interrupted"] is True
    assert delta.recipe["steps"] == stepped.stat().st_size < delta.recipe["planned_steps"]
    assert set(delta.parameters) == {"b.weight", "b.bias", "head.weight", "head.bias"}


def test_a_second_ctrl_c_ends_at_once(home) -> None:
    """The first is heard in a forward pass that takes a minute."""
    process = start(home, "finetune", "zest_ends_user:Stuck", BATCHES, "--layers", "net.b", "--out", "d.safetensors")
    read_until(process, "running")  # a user's module prints to stderr
    process.send_signal(signal.SIGINT)
    read_until(process, "once more ends at once")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not list(home.glob("*.safetensors"))


def test_ctrl_c_after_the_training_leaves_the_whole_delta(run, home, monkeypatch) -> None:
    scored = []

    def score(job, wanted):
        scored.append(job)
        if len(scored) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("zest_fast.cli.jobs.finetuning._score", score)
    result = run("finetune", NET, BATCHES, "--layers", "b", "--out", "d.safetensors")
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        "interrupted: training was over, and the trained layers are saved as d.safetensors"
    )
    assert read_delta(home / "d.safetensors").recipe["steps"] == 5


@pytest.mark.parametrize("command", ["profile", "sweep"])
def test_ctrl_c_elsewhere_is_one_line(home, command) -> None:
    words = {"profile": ("--metrics", "snip"), "sweep": ("--out", "s.jsonl")}[command]
    process = start(home, command, "zest_ends_user:Stuck", BATCHES, *words)
    read_until(process, "running")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and output == ""
    lines = [line for line in errors.splitlines() if line != "running"]
    assert len(lines) == 1 and lines[0].startswith("interrupted"), errors
    if command == "sweep":
        assert "s.jsonl holds what was done" in lines[0]


def test_ctrl_c_in_rank_is_one_line(run, home, monkeypatch) -> None:
    make_profile({"a": 1.0, "head": 3.0}, heads=("head",)).save(home / "q.json")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("zest_fast.ranking.ranking.rank", interrupt)
    result = run("rank", "q.json", "--top", 1)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_processes_that_are_started_anew_find_the_users_module(run, home, monkeypatch) -> None:
    """They unpickle a model whose class is in the current folder, which is not on sys.path by itself."""
    monkeypatch.setattr("zest_fast.sweeping.local_workers._can_fork", lambda threads: False)
    assert str(home) not in sys.path and "" not in sys.path
    path = list(sys.path)
    words = ("--steps", 2, "--batch-size", 4, "--seeds", 1, "--workers", 2, "--json")
    result = run("sweep", NET, BATCHES, *words)
    assert result.exit_code == 0, result.stderr
    assert {row["layer"] for row in json.loads(result.stdout)["best"]} == {"a", "b"}
    assert sys.path == path


def test_debug_works_wherever_it_stands(run, home) -> None:
    for words in (("--debug", "profile", NET, "gone.csv"), ("profile", NET, "gone.csv", "--debug")):
        result = run(*words)
        assert isinstance(result.exception, ValueError) and result.exit_code == 1, words
    assert run("profile", NET, "gone.csv").exit_code == 2
    assert "--debug" in run("profile", NET, "--", "--debug").stderr  # a file of this name


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--layers", "0"), ["--layers 0: there are"]),
        (("--layers", "all", "--frozen", "int8"), ["--frozen 'int8' with --layers 'all'"]),
        (("--layers", "all", "--stream", "--device", "cpu"), ["--stream with --layers 'all'"]),
        (("--sequence-length", "8", "--dtype", "float8"), ["--dtype 'float8' is unknown"]),
        (("--sequence-length", "8", "--optimizer", "adams"), ["--optimizer 'adams' is unknown"]),
        (("--fit", "1KB", "--sequence-length", "8"), ["--"]),
    ],
)
def test_errors_name_options_and_no_arguments_of_python(run, home, words, parts) -> None:
    save_bert(home / "bert")
    result = run("plan", "bert", *words)
    refused(result, *parts)
    assert not re.search(r"\b(layers|frozen|stream|device|dtype|optimizer|checkpoint|max_memory)=", result.stderr)


def test_an_equals_sign_in_a_path_stays(run, home) -> None:
    refused(run("profile", NET, "runs/seed=3.csv"), "'runs/seed=3.csv'")
    refused(run("profile", NET, "seed=3.csv"), "'seed=3.csv'")


def test_doctor_names_what_others_provide(run, home) -> None:
    found = json.loads(run("doctor", "--json").stdout)["optional"]
    assert {"transformers", "peft", "accelerate", "bitsandbytes", "ray"} <= found.keys()


def test_the_file_of_a_trainer_is_a_model_to_plan(run, home) -> None:
    save_bert(home / "bert")
    (home / "axolotl.yml").write_text("base_model: bert\nsequence_len: 8\nmicro_batch_size: 2\n")
    one, other = (run("plan", *words, "--json") for words in (("axolotl.yml",), ("--file", "axolotl.yml")))
    assert one.exit_code == 0 and one.stdout == other.stdout and "by axolotl" in one.stdout
    (home / "axolotl.yml").write_text("base_model: bert\nsequence_len: [8]\n")
    refused(run("plan", "axolotl.yml"), "axolotl.yml', sequence_len: expected a whole number")
