"""A choice of layers as a configuration of PEFT: adapters on exactly these layers, of low rank (LoRA + ZEST) or sparse
(SHiRA), and a selector in the form of PEFT's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from zest_fast.foundation.nearest import nearest, some
from zest_fast.integrations.exports import (
    outside_of_head,
    selected,
    suffix_matches,
    trained_head,
    used_without_a_call,
)
from zest_fast.profiling.heads import is_language_model, unwrap
from zest_fast.profiling.layers import is_transformers_conv1d
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import Ranking, rank

_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lora_config(
    layers: Ranking | Iterable[str],
    model: nn.Module,
    *,
    n: int | None = None,
    r: int = 8,
    ranks: Mapping[str, int] | Literal["score"] | None = None,
    head: str | Iterable[str] | None = "auto",
    **options: Any,
) -> LoraConfig:
    """A `LoraConfig` for `get_peft_model(model, ...)` that adapts exactly these layers.

    Args:
        layers: names, or a Ranking of which the `n` best are taken.
        model: to adapt.
        n: how many layers of a Ranking.
        r: rank of the adapters.
        ranks: for some of the layers another rank than `r`; "score" = by the scores of a Ranking, from the best of the
            chosen, which gets twice the rank of the last one, with a mean of about `r`. An adapter of another rank
            keeps the factor of the rest, lora_alpha / r or with use_rslora lora_alpha / sqrt(r) (PEFT's alpha_pattern).
        head: trained whole (PEFT's modules_to_save): "auto" = that of a classifier, of one of transformers all that it
            has beside its base model; nothing for a language model; names; None. Layers inside of it get no adapter.
        **options: further arguments of LoraConfig; lora_alpha is `r` where not given.

    Returns:
        The configuration.

    Raises:
        ValueError: a layer that the model does not have, that PEFT cannot adapt, or whose weight torch uses without a
            call (in nn.MultiheadAttention and nn.TransformerEncoderLayer), where an adapter does nothing.
    """
    targets = _targets(layers, model, n, head, _adaptable, "LoRA adapts Linear, Conv and Embedding")
    if ranks == "score":
        if not isinstance(layers, Ranking):
            raise ValueError("ranks='score' needs a Ranking with n=, which has scores; these are names")
        ranks = _ranks_by_score(layers, targets.names, r)
    if unknown := set(ranks or ()) - set(targets.names):
        raise ValueError(f"ranks names layers that are not among the chosen ones: {some(sorted(unknown))}")
    options.setdefault("task_type", _task_type(model))
    options.setdefault("lora_alpha", r)
    patterns = {f"^{re.escape(name)}": rank for name, rank in (ranks or {}).items()}
    power = 0.5 if options.get("use_rslora") else 1  # its factor is lora_alpha / sqrt(rank)
    alphas = {key: options["lora_alpha"] * (rank / r) ** power for key, rank in patterns.items()}
    options.setdefault("alpha_pattern", alphas)
    return LoraConfig(
        r=r, target_modules=targets.pattern, rank_pattern=patterns, modules_to_save=targets.whole, **options
    )


def _ranks_by_score(ranking: Ranking, names: Sequence[str], r: int) -> dict[str, int]:
    """A rank for each of these layers: linear in its score, the best one's twice the last one's, the mean about `r`."""
    scores = np.array([ranking.scores[ranking.names.index(name)] for name in names])
    spread = np.ptp(scores)
    shares = 1 + (scores - scores.min()) / spread if spread > 0 else np.ones(len(names))
    ranks = np.maximum(1, np.rint(r * shares / shares.mean())).astype(int)
    return dict(zip(names, ranks.tolist(), strict=True))


def shira_config(
    layers: Ranking | Iterable[str],
    model: nn.Module,
    *,
    n: int | None = None,
    r: int = 8,
    mask: Literal["random", "magnitude"] = "random",
    head: str | Iterable[str] | None = "auto",
    **options: Any,
) -> PeftConfig:
    """A `ShiraConfig` (PEFT 0.17): of exactly these layers r (rows + columns) single weights train, as many as of LoRA.

    Args:
        layers: names, or a Ranking of which the `n` best are taken.
        model: to adapt.
        n: how many layers of a Ranking.
        r: the rank of the LoRA that would have as many parameters.
        mask: which weights: "random" as PEFT draws them, or "magnitude" = the largest of the pretrained ones.
        head: as in `lora_config`.
        **options: further arguments of ShiraConfig.

    Returns:
        The configuration.

    Raises:
        ValueError: a layer that the model does not have, that is no nn.Linear, or that has fewer weights.
    """
    from peft import ShiraConfig

    if mask not in ("random", "magnitude"):
        raise ValueError(f"mask={mask!r} is unknown; {nearest(mask, ('random', 'magnitude'))}")
    targets = _targets(layers, model, n, head, lambda module: isinstance(module, nn.Linear), "SHiRA adapts nn.Linear")
    for name in targets.names:
        weight = model.get_parameter(f"{name}.weight")
        if r * sum(weight.shape) > weight.numel():
            raise ValueError(
                f"r={r}: of {name!r}, which is {' x '.join(map(str, weight.shape))}, {r * sum(weight.shape):,} weights "
                f"would train, and it has {weight.numel():,}; take a smaller r"
            )
    config: Any = ShiraConfig(r=r, target_modules=targets.pattern, modules_to_save=targets.whole, **options)
    if mask == "magnitude":
        config.mask_fn = _largest
    return config


def _largest(layer: Any, r: int, **_: Any) -> torch.Tensor:
    """As PEFT asks for a mask: shape, dtype and device of the weight, with r (rows + columns) ones."""
    weight = layer.weight.detach()
    kept = weight.abs().flatten().topk(r * sum(weight.shape)).indices
    return torch.zeros_like(weight).flatten().index_fill_(0, kept, 1).view_as(weight)


class ZestSelector:
    """Targets for an adapter of PEFT by ZEST's score, in the form of PEFT's `KappaTuneSelector`.

    Args:
        model: to adapt.
        ranking: of its layers, or a batch as of `zest_fast.profile`, by which they are then ranked.

    Raises:
        ValueError: also of its methods: names that PEFT would take for other modules too (it goes by the ends of
            names), for which `lora_config` has a pattern; a share or number that there cannot be.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from zest_fast.integrations.peft import ZestSelector
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> selector = ZestSelector(model, (torch.randn(6, 4), torch.randint(3, (6,))))
        >>> sorted(selector.get_best_targets(num_modules=2)), selector.get_best_target_parameters()
        (['0', '2'], [])
    """

    def __init__(self, model: nn.Module, ranking: Any) -> None:
        self.model = model
        self.ranking = ranking if isinstance(ranking, Ranking) else rank(profile(model, ranking))

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Modules for `target_modules`, best first; those of a head that trains whole are not among them.

        Args:
            top_p: this share of them, one at least.
            num_modules: so many; goes before top_p, as in PEFT.
            threshold: those with this score or a better one.

        Returns:
            Their names; all where no argument is given.
        """
        modules = dict(self.model.named_modules())

        def fits(name: str) -> bool:
            return _adaptable(modules.get(name)) and not used_without_a_call(modules, name)

        return self._best(fits, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of fused experts, whose weights of three dimensions are for `target_parameters`.

        Args:
            top_p: as above.
            num_modules: as above.
            threshold: as above.

        Returns:
            Names of parameters.
        """
        fused = {name for name, parameter in self.model.named_parameters() if parameter.dim() == 3}
        return self._best(fused.__contains__, top_p, num_modules, threshold)

    def _best(
        self, fits: Callable[[str], bool], top_p: float | None, number: int | None, threshold: float | None
    ) -> list[str]:
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p!r}: expected a share above 0 and at most 1")
        if number is not None and (isinstance(number, bool) or number < 1):
            raise ValueError(f"num_modules={number!r}: expected 1 or more")
        heads = set(self.ranking.heads)
        scored = dict(zip(self.ranking.names, self.ranking.scores, strict=True))
        names = [name for name, score in scored.items() if name not in heads and not np.isnan(score) and fits(name)]
        if number is not None:
            names = names[:number]
        elif top_p is not None:
            names = names[: max(1, int(len(names) * top_p))]
        elif threshold is not None:
            names = [name for name in names if scored[name] >= threshold]
        if names and (others := suffix_matches(self.model, names)):
            raise ValueError(
                f"PEFT takes names for the ends of names, so these would bring in {some(others)}; lora_config makes a "
                "configuration with a pattern"
            )
        return names


class _Targets(NamedTuple):
    """names: of the modules that get an adapter. pattern: those for PEFT. whole: what trains whole."""

    names: tuple[str, ...]
    pattern: str | list[str]
    whole: list[str] | None


def _targets(
    layers: Ranking | Iterable[str],
    model: nn.Module,
    n: int | None,
    head: str | Iterable[str] | None,
    fits: Callable[[nn.Module | None], bool],
    adapts: str,
) -> _Targets:
    whole = trained_head(model, layers, head)
    names = outside_of_head(selected(layers, n), whole)
    others = suffix_matches(model, names)
    modules = dict(model.named_modules())
    if unfit := [name for name in names if not fits(modules.get(name))]:
        raise ValueError(f"layers: {adapts}, not {some(unfit)}; leave out what it cannot")
    if idle := [name for name in names if used_without_a_call(modules, name)]:
        raise ValueError(
            f"layers: torch's own attention and encoder layers take the weights of {some(idle)} and do not call them, "
            "in eval mode at the latest, so that an adapter there does nothing; train the layers themselves, with "
            "SelectiveBackward"
        )
    if more := _ends_alike(model, whole):
        raise ValueError(
            f"head: PEFT takes modules_to_save for the ends of names, so {some(whole)} would bring in {some(more)}, "
            "which would train too; name another head=, or add them to it"
        )
    # PEFT takes a list for the ends of names; where another module ends the same, only a whole match tells.
    return _Targets(names, "|".join(map(re.escape, names)) if others else list(names), list(whole) or None)


def _ends_alike(model: nn.Module, whole: Sequence[str]) -> list[str]:
    """Other modules that PEFT takes for one of these names, with parameters and not inside of them."""
    inside = tuple(f"{name}." for name in whole)
    return [
        name
        for name, module in model.named_modules()
        if name.endswith(tuple(whole)) and not f"{name}.".startswith(inside) and any(True for _ in module.parameters())
    ]


def _task_type(model: nn.Module) -> str | None:
    """What PEFT adds generation for; models of masked tokens have none."""
    inner: Any = unwrap(model)
    if not is_language_model(inner) or not hasattr(inner, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if inner.config.is_encoder_decoder else "CAUSAL_LM"


def _adaptable(module: nn.Module | None) -> bool:
    return isinstance(module, _ADAPTABLE) or (module is not None and is_transformers_conv1d(module))
