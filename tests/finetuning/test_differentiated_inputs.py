"""Losses that differentiate inputs or weights, functional transforms, threads: as plain freezing, in float64."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from small_models import llama
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import zest_fast
from zest_fast.finetuning.selective_backward import SelectiveBackward

PACKAGE = str(Path(zest_fast.__file__).parent)  # and no more: a checkout may have its name, and a .venv inside
TOLERANCE = 1e-12  # relative, of float64; lean kernels add in another order


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """Frozen layers below and above the one that trains, a skip past all of them, and what lean saving knows."""

    def __init__(self, width=6, inputs=2, outputs=1):
        super().__init__()
        self.below, self.low = nn.Linear(inputs, width), nn.Tanh()
        self.norm = nn.BatchNorm1d(width)
        self.chosen = nn.Linear(width, width)
        self.act, self.above = nn.SiLU(), nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.1), nn.Tanh())
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        y = self.norm(self.low(self.below(x)))
        return self.head(self.above(self.act(self.chosen(y))) + y) + x.square().sum(-1, keepdim=True)


def pair(make=Net, layers=("chosen",), head="head", lean=True):
    """A wrapped model, its SelectiveBackward, and a copy that is frozen by hand with the same norms in eval mode."""
    model = make().double()
    plain = copy.deepcopy(model)
    tuned = SelectiveBackward(model, layers, head=head, lean=lean)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in tuned.trainable_names)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return model, tuned, plain


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape and (one - other).abs().max() <= TOLERANCE * other.abs().max().clamp(1e-30)


def physics(model):
    """Poisson's equation: second derivatives of the output with respect to the input."""
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(10, 2).requires_grad_()
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    d2u = sum(torch.autograd.grad(du[:, place].sum(), x, create_graph=True)[0][:, place] for place in range(2))
    return (d2u - x.detach().sum(-1)).square().mean()


def forces(model):
    """Positions that come with a graph: forces are the gradient of the energy."""
    positions = torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2).requires_grad_()
    energy = model((positions - positions.mean(0)) * 2).sum()
    return torch.autograd.grad(energy, positions, create_graph=True)[0].square().sum() + energy


def penalty(model):
    """WGAN-GP: the norm of the critic's gradient between real and generated samples."""
    real, made = torch.randn(2, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    between = (0.3 * real + 0.7 * made).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    return model(made).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()


def contraction(model):
    """Two derivatives, by a product with a vector: the gradient of a gradient of a gradient."""
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(10, 2).requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad((slope * x.detach()).sum(), x, create_graph=True)
    return curve.square().sum()


def inner_steps(model):
    """MAML: two steps on the trained layers by `functional_call`, then the loss of what came of them."""
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(10, 2)
    fast = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        loss = functional_call(model, fast, (x,)).square().mean()
        steps = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: p - 0.1 * step for (name, p), step in zip(fast.items(), steps, strict=True)}
    return (functional_call(model, fast, (x,)) - x.sum(-1, keepdim=True)).square().mean()


