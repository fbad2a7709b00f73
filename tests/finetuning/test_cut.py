"""Backward ends at the lowest trained weight, and costs what plain freezing costs, whatever the user switches on."""

import copy
import types
from functools import partial

import pytest
import torch
from small_models import Mlp, assert_same, llama, snapshot
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from zest_fast.finetuning.selective_backward import SelectiveBackward

BLOCKS, LAYER = 8, "model.layers.7.mlp.up_proj"
IDS = torch.arange(32).reshape(2, 16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def blocks():
    torch.manual_seed(0)
    return llama(num_hidden_layers=BLOCKS).train()


class Cost:
    """Of one forward and backward pass: FLOPs of backward (recomputation included), bytes saved for it, gradients."""

    def __init__(self, model, run):
        model.zero_grad()
        self.saved = 0
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
            loss = run()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        self.flops = backward.get_total_flops()
        self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def _count(self, tensor):
        self.saved += tensor.numel() * tensor.element_size()
        return tensor


def loss_of(model, **inputs):
    return model(**(inputs or {"input_ids": IDS}), labels=IDS, use_cache=False).loss


@pytest.fixture(scope="module")
def frozen_by_hand():
    model = blocks().requires_grad_(False)
    model.get_submodule(LAYER).weight.requires_grad_(True)
    return Cost(model, partial(loss_of, model))


@pytest.fixture(scope="module")
def one_block():
    """FLOPs of the forward pass of a block."""
    model = blocks()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = torch.randn(2, 16, 16)
        model.model.layers[0](hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(16)[None]))
    return counter.get_total_flops()


