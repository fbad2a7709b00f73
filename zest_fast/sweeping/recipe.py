"""How a contribution is measured. Rankings depend on it, so its hash goes with every record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from zest_fast.foundation.documents import json_hash


@dataclass(frozen=True)
class Recipe:
    """Everything that the score of a layer depends on beside model and data.

    A layer's learning rate is `layer_lr_factor` x RMS(W), at most `max_layer_lr`: stems and early depthwise layers have
    large weights of few inputs, and a rate in proportion to those breaks them. Both rates fall linearly to zero.

    Args:
        steps: training steps of each layer.
        batch_size: samples in a step.
        optimizer: "adam".
        decay: "linear".
        head_lr: learning rate of the head.
        layer_lr_factor: see above.
        max_layer_lr: see above.
        seeds: samples are drawn by seed, disjoint between seeds as far as the split reaches.
        head_samples: so many a seed warm the head; None = the whole split.
        train_samples: so many a seed train a layer; None = the whole split.
        profile_samples: the first of the seed's training samples make the mini-batch that is profiled.
        head_strengths: L2 of the head, one of these.
        note: what the numbers do not say.

    Raises:
        ValueError: values that cannot be.

    Examples:
        >>> import zest_fast
        >>> recipe = zest_fast.Recipe(steps=8, seeds=(0,))
        >>> recipe.layer_lr(rms=0.05)
        0.0005
        >>> recipe == zest_fast.Recipe.from_dict(recipe.to_dict())
        True
    """

    steps: int = 32
    batch_size: int = 32
    optimizer: str = "adam"
    decay: str = "linear"
    head_lr: float = 5e-4
    layer_lr_factor: float = 1e-2
    max_layer_lr: float = 2e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    head_samples: int | None = 500
    train_samples: int | None = 1024
    profile_samples: int = 64
    """The first of the seed's training samples make the mini-batch that is profiled."""
    head_strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """L2 of the head, one of these: the best on 20 % of the first seed's head samples, then the same for every seed."""
    note: str = ""
    """What the numbers do not say: how the factor was chosen, how the images were prepared."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "head_strengths", tuple(float(strength) for strength in self.head_strengths))
        for name in ("steps", "batch_size", "head_samples", "train_samples", "profile_samples"):
            value = getattr(self, name)
            optional = name in ("head_samples", "train_samples")
            if not (optional and value is None) and not (isinstance(value, int) and value > 0):
                raise ValueError(f"recipe: {name} is {value!r}; a positive whole number is needed")
        for name in ("head_lr", "layer_lr_factor", "max_layer_lr"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"recipe: {name} is {value!r}; a positive number is needed")
        if self.optimizer != "adam":
            raise ValueError(f"recipe: optimizer is {self.optimizer!r}; there is 'adam' only")
        if self.decay != "linear":
            raise ValueError(f"recipe: decay is {self.decay!r}; there is 'linear' only")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"recipe: seeds is {self.seeds!r}; different whole numbers from 0 on are needed")
        if not self.head_strengths or any(strength <= 0 for strength in self.head_strengths):
            raise ValueError(f"recipe: head_strengths is {self.head_strengths!r}; positive numbers are needed")

    def layer_lr(self, rms: float) -> float:
        """The learning rate of a layer.

        Args:
            rms: root mean square of its weight.

        Returns:
            `layer_lr_factor` x rms, at most `max_layer_lr`.

        Raises:
            TypeError: no number.
        """
        return min(self.layer_lr_factor * rms, self.max_layer_lr)

    def learning_rate_scale(self, step: int) -> float:
        """What both rates are multiplied by in a step.

        Args:
            step: 0, 1, ...

        Returns:
            1 in the first step, falling linearly.

        Raises:
            TypeError: no number.
        """
        return 1 - step / self.steps

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that differ as soon as any value does."""
        return json_hash(self.to_dict())[:16]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"seeds": list(self.seeds), "head_strengths": list(self.head_strengths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` described.

        Args:
            values: what `to_dict` gave.

        Returns:
            An equal recipe.

        Raises:
            ValueError: names that this version does not know, or values that cannot be.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"recipe: {unknown[0]!r} is unknown to this version")
        return cls(**values)
