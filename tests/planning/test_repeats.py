"""A plan that goes through some of the blocks that are alike is the plan of all blocks, to the byte."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zest_fast.planning import step
from zest_fast.planning.blocks import layout_of
from zest_fast.planning.plan import plan
from zest_fast.planning.repeats import Unlike, runs_of
from zest_fast.planning.settings import Setting

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 100, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}

# name: class of the configuration, its arguments, and whether blocks are skipped: of the others some are, and some not
ZOO = {
    "bert": ("BertConfig", TEXT, True),
    "gpt2": (
        "GPT2Config",
        {"n_layer": 6, "n_head": 2, "n_embd": 32, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2},
        True,
    ),
    "llama": ("LlamaConfig", GROUPED, True),
    "mistral, windows": ("MistralConfig", {**GROUPED, "sliding_window": 8}, True),
    "qwen2, windows in the upper half": (
        "Qwen2Config",
        {**GROUPED, "num_hidden_layers": 10}
        | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5},
        None,
    ),
    "gemma2, alternating": ("Gemma2Config", {**GROUPED, "sliding_window": 8}, None),
    "gemma3, five and one": ("Gemma3TextConfig", {**GROUPED, "num_hidden_layers": 12, "sliding_window": 8}, None),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_ff": 48, "num_layers": 6, "num_heads": 2, "d_kv": 16, "vocab_size": 100}
        | {"decoder_start_token_id": 0, "architectures": ["T5ForConditionalGeneration"]},
        None,
    ),
    "vit": ("ViTConfig", {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 4}, True),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}, None),
    "mixtral, loss of the routers": (
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "output_router_logits": True},
        None,
    ),
    "modernbert, one in three": (
        "ModernBertConfig",
        {**TEXT, "num_hidden_layers": 12}
        | dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 1),
        None,
    ),
}
WAYS = {
    "plain": {"lean": False},
    "lean": {},
    "checkpointed": {"checkpoint": "above-cut"},
    "in backward": {"optimizer": "adamw-in-backward"},
    "masters": {"optimizer": "adamw-masters"},
    "8-bit": {"optimizer": "adamw-8bit"},
    "foreach": {"optimizer": "adamw-foreach"},
    "mixed": {"dtype": "bfloat16-mixed"},
    "nf4": {"frozen": "nf4"},
    "on disk": {"stream": True},
    "on a CPU": {"device": "cpu", "dtype": "float32"},
}


LAYERS = [
    pytest.param(("model.layers.4.mlp.up_proj",), id="one"),
    pytest.param(3, id="three", marks=pytest.mark.slow),
    pytest.param("all", id="all", marks=pytest.mark.slow),
]
QUICK = {"bert", "gpt2", "gemma3, five and one", "vit", "lean", "checkpointed", "in backward", "nf4"}  #: of both


def outcome(monkeypatch, source, layers, **settings):
    """The plan, that of all blocks, and of the first one what each attempt came to: None, or why it was given up."""
    attempts = []
    real = step._step

    def noted(*arguments):
        try:
            found = real(*arguments)
        except (Unlike, KeyError) as error:
            attempts.append(str(error))
            raise
        attempts.append(None)
        return found

    settings = {"dtype": "bfloat16", **({} if "batch" in settings else {"batch_size": 2}), **settings}
    with monkeypatch.context() as patch:
        patch.setattr(step, "_step", noted)
        quick = plan(source, layers, **settings)
        patch.setattr(step, "runs_of", lambda *arguments: ())
        before = list(attempts)
        full = plan(source, layers, **settings)
    return quick, full, before


def size_of(name):
    return {"image_size": 16} if name == "vit" else {"sequence_length": 16}


@pytest.mark.parametrize("layers", [2, pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_equal_to_the_plan_of_all_blocks(monkeypatch, name, layers):
    kind, arguments, skips = ZOO[name]
    config = getattr(transformers, kind)(**arguments)
    quick, full, attempts = outcome(monkeypatch, config, layers, **size_of(name))
    assert quick == full
    assert str(quick) == str(full)
    if skips:
        assert attempts == [None]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_equal_in_every_setting(monkeypatch, way, layers):
    if layers == "all" and way in ("nf4", "on disk"):
        pytest.skip("nothing is frozen")
    config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 9})
    quick, full, attempts = outcome(monkeypatch, config, layers, sequence_length=16, **WAYS[way])
    assert quick == full
    assert attempts == (
        [None]
        if (way, layers) != ("foreach", "all")
        else ["the optimizer updates parameters of several blocks at once", None]
    )


@pytest.mark.slow
def test_the_loss_of_routers_sees_all_blocks(monkeypatch):
    """Its tensors grow with the number of blocks, which no block shows."""
    config = transformers.MixtralConfig(
        **{**GROUPED, "num_hidden_layers": 8}, num_local_experts=4, output_router_logits=True
    )
    quick, full, attempts = outcome(monkeypatch, config, "all", sequence_length=16, lean=False)
    assert quick == full
    assert len(attempts) == 2


@pytest.mark.slow
def test_a_lora_in_every_block(monkeypatch):
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, use_cache=False))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    quick, full, _ = outcome(monkeypatch, model, None, sequence_length=16)
    assert quick == full


ROWS = {"batch": (torch.zeros(2, 192), torch.zeros(2, dtype=torch.long)), "dtype": "float32"}


class Block(nn.Module):
    def __init__(self, number, width=8):
        super().__init__()
        self.number = number
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def inner(self, x):
        return torch.relu(self.first(x))

    def forward(self, x):
        return x + self.second(self.inner(x))


class Often(Block):
    """times: how often its two layers run, which shows in FLOPs and in what backward needs."""

    times = 1

    def inner(self, x):
        y = super().inner(x)
        for _ in range(self.times - 1):
            y = super().inner(self.second(y))
        return y


class AsksForItsNumber(Often):
    times = property(lambda self: 3 if self.number == 5 else 1)


class LooksItUp(Often):
    times = property(lambda self: self.copies[self.number])

    def __init__(self, number, width=8):
        super().__init__(number, width)
        self.copies = [1, 1, 1, 1, 1, 3, 1, 1]


TIMES = [1, 1, 1, 1, 1, 3, 1, 1]


class LooksElsewhere(Often):
    """In a list that it does not hold."""

    times = property(lambda self: TIMES[self.number])


class Names(Often):
    times = property(lambda self: 3 if f"block {self.number}" == "block 5" else 1)


class AsksForItsType(Often):
    times = property(lambda self: 1 if isinstance(self.number, int) else 2)


class Counts(Often):
    calls = 0

    def inner(self, x):
        Counts.calls += 1
        self.times = 3 if Counts.calls == 6 else 1
        return super().inner(x)


class Shared(Often):
    times = property(lambda self: self.state.times)


class Dropping(Block):
    def __init__(self, number, width=8):
        super().__init__(number, width)
        self.rate = number / 10

    def inner(self, x):
        return nn.functional.dropout(super().inner(x), self.rate)


class Stack(nn.Module):
    """blocks, one after the other; subclasses do something beside it."""

    def __init__(self, kind=Block, count=8):
        super().__init__()
        self.begin = nn.Linear(192, 8)
        self.blocks = nn.ModuleList(kind(number) for number in range(count))
        self.end = nn.Linear(8, 4)

    def walk(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.end(self.walk(self.begin(x.flatten(1))))


class Twice(Stack):
    def walk(self, x):
        return super().walk(super().walk(x))


class Collecting(Stack):
    def walk(self, x):
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        return torch.stack(seen).sum(0)


class Skipping(Stack):
    def walk(self, x):
        below = self.blocks[0](x)
        x = below
        for block in self.blocks[1:]:
            x = block(x)
        return x * below


class Between(Stack):
    def walk(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 5:
                x = torch.cat([x, x, x], -1)[:, :8]
        return x


class WithoutCalls(Stack):
    def walk(self, x):
        for block in self.blocks:
            x = block.forward(x)
        return x


class Masked(Stack):
    """Block 5 gets another input than its neighbours."""

    def __init__(self):
        super().__init__(Scaled)

    def walk(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x, torch.ones(8) if number == 5 else None)
        return x


class Called(Stack):
    """Block 5 is called in another way, by `around(block, x)`."""

    def __init__(self, around):
        super().__init__(Often)
        self.around = around

    def walk(self, x):
        for number, block in enumerate(self.blocks):
            x = self.around(block, x) if number == 5 else block(x)
        return x


def checkpointed(block, x):
    return checkpoint(block, x, use_reentrant=False)


def without_gradient(block, x):
    with torch.no_grad():
        return block(x)


def in_bfloat16(block, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return block(x)


def as_float64(block, x):
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.double, torch.Tensor.float):
        return block(x)


def twice_as_often(block, x):
    block.times = 2
    return block(x)


class Counting(Stack):
    """Its blocks count their calls, in their class."""

    def __init__(self):
        super().__init__(Counts)

    def walk(self, x):
        Counts.calls = 0
        return super().walk(x)


class Told(Stack):
    """What blocks share says something else for block 5."""

    def __init__(self):
        super().__init__(Shared)
        self.state = SimpleNamespace(times=1)
        for block in self.blocks:
            block.state = self.state

    def walk(self, x):
        for number, block in enumerate(self.blocks):
            self.state.times = 3 if number == 5 else 1
            x = block(x)
        return x


class InPlace(Stack):
    """A product after block 5 goes into a tensor that is there already."""

    def walk(self, x):
        product, rows = torch.empty(8, 8), torch.empty(8, 2)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 5:
                with torch.no_grad():
                    torch.mm(rows, x.detach(), out=product)
        return x


class Scaled(Block):
    def forward(self, x, scale=None):
        return super().forward(x if scale is None else x * scale)


class Regularised(Stack):
    def forward(self, x):
        return super().forward(x) + sum((block.first.weight**2).sum() for block in self.blocks)


def shared():
    model = Stack()
    model.blocks[5].first.weight = model.blocks[2].first.weight
    return model


def hooked():
    model = Stack()
    model.blocks[5].register_forward_hook(double)
    return model


def double(module, inputs, output):
    return torch.cat([output, output], -1)[:, :8]


def another_dtype():
    model = Stack()
    for number, block in enumerate(model.blocks):
        block.register_buffer("scale", torch.ones(8, dtype=torch.float64 if number == 5 else torch.float32))
    return model


def in_eval():
    model = Stack(Dropping)
    for block in model.blocks:
        block.rate = 0.5
    model.blocks[5].eval()
    return model


def another_stride():
    model = Stack()
    first = model.blocks[5].first
    first.weight = nn.Parameter(first.weight.detach().T.contiguous().T)
    return model


# name: the model, and of what tells its block 5 from others while it runs, why the quick dry run is given up; "" where
# the blocks themselves show that it is not to be skipped
LOOK_ALIKE = {
    "a block asks for its number": (lambda: Stack(AsksForItsNumber), "asks for its number"),
    "a block looks its number up": (lambda: Stack(LooksItUp), "asks for its number"),
    "a block looks its number up elsewhere": (lambda: Stack(LooksElsewhere), "asks for its number"),
    "a block writes its number": (lambda: Stack(Names), "asks for its number"),
    "a block asks for the type of its number": (lambda: Stack(AsksForItsType), "asks for its number"),
    "rates of dropout": (lambda: Stack(Dropping), ""),
    "run twice": (Twice, "used elsewhere|another order"),
    "all outputs used": (Collecting, "used elsewhere"),
    "one output used": (Skipping, "used elsewhere"),
    "something between two": (Between, "5"),
    "something between two that makes no tensor": (InPlace, "computed between"),
    "no calls": (WithoutCalls, "different inputs"),
    "another input": (Masked, "different inputs"),
    "checkpointed": (lambda: Called(checkpointed), "called in different ways"),
    "without gradient": (lambda: Called(without_gradient), "called in different ways"),
    "under autocast": (lambda: Called(in_bfloat16), "called in different ways"),
    "what it saves is packed": (lambda: Called(as_float64), "called in different ways"),
    "told before it is called": (lambda: Called(twice_as_often), "called in different ways"),
    "a class counts its calls": (Counting, "called in different ways"),
    "told by what all share": (Told, "called in different ways"),
    "weights used elsewhere": (Regularised, "used elsewhere"),
    "a shared weight": (shared, ""),
    "a hook": (hooked, ""),
    "another buffer": (another_dtype, ""),
    "another stride": (another_stride, ""),
    "a mode": (in_eval, ""),
}


@pytest.mark.parametrize("layers", [["blocks.1.first", "end"], "all"], ids=["one", "all"])
@pytest.mark.parametrize("case", LOOK_ALIKE)
def test_blocks_that_look_alike_and_are_not(monkeypatch, case, layers):
    make, why = LOOK_ALIKE[case]
    model = make()
    quick, full, attempts = outcome(monkeypatch, model, layers, **ROWS, lean=False)
    assert quick == full
    runs = runs_of(model, layout_of(model), Setting(layers=layers, batch_size=2))
    assert any(5 in run.skipped for run in runs) == bool(why)
    if why:
        assert re.search(why, attempts[0])
        assert attempts[1] is None


def test_plain_blocks_are_skipped(monkeypatch):
    quick, full, attempts = outcome(monkeypatch, Stack(count=12), "all", **ROWS)
    assert quick == full
    assert attempts == [None]


def test_a_head_may_be_an_iterator():
    """The quick dry run asks for it, and the step."""
    plans = [plan(Stack(count=12), ["blocks.3.first"], head=head, **ROWS) for head in (["end"], iter(["end"]))]
    assert plans[0].trainable_parameters == plans[1].trainable_parameters == 8 * 16 + 16 + 8 * 4 + 4


def test_an_error_is_that_of_the_whole_model():
    class Fails(Block):
        def forward(self, x):
            if len(x) == 3:
                raise LookupError("three samples")
            return super().forward(x)

    with pytest.raises(LookupError, match="three samples"):
        plan(Stack(Fails), "all", batch=(torch.zeros(3, 192), torch.zeros(3, dtype=torch.long)))


def test_runs():
    model = Stack(count=12)
    layout = layout_of(model)
    setting = Setting(layers=("blocks.3.first",), batch_size=1)
    (above,) = runs_of(model, layout, setting)  # the three below are too few
    assert (above.blocks, above.traced, list(above.skipped)) == (range(4, 12), (4, 5, 11), [6, 7, 8, 9, 10])
    assert above.numbers == {("", "number")}
