"""Float32 masters of weights in bfloat16 and float16: no step is rounded away, and the model keeps its types.

A step of 2e-5 is below half of the last digit of most weights in bfloat16, and the nearest number is the old one, step
after step. The optimizer moves a float32 copy instead, and the weight is that copy, rounded. For five layers that is
cheap: 4 bytes for each weight that trains, beside the 8 of AdamW's moments, which are float32 then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.lean.optimizer import ELEMENTWISE, adamw

LOW = (torch.bfloat16, torch.float16)


class MasterWeights(torch.optim.Optimizer):
    """An optimizer that steps float32 masters of what is in bfloat16 or float16, and rounds them into the model.

    Use it as the optimizer that it is around: schedulers act on its groups, `optimizer_in_backward` and `.save_run`
    take it. Parameters of other types are stepped as they are. What somebody else writes into a weight between two
    steps (a delta, `load_state_dict`) is taken over, entry by entry; the rest of its master stays.

    `optimizer.state_dict()` holds the masters; what a delta holds is the rounded weights, as the model has them. Not
    for torch.amp.GradScaler, which refuses gradients in float16 by itself, nor tested with FSDP2.

    Args:
        parameters: as for any optimizer: tensors, named tensors or groups.
        build: makes the optimizer of the masters: a class or function of parameters and options.
        **options: go to `build`.

    Attributes:
        inner: the optimizer of the masters.

    Raises:
        TypeError: `build` makes no optimizer.
        ValueError: no parameters, an optimizer that needs them as one vector and closures (LBFGS), or what `build`
            refuses.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
        >>> tuned = zest_fast.SelectiveBackward(model, ["0"])
        >>> optimizer = zest_fast.MasterWeights(tuned.parameters(), lr=2e-5)
        >>> model(torch.randn(6, 4).bfloat16()).float().square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.master_of(model[0].weight).dtype
        torch.float32
    """

    master_weights = True  #: asked for by what warns of steps that are rounded away

    def __init__(
        self,
        parameters: Iterable[Any],
        build: Callable[..., torch.optim.Optimizer] = adamw,
        **options: Any,
    ) -> None:
        groups = _as_groups(parameters)
        if not any(group["params"] for group in groups):
            raise ValueError("parameters: there are none (an iterator that was used already?)")
        self._masters: dict[Tensor, nn.Parameter] = {}
        self.inner = build([{**group, "params": self._held(group["params"])} for group in groups], **options)
        if not isinstance(self.inner, torch.optim.Optimizer):
            raise TypeError(f"build must make a torch.optim.Optimizer, not a {type(self.inner).__name__}")
        if isinstance(self.inner, torch.optim.LBFGS):
            raise ValueError("build: LBFGS takes closures and one vector of all parameters; take another optimizer")
        own = [
            {**_options_of(inner), "params": group["params"]}
            for inner, group in zip(self.inner.param_groups, groups, strict=True)
        ]
        super().__init__(own, dict(self.inner.defaults))

    def master_of(self, parameter: Tensor) -> Tensor:
        """The float32 master of a parameter; itself where it needs none.

        Args:
            parameter: one that this optimizer holds.

        Returns:
            A tensor that is not to be written to.

        Raises:
            KeyError: a parameter in bfloat16 or float16 that this optimizer does not hold.
        """
        return self._masters[parameter] if parameter.dtype in LOW else parameter

    @property
    def master_bytes(self) -> int:
        """What the masters take."""
        return sum(master.numel() * master.element_size() for master in self._masters.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer: further parameters, with options of their own.

        Args:
            param_group: "params" and options.

        Returns:
            None.

        Raises:
            ValueError: as torch does.
        """
        if not hasattr(self, "param_groups") or len(self.param_groups) < len(self.inner.param_groups):
            super().add_param_group(param_group)  # while it is built
            return
        (group,) = _as_groups([param_group])
        self.inner.add_param_group({**group, "params": self._held(group["params"])})
        super().add_param_group({**group, **_options_of(self.inner.param_groups[-1])})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the masters by the gradients of the weights, and round them into the weights.

        Args:
            closure: as of any optimizer: is called first, with gradients enabled.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: what the inner optimizer raises; the groups are then as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if isinstance(self.inner, ELEMENTWISE):  # one float32 gradient is alive at a time
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._step([(group, [parameter])])
        else:
            self._step([(group, group["params"]) for group in self.param_groups])
        return loss

    def _step(self, parts: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """One step of the inner optimizer over these parameters, with the options of their groups as they are now."""
        there = [(group, [p for p in parameters if p.grad is not None]) for group, parameters in parts]
        there = [(group, parameters) for group, parameters in there if parameters]
        if not there:
            return
        low = [parameter for _, parameters in there for parameter in parameters if parameter in self._masters]
        everything = self.inner.param_groups
        self.inner.param_groups = [
            {**_options_of(group), "params": [self._masters.get(p, p) for p in parameters]}
            for group, parameters in there
        ]
        try:
            for parameter in low:
                master = self._masters[parameter]
                _take_over(master, parameter)
                assert parameter.grad is not None
                master.grad = parameter.grad.to(master.dtype)
            self.inner.step()
            for stepped, (group, _) in zip(self.inner.param_groups, there, strict=True):
                group.update(_options_of(stepped))  # some count their steps there
            for parameter in low:
                parameter.copy_(self._masters[parameter])
        finally:
            self.inner.param_groups = everything
            for parameter in low:
                self._masters[parameter].grad = None

    @property
    def state(self) -> Any:
        """By parameter, what the inner optimizer keeps of its master, and "master"; to be read, as in state_dict()."""
        found: dict[Tensor, dict[str, Any]] = {}
        for parameter in self._every():
            held = dict(self.inner.state.get(self._masters.get(parameter, parameter), {}))
            if parameter in self._masters:
                held["master"] = self._masters[parameter].detach()
            if held:
                found[parameter] = held
        return found

    @state.setter
    def state(self, value: Any) -> None:
        """torch's own constructor sets an empty one."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what `state_dict()` gave, masters to the bit.

        Args:
            state_dict: of a MasterWeights over as many parameters, of the same shapes.

        Returns:
            None.

        Raises:
            ValueError: groups of other sizes, or a master that is missing or of another shape; nothing has changed
                then.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the state is of groups with other numbers of parameters than those of this optimizer")
        numbers = [number for group in groups for number in group["params"]]
        own = dict(zip(numbers, self._every(), strict=True))
        for number, parameter in own.items():
            master = states.get(number, {}).get("master")
            if parameter in self._masters and not _fits(master, parameter):
                raise ValueError(
                    f"the state of parameter {number} has no float32 master of shape {list(parameter.shape)}: it was "
                    "saved by an optimizer without masters, or of another model"
                )
        rest = {number: {k: v for k, v in state.items() if k != "master"} for number, state in states.items()}
        inner = {"state": {number: state for number, state in rest.items() if state}, "param_groups": list(groups)}
        self.inner.load_state_dict(inner)
        super().load_state_dict({"state": {}, "param_groups": list(groups)})
        with torch.no_grad():
            for number, parameter in own.items():
                if parameter in self._masters:
                    self._masters[parameter].copy_(states[number]["master"])

    def _every(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _held(self, parameters: Iterable[Any]) -> list[Any]:
        """What the inner optimizer is to step: masters, made here, and parameters that need none."""
        held: list[Any] = []
        for entry in parameters:
            name, parameter = entry if isinstance(entry, tuple) else (None, entry)
            if isinstance(parameter, Tensor) and parameter.dtype in LOW:
                master = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
                self._masters[parameter] = parameter = master
            held.append(parameter if name is None else (name, parameter))
        return held

    def __getstate__(self) -> dict[str, Any]:
        """torch's keeps but the state and the groups; copies need the masters."""
        return dict(vars(self))


def _as_groups(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups with a list of tensors, or of pairs (name, tensor), in each."""
    entries = list(parameters)
    if entries and isinstance(entries[0], dict):
        found = []
        for group in entries:
            held = group["params"]
            found.append({**group, "params": [held] if isinstance(held, Tensor) else list(held)})
        return found
    return [{"params": entries}]


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _take_over(master: Tensor, weight: Tensor) -> None:
    """Let the master be what the weight is, wherever that is not what the master rounds to."""
    same = master.to(weight.dtype) == weight
    torch.where(same, master, weight.to(master.dtype), out=master)  # without a question, which would wait for a GPU


def _fits(master: Any, parameter: Tensor) -> bool:
    return isinstance(master, Tensor) and master.shape == parameter.shape and master.dtype == torch.float32
