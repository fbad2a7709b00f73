"""Models that write, count and draw in forward: a profile leaves them as they were, and its runs see one state."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from oracle import measure
from torch import Tensor, nn
from torch.nn import functional as F
from untouched import changes, state_of

import zest_fast
from zest_fast.profiling.borrowing import kept_values

torch.manual_seed(0)
TOKENS, X, Y = torch.randint(9, (5, 3)), torch.randn(5, 4), torch.randint(3, (5,))


@pytest.fixture(params=["copied", "watched"])
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small models are copied, large ones watched: each case has to hold either way."""
    if request.param == "watched":
        monkeypatch.setattr(kept_values, "COPIED_BYTES", -1)
    return request.param


class Writer(nn.Module):
    """An encoder, a copy of it that follows it, and a head; ``write`` is what happens in forward."""

    def __init__(self, write: Callable[[Writer], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.key.requires_grad_(False)
        with torch.no_grad():
            self.key.weight[0, 0] = -0.0
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        with torch.no_grad():
            target = self.key(x)
        q = self.query(x)
        return self.head(torch.tanh(q)) + F.mse_loss(q, target)


def pairs(m: Writer) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    return zip(m.query.parameters(), m.key.parameters(), strict=True)


def moco(m: Writer) -> None:
    for q, k in pairs(m):
        k.data = k.data * 0.9 + q.data * 0.1


def byol(m: Writer) -> None:
    for q, k in pairs(m):
        k.data.mul_(0.9).add_(q.data, alpha=0.1)


@torch.no_grad()
def lerp(m: Writer) -> None:
    for q, k in pairs(m):
        k.lerp_(q, 0.1)


def foreach(m: Writer) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(m.key.parameters()), list(m.query.parameters()), 0.1)


def out(m: Writer) -> None:
    with torch.no_grad():
        torch.add(m.query.weight, 1.0, out=m.key.weight)


def view(m: Writer) -> None:
    m.key.weight.detach().view(-1)[3:5] = 7.0


def clip(m: Writer) -> None:
    m.query.weight.data.clamp_(-0.1, 0.1)


def state_dict(m: Writer) -> None:
    m.key.load_state_dict(m.query.state_dict())


def replace(m: Writer) -> None:
    m.key.weight = nn.Parameter(m.query.weight.detach().clone(), requires_grad=False)


WRITES = [moco, byol, lerp, foreach, out, view, clip, state_dict, replace]


@pytest.mark.parametrize("metrics", [None, ["act_std"], "all"], ids=["one pass", "forward", "all"])
@pytest.mark.parametrize("write", WRITES)
def test_parameters_that_a_forward_writes_are_as_before(
    write: Callable[[Writer], None], metrics: list[str] | str | None, keeping: str
) -> None:
    model = Writer(write)
    before = state_of(model)
    zest_fast.profile(model, (X, Y), metrics=metrics)
    assert changes(before, state_of(model)) == []
    with pytest.raises(ZeroDivisionError):
        zest_fast.profile(model, (X, Y), loss_fn=lambda o, y: 1 / 0)
    assert changes(before, state_of(model)) == []


@pytest.mark.parametrize("write", WRITES)
def test_metrics_are_those_of_the_weights_that_the_forward_wrote(write: Callable[[Writer], None]) -> None:
    model = Writer(write)
    spec = copy.deepcopy(model).double()
    expected = measure(spec, lambda: F.cross_entropy(spec(X.double()), Y), ["query", "head"]).values
    found = zest_fast.profile(model, (X, Y), layers=["query", "head"])
    for layer, row in expected.items():
        assert found[layer] == pytest.approx(row, rel=1e-4, abs=1e-7)


def test_max_norm_of_an_embedding_is_undone(keeping: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 3))
    before = state_of(model)
    spec = copy.deepcopy(model).double()
    found = zest_fast.profile(model, (TOKENS, Y), layers=["0", "2"])
    assert changes(before, state_of(model)) == []
    expected = measure(spec, lambda: F.cross_entropy(spec(TOKENS), Y), ["0", "2"]).values
    assert found["2"] == pytest.approx(expected["2"], rel=1e-4, abs=1e-7)
    assert found["0"]["weight_std"] == pytest.approx(expected["0"]["weight_std"], rel=1e-5)