def first_order_inner_steps(model):
    """FOMAML and a teacher: fast weights and averaged weights are plain tensors, leaves of their own."""
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(10, 2)
    fast = {name: p.detach().clone() for name, p in model.named_parameters()}
    teacher = functional_call(model, {name: 0.9 * p for name, p in fast.items()}, (x,))
    own = {name: fast[name].requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    loss = (functional_call(model, fast, (x,)) - teacher).square().mean()
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = own[name].grad
    return loss.detach().requires_grad_()


LOSSES = (physics, forces, penalty, contraction, inner_steps, first_order_inner_steps)


@pytest.mark.parametrize("loss_of", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
def test_losses_that_differentiate(loss_of, lean, recwarn):
    model, tuned, plain = pair(lean=lean)
    for _ in range(2):
        results = []
        for one in (model, plain):
            one.zero_grad()
            loss = loss_of(one)
            loss.backward()
            results.append([loss.detach(), *(p.grad for _, p in sorted(one.named_parameters()))])
        assert_same(*results)
    assert tuned.cut == "chosen"
    assert not [warning for warning in recwarn if str(warning.filename).startswith(PACKAGE)]
    model(torch.zeros(3, 2, dtype=torch.float64))
    assert tuned.summary().skipped_parameters in (0, 6 * 2 + 6 + 12)


@pytest.mark.parametrize("model_of", [lambda: llama(num_hidden_layers=2, attn_implementation="eager")])
def test_gradient_of_embeddings_of_a_language_model(model_of):
    """The norm of the gradient with respect to the embeddings, as adversarial training takes it."""
    layer, ids = "model.layers.1.mlp.up_proj", torch.arange(12).reshape(2, 6)
    plain = model_of().double()
    for lean in (False, True):
        model = copy.deepcopy(plain)
        tuned = SelectiveBackward(model, [layer], lean=lean)
        results = []
        for one in (model, plain):
            for name, parameter in one.named_parameters():
                parameter.requires_grad_(name in tuned.trainable_names)
            embeddings = one.model.embed_tokens(ids).detach().requires_grad_()
            loss = one(inputs_embeds=embeddings, labels=ids).loss
            if lean and one is model:
                with pytest.raises(RuntimeError, match=r"loss over chunks.*cannot be differentiated twice.*lean=False"):
                    torch.autograd.grad(loss, embeddings, create_graph=True)
                return
            (slope,) = torch.autograd.grad(loss, embeddings, create_graph=True)
            (loss + slope.square().sum()).backward()
            results.append([slope.detach(), one.get_submodule(layer).weight.grad])
        assert_same(*results)


class Hidden(nn.Module):
    """A frozen module reads positions that require a gradient from an attribute: no argument shows them."""

    def __init__(self):
        super().__init__()
        self.frozen, self.chosen, self.head = Reads(), nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()  # as force fields do it
        self.frozen.positions = x
        energy = self.head(self.chosen(x).tanh() * self.frozen(torch.ones(len(x), 4).to(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, scale):
        return scale * self.linear(self.positions).sin()


def test_positions_that_a_frozen_module_reads_from_an_attribute():
    model, _, plain = pair(Hidden)
    for _ in range(2):
        results = []
        for one in (model, plain):
            one.zero_grad()
            forces = one(torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2))
            forces.square().sum().backward()
            results.append([forces.detach(), one.chosen.weight.grad, one.head.weight.grad])
        assert_same(*results)


def test_a_soft_prompt_that_is_a_plain_tensor_trains():
    model, _, plain = pair()
    results = []
    for one in (model, plain):
        prompt = torch.full((1, 2), 0.3, dtype=torch.float64, requires_grad=True)
        one.below.register_forward_pre_hook(lambda _, args, prompt=prompt: (args[0] + prompt,))
        one(torch.ones(3, 2, dtype=torch.float64)).sum().backward()
        results.append([prompt.grad, one.chosen.weight.grad])
    assert_same(*results)


TRANSFORMS = {
    "grad": lambda f, p, x: grad(lambda p: f(p, x).sum())(p),
    "grad of the input": lambda f, p, x: {"x": grad(lambda x: f(p, x).sum())(x)},
    "jvp": lambda f, p, x: {"x": torch.stack(jvp(lambda x: f(p, x), (x,), (torch.ones_like(x),)))},
    "jacrev of vmap": lambda f, p, x: jacrev(lambda p: vmap(lambda one: f(p, one[None])[0])(x))(p),
    "ensemble": lambda f, p, x: {
        "x": vmap(lambda q: f(q, x))({name: torch.stack([v, 2 * v]) for name, v in p.items()})
    },
}


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("frozen", [None, "int8"])
def test_functional_transforms(how, frozen):
    model, x = Net().double(), torch.linspace(-1, 1, 20, dtype=torch.float64).view(10, 2)
    if frozen:
        model.float()
        x = x.float()
    tuned = SelectiveBackward(model, ["chosen"], head="head", frozen=frozen)
    weights = {name: model.get_parameter(name).detach() for name in tuned.trainable_names}
    found = TRANSFORMS[how](lambda p, x: functional_call(model, p, (x,)), weights, x)
    tuned.remove()
    wanted = TRANSFORMS[how](lambda p, x: functional_call(model.eval(), p, (x,)), weights, x)
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-5 if frozen else TOLERANCE, atol=1e-6 * bool(frozen))


@pytest.mark.parametrize("frozen", [None, "int8"])
def test_forward_mode(frozen):
    model = Net()
    tuned = SelectiveBackward(model, ["chosen"], head="head", frozen=frozen)
    x, results = torch.linspace(-1, 1, 20).view(10, 2), []
    for _ in range(2):
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
            results.append([y.primal.detach(), y.tangent.detach()])
        tuned.remove()
        model.eval()
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["int8"])
def test_double_backward_through_packed_weights(frozen):
    model = Net()
    tuned = SelectiveBackward(model, ["chosen"], head="head", frozen=frozen)
    results = []
    for _ in range(2):
        x = torch.linspace(-1, 1, 20).view(10, 2).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), [model.chosen.weight, model.head.weight]))
        if not results[1:]:
            tuned.remove()
            model.eval()
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_teacher_by_functional_call_is_no_constant_output(recwarn):
    model, _, _ = pair()
    x = torch.ones(3, 2, dtype=torch.float64)
    teacher = {name: p.detach() for name, p in model.named_parameters()}
    assert not functional_call(model, teacher, (x,)).requires_grad
    model(x).sum().backward()
    assert not [warning for warning in recwarn if "depends on nothing" in str(warning.message)]