def checkpointing(model, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def inputs(model):
    model.enable_input_require_grads()


SWITCHES = {
    "nothing": ((), ()),
    "inputs before": ((inputs,), ()),
    "inputs after": ((), (inputs,)),
    "checkpointing before": ((partial(checkpointing, reentrant=False),), ()),
    "checkpointing after": ((), (partial(checkpointing, reentrant=False),)),
    "checkpointing and inputs before": ((partial(checkpointing, reentrant=False), inputs), ()),
    "checkpointing and inputs after": ((), (partial(checkpointing, reentrant=False), inputs)),
    "reentrant before": ((partial(checkpointing, reentrant=True),), ()),
    "reentrant after": ((), (partial(checkpointing, reentrant=True),)),
    "reentrant and inputs before": ((partial(checkpointing, reentrant=True), inputs), ()),
    "reentrant and inputs after": ((), (partial(checkpointing, reentrant=True), inputs)),
}


def assert_minimal(cost, minimum, recomputed=0):
    assert cost.flops <= 1.05 * minimum.flops + recomputed
    assert cost.saved <= 1.05 * minimum.saved
    assert_close(cost.gradients, minimum.gradients)


def assert_close(gradients, wanted):
    """To 1e-6: lean saving sums the loss of a language model in another order."""
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("switch", SWITCHES)
def test_costs_what_plain_freezing_costs(switch, frozen_by_hand, one_block):
    model = blocks()
    before, after = SWITCHES[switch]
    for turn_on in before:
        turn_on(model)
    tuned = SelectiveBackward(model, [LAYER])
    for turn_on in after:
        turn_on(model)
    recomputed = 0 if "check" not in switch and "reentrant" not in switch else one_block
    for _ in range(2):  # the first pass learns the order of use
        assert_minimal(Cost(model, partial(loss_of, model)), frozen_by_hand, recomputed)
    assert tuned.cut == LAYER and torch.is_grad_enabled()


def test_switches_in_the_middle_of_a_run(frozen_by_hand, one_block):
    model = blocks()
    with SelectiveBackward(model, [LAYER]):
        assert_minimal(Cost(model, partial(loss_of, model)), frozen_by_hand)
        checkpointing(model, reentrant=True)
        inputs(model)
        assert_minimal(Cost(model, partial(loss_of, model)), frozen_by_hand, one_block)
        block = model.model.layers[0]
        assert block._gradient_checkpointing_func.keywords == {"use_reentrant": True}  # between passes as asked for
    loss_of(model).backward()
    assert model.model.embed_tokens.weight.grad is not None  # as without the wrapper


def test_embeddings_that_require_a_gradient_get_it(frozen_by_hand):
    model, by_hand = blocks(), blocks().requires_grad_(False)
    by_hand.get_submodule(LAYER).weight.requires_grad_(True)
    SelectiveBackward(model, [LAYER])
    gradients = []
    for one in (model, by_hand):
        embeddings = one.model.embed_tokens(IDS).detach().requires_grad_()
        found = Cost(one, partial(loss_of, one, inputs_embeds=embeddings)).gradients
        gradients.append({**found, "embeddings": embeddings.grad})
    assert_close(*gradients)
    assert_minimal(Cost(model, partial(loss_of, model)), frozen_by_hand)  # the next pass asks for none


def test_checkpoint_above_cut(frozen_by_hand, one_block):
    model = blocks()
    before, attributes = snapshot(model), [sorted(vars(module)) for module in model.modules()]
    with SelectiveBackward(model, [LAYER], checkpoint="above-cut"):
        cost = Cost(model, partial(loss_of, model))
        assert_minimal(cost, frozen_by_hand, one_block)
        assert cost.flops > 1.05 * frozen_by_hand.flops  # it does recompute that block
    assert_same(before, snapshot(model))
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert not model.model.layers[0].gradient_checkpointing
    lowest = "model.layers.5.mlp.up_proj"
    with SelectiveBackward(model, [lowest]):
        plain = Cost(model, partial(loss_of, model))
    with SelectiveBackward(model, [lowest], checkpoint="above-cut"):
        cost = Cost(model, partial(loss_of, model))
    assert cost.flops <= 1.05 * plain.flops + 3 * one_block and cost.saved < 0.8 * plain.saved
    assert torch.equal(cost.gradients[f"{lowest}.weight"], plain.gradients[f"{lowest}.weight"])


class Blocks(nn.Module):
    """Repeated blocks, checkpointed by the model itself if `reentrant` is not None."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("how", ["above-cut", "own"])
def test_checkpointing_of_any_model(how):
    model, x = Blocks(None if how == "above-cut" else False), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    plain.reentrant = None
    with SelectiveBackward(plain, ["blocks.2.0"]):
        minimum = Cost(plain, lambda: plain(x).sum())
    forward = model.blocks[2].forward
    with SelectiveBackward(model, ["blocks.2.0"], checkpoint="above-cut" if how == "above-cut" else None):
        cost = Cost(model, lambda: model(x).sum())
    assert_minimal(cost, minimum, recomputed=2 * 2 * 2 * 3 * 4 * 8)
    assert cost.flops > minimum.flops and model.blocks[2].forward == forward


def test_reentrant_checkpointing_of_another_kind_is_refused_where_it_would_lose_gradients():
    model = Blocks(reentrant=True)
    SelectiveBackward(model, ["blocks.2.0"])
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"'blocks\.2\.0' trains and runs inside reentrant .*use_reentrant=False"):
        model(x)
    assert torch.is_grad_enabled()
    model(x.requires_grad_()).sum().backward()
    found = [x.grad, model.blocks[2][0].weight.grad]
    model.reentrant, x.grad, model.blocks[2][0].weight.grad = None, None, None
    model(x).sum().backward()
    assert all(map(torch.equal, found, [x.grad, model.blocks[2][0].weight.grad]))


def test_accelerate(frozen_by_hand):
    accelerate = pytest.importorskip("accelerate")
    model = blocks()
    tuned = SelectiveBackward(model, [LAYER])
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(tuned.parameters(), lr=0.1))
    assert tuned.summary(optimizer).foreign == 0
    inputs(model)
    assert_minimal(Cost(model, partial(loss_of, prepared)), frozen_by_hand)


def test_trainer(tmp_path, frozen_by_hand, one_block):
    transformers = pytest.importorskip("transformers")
    model = blocks()
    tuned = SelectiveBackward(model, [LAYER])
    with FlopCounterMode(display=False) as forward:
        loss_of(model)
    settings = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_checkpointing=True, **settings
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    inputs(model)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    once = forward.get_total_flops() + 1.05 * frozen_by_hand.flops + one_block
    assert forward.get_total_flops() < counter.get_total_flops() / 2 <= once
    tuned.summary(trainer.optimizer)
    tuned.verify()


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group, frozen_by_hand, one_block):
    model = blocks()
    SelectiveBackward(model, [LAYER])
    checkpointing(model, reentrant=True)
    inputs(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        cost = Cost(model, partial(loss_of, parallel))
        assert_minimal(cost, frozen_by_hand, one_block)


def test_a_replica_of_data_parallel_uses_its_own_weights():
    model = Mlp()
    SelectiveBackward(model, ["b"])
    replica = model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica is not model
    assert "forward" in vars(model)


@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_compiled(part):
    model, x = Blocks(), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    with SelectiveBackward(plain, ["blocks.2.0"]):
        minimum = Cost(plain, lambda: plain(x).sum())
    SelectiveBackward(model, ["blocks.2.0"])
    for module in [model] if part == "whole" else model.blocks:
        module.compile(backend="aot_eager", fullgraph=part == "whole")
    for _ in range(2):
        model.zero_grad()
        model(x).sum().backward()
        assert torch.is_grad_enabled()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(minimum.gradients)
        for name, gradient in minimum.gradients.items():
            assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-6)


def compiled_cost(model, part):
    """FLOPs of the second backward pass, the number of graphs, and the gradients; a break in a graph is an error."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for module in [model] if part == "whole" else model.model.layers:
        module.compile(backend=counter, fullgraph=True)
    loss_of(model).backward()  # compiles, which it could not while FLOPs are counted
    model.zero_grad()
    loss = loss_of(model)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return backward.get_total_flops(), counter.frame_count, gradients


@pytest.mark.parametrize(
    ("switch", "part"),
    [
        ("inputs before", "whole"),
        ("checkpointing after", "whole"),
        ("nothing", "blocks"),
        ("inputs after", "blocks"),
        ("checkpointing after", "blocks"),
    ],
)
def test_compiled_transformers(switch, part):
    by_hand, model = blocks().requires_grad_(False), blocks()
    for one in (by_hand, model):
        one.set_attn_implementation("eager")  # torch cannot compile a checkpointed fused one
    by_hand.get_submodule(LAYER).weight.requires_grad_(True)
    if "checkpointing" in switch:
        checkpointing(by_hand, reentrant=False)
        by_hand.disable_input_require_grads()
    before, after = SWITCHES[switch]
    for turn_on in before:
        turn_on(model)
    SelectiveBackward(model, [LAYER])
    for turn_on in after:
        turn_on(model)
    minimum, graphs, wanted = compiled_cost(by_hand, part)
    flops, ours, gradients = compiled_cost(model, part)
    assert 0 < flops <= 1.05 * minimum
    assert ours == graphs == (1 if part == "whole" else 2)  # all blocks share their code but for the one that trains
    assert_close(gradients, wanted)


def test_input_gradients_are_as_asked_for():
    model, before, disabled = blocks(), blocks(), blocks()
    for one in (before, disabled):
        inputs(one)
    own = next(iter(before.model.embed_tokens._forward_hooks.values()))
    with SelectiveBackward(model, [LAYER]), SelectiveBackward(before, [LAYER]), SelectiveBackward(disabled, [LAYER]):
        inputs(model)
        disabled.disable_input_require_grads()
        assert model.model.embed_tokens(IDS).requires_grad and not disabled.model.embed_tokens(IDS).requires_grad
        copied = copy.deepcopy(model)
        for one in (model, before, copied):
            loss_of(one.train()).backward()
    for one in (model, before, disabled):
        assert one.requires_grad_(False).model.embed_tokens(IDS).requires_grad is (one is not disabled)
        assert "enable_input_require_grads" not in vars(one)
        one.disable_input_require_grads()
        assert not one.model.embed_tokens(IDS).requires_grad
    inputs(before)
    assert next(iter(before.model.embed_tokens._forward_hooks.values())).__qualname__ == own.__qualname__


def hidden_by_parts(model):
    return model.lm_head(model.model(input_ids=IDS, use_cache=False).last_hidden_state).logsumexp(-1).mean()


def test_reentrant_checkpointing_around_the_models_own_forward():
    """A contrastive loop, an outer module, a replica: the cut does not see the pass, and gradients are there anyway."""
    model, by_hand = blocks(), blocks().requires_grad_(False)
    for part in (LAYER, "lm_head"):
        by_hand.get_submodule(part).requires_grad_(True)
    for one in (model, by_hand):
        checkpointing(one, reentrant=True)
        inputs(one)  # which transformers 5 does by itself
    SelectiveBackward(model, [LAYER], head="lm_head")
    for one in (model, by_hand):
        hidden_by_parts(one).backward()
    for name, parameter in by_hand.named_parameters():
        found = model.get_parameter(name).grad
        assert found is None if not parameter.requires_grad else torch.allclose(found, parameter.grad, atol=1e-6), name


def test_an_input_that_trains_under_reentrant_checkpointing():
    """It reaches the blocks as a mask, which reentrant checkpointing does not look at."""
    model = blocks()
    checkpointing(model, reentrant=True)
    SelectiveBackward(model, [LAYER], lean=False)
    bias = nn.Parameter(torch.zeros(1, 1, 16, 16))
    mask = torch.triu(torch.full((16, 16), -1e9), 1)[None, None] + bias
    with pytest.warns(UserWarning, match="computed from something that trains"):
        loss = model(input_ids=IDS, labels=IDS, attention_mask=mask, use_cache=False).loss
    loss.backward()
    assert model.get_submodule(LAYER).weight.grad.abs().sum() > 0 and bias.grad.abs().sum() > 0


def by_hook(module, adapter):
    module.register_forward_hook(lambda _, args, output: output + adapter(output))


def by_pre_hook(module, adapter):
    module.register_forward_pre_hook(lambda _, args: (args[0] + adapter(args[0]), *args[1:]))


def by_forward(module, adapter):
    forward = module.forward
    module.forward = lambda *args, **keywords: (lambda y: y + adapter(y))(forward(*args, **keywords))


@pytest.mark.parametrize("attach", [by_hook, by_pre_hook, by_forward])
@pytest.mark.parametrize("when", ["before", "after", "after a pass"])
@pytest.mark.parametrize("place", ["model.layers.0", "model.layers.2.mlp"])
def test_what_is_attached_from_outside_trains(attach, when, place):
    model, by_hand, adapter = blocks(), blocks().requires_grad_(False), nn.Linear(16, 16)
    by_hand.get_submodule(LAYER).weight.requires_grad_(True)
    attach(by_hand.get_submodule(place), adapter)
    loss_of(by_hand).backward()
    wanted = {"adapter": adapter.weight.grad, "layer": by_hand.get_submodule(LAYER).weight.grad}
    adapter.zero_grad()
    if when == "before":
        attach(model.get_submodule(place), adapter)
    SelectiveBackward(model, [LAYER], lean=False)
    if when == "after a pass":
        loss_of(model)
    if when != "before":
        attach(model.get_submodule(place), adapter)
    for _ in range(2):
        model.zero_grad()
        adapter.zero_grad()
        loss_of(model).backward()
        assert_close({"adapter": adapter.weight.grad, "layer": model.get_submodule(LAYER).weight.grad}, wanted)


def test_a_hook_that_brings_in_nothing_leaves_the_cut(frozen_by_hand):
    model = blocks()
    SelectiveBackward(model, [LAYER])
    model.model.layers[1].register_forward_hook(lambda _, args, output: output.clone())
    inputs(model)
    for _ in range(2):
        assert_minimal(Cost(model, partial(loss_of, model)), frozen_by_hand)


def test_an_output_that_depends_on_no_chosen_layer_is_named():
    model = Mlp()
    model.unused = nn.Linear(4, 4)
    SelectiveBackward(model, ["unused"], head=None)
    with pytest.warns(UserWarning, match=r"depends on nothing that was chosen \('unused\.weight', 'unused\.bias'\)"):
        model(torch.randn(2, 4))


def test_a_copy_is_wrapped_anew():
    model = blocks()
    tuned = SelectiveBackward(model, [LAYER])
    loss_of(model).backward()
    copied, other = copy.deepcopy(model), "model.layers.3.mlp.up_proj"
    again = SelectiveBackward(copied, [other])
    loss_of(copied).backward()
    assert again.cut == other and copied.get_submodule(other).weight.grad is not None
    again.remove()
    assert not {"forward", "enable_input_require_grads"} & vars(copied).keys()
    loss_of(model).backward()
    assert tuned.cut == LAYER


def test_an_adapter_below_moves_the_cut():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(blocks(), config)
    tuned = SelectiveBackward(model, [f"base_model.model.{LAYER}"])
    loss_of(model).backward()
    assert tuned.cut == f"base_model.model.{LAYER}"
    adapter = model.base_model.model.model.layers[2].self_attn.q_proj.lora_A["default"]
    adapter.weight.requires_grad_(True)
    loss_of(model).backward()
    assert adapter.weight.grad.abs().sum() > 0
    assert tuned.cut == "base_model.model.model.layers.2.self_attn.q_proj.lora_A.default"
    assert f"ends at {tuned.cut}" in str(tuned.summary())


def test_peft_on_top_freezes_the_chosen_layers_and_that_is_named():
    peft = pytest.importorskip("peft")
    model = blocks()
    tuned = SelectiveBackward(model, [LAYER])
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    with pytest.raises(RuntimeError, match=rf"'{LAYER}\.weight' was chosen .*get_peft_model freezes"):
        loss_of(adapted)
    for parameter in tuned.parameters():
        parameter.requires_grad_(True)
    loss_of(adapted).backward()
    reached = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in adapted.named_parameters() if p.requires_grad} and len(reached) == 17


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_ends_a_pass_leaves_gradients_on(error):
    model, x = Mlp(), torch.randn(2, 4)
    SelectiveBackward(model, ["b"])

    def stop(*_):
        raise error

    handle = model.a.register_forward_hook(stop)
    with pytest.raises(error):
        model(x)
    assert torch.is_grad_enabled()
    handle.remove()
    model(x).sum().backward()
    assert model.b.weight.grad is not None


