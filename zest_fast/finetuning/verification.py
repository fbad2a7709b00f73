"""The proof after training: what was chosen moved, and nothing else did."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from zest_fast.finetuning.digests import UNHASHED, Base, digests, saved_buffers
from zest_fast.finetuning.sharding import whole
from zest_fast.foundation.nearest import some


def verify(
    model: nn.Module,
    base: Base,
    chosen: Mapping[str, nn.Parameter],
    moving: Collection[str] = frozenset(),
    *,
    left: Mapping[str, str] | None = None,
    untried: Collection[str] = frozenset(),
) -> str:
    """Raise RuntimeError, naming each, unless every chosen weight moved and all else is bit for bit as it was.

    base: of the model when it was wrapped. Biases and other vectors may rest (some have no gradient by construction),
    and buffers beside a parameter that trains (batch norm in a head) may change, and those that the model's own forward
    pass moves (`moving`). Returns what was found, with the names of the latter.

    left: digests of what trained and was frozen during the run, at that moment: it has to be as it was then, and
    finite.
    untried: of the chosen, what there has been no backward pass for yet; it may rest.
    """
    left = left or {}
    frozen = dict(model.named_parameters())
    for name in chosen:
        frozen.pop(name, None)
    buffers = saved_buffers(model)
    places = {name.rpartition(".")[0] for name in (*chosen, *left)}
    still = {**frozen, **{name: buffer for name, buffer in buffers.items() if name.rpartition(".")[0] not in places}}
    now = digests({**still, **chosen})
    before = {**base.digests, **left}
    changed = [name for name in still if name in before and now[name] != before[name]]
    found = {
        "chosen, but did not move (no gradient, no step, or steps too small for the dtype)": [
            name
            for name, parameter in chosen.items()
            if parameter.dim() > 1 and now[name] == before[name] and name not in untried
        ],
        "chosen, but not finite any more (was the loss NaN?)": not_finite(
            {**chosen, **{name: frozen[name] for name in left if name in frozen}}
        ),
        "frozen, but changed": [name for name in changed if name not in moving or name not in buffers],
        "not there when the model was wrapped": [name for name in still if name not in before],
        "gone since the model was wrapped": sorted(before.keys() - frozen.keys() - buffers.keys() - chosen.keys()),
        "could not be read, so nobody knows": [name for name, digest in now.items() if digest == UNHASHED],
    }
    problems = [f"{what}: {some(map(repr, names))}" for what, names in found.items() if names]
    if problems:
        raise RuntimeError("verify: " + "; ".join(problems))
    report = "verified: every chosen weight moved, every frozen tensor is bit for bit as it was"
    if left:
        report += f" ({len(left)} that trained before an exchange: as when they left)"
    if untried:
        report += f"; not trained yet, since there was no backward pass after the exchange: {some(map(repr, untried))}"
    if changed:
        report += (
            f", but for buffers that the model's own forward pass moves in train mode, whatever is frozen (such as the "
            f"vectors of spectral norms): {some(map(repr, changed))}"
        )
    return report


def not_finite(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of those with an infinite entry or NaN."""
    return [name for name, parameter in parameters.items() if not torch.isfinite(whole(parameter)).all()]
