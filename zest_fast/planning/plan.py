"""Does it fit? Peak memory and FLOPs of a training step, before anything is loaded and without a GPU."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zest_fast.foundation.options import Checkpoint, Frozen, MetricNames, PlannedDevice
from zest_fast.planning.blocks import layout_of
from zest_fast.planning.optimizers import Build
from zest_fast.planning.profile_pass import dry_profile
from zest_fast.planning.report import Plan, make_plan
from zest_fast.planning.settings import Setting, dtype_name
from zest_fast.planning.skeletons import named_model
from zest_fast.planning.step import dry_step
from zest_fast.profiling.heads import unwrap


def plan(
    model_or_config: Any,
    layers: Iterable[str] | str | int | None,
    *,
    batch_size: int | None = None,
    batch: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    sequence_length: int | None = None,
    image_size: int | None = None,
    dtype: Any = "auto",
    optimizer: str | Build = "adamw",
    lean: bool = True,
    checkpoint: Checkpoint | None = None,
    frozen: Frozen | None = None,
    stream: bool = False,
    head: str | Iterable[str] | None = "auto",
    device: PlannedDevice | None = None,
    accumulating: bool = False,
) -> Plan:
    """Plan a training step by a dry run on fake tensors: no GPU, no weights, seconds for a 7B model.

    Args:
        model_or_config: an nn.Module (it stays as it is; meta weights do); a PretrainedConfig, a config.json or its
            folder, which stand for their causal LM or classifier; or the name of one: llama-7b, llama-13b, llama-3-8b,
            mistral-7b, gpt2, bert-base, bert-large, vit-base, resnet-50, mobilenet-v2, efficientnet-b0.
        layers: names as for SelectiveBackward; "all" = full fine-tuning; None = whatever requires a gradient in the
            model as it is (one of PEFT, say); a number = so many layers from the lowest block up, evenly, for a plan
            before they are chosen.
        batch_size: samples of a step.
        batch: a batch in place of the three sizes, as for `profile`: only shapes and dtypes are read, and whether
            attention_mask masks anything.
        loss_fn: as for `profile`, with a batch.
        sequence_length: tokens of a sample; texts are unpadded.
        image_size: pixels of both sides.
        dtype: of weights and inputs: "bfloat16", "float16", "float32"; "bfloat16-mixed" = float32 under autocast; None
            = as the model has it; "auto" = bfloat16, with a batch None.
        optimizer: adamw, adamw-foreach (what torch takes on CUDA unless told otherwise), adamw-fused, adamw-8bit, adam,
            sgd, sgd-momentum; with "-masters" behind it MasterWeights around it, with "-in-backward" each gradient is
            used and dropped at once; or a function of the parameters that returns a torch.optim.Optimizer.
        lean: as for SelectiveBackward, which the dry run uses.
        checkpoint: as for SelectiveBackward. With "all", any checkpoint= means the gradient checkpointing of
            transformers.
        frozen: "int8" or "nf4" = frozen Linear layers but the head are kept quantised and unpacked one at a time, by
            formula: 1 byte a weight and 4 a row, or 0.5625 bytes a weight.
        stream: frozen weights from 1 MiB on are on disk, as `open_streamed` has them: on a CPU one layer's is resident
            while it multiplies, on a GPU two buffers are, as large as the largest layer.
        head: as for SelectiveBackward.
        device: that the step is to run on. "cuda" = tensors alone. "cpu" = also the copies on which oneDNN runs
            convolutions and recurrent layers, up to 37 % more. None = "cpu" for a module whose weights are on the CPU
            and for stream=True, else "cuda".
        accumulating: gradients of an earlier batch are there already, as in every later pass of a step of several.

    Returns:
        A Plan: print it, or ask it for `.peak_bytes`, `.flops`, `.breakdown`, `.within("24GB")` and more.

    Raises:
        ValueError: an unknown model, layer, dtype or optimizer, a size that is missing or has no place; it names the
            argument and what is needed. What the model's own code raises passes through.
        TypeError: something that is no model at all.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
        >>> step = zest_fast.plan(model, ["2"], batch_size=4, image_size=8)
        >>> full = zest_fast.plan(model, "all", batch_size=4, image_size=8)
        >>> step.peak_bytes < full.peak_bytes
        True
    """
    sizes = _sizes(batch, batch_size, sequence_length, image_size, loss_fn)
    if dtype == "auto":
        dtype = "bfloat16" if batch is None else None
    name, skeleton = named_model(model_or_config)
    if isinstance(layers, Integral) and not isinstance(layers, bool):
        layers = layout_of(skeleton).stand_ins(operator.index(layers), 0)
    setting = Setting(
        layers=_layers(layers),
        **sizes,
        dtype=dtype_name(dtype),
        optimizer=optimizer,
        lean=lean,
        checkpoint=checkpoint,
        frozen=frozen,
        head=head,
        device=("cpu" if stream else _device(model_or_config)) if device is None else device,
        stream=stream,
        accumulating=accumulating,
    )
    return plan_setting(name, skeleton, setting, _notes(skeleton), batch, loss_fn)


def _sizes(
    batch: Any,
    batch_size: int | None,
    sequence_length: int | None,
    image_size: int | None,
    loss_fn: Callable[..., Tensor] | None,
) -> dict[str, Any]:
    """Those of the setting; of a batch the number of samples and, of token ids, the length."""
    said = {"batch_size": batch_size, "sequence_length": sequence_length, "image_size": image_size}
    if batch is None:
        if batch_size is None:
            raise TypeError("plan needs batch_size= with the sizes of a sample, or batch=")
        if loss_fn is not None:
            raise ValueError("loss_fn is of a batch: pass batch= with it")
        return said
    if given := [name for name, value in said.items() if value is not None]:
        raise ValueError(f"batch= says its sizes, and {given[0]}= too: leave one of them out")
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is None:
        raise ValueError(f"batch: a batch of tensors is needed, and this {type(batch).__name__} holds none")
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    length = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
    return {"batch_size": max(1, first.shape[0]), "sequence_length": length}


def plan_setting(
    name: str,
    skeleton: nn.Module,
    setting: Setting,
    notes: tuple[str, ...] = (),
    batch: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
) -> Plan:
    """A plan of a model on the meta device, which stays as it is."""
    layout = layout_of(skeleton)

    def again(other: Setting) -> Plan:
        _check_sizes(batch, setting, other)
        return make_plan(name, other, dry_step(skeleton, layout, other, batch, loss_fn), layout, again, notes)

    return again(setting)


def _check_sizes(batch: Any, setting: Setting, other: Setting) -> None:
    """Raises ValueError for sizes that are not those of the batch."""

    def sizes_of(one: Setting) -> tuple[int | None, ...]:
        return one.batch_size, one.sequence_length, one.image_size

    if batch is not None and sizes_of(other) != sizes_of(setting):
        raise ValueError(
            "this plan is of a batch, whose sizes cannot be changed: plan with batch_size= and the sizes of a sample "
            "for a table of others"
        )


def plan_profile(
    model_or_config: Any,
    *,
    batch: Any = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    image_size: int | None = None,
    dtype: Any = "auto",
    metrics: MetricNames | None = None,
) -> Plan:
    """Plan the pass of `zest_fast.profile` on one batch: its memory and FLOPs, by a dry run as of `plan`.

    On a CPU the pass needs up to 32 MiB less, which GPUs take for a piece of a dW.

    Args:
        model_or_config: as for `plan`, as the batch, the sizes and dtype.
        batch: one to plan for, in the place of the sizes.
        batch_size: samples.
        sequence_length: tokens of a sample.
        image_size: pixels of both sides.
        dtype: of weights and inputs.
        metrics: as for `profile`.

    Returns:
        A Plan.

    Raises:
        ValueError: metrics that need no backward pass, and what `plan` refuses.
        NotImplementedError: metrics that take more than one pass.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
        >>> zest_fast.plan_profile(model, batch_size=4, image_size=8).purpose
        'profile'
    """
    sizes = _sizes(batch, batch_size, sequence_length, image_size, None)
    if dtype == "auto":
        dtype = "bfloat16" if batch is None else None
    setting = Setting(layers=None, **sizes, dtype=dtype_name(dtype))
    names = metrics if metrics is None or isinstance(metrics, str) else tuple(metrics)
    name, skeleton = named_model(model_or_config)
    layout, notes = layout_of(skeleton), _notes(skeleton)

    def again(other: Setting) -> Plan:
        _check_sizes(batch, setting, other)
        step = dry_profile(skeleton, layout, other, names, batch)
        return make_plan(name, other, step, layout, again, notes, purpose="profile")

    return again(setting)


def planned_peak(
    model: nn.Module,
    batch: Any,
    layers: Iterable[str] | str | None,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    head: str | Iterable[str] | None = "auto",
    optimizer: str | Build = "adamw",
    lean: bool = True,
    checkpoint: Checkpoint | None = None,
    frozen: Frozen | None = None,
    stream: bool = False,
    accumulating: bool = False,
) -> int:
    """Peak bytes of a training step of `model`, as it is, on a batch like `batch`: for whoever has both at hand.

    Args:
        model: stays as it is; its device is where the step runs.
        batch: as for `profile`; only shapes and dtypes are read, and whether attention_mask masks anything.
        layers: as for `plan`, as all that follow but loss_fn.
        loss_fn: as for `profile`.
        head: of SelectiveBackward.
        optimizer: its name, or what builds it.
        lean: of SelectiveBackward.
        checkpoint: of SelectiveBackward.
        frozen: of SelectiveBackward.
        stream: frozen weights are on disk, as for `plan`.
        accumulating: as for `plan`.

    Returns:
        Bytes.

    Raises:
        ValueError, TypeError: as `plan` does.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(6, 4), torch.randint(3, (6,))
        >>> zest_fast.planned_peak(model, batch, ["2"]) < zest_fast.planned_peak(model, batch, "all")
        True
    """
    return peaks(model, batch, loss_fn=loss_fn)(
        Setting(
            layers=_layers(layers),
            batch_size=1,  # the batch says it
            dtype=None,
            optimizer=optimizer,
            lean=lean,
            checkpoint=checkpoint,
            frozen=frozen,
            head=head,
            stream=stream,
            accumulating=accumulating,
        )
    )


def peaks(model: nn.Module, batch: Any, *, loss_fn: Callable[..., Tensor] | None = None) -> Callable[[Setting], int]:
    """`planned_peak` for several settings of one model, which is looked at once."""
    _, skeleton = named_model(model)
    layout, device = layout_of(skeleton), _device(model)
    return lambda setting: dry_step(skeleton, layout, replace(setting, device=device), batch, loss_fn).peak.size


def _device(model_or_config: Any) -> PlannedDevice:
    """Where a step of it runs as it is: what has no weights yet is for a GPU."""
    if not isinstance(model_or_config, nn.Module):
        return "cuda"
    first = next(model_or_config.parameters(), None)
    return "cpu" if first is not None and first.device.type == "cpu" else "cuda"


def _notes(model: nn.Module) -> tuple[str, ...]:
    if getattr(getattr(unwrap(model), "config", None), "use_cache", False) is not True:
        return ()
    return ("config.use_cache is True: keys and values of every block are kept for nothing; set it to False to train",)


def _layers(layers: Iterable[str] | str | int | None) -> tuple[str, ...] | str | None:
    if layers is None or layers == "all":
        return layers
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers={layers!r}: layer names, such as ranking.top(5), 'all' or None are needed")
    return tuple(layers)
