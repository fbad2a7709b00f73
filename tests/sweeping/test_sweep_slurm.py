"""Sweeps through submitit: with its local executor, whose jobs are processes, and on a cluster that is played.

No Slurm has seen this. What a real one adds are `sbatch`, `sacct` and `scancel`, which submitit calls.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from small_models import assert_same, snapshot
from sweeping_models import RECIPE, Mortal, Residual, kill_after, make
from torch import nn

from zest_fast.sweeping import slurm_job, slurm_workers
from zest_fast.sweeping.records import RecordFile, read_records
from zest_fast.sweeping.slurm_job import Mailbox, Order, Report, Terms, read, work, write
from zest_fast.sweeping.slurm_workers import SlurmPool
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.trials import Trial
from zest_fast.sweeping.workers import distribute

needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
SHORT = replace(RECIPE, seeds=(0,), steps=1)

pytestmark = pytest.mark.usefixtures("one_thread")


def locally(folder: Path, **options):
    """Jobs that are processes of this machine."""
    folder.mkdir(exist_ok=True)
    return {"folder": folder, "cluster": "local", "timeout_min": 5, **options}


def trials_in(path):
    return [(record["layer"], record["seed"]) for record in read_records(path)[1] if record["record"] == "layer"]


@pytest.fixture
def submitted(monkeypatch):
    """What submitit's local executor has submitted."""
    from submitit.local.local import LocalExecutor

    jobs = []
    submit = LocalExecutor._submit_command
    monkeypatch.setattr(
        LocalExecutor, "_submit_command", lambda self, command: (jobs.append(submit(self, command)), jobs[-1])[1]
    )
    return jobs


@needs_submitit
def test_jobs_give_the_bits_of_one_process_though_one_is_killed(tmp_path, submitted) -> None:
    model, splits = make(Residual)
    recipe = replace(RECIPE, seeds=(1,))
    alone = sweep(Mortal(model, tmp_path, lives=0), splits, out=tmp_path / "alone.jsonl", recipe=recipe)
    mortal = Mortal(model, tmp_path, lives=1)
    before = snapshot(mortal)
    shared = sweep(
        mortal, splits, out=tmp_path / "jobs.jsonl", recipe=recipe, workers="slurm:1", slurm=locally(tmp_path / "nfs")
    )
    pandas.testing.assert_frame_equal(alone, shared, check_exact=True)
    assert len(list(tmp_path.glob("died-*"))) == 1 and len(submitted) == 2
    assert len(trials_in(tmp_path / "jobs.jsonl")) == len(set(trials_in(tmp_path / "jobs.jsonl"))) == 7
    assert not list((tmp_path / "nfs").iterdir())
    assert_same(before, snapshot(mortal))
    assert all(job._process.poll() is not None for job in submitted)


@needs_submitit
def test_ctrl_c_ends_the_jobs_and_the_sweep_goes_on_from_its_file(tmp_path, submitted, monkeypatch) -> None:
    append = RecordFile.append

    def interrupted(self, record):
        append(self, record)
        if record["record"] == "layer":
            raise KeyboardInterrupt

    model, splits = make(Residual)
    path = tmp_path / "records.jsonl"
    monkeypatch.setattr(RecordFile, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, splits, out=path, recipe=SHORT, workers="slurm:2", slurm=locally(tmp_path / "nfs"))
    assert all(job._process.poll() is not None for job in submitted) and len(submitted) == 2
    assert not list((tmp_path / "nfs").iterdir())
    monkeypatch.undo()
    kept = trials_in(path)
    sweep(model, splits, out=path, recipe=SHORT)
    assert len(kept) == 1 and trials_in(path)[0] == kept[0] and len(trials_in(path)) == 7