def test_only_what_is_written_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_values, "COPIED_BYTES", -1)
    copied: list[int] = []
    joined = kept_values._joined
    monkeypatch.setattr(kept_values, "_joined", lambda group: copied.append(id(group[0].tensor)) or joined(group))
    model = Writer(view)
    zest_fast.profile(model, (X, Y))
    assert set(copied) == {id(model.key.weight)}


def test_a_parameter_that_is_not_written_gets_no_new_version(keeping: str) -> None:
    """A graph that the user holds stays usable."""
    model = Writer(lambda m: None)
    held = model(X).sum()
    zest_fast.profile(model, (X, Y))
    held.backward()


def test_a_write_in_a_backward_hook_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip_in_backward(*_: object) -> None:
        with torch.no_grad():
            model.key.weight.clamp_(-0.1, 0.1)

    model = Writer(lambda m: None)
    model.head.register_full_backward_hook(clip_in_backward)
    before = state_of(model)
    zest_fast.profile(model, (X, Y))  # small: there is a copy
    assert changes(before, state_of(model)) == []
    monkeypatch.setattr(kept_values, "COPIED_BYTES", -1)
    with pytest.raises(RuntimeError, match=r"written in place outside of the forward.*key\.weight"):
        zest_fast.profile(model, (X, Y))


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.data.clamp_(-0.2, 0.2)
        return self.b(y)


@pytest.mark.parametrize("metrics", [None, ["fisher", "plain"], ["fisher"]])
def test_fisher_of_an_output_that_was_overwritten_is_nan_with_its_reason(
    metrics: list[str] | None, keeping: str
) -> None:
    """Or right: that of Y as the layer returned it, which is what act sees, too."""
    torch.manual_seed(0)
    model = Overwriting()
    spec = copy.deepcopy(model).double()
    expected = measure(spec, lambda: F.cross_entropy(spec(X.double()), Y)).values
    found = zest_fast.profile(model, (X, Y), metrics=metrics)
    for layer, row in expected.items():
        for metric in found.metrics:
            if (layer, metric) == ("a", "fisher") and np.isnan(found[layer][metric]):
                assert "overwritten after the layer had returned it" in found.info[layer]["note"]
            else:
                assert found[layer][metric] == pytest.approx(row[metric], rel=1e-4, abs=1e-7)
    assert not found.info["b"]["note"]


# --- runs of one pass -------------------------------------------------------------------------------------------------


