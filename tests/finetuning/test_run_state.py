"""A run that was interrupted goes on to the bit as if it had not been."""

import copy
import random
import zipfile

import numpy as np
import pytest
import torch
from small_models import Mlp, assert_same, snapshot
from torch import nn

from zest_fast.finetuning.selective_backward import SelectiveBackward


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Job:
    """A model with dropout and a batch norm that trains, its optimizer, and data drawn as it goes."""

    def __init__(self, layers=("0",), scheduler="multi", head=("1", "3")):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.tuned = SelectiveBackward(self.model, layers, head=head)
        self.optimizer = torch.optim.AdamW(self.tuned.parameters(), lr=0.01)
        if scheduler == "multi":
            self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [1, 3], gamma=0.5)
        else:
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def steps(self, count):
        for _ in range(count):
            x = torch.randn(5, 6) + random.random() + np.random.rand()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def save(self, path):
        return self.tuned.save_run(path, self.optimizer, self.scheduler, progress={"step": 2})

    def resume(self, path):
        return self.tuned.resume(path, self.optimizer, self.scheduler)


@pytest.mark.parametrize("scheduler", ["multi", "lambda"])
def test_resumed_equals_uninterrupted(scheduler, tmp_path):
    job = Job(scheduler=scheduler)
    job.steps(2)
    path = job.save(tmp_path / "run.pt")
    job.steps(3)
    again = Job(scheduler=scheduler)
    again.steps(1)  # whatever happened before
    assert again.resume(path) == {"step": 2}
    again.steps(3)
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert job.optimizer.param_groups[0]["lr"] == again.optimizer.param_groups[0]["lr"]
    again.tuned.verify()


@pytest.mark.parametrize(
    ("make", "damage", "message"),
    [
        (Job, lambda data: data[: len(data) // 2], "is no run that can be resumed .*torn"),
        (Job, lambda data: b"", "is no run that can be resumed"),
        (lambda: Job(layers=[]), None, r"saved with layers=\['0'\], this model is wrapped with \[\]"),
        (lambda: Job(head=["3"]), None, r"saved with head="),
    ],
)
def test_a_run_that_does_not_fit_changes_nothing(make, damage, message, tmp_path):
    job = Job()
    job.steps(2)
    path = job.save(tmp_path / "run.pt")
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    other = make()
    other.steps(1)
    before, states = snapshot(other.model), copy.deepcopy(other.optimizer.state_dict())
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        other.resume(path)
    assert_same(before, snapshot(other.model))
    assert str(states) == str(other.optimizer.state_dict()) and torch.equal(generator, torch.get_rng_state())


def test_an_archive_that_unfolds_is_refused_before_it_does(tmp_path):
    """64 MiB of zeros in 64 KiB: torch.load would take the memory before anything is looked at."""
    torch.save({"zeros": torch.zeros(2**26, dtype=torch.uint8)}, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for one in stored.infolist():
            bomb.writestr(one.filename, stored.read(one), zipfile.ZIP_DEFLATED)
    torch.load(tmp_path / "bomb.pt", weights_only=True)  # it does unfold such an archive
    with pytest.raises(
        ValueError, match=r"bomb\.pt' is no run .*bytes unfold to 67,\d+,\d+, and torch.save compresses"
    ):
        Job().resume(tmp_path / "bomb.pt")


def test_objects_that_do_not_fit_are_put_back(tmp_path):
    job = Job()
    job.steps(2)
    path = job.save(tmp_path / "run.pt")
    other = Job()
    with pytest.raises(ValueError, match=r"saved with \['optimizer', 'scheduler'\], and \['optimizer'\] are there"):
        other.tuned.resume(path, other.optimizer)
    fewer = torch.optim.AdamW([{"params": [p]} for p in other.tuned.parameters()], lr=0.5)
    before = copy.deepcopy(other.scheduler.state_dict())
    with pytest.raises(ValueError, match=r"run\.pt' does not fit: the state of optimizer does not fit"):
        other.tuned.resume(path, fewer, other.scheduler)
    assert fewer.param_groups[0]["lr"] == 0.5 and other.scheduler.state_dict() == before


def test_a_run_holds_no_code(tmp_path):
    job = Job()

    class Sampler:
        def state_dict(self):
            return {"draws": [1, {"next": len}]}

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(TypeError, match=r"states\['sampler'\]\['draws'\]\[1\]\['next'\] is a builtin_function"):
        job.tuned.save_run(tmp_path / "run.pt", job.optimizer, sampler=Sampler())
    assert not list(tmp_path.iterdir())
    torch.save(job.model, tmp_path / "model.pt")  # a pickle of code
    with pytest.raises(ValueError, match="is no run that can be resumed"):
        job.resume(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError):
        job.resume(tmp_path / "missing.pt")


def test_another_kind_of_optimizer_is_refused(tmp_path):
    model = Mlp()
    tuned = SelectiveBackward(model, ["b"])
    saved, other = torch.optim.AdamW(tuned.parameters()), torch.optim.SGD(tuned.parameters(), lr=0.5, momentum=0.9)
    tuned.save_run(tmp_path / "run", saved)
    with pytest.raises(ValueError, match="the optimizer was a AdamW, and here is a SGD"):
        tuned.resume(tmp_path / "run", other)
    assert other.param_groups[0]["lr"] == 0.5