def test_accumulation_evaluation_and_generation_between_passes():
    model, reference = blocks(), blocks().requires_grad_(False)
    reference.get_submodule(LAYER).weight.requires_grad_(True)
    SelectiveBackward(model, [LAYER])
    for _ in range(2):
        for one in (model, reference):
            loss_of(one).backward()
            with torch.no_grad():
                assert not loss_of(one).requires_grad
            with torch.inference_mode():
                loss_of(one)
            one.generate(IDS[:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert_close({LAYER: model.get_submodule(LAYER).weight.grad}, {LAYER: reference.get_submodule(LAYER).weight.grad})


def test_a_copy_has_a_cut_of_its_own(frozen_by_hand):
    model = blocks()
    SelectiveBackward(model, [LAYER])
    loss_of(model)
    twin = copy.deepcopy(model)
    inputs(twin)
    assert_minimal(Cost(twin, partial(loss_of, twin)), frozen_by_hand)
    assert all(p.grad is None for p in model.parameters())


class Odd(nn.Module):
    """What a guess from names or order would get wrong; `how` picks the forward pass."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(5, 4)
        self.frozen, self.shared, self.opens = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Opens()
        self.chosen, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(getattr(self, self.how)(self.embed(ids)))

    def frozen_again_after_it(self, x):
        return self.shared(self.chosen(self.shared(x)))

    def used_by_its_parent(self, x):
        return self.frozen(F.linear(x, self.chosen.weight)) + self.chosen(x)

    def in_place_on_a_view(self, x):
        y = self.frozen(x)  # of a Linear with bias on 3-D input: a view
        y += self.chosen(x)
        return y

    def through_an_object(self, x):
        return self.opens(types.SimpleNamespace(inside={"key": [F.linear(x, self.chosen.weight)]})) + self.chosen(x)

    def skips(self, x):
        return self.chosen(self.frozen(x)) + x


class Opens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, box):
        return self.linear(box.inside["key"][0])


@pytest.mark.parametrize(
    "how", ["frozen_again_after_it", "used_by_its_parent", "in_place_on_a_view", "through_an_object", "skips"]
)
def test_gradients_of_odd_models_are_those_of_plain_freezing(how):
    model, ids = Odd(how), torch.tensor([[0, 1, 2], [2, 3, 4]])
    plain = copy.deepcopy(model).requires_grad_(False)
    for module in (plain.chosen, plain.head):
        module.requires_grad_(True)
    tuned = SelectiveBackward(model, ["chosen"], head="head")
    model.embed.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    with pytest.warns(UserWarning, match="a hook makes the output of 'embed', which is frozen, require a gradient"):
        for _ in range(2):
            costs = [Cost(one, lambda one=one: one(ids).square().sum()) for one in (model, plain)]
            assert_minimal(*costs)
    assert tuned.cut == "chosen"


def test_an_input_from_something_that_trains_keeps_its_gradient():
    model, before, x = Mlp(), nn.Linear(4, 4), torch.randn(2, 4)
    SelectiveBackward(model, ["b"])
    for _ in range(2):
        before.zero_grad()
        if _ == 0:
            with pytest.warns(UserWarning, match="an input of Mlp was computed from something that trains"):
                loss = model(before(x)).sum()
        loss = model(before(x)).sum()
        loss.backward()
        assert before.weight.grad.abs().sum() > 0


def test_a_layer_that_is_not_on_the_path_of_the_loss_is_named():
    model = Mlp()
    model.aside = nn.Linear(4, 4)
    SelectiveBackward(model, ["b", "aside"], head="head")
    model(torch.randn(2, 4))
    model(torch.randn(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"no gradient to 'aside\.weight', 'aside\.bias': not on the path"):
        model(torch.randn(2, 4))
    assert not model.b.weight._post_accumulate_grad_hooks


def test_functional_transforms_pass_through():
    model, x = Mlp(), torch.randn(2, 4)
    SelectiveBackward(model, ["b"])
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    assert gradients["c.weight"].abs().sum() > 0


def test_removing_leaves_nothing():
    model = Mlp()
    attributes = sorted(vars(model))
    with SelectiveBackward(model, ["b"]):
        model(torch.randn(2, 4)).sum().backward()
    assert sorted(vars(model)) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