def test_threads_share_a_wrapped_model():
    """Norms are in eval mode within a pass and as asked for afterwards; gradients are those of one thread."""

    class Slow(nn.Module):
        def forward(self, x):
            meeting.wait(timeout=20)  # both threads are inside the pass
            return x

    model, _, plain = pair(lambda: nn.Sequential(nn.BatchNorm1d(2), Slow(), Net()), layers=["2.chosen"], head="2.head")
    model[0].train()
    xs = [torch.linspace(-1, 1, 20, dtype=torch.float64).view(10, 2) * scale for scale in (1, 2)]
    meeting, results = threading.Barrier(2), {}

    def work(one, place):
        loss = one(xs[place]).square().mean()
        weights = [p for p in one.parameters() if p.requires_grad]
        results[one, place] = torch.autograd.grad(loss, weights)

    for one in (model, plain):
        threads = [threading.Thread(target=work, args=(one, place)) for place in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for place in (0, 1):
        assert_same(results[model, place], results[plain, place])
    assert all(module.training for module in model.modules())


def test_overlapping_calls_of_a_frozen_norm_keep_its_mode():
    """One thread enters the norm, another enters and leaves it, the first leaves."""

    class Norm(nn.BatchNorm1d):
        def forward(self, x):
            modes.append(self.training)
            if threading.current_thread() is first:
                inside.set()
                outside.wait(20)
            return super().forward(x)

    model, modes, inside, outside = nn.Sequential(Norm(2), nn.Linear(2, 2)), [], threading.Event(), threading.Event()
    SelectiveBackward(model, [], head="1")

    def second_call():
        inside.wait(20)
        model(torch.ones(3, 2))
        outside.set()

    first = threading.Thread(target=lambda: model(torch.ones(3, 2)))
    second = threading.Thread(target=second_call)
    for thread in (first, second):
        thread.start()
    for thread in (first, second):
        thread.join()
    assert modes == [False, False] and model[0].training and model[0].num_batches_tracked == 0


def test_an_interrupted_pass_leaves_the_mode_of_frozen_norms():
    class Norm(nn.BatchNorm1d):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(Norm(2), nn.Linear(2, 2))
    with SelectiveBackward(model, [], head="1"):
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(3, 2))
        assert model[0].training