class Rerun(nn.Module):
    """``a`` is used outside of its module as well, which only counting can tell: the pass has to be run twice."""

    def __init__(self, factor: Callable[[nn.Module], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.factor = factor
        self.steps, self.runs = 0, 0
        self.history: list[Tensor] = []
        self.counts = {"forward": 0}
        self.running = torch.ones(())
        self.cache = None
        self.torch_generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(3)
        self.generators = [random.Random(3)]

    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(1)
        return self.b(F.linear(self.a(x), self.a.weight)) * self.factor(self)


RUNS: list[int] = []
MODULE_GENERATOR = np.random.default_rng(5)


def counter(m: Rerun) -> float:
    m.steps += 1
    return 1.0 + m.steps


def dictionary(m: Rerun) -> float:
    m.counts["forward"] += 1
    return 1.0 + m.counts["forward"]


def auxiliary(m: Rerun) -> float:
    m.history.append(torch.ones(()))
    return float(sum(m.history))


def reassigned(m: Rerun) -> float:
    m.running = m.running * 0.5
    return float(m.running)


def in_place(m: Rerun) -> float:
    m.running.mul_(0.5)
    return float(m.running)


def cached(m: Rerun) -> float:
    if m.cache is None:
        m.cache = torch.full((), 3.0)
        return 1.0
    return 3.0


def created(m: Rerun) -> float:
    if not hasattr(m, "offset"):
        m.offset = 2.0
        return 1.0
    return m.offset


STATES = {
    "counter": counter,
    "entry of a dictionary": dictionary,
    "list of auxiliary losses": auxiliary,
    "tensor that is replaced": reassigned,
    "tensor written in place": in_place,
    "cache": cached,
    "attribute made in forward": created,
    "numpy": lambda m: 1.0 + np.random.rand(),
    "python": lambda m: 1.0 + random.random(),
    "own generator of torch": lambda m: 1.0 + float(torch.rand((), generator=m.torch_generator)),
    "own generator of numpy": lambda m: 1.0 + m.numpy_generator.random(),
    "own generator of python, in a list": lambda m: 1.0 + m.generators[0].random(),
    "generator of a file": lambda m: 1.0 + MODULE_GENERATOR.random(),
}


def drawn(model: Rerun) -> list[object]:
    """Everything that a forward may draw from or count in."""
    return [
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        model.torch_generator.get_state().tolist(),
        model.numpy_generator.bit_generator.state,
        model.generators[0].getstate(),
        model.steps,
        dict(model.counts),
        len(model.history),
        float(model.running),
        model.cache,
        hasattr(model, "offset"),
    ]


@pytest.mark.parametrize("case", STATES)
def test_every_run_of_a_pass_sees_one_state_which_is_put_back(case: str, keeping: str) -> None:
    model = Rerun(STATES[case])
    generator = copy.deepcopy(MODULE_GENERATOR) if case == "generator of a file" else None
    closure = (lambda: F.cross_entropy(model(X), Y)) if generator is None else generator_closure(model)
    before = drawn(model)
    RUNS.clear()
    found = zest_fast.profile(model, closure=closure)
    assert len(RUNS) > 1, "the pass was not run again"
    assert drawn(model) == before
    loss = closure()  # draws what the profile drew
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    model.zero_grad()
    loss.backward()
    assert found["a"]["grad_norm"] == pytest.approx(float(model.a.weight.grad.norm()), rel=1e-4)


def generator_closure(model: Rerun) -> Callable[[], Tensor]:
    """The generator is a global that this closure's code names."""

    def closure() -> Tensor:
        model.factor = lambda m: 1.0
        return F.cross_entropy(model(X) * (1.0 + MODULE_GENERATOR.random()), Y)

    return closure


def test_state_that_cannot_be_rewound_is_an_error_that_says_so() -> None:
    calls = iter([1.0, 1.01, 1.02, 1.03])
    model = Rerun(lambda m: next(calls))
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"the loss was .* in the first run .* and .* in the next.*data iterator"):
        zest_fast.profile(model, (X, Y))
    assert changes(before, state_of(model)) == []


def test_one_run_may_use_a_closure_that_runs_once() -> None:
    batches = iter([X])
    model = nn.Linear(4, 3)
    assert zest_fast.profile(model, closure=lambda: F.cross_entropy(model(next(batches)), Y)).loss > 0


def test_state_that_cannot_be_rewound_is_noted_on_request() -> None:
    """The two runs of a finite difference's pass have to agree as well."""
    calls = iter(range(100))
    model = Rerun(lambda m: 1.0 + (0.5 * next(calls) if len(RUNS) > 2 else 0.0))
    RUNS.clear()
    found = zest_fast.profile(model, (X, Y), metrics="all")
    assert "agree_dot" in found.metrics and "the loss was" in found.info["a"]["note"]


# --- several processes ------------------------------------------------------------------------------------------------


def test_one_process_in_ddp_is_profiled_as_the_plain_model() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = nn.Sequential(nn.Linear(4, 3))
        found = zest_fast.profile(nn.parallel.DistributedDataParallel(plain), (X, Y))
        assert not found.info["0"]["note"]
        assert (found.values == zest_fast.profile(plain, (X, Y)).values).all()
    finally:
        dist.destroy_process_group()


def test_an_optimizer_in_backward_rests_while_a_loss_runs_a_backward_pass_by_itself() -> None:
    model = nn.Linear(4, 3)
    steps = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps.append(p))

    def closure() -> Tensor:
        model(X).sum().backward()
        return F.cross_entropy(model(X), Y)

    zest_fast.profile(model, closure=closure)
    assert not steps
    model(X).sum().backward()
    assert len(steps) == 2
