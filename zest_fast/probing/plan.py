"""What a probe holds at its peak, by a dry run: `zest_fast.plan_probe` and `zest-fast plan --probe`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from zest_fast.planning.batches import cast, make_batch
from zest_fast.planning.blocks import Layout, layout_of
from zest_fast.planning.dry_run import dry, fill
from zest_fast.planning.ledger import Ledger
from zest_fast.planning.report import Plan, make_plan
from zest_fast.planning.settings import DTYPES, Setting, dtype_name
from zest_fast.planning.skeletons import named_model
from zest_fast.planning.step import Step, hold
from zest_fast.probing.budget import BATCH, PENDING, Sizes, sizes_for
from zest_fast.probing.collecting import SAMPLES
from zest_fast.probing.directions import flat_gradients, trainable
from zest_fast.profiling.heads import find_head, is_language_model
from zest_fast.profiling.layers import find_layers, select_layers
from zest_fast.profiling.loss import loss_of


def plan_probe(
    model_or_config: Any,
    *,
    budget: float = 0.05,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    image_size: int | None = None,
    dtype: Any = "bfloat16",
) -> Plan:
    """Plan the passes of `zest_fast.probe`: the memory at their peak and the FLOPs of one batch of eight samples.

    Args:
        model_or_config: as for `plan`, as the sizes and dtype.
        budget: as for `probe`.
        samples: that the batches of the probe hold. What they take is not in the plan.
        sequence_length: tokens of a sample.
        image_size: pixels of both sides.
        dtype: of weights and inputs.

    Returns:
        A Plan, of the pass of the group of weights that takes most; its `notes` say how many passes there are, and how
        many directions each layer has.

    Raises:
        ValueError: a budget or samples that are too few for a probe, and what `plan` refuses.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
        >>> zest_fast.plan_probe(model, image_size=8).purpose
        'probe'
    """
    setting = Setting(
        layers=None,
        batch_size=BATCH,
        sequence_length=sequence_length,
        image_size=image_size,
        dtype=dtype_name(dtype),
    )
    name, skeleton = named_model(model_or_config)
    layout = layout_of(skeleton)
    head = find_head(skeleton)
    model = copy.deepcopy(skeleton)
    with dry() as mode, mode:
        fill(model, None)
        numels = {name: weight.numel() for name, weight in _weights(model).items() if name != head}
    classifier = head is not None and isinstance(skeleton.get_submodule(head), nn.Linear)
    fits_head = classifier and not is_language_model(skeleton)
    sizes = sizes_for(samples, budget, list(numels.values()), fits_head=fits_head)
    passes = len(sizes.groups)
    words = "one pass" if passes == 1 else f"{passes} passes, a group of weights each,"
    note = f"{words} over {sizes.probed} samples, {sizes.directions} directions of each half for each layer"

    def again(other: Setting) -> Plan:
        step = _dry_pass(skeleton, layout, other, list(numels), sizes, drawn=fits_head)
        return make_plan(name, other, step, layout, again, (note,), purpose="probe")

    return again(setting)


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """By layer, in the order of `probe`; the model has fake tensors."""
    return {
        layer.name: layer.weight.parameter for layer in select_layers(find_layers(dict(model.named_modules())), None)
    }


def _dry_pass(
    skeleton: nn.Module, layout: Layout, setting: Setting, names: list[str], sizes: Sizes, *, drawn: bool
) -> Step:
    """Of the group whose directions take most: batches until their gradients are read.

    drawn: whether there is a second backward pass, of labels that the model draws.
    """
    model = copy.deepcopy(skeleton).eval()
    weights = DTYPES[setting.dtype][0] if setting.dtype else None
    with dry() as mode, mode:
        fill(model, weights)
        batch = cast(make_batch(model, setting), weights)
        of_layer = _weights(model)
        parameters = [of_layer[name] for name in names]
        group = max(sizes.groups, key=lambda rows: sum(parameters[row].numel() for row in rows))
        trained = [parameters[row] for row in group]
        model.requires_grad_(False)
        ledger = Ledger()
        hold(ledger, model, batch, {})
        ledger.watch(model, layout.head)
        compute_loss = loss_of(model, batch, None, None)
        with trainable(trained), ledger:
            ledger.enter("forward")
            ledger.start()
            ways = [torch.empty(2 * sizes.directions, w.numel(), dtype=torch.float32, device="cpu") for w in trained]
            pending: list[list[torch.Tensor]] = [[] for _ in trained]
            for _ in range(PENDING):
                loss = compute_loss()
                for place in range(1 + drawn):
                    found = flat_gradients(loss, trained, retain_graph=place < drawn)
                    for held, gradient in zip(pending, found, strict=True):
                        held.append(gradient)
                    del found, gradient
                del loss
            for held, way in zip(pending, ways, strict=True):
                torch.stack(held) @ way.T
        books = ledger.books()
        flops = {phase: count // PENDING for phase, count in books.flops_by_phase.items()}
        return Step(books.peak(), flops, sum(weight.numel() for weight in trained), "")