@needs_submitit
@pytest.mark.slow  # pytest -m slow tests/sweeping/test_sweep_slurm.py
def test_jobs_leave_when_their_sweep_is_killed(tmp_path) -> None:
    path, folder = tmp_path / "records.jsonl", tmp_path / "nfs"
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from test_sweep_slurm import locally\n"
        "from sweeping_models import RECIPE, Residual, make\n"
        "from zest_fast.sweeping import slurm_job\n"
        "from zest_fast.sweeping.sweep import sweep\n"
        "from pathlib import Path\n"
        "slurm_job._PATIENCE = 12.0\n"
        "model, splits = make(Residual)\n"
        f"options = locally(Path({str(folder)!r}))\n"
        f"sweep(model, splits, out={str(path)!r}, recipe=RECIPE, workers='slurm:1', slurm=options)\n"
    )
    kill_after(program, path, layers=1)
    kept = trials_in(path)
    deadline = time.monotonic() + 60
    while not list(folder.glob("zest-sweep-*/logs/*_result.pkl")):  # submitit writes it when a job is over
        assert time.monotonic() < deadline
        time.sleep(0.5)
    model, splits = make(Residual)
    sweep(model, splits, out=path, recipe=RECIPE)
    assert trials_in(path)[: len(kept)] == kept and len(trials_in(path)) == 14


class Picky(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.parent = inner, os.getpid()

    def forward(self, x):
        if os.getpid() != self.parent:
            raise OSError("not in this process")
        return self.inner(x)


@needs_submitit
def test_what_a_trial_raises_arrives_as_it_is_and_the_logs_are_kept(tmp_path, submitted) -> None:
    model, splits = make(Residual)
    with (
        pytest.raises(OSError, match="not in this process"),
        pytest.warns(UserWarning, match=r"logs and model of the jobs are kept in .*zest-sweep-"),
    ):
        sweep(
            Picky(model), splits, out=tmp_path / "records.jsonl", recipe=SHORT, workers="slurm:1",
            slurm=locally(tmp_path / "nfs"),
        )  # fmt: skip
    assert list((tmp_path / "nfs").glob("zest-sweep-*/logs/*.err"))
    assert submitted[0]._process.poll() is not None


@needs_submitit
def test_a_model_that_cannot_be_pickled_is_named_and_leaves_nothing(tmp_path, submitted) -> None:
    model, splits = make(Residual)
    model.blocks[0].register_forward_hook(lambda *_, file=sys.stderr: None)
    model.generator = (number for number in range(3))
    with pytest.raises(ValueError, match=r"cannot be sent to other processes .*workers=1"):
        sweep(
            model, splits, out=tmp_path / "records.jsonl", recipe=SHORT, workers="slurm:1",
            slurm=locally(tmp_path / "nfs"),
        )  # fmt: skip
    assert not submitted and not list((tmp_path / "nfs").iterdir())


# Arguments


@needs_submitit
@pytest.mark.parametrize(
    ("workers", "changes", "error", "message"),
    [
        ("slurm", {}, ValueError, "'slurm:8' asks for eight jobs"),
        ("slurm:", {}, ValueError, "'slurm:8' asks for eight jobs"),
        ("slurm:0", {}, ValueError, "'slurm:8' asks for eight jobs"),
        ("slurm:-2", {}, ValueError, "'slurm:8' asks for eight jobs"),
        ("slurm:two", {}, ValueError, "'slurm:8' asks for eight jobs"),
        (2, {}, ValueError, r"slurm is for workers='slurm:N'; workers is 2"),
        ("ray", {}, ValueError, r"slurm is for workers='slurm:N'; workers is 'ray'"),
        ("slurm:1", {"folder": None}, ValueError, "lacks the folder that all machines"),
        ("slurm:1", {"folder": "/nowhere/at/all"}, ValueError, r"'/nowhere/at/all' nothing .*No such file"),
        ("slurm:1", {"folder": __file__}, ValueError, r"nothing can be written \(Not a directory"),
        ("slurm:1", {"folder": "/proc"}, ValueError, r"'/proc' nothing can be written"),
        ("slurm:1", {"timeout_min": None}, ValueError, "lacks timeout_min"),
        ("slurm:1", {"timeout_min": "60"}, ValueError, '"timeout_min" expected type'),
        ("slurm:1", {"partion": "gpu"}, ValueError, "'partion'"),
        ("slurm:1", {"slurm_partion": "gpu"}, ValueError, "'partion'"),
        ("slurm:1", {"partition": "a", "slurm_partition": "b"}, ValueError, "twice"),
        ("slurm:1", {"nodes": 2}, ValueError, "nodes is 2; a worker is one process"),
        ("slurm:1", {"tasks_per_node": 4}, ValueError, "tasks_per_node is 4; a worker is one process"),
        ("slurm:1", {"cluster": "debug"}, ValueError, "cluster is 'debug'"),
        ("slurm:1", {"additional_parameters": 3}, ValueError, "slurm: "),
        ("slurm:1", {3: 4}, TypeError, "a mapping of submitit's options"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_done(workers, changes, error, message, tmp_path) -> None:
    model, splits = make(Residual)
    with pytest.raises(error, match=message):
        sweep(
            model, splits, out=tmp_path / "records.jsonl", recipe=SHORT, workers=workers,
            slurm=locally(tmp_path / "nfs") | changes,
        )  # fmt: skip
    assert not (tmp_path / "records.jsonl").exists()
    assert not list((tmp_path / "nfs").iterdir())


@needs_submitit
def test_a_machine_without_slurm_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs a machine that submits jobs to Slurm .*srun"):
        slurm_workers.slurm_jobs("slurm:2", {"folder": tmp_path, "timeout_min": 5})


@needs_submitit
def test_what_slurm_is_asked_for(tmp_path, monkeypatch) -> None:
    """The text that sbatch would get, by submitit's own hand: an array of three, options as they were named."""
    (tmp_path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = {
        "timeout_min": 90, "partition": "long", "account": "0123", "cpus_per_task": 4, "mem_gb": 6,
        "additional_parameters": {"reservation": "tuesday"},
    }  # fmt: skip
    jobs = slurm_workers.slurm_jobs("slurm:3", {"folder": tmp_path, **options})
    executor = slurm_workers._executor(jobs, tmp_path / "logs")
    asked = []

    def sbatch(self, command):
        asked.append(self._make_submission_file_text(command, "uid").splitlines())
        raise RuntimeError("sbatch: error: Batch job submission failed")

    monkeypatch.setattr(type(executor._executor), "_submit_command", sbatch)
    pool = SlurmPool(executor, tmp_path, jobs.count)
    for worker in range(3):
        pool.start(worker, Trial("a", worker))
    with pytest.raises(RuntimeError, match=r"the jobs cannot be submitted: sbatch: error"):
        pool.wait()
    flags = {line.removeprefix("#SBATCH --") for line in asked[0] if line.startswith("#SBATCH")}
    assert {
        "array=0-2%3", "time=90", "partition=long", "account=0123", "cpus-per-task=4", "mem=6GB", "no-requeue",
        "reservation=tuesday", "job-name=zest-fast-sweep",
    } <= flags  # fmt: skip
    assert jobs.threads == 4 and len(asked) == 1


def test_missing_submitit_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    model, splits = make(Residual)
    with pytest.raises(ImportError, match=r"pip install 'zest_fast\[slurm\]'"):
        sweep(model, splits, out=tmp_path / "records.jsonl", workers="slurm:2", slurm={"folder": tmp_path})
    assert not (tmp_path / "records.jsonl").exists()


# The job, in this process


@pytest.fixture
def signals_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def in_a_folder(folder: Path, **changes) -> Mailbox:
    """A mailbox of a sweep that no longer lives."""
    write(folder / "alive", 1)
    write(folder / "terms", replace(Terms.of_this_process(1), **changes))
    mailbox = Mailbox(folder / "mailbox-0")
    mailbox.make()
    return mailbox


@needs_submitit
@pytest.mark.usefixtures("signals_as_they_were")
def test_a_job_whose_caller_is_gone_leaves(tmp_path) -> None:
    mailbox = in_a_folder(tmp_path, patience=0.3)
    work(tmp_path, "mailbox-0")
    assert read(mailbox.report) == Report(0)


@needs_submitit
@pytest.mark.usefixtures("signals_as_they_were")
def test_a_job_goes_when_it_is_sent_home(tmp_path) -> None:
    mailbox = in_a_folder(tmp_path)
    write(mailbox.order, Order(1))
    work(tmp_path, "mailbox-0")
    assert read(mailbox.report) is None


@needs_submitit
@pytest.mark.usefixtures("signals_as_they_were")
def test_another_version_in_the_job_is_an_error_not_another_score(tmp_path) -> None:
    mailbox = in_a_folder(tmp_path, versions="zest_fast 0.0.1 with torch 1.0", patience=0.3)
    write(mailbox.order, Order(1, Trial("a", 0)))
    work(tmp_path, "mailbox-0")
    report = read(mailbox.report)
    assert report.number == 1 and "scores of the two are not the same" in str(report.outcome)


@needs_submitit
@pytest.mark.usefixtures("signals_as_they_were")
def test_a_job_that_slurm_starts_again_does_its_order_again(tmp_path, monkeypatch) -> None:
    mailbox = in_a_folder(tmp_path, patience=0.3)
    write(mailbox.order, Order(4, Trial("a", 0)))
    write(mailbox.report, Report(3, {"loss": 3.0}))
    monkeypatch.setattr(slurm_job, "_unpacked", lambda *_: SimpleNamespace(run=lambda trial: {"loss": 4.0}))
    work(tmp_path, "mailbox-0")
    assert read(mailbox.report) == Report(4, {"loss": 4.0})


@needs_submitit
@pytest.mark.usefixtures("signals_as_they_were")
def test_a_job_whose_time_is_nearly_up_finishes_its_trial_and_takes_no_other(tmp_path, monkeypatch) -> None:
    """Slurm says so by a signal, at which submitit would raise an error in the middle of the trial."""
    mailbox = in_a_folder(tmp_path)
    write(mailbox.order, Order(1, Trial("a", 0)))

    def run(trial):
        os.kill(os.getpid(), signal.SIGUSR2)
        return {"loss": 1.0}

    monkeypatch.setattr(slurm_job, "_unpacked", lambda *_: SimpleNamespace(run=run))
    work(tmp_path, "mailbox-0")
    assert read(mailbox.report) == Report(1, {"loss": 1.0}, leaving=True)


@needs_submitit
@pytest.mark.usefixtures("signals_as_they_were")
def test_a_job_has_the_callers_types_and_modules_and_tells_its_warnings(tmp_path, monkeypatch) -> None:
    (tmp_path / "modules").mkdir()
    mailbox = in_a_folder(tmp_path, path=(str(tmp_path / "modules"),), dtype=torch.float64, patience=0.3)
    write(mailbox.order, Order(1, Trial("a", 0)))
    (tmp_path / "modules" / "only_the_caller_has_it.py").write_text(
        "import torch, warnings, pathlib\n"
        "class Trials:\n"
        "    folder = pathlib.Path('/nowhere')\n"
        "    def run(self, trial):\n"
        "        warnings.warn('not reused')\n"
        "        return {'loss': torch.ones(1).dtype, 'folder': self.folder.is_dir()}\n"
    )
    (tmp_path / "trials").write_bytes(b"conly_the_caller_has_it\nTrials\n)R.")
    monkeypatch.setattr(sys, "path", list(sys.path))
    precision = torch.get_float32_matmul_precision()
    try:
        work(tmp_path, "mailbox-0")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)
    assert read(mailbox.report) == Report(1, {"loss": torch.float64, "folder": True}, ("not reused",))


# The pool, on a cluster that is played


class Cluster:
    """An executor of submitit whose jobs do what a script says: a generator for each, which yields once a second."""

    def __init__(self, folder: Path, script) -> None:
        self.folder, self.script, self.arrays, self.jobs, self.now = folder, script, [], [], 0.0

    def map_array(self, _, folders, names):
        self.arrays.append(len(names))
        if isinstance(self.script, Exception):
            raise self.script
        new = [Played(self, len(self.jobs) + place, name) for place, name in enumerate(names)]
        self.jobs += new
        return new

    def monotonic(self):
        return self.now

    def sleep(self, _):
        self.now += 1.0
        assert self.now < 500, "the sweep hangs"
        for job in self.jobs:
            next(job.life, None)


class Played:
    def __init__(self, cluster, number, name):
        self.job_id, self.state, self.over, self.cancelled = f"7_{number}", "PENDING", False, False
        self.mailbox = Mailbox(cluster.folder / name)
        self.paths = SimpleNamespace(stderr=cluster.folder / f"{number}.err")
        self.trials = []
        self.life = cluster.script(self, number)

    def done(self, force_check=False):
        return self.over

    def cancel(self, check=True):
        self.cancelled = self.over = True

    def end(self, state, log=""):
        self.state, self.over = state, state != "PREEMPTED"  # of which submitit says that it goes on
        self.paths.stderr.write_text(log)

    def begin(self):
        self.state = "RUNNING"
        write(self.mailbox.report, Report(0))

    def order(self):
        """The next one, if there is any."""
        order = read(self.mailbox.order)
        if order.trial is None or len(self.trials) == order.number:
            return None
        self.trials.append(order.trial)
        return order

    def does(self, most=None, leaving=False):
        """So many trials, or those that come until it is sent home; leaving: says with the last one that it leaves."""
        self.begin()
        while not self.over and (most is None or len(self.trials) < most):
            yield
            order = self.order()
            if order is not None:
                last = leaving and len(self.trials) == most
                write(self.mailbox.report, Report(order.number, {"loss": 1.0}, leaving=last))
            elif read(self.mailbox.order).number > len(self.trials):
                break

    def works(self):
        yield from self.does()
        self.end("COMPLETED")


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Distributes trials on a cluster with this script: the cluster, and what was saved."""

    def run(script, size, trials):
        cluster = Cluster(tmp_path, script)
        monkeypatch.setattr(slurm_workers, "time", cluster)
        pool = SlurmPool(cluster, tmp_path, size)
        saved = []
        try:
            distribute(trials, pool, lambda trial, _: saved.append(trial))
        except RuntimeError as error:
            return cluster, saved, error
        finally:
            pool.close()
        return cluster, saved, None

    return run


TRIALS = [Trial(layer, seed) for layer in "abc" for seed in (0, 1)]


@needs_submitit
def test_one_array_for_all_and_each_job_stays_with_its_layer(play) -> None:
    cluster, saved, error = play(lambda job, _: job.works(), 3, TRIALS)
    assert error is None and sorted(saved) == TRIALS and cluster.arrays == [3]
    assert [job.trials for job in cluster.jobs] == [[Trial(layer, seed) for seed in (0, 1)] for layer in "abc"]
    assert not any(job.cancelled for job in cluster.jobs)  # they went home


@needs_submitit
def test_nobody_waits_for_a_job_that_stays_in_the_queue(play) -> None:
    cluster, saved, error = play(lambda job, number: job.works() if number == 0 else iter(()), 3, TRIALS)
    assert error is None and sorted(saved) == TRIALS and cluster.arrays == [3]
    assert [job.cancelled for job in cluster.jobs] == [False, True, True]
    assert cluster.jobs[0].trials == TRIALS  # layer by layer, also those of workers that have no job


@needs_submitit
@pytest.mark.parametrize("state", ["NODE_FAIL", "TIMEOUT", "PREEMPTED", "CANCELLED by 0", "OUT_OF_MEMORY"])
def test_a_job_that_is_lost_costs_its_trial_only(state, play) -> None:
    def script(job, number):
        if number != 1:
            yield from job.works()
            return
        job.begin()
        while job.order() is None:
            yield
        job.end(state)

    cluster, saved, error = play(script, 2, TRIALS)
    assert error is None and sorted(saved) == TRIALS and cluster.arrays[0] == 2
    done = [trial for job in cluster.jobs for trial in job.trials]
    assert len(done) == 7 and cluster.jobs[1].cancelled  # whatever Slurm thinks, it does not come back


@needs_submitit
def test_what_a_job_wrote_before_its_end_counts(play) -> None:
    def script(job, _):
        yield from job.does(1, leaving=True)
        job.end("COMPLETED")

    cluster, saved, error = play(script, 1, TRIALS)
    assert error is None and saved == TRIALS and cluster.arrays == [1] * 6
    assert all(read(job.mailbox.order).number == 1 for job in cluster.jobs)  # who leaves gets no other order


@needs_submitit
def test_a_trial_that_ends_every_job_is_named_with_the_last_words(play) -> None:
    def script(job, _):
        job.begin()
        while job.order() is None:
            yield
        job.end("OUT_OF_MEMORY", "slurmstepd: error: Detected 1 oom_kill event\n\n")

    cluster, saved, error = play(script, 1, TRIALS[:1])
    assert not saved and cluster.arrays == [1, 1, 1]
    assert "3 workers died while they trained 'a' with seed 0" in str(error)
    assert "job 7_2 is over (state OUT_OF_MEMORY, last words: slurmstepd: error: Detected 1 oom_kill" in str(error)


@needs_submitit
@pytest.mark.parametrize(("size", "arrays"), [(1, [1, 1, 1]), (5, [5])])
def test_jobs_that_never_begin_are_not_submitted_for_ever(size, arrays, play) -> None:
    def script(job, _):
        yield
        job.end("FAILED", "ModuleNotFoundError: No module named 'zest_fast'\n")

    cluster, saved, error = play(script, size, TRIALS)
    assert not saved and cluster.arrays == arrays
    assert "jobs ended before they had begun" in str(error) and "No module named 'zest_fast'" in str(error)


@needs_submitit
def test_a_bad_machine_does_not_end_a_sweep_that_others_do(play) -> None:
    def script(job, number):
        if number == 0:
            yield from job.works()
        job.end("FAILED")

    cluster, saved, error = play(script, 2, TRIALS * 3)
    assert error is None and len(saved) == 18 and len(cluster.jobs[0].trials) == 18
    assert len(cluster.jobs) > 4  # it was tried again


@needs_submitit
def test_jobs_that_wait_for_work_and_are_lost_do_not_count_as_failures(play) -> None:
    """Three begin when the first one has taken all trials, and are gone when it is lost with the last of them."""

    def script(job, number):
        if number >= 4:
            yield from job.works()
        if number == 0:
            yield from job.does(3)
            while job.order() is None:
                yield
            first.append(job)
            for _ in range(20):
                yield
        else:
            while not first:
                yield
            job.begin()
            for _ in range(5):
                yield
        job.end("NODE_FAIL")

    first = []
    cluster, saved, error = play(script, 4, TRIALS[:4])
    assert error is None and sorted(saved) == TRIALS[:4] and cluster.arrays == [4, 1]


@needs_submitit
def test_a_job_that_cannot_be_replaced_is_said_and_the_others_go_on(play) -> None:
    def script(job, number):
        if number == 0:
            yield from job.works()
            return
        job.begin()
        while job.order() is None:
            yield
        cluster.append(job)
        job.end("NODE_FAIL")
        submit, Cluster.map_array = Cluster.map_array, refuse
        kept.append(submit)

    def refuse(self, *_):
        raise RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit")

    cluster, kept = [], []
    try:
        with pytest.warns(UserWarning, match=r"cannot be replaced .*QOSMaxSubmit"):
            _, saved, error = play(script, 2, TRIALS)
    finally:
        Cluster.map_array = kept[0]
    assert error is None and sorted(saved) == TRIALS


@needs_submitit
def test_a_shared_folder_that_is_full_is_named(play, monkeypatch) -> None:
    def full(path, value):
        if path.name == "order" and value.number:
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(slurm_workers, "write", full)
    cluster, saved, error = play(lambda job, _: job.works(), 1, TRIALS)
    assert not saved and "cannot be written (No space left on device)" in str(error)
    assert cluster.jobs[0].cancelled
