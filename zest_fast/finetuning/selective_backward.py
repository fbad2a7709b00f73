"""Fine-tune a few layers in place: they and the head train, and backward ends at the lowest of them."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zest_fast.finetuning.cut import Cut, remove_copied_cut
from zest_fast.finetuning.delta_files import Delta, check_tensors, names_in, read_delta, write_delta
from zest_fast.finetuning.digests import Base, digest, digest_of_modules, digests, saved_buffers
from zest_fast.finetuning.first_step import FirstStep
from zest_fast.finetuning.moving_buffers import MovingBuffers
from zest_fast.finetuning.optimizer_check import check_optimizer
from zest_fast.finetuning.quantised_models import UnpackedLayers, can_be_unpacked
from zest_fast.finetuning.quantised_weights import QuantisedWeights, weight_counts
from zest_fast.finetuning.recomputation import AboveCut, InputGradients
from zest_fast.finetuning.rounding import Samples, complaints, lost_steps
from zest_fast.finetuning.run_state import Objects, Stateful, random_state, read_run, set_random_state, write_run
from zest_fast.finetuning.sharding import put
from zest_fast.finetuning.summary import Summary
from zest_fast.finetuning.trainable_layers import Part, chosen_layers, head_layers
from zest_fast.finetuning.verification import not_finite, verify
from zest_fast.finetuning.wrapped_models import mark_wrapped, refuse_wrapped, unmark_wrapped
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.nearest import some
from zest_fast.foundation.options import Checkpoint, Frozen
from zest_fast.foundation.removable import Removable
from zest_fast.lean.apply import apply_lean
from zest_fast.lean.frozen_norms import keep_frozen_norms_in_eval
from zest_fast.prefix.cache import PrefixCache
from zest_fast.prefix.cached_passes import CachedPasses
from zest_fast.profiling.processes.local import is_distributed


class SelectiveBackward(Removable):
    """Let the weight and bias of the chosen `layers` and the `head` train and freeze the rest, in place.

    Use the model as before; give `.parameters()` to the optimizer. `.remove()`, or the end of a `with` block, gives the
    model back as found, with its tuned weights.

    Chosen layers of a model that bitsandbytes has quantised are unpacked, and stay so.

    While wrapped, a forward pass makes no graph below the lowest weight that trains (see cut.py), also with gradient
    checkpointing of transformers and its `enable_input_require_grads()`. An input that requires a gradient gets it, and
    may be differentiated twice; that and whatever else is made to train (an adapter) moves the cut. Choosing a layer
    that shares its weight with an embedding makes backward run down to the embedding. Batch norm whose parameters are
    frozen runs in eval mode, also after `model.train()`. The `.grad` of what is frozen is neither read nor cleared.

    Compiled code (torch.compile of the wrapped model or of its blocks) has the cut that freezing gives. Ctrl-C waits
    for the end of wrapping, of `.remove()` and of `.resume()`, each of which is done whole or not at all.

    Every tensor is hashed once, for `.verify()` and `.save()`: a second for each GB and core.

    Args:
        model: any nn.Module that is not wrapped yet; torch.compile, DistributedDataParallel and accelerate come
            afterwards, peft before (its get_peft_model freezes what it finds).
        layers: names as in a profile, such as `ranking.top(5)`.
        head: "auto" = the last layer of a classifier, nothing for a language model (ValueError where that cannot be
            told); a name or names of modules, each with all its parameters; None.
        checkpoint: "above-cut" = blocks recompute their activations in backward; None = as the model does.
        lean: frozen modules above the cut keep only what the gradient of their input needs, where that is exact (see
            `apply_lean`); `.summary()` names those that stay plain. False = as torch keeps them.
        frozen: "int8" or "nf4" (extra `quant`) = frozen nn.Linear layers but the head are kept quantised, in half or
            0.28 of the memory of bfloat16, and unpacked one at a time; what trains keeps its dtype. Rounding is for
            good: `.remove()` unpacks, into the memory of the plain model, and does not bring back what was lost; a
            delta fits a model that is wrapped in the same way. While wrapped, state_dict() has `packed` and `scale` for
            `weight`.
        cache: a PrefixCache = what is frozen below the cut computes each sample once and reads it from disk afterwards.

    Attributes:
        model: the one that was given.
        trainable_names: of the parameters that train.

    Raises:
        ValueError: a layer that does not exist or cannot train, or nothing that would train.
        RuntimeError: a model that is wrapped, compiled or in DistributedDataParallel already. The model is then
            untouched. A layer that the first backward pass does not reach is named in a warning, one that something
            freezes later in a RuntimeError.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with zest_fast.SelectiveBackward(model, ["2"]) as tuned:
        ...     optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        ...     for x in torch.randn(2, 6, 4):
        ...         nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     _ = tuned.verify()
        ...     print(tuned.trainable_names, tuned.cut)
        ('2.weight', '2.bias', '4.weight', '4.bias') 2
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        *,
        head: str | Iterable[str] | None = "auto",
        checkpoint: Checkpoint | None = None,
        lean: bool = True,
        frozen: Frozen | None = None,
        cache: PrefixCache | None = None,
    ) -> None:
        if checkpoint not in (None, "above-cut"):
            raise ValueError(f"checkpoint must be None or 'above-cut', not {checkpoint!r}")
        refuse_wrapped(model)
        self._layers = chosen_layers(model, layers)
        self._head = head_layers(model, head)
        if not self._layers and not self._head:
            raise ValueError("nothing would train: layers is empty and there is no head; choose layers or pass head=")
        if cache is not None and not isinstance(cache, PrefixCache):
            raise TypeError(f"cache must be a PrefixCache or None, not {type(cache).__name__}")
        self.model = model
        self._cache = cache
        self._quantised = None if frozen is None else QuantisedWeights(model, frozen, self._chosen_ids())
        self._found = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._removed = False
        self._optimizer: weakref.ref[Any] | None = None  # the one that was last seen
        self._handles: list[Any] = []  # whatever has .remove()
        self._unpacked: UnpackedLayers | None = None
        self._first_step: FirstStep | None = None
        self._passes: CachedPasses | None = None
        # Layers that trained before an exchange, and rest since: digests of their parameters when they were frozen.
        self._left: dict[str, dict[str, str]] = {}
        self._fresh: tuple[str, ...] = ()  # parameters that the last exchange let train
        try:
            with HeldInterrupts():
                self._choose(checkpoint)
            self._base, self._samples = Base(model), Samples(self._chosen())  # takes long: may be interrupted
            with HeldInterrupts():
                self._put_in(checkpoint, lean)
        except BaseException as error:
            with HeldInterrupts():
                self.remove()
                if self._unpacked is not None:
                    self._unpacked.undo()
            if self._quantised is not None and self._quantised.rounded:
                error.add_note("frozen weights have been rounded before this happened: load the model again")
            raise

    def _chosen_ids(self) -> set[int]:
        return {id(parameter) for part in (*self._layers, *self._head) for parameter in part.parameters}

    def _choose(self, checkpoint: str | None) -> None:
        """What trains requires a gradient, and nothing else; frozen weights are packed."""
        model = self.model
        self._unpacked = UnpackedLayers(model, (*self._layers, *self._head))
        if self._unpacked:  # these are other parameters now
            self._layers = chosen_layers(model, _names(self._layers))
            self._head = head_layers(model, _names(self._head))
        chosen = self._chosen_ids()
        self.trainable_names = tuple(name for name, parameter in model.named_parameters() if id(parameter) in chosen)
        remove_copied_cut(model)
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        if self._quantised is not None:
            if checkpoint is not None:
                AboveCut(model).remove()  # raises what it raises before anything is rounded
            self._handles.append(self._quantised)
            self._quantised.put_in()

    def _put_in(self, checkpoint: str | None, lean: bool) -> None:
        self._handles += keep_frozen_norms_in_eval(self.model)
        self._lean = apply_lean(self.model) if lean else None
        if self._lean is not None:
            self._handles.append(self._lean)
        if checkpoint is not None:
            self._handles.append(AboveCut(self.model))
        self._handles.append(InputGradients(self.model))
        self._buffers = MovingBuffers(self.model)
        if self._cache is not None:
            self._passes = CachedPasses(self._cache, self.model, partial(digest_of_modules, self.model))
            self._handles.append(self._passes)
        self._cut = Cut(self.model, self._chosen(), self._buffers, self._leave_compiled_code, self._passes)
        self._handles.append(self._cut)
        if self._samples:
            self._first_step = FirstStep(self._chosen, self._remember)
            self._handles.append(self._first_step)
        mark_wrapped(self.model)

    def _leave_compiled_code(self, modules: frozenset[int]) -> None:
        if self._lean is not None:
            self._lean.take_out(modules)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that train beside the head."""
        return _names(self._layers)

    @property
    def former_layers(self) -> tuple[str, ...]:
        """Those that trained before an exchange, and are frozen with what they learned."""
        return tuple(self._left)

    @property
    def head(self) -> tuple[str, ...]:
        """What trains as the head."""
        return _names(self._head)

    def exchange(self, layers: Iterable[str]) -> SelectiveBackward:
        """Let these layers train from now on, in the place of those that do; the head stays.

        Between two steps. The cut, lean saving, checkpointing and the prefix cache (which learns the new cut from the
        next batch) follow; an optimizer does not: `zest_fast.Reselect` exchanges in both. A layer that leaves is frozen
        with what it has learned, its `.grad` is None, `.save()` writes it, and `.verify()` holds it against the moment
        that it left. Ctrl-C waits; it is done whole or not at all.

        Args:
            layers: all that train beside the head, as when the model was wrapped.

        Returns:
            Itself.

        Raises:
            ValueError: a layer that does not exist or cannot train, or nothing that would train.
            NotImplementedError: frozen="int8" or "nf4", layers that bitsandbytes has quantised, several processes, or
                sharded parameters.
            RuntimeError: after `.remove()`, or within a forward pass. The model is untouched in each case.
        """
        layers = tuple(layers)
        names = self.check_exchange(layers)
        fresh, old = chosen_layers(self.model, layers), chosen_layers(self.model, self.layers)
        head = head_layers(self.model, self.head) if self._head else ()  # with the parameters that are there now
        trained, there = self._chosen(), dict(self.model.named_parameters())
        leaving = {name: parameter for name, parameter in trained.items() if name not in names}
        entering = {name: there[name] for name in names if name not in trained}
        left = {name: found for name, found in self._left.items() if name not in _names(fresh)}
        for part in old:
            found = {n: digest(p) for n, p in leaving.items() if any(p is own for own in part.parameters)}
            if any(found[name] != self._base.digests.get(name) for name in found):
                left[part.name] = found
        with HeldInterrupts():
            before = {name: vars(self)[name] for name in _OF_A_CHOICE}
            flags = [(parameter, parameter.requires_grad) for parameter in there.values()]
            try:
                self._samples.add(entering)
                self._layers, self._head, self.trainable_names = fresh, head, names
                self._left, self._fresh = left, tuple(entering)
                for parameter in leaving.values():
                    parameter.requires_grad_(False)
                for parameter in entering.values():
                    parameter.requires_grad_(True)
                self._follow()
            except BaseException:
                vars(self).update(before)
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
                self._follow()
                raise
            for parameter in leaving.values():
                parameter.grad = None
        return self

    def check_exchange(self, layers: Iterable[str]) -> tuple[str, ...]:
        """Whether `exchange` could be done; changes nothing.

        Args:
            layers: as for `exchange`.

        Returns:
            The parameters that would train, by name.

        Raises:
            ValueError, NotImplementedError, RuntimeError: as `exchange`.
        """
        parts = chosen_layers(self.model, layers)
        if self._removed:
            raise RuntimeError("exchange: the model is not wrapped any more (.remove() was called); wrap it again")
        if not parts and not self._head:
            raise ValueError("exchange: nothing would train: layers is empty and there is no head")
        if self._quantised is not None:
            raise NotImplementedError(
                f"exchange: with frozen={self._quantised.format!r} what is frozen is packed and rounded for good, and "
                "layers cannot be exchanged during a run; wrap without frozen="
            )
        for part in parts:
            if any(map(can_be_unpacked, part.parameters)):
                raise NotImplementedError(
                    f"exchange: {part.name!r} is quantised by bitsandbytes, and layers are unpacked only when the "
                    "model is wrapped; choose it there, or another layer"
                )
            if any(getattr(parameter, "pages", None) is not None for parameter in part.parameters):
                raise NotImplementedError(
                    f"exchange: {part.name!r} stays on disk (open_streamed), and cannot train there; name it in train= "
                    "when the model is opened"
                )
        sharded = next((name for name, p in self.model.named_parameters() if is_distributed(p)), None)
        if sharded is not None:
            raise NotImplementedError(
                f"exchange: {sharded!r} is sharded over processes (FSDP, tensor parallel), where layers cannot be "
                "exchanged during a run"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            if processes > 1:
                raise NotImplementedError(
                    f"exchange: one of {processes} processes: DistributedDataParallel averages the gradients of what "
                    "trained when it was built, and not of layers that are exchanged later"
                )
        if self._cut.is_running:
            raise RuntimeError("exchange: within a forward pass of the model; call it between two steps")
        head = head_layers(self.model, self.head) if self._head else ()
        own = {id(parameter) for part in (*parts, *head) for parameter in part.parameters}
        return tuple(name for name, parameter in self.model.named_parameters() if id(parameter) in own)

    def _follow(self) -> None:
        """All that goes by what trains."""
        if self._lean is not None:
            self._lean.follow(self.model)
            self._lean.take_out(self._cut.compiled)
        if self._passes is not None and self._cache is not None:
            self._passes.remove()
            passes = CachedPasses(self._cache, self.model, partial(digest_of_modules, self.model))
            self._handles[self._handles.index(self._passes)] = passes
            self._passes = passes
        self._cut.follow(self._chosen(), self._passes)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains, for the optimizer: each parameter once, in the order of `trainable_names`."""
        return iter(self._chosen().values())

    @property
    def cut(self) -> str:
        """The lowest layer that trains: by registration before the first forward pass, then by the order of use."""
        return self._cut_and_tie()[0]

    def summary(self, optimizer: torch.optim.Optimizer | None = None) -> Summary:
        """What trains, where backward ends and what it skips; print it.

        Args:
            optimizer: is checked where it is given; a warning says where its steps are too small for weights in
                bfloat16 or float16.

        Returns:
            The summary.

        Raises:
            ValueError: the optimizer lacks something that trains, or holds something frozen because it was built before
                the model was wrapped.
        """
        cut, tied = self._cut_and_tie()
        counts = weight_counts(self.model)
        skipped = {id(p) for name in self._cut.skipped for p in self.model.get_submodule(name).parameters()}
        return Summary(
            trainable_parameters=sum(parameter.numel() for parameter in self.parameters()),
            total_parameters=sum(counts.values()),
            layers=_names(self._layers),
            head=_names(self._head),
            cut=cut,
            tied=tied,
            skipped_parameters=sum(counts[key] for key in skipped),
            lean=str(self._lean) if self._lean is not None else "",
            frozen=str(self._quantised or ""),
            cache=str(self._cache or ""),
            foreign=0 if optimizer is None else self._check_optimizer(optimizer),
            rounding="" if optimizer is None else self._rounding(optimizer),
        )

    def _rounding(self, optimizer: Any) -> str:
        self._remember(optimizer)
        lost = lost_steps(optimizer, self._chosen())
        if self._first_step is not None:
            self._first_step.told = True  # here
        if lost is not None:
            warnings.warn(str(lost), stacklevel=3)
        return "" if lost is None else str(lost)

    def _remember(self, optimizer: Any) -> None:
        with contextlib.suppress(TypeError):  # of a kind that knows no weak references
            self._optimizer = weakref.ref(optimizer)

    def _check_optimizer(self, optimizer: Any) -> int:
        replaced = () if self._quantised is None else self._quantised.replaced()
        return check_optimizer(optimizer, self._chosen(), self.model, replaced)

    def verify(self) -> str:
        """After training: every chosen weight moved and is finite, and all that is frozen is bit for bit as it was
        (what trained before an exchange: as it was when it left).

        Takes a second for each GB and core. With FSDP2 (`fully_shard`) every process has to call it, as `.save()` and
        `.load()`: shards are gathered one by one. Warns where weights in bfloat16 or float16 have not moved, since
        their steps were rounded away.

        Returns:
            What was found. Buffers that the model's own forward pass moves in train mode, such as the vectors of
            spectral norms, are no fault; they are named there, and travel with a delta.

        Raises:
            RuntimeError: a chosen weight that did not move or is not finite, a frozen parameter or buffer that changed,
                each by its name.
        """
        if self._removed and self._quantised is not None:
            raise RuntimeError("verify: the quantised weights are unpacked since .remove(); call .verify() before it")
        untried = () if self._cut.had_a_backward_pass else self._fresh
        found = verify(
            self.model, self._base, self._chosen(), self._buffers.names, left=self._digests_left(), untried=untried
        )
        optimizer = self._optimizer() if self._optimizer is not None else None
        tried = {name: parameter for name, parameter in self._ever().items() if name not in untried}
        for complaint in complaints(self._samples, tried, optimizer):
            warnings.warn(f"verify: {complaint}", stacklevel=2)
            found += f"; {complaint}"
        return found

    @property
    def frozen_format(self) -> str | None:
        """What frozen weights are kept in: "int8", "nf4" or None."""
        return None if self._quantised is None or self._removed else self._quantised.format

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        ranking: Any = None,
        recipe: Any = None,
        class_names: Iterable[str] = (),
        data: Any = None,
    ) -> Path:
        """Write the trained parameters and the buffers that changed as a safetensors delta.

        Args:
            path: an existing file is replaced at once or kept, also where the disk is full.
            ranking: how the layers were chosen, for the record: a Ranking, a dataclass or plain data.
            recipe: how they were trained, likewise.
            class_names: what the outputs are called, in their order, where the model is a classifier.
            data: how data became batches (columns, max length), for whoever evaluates it; likewise.

        Returns:
            The path.

        Raises:
            RuntimeError: a trained parameter is not finite; nothing is written.
            TypeError: class_names is one string, or something of the rest is no plain data; nothing is written.
            ValueError: a class name twice; nothing is written.
            OSError: the file cannot be written.
        """
        names = _class_names(class_names)
        return write_delta(path, replace(self._delta(), ranking=ranking, recipe=recipe, class_names=names, data=data))

    def load(self, path: str | os.PathLike[str]) -> SelectiveBackward:
        """Put a saved delta into the model, exact to the bit.

        Args:
            path: what `.save()` wrote.

        Returns:
            Itself.

        Raises:
            ValueError: the file is torn or foreign, other layers trained, or the frozen parameters were others than
                those that the delta was made on. The model is then untouched.
        """
        delta = read_delta(path)
        self._check(path, delta)
        with HeldInterrupts():
            self._put(delta)
        return self

    def save_run(
        self,
        path: str | os.PathLike[str],
        optimizer: torch.optim.Optimizer,
        scheduler: Stateful | None = None,
        *,
        progress: Any = None,
        **others: Stateful,
    ) -> Path:
        """Write all that `resume` needs to go on as if the run had not stopped.

        That is the trained parameters, changed buffers, the states of the objects given here, and of the random
        generators of torch, NumPy and Python. Not the place in the data.

        Args:
            path: an existing file is replaced at once or kept.
            optimizer: the one that trains.
            scheduler: that of the learning rate, if there is one.
            progress: where you are in the data, as plain data; `resume` returns it.
            **others: a GradScaler, a sampler: what has a state_dict.

        Returns:
            The path.

        Raises:
            RuntimeError: a trained parameter is not finite, or layers were exchanged, which `resume` would not know;
                nothing is written.
            OSError: the file cannot be written.
        """
        if self._left:
            raise RuntimeError(
                f"save_run: {some(map(repr, self._left))} trained before an exchange, and a run with exchanges cannot "
                "be resumed; .save() writes what was trained"
            )
        self._remember(optimizer)
        return write_run(path, self._delta(), _stateful(optimizer, scheduler, others), progress)

    def resume(
        self,
        path: str | os.PathLike[str],
        optimizer: torch.optim.Optimizer,
        scheduler: Stateful | None = None,
        **others: Stateful,
    ) -> Any:
        """Put back what `save_run` wrote, exact to the bit, into this model and these objects.

        Args:
            path: the file.
            optimizer: a new one of the same kind over the same parameters.
            scheduler: a new one, if there was one.
            **others: new ones under the same names.

        Returns:
            The `progress` that was saved.

        Raises:
            ValueError: the file is torn or foreign, or does not fit this model, these layers or these objects.
                Everything is then as it was.
            RuntimeError: layers were exchanged since the model was wrapped.
        """
        if self._left:
            raise RuntimeError("resume: layers were exchanged since this model was wrapped; wrap it anew first")
        run = read_run(path)
        self._check(path, run.delta)
        self._remember(optimizer)
        before = {name: tensor.detach().clone() for name, tensor in self._kept().items()}
        try:
            objects = Objects(_stateful(optimizer, scheduler, others), run)
            with HeldInterrupts():
                generators = random_state()
                try:
                    objects.put()
                    self._put(run.delta)
                    set_random_state(run.random)
                except BaseException:
                    objects.put_back()
                    self._put_back(before)
                    set_random_state(generators)
                    raise
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} does not fit: {error}") from error
        return run.progress

    def remove(self) -> None:
        """Give the model back: `requires_grad` as found, no hooks, tuned weights. A second call does nothing.

        With frozen="int8" or "nf4" the frozen weights are plain again, rounded as they were, in new Parameters.
        """
        if self._removed:
            return
        with HeldInterrupts():
            while self._handles:
                self._handles[-1].remove()
                self._handles.pop()  # now, so that a second call goes on where one was stopped by an error
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(self._found.get(name, parameter.requires_grad))
            unmark_wrapped(self.model)
            self._removed = True

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a wrapped model hold this; they have no optimizer yet."""
        return {**vars(self), "_optimizer": None}

    def __repr__(self) -> str:
        state = "removed; while wrapped: " if self._removed else ""
        return f"SelectiveBackward({type(self.model).__name__}): {state}{self.summary()}"

    def _chosen(self) -> dict[str, nn.Parameter]:
        """By name, so that parameters that were replaced since (`load_state_dict(assign=True)`) are the new ones."""
        return self._named(self.trainable_names)

    def _ever(self) -> dict[str, nn.Parameter]:
        """What trains, and what did before an exchange."""
        return self._named((*self.trainable_names, *self._digests_left()))

    def _digests_left(self) -> dict[str, str]:
        found = {name: one for digests in self._left.values() for name, one in digests.items()}
        return {name: one for name, one in found.items() if name not in self.trainable_names}  # but what is tied

    def _named(self, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
        there = dict(self.model.named_parameters())
        gone = next((name for name in names if name not in there), None)
        if gone is not None:
            raise RuntimeError(f"the model has no {gone!r} any more: its module was replaced after wrapping")
        return {name: there[name] for name in names}

    def _delta(self) -> Delta:
        if broken := not_finite(self._ever()):
            raise RuntimeError(f"{some(map(repr, broken))} is not finite (was the loss NaN?): nothing is written")
        buffers = saved_buffers(self.model)
        changed = {name for name, now in digests(buffers).items() if now != self._base.digests.get(name)}
        return Delta(
            layers=(*self.layers, *self._left),
            head=_names(self._head),
            base=self._base.hash(without=self._ever()),
            parameters=self._ever(),
            buffers={name: buffer for name, buffer in buffers.items() if name in changed},
            dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})),
        )

    def _check(self, path: str | os.PathLike[str], delta: Delta) -> None:
        try:
            self._check_fit(delta)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} does not fit: {error}") from error

    def _check_fit(self, delta: Delta) -> None:
        layers = (*self.layers, *self._left)
        for argument, saved, ours in (("layers", delta.layers, layers), ("head", delta.head, self.head)):
            if set(saved) != set(ours):
                raise ValueError(
                    f"it was saved with {argument}={list(saved)}, this model is wrapped with {list(ours)}; "
                    f"wrap it with the same {argument}"
                )
        parameters = self._ever()
        missing = sorted(set(parameters) - set(delta.parameters))
        if missing:
            raise ValueError(f"it lacks the parameter {missing[0]!r}")
        check_tensors("parameter", delta.parameters, parameters)
        check_tensors("buffer", delta.buffers, saved_buffers(self.model))
        if delta.base != self._base.hash(without=parameters):
            raise ValueError(
                "the frozen parameters or buffers of this model differ from those it was trained on: "
                "load the same base weights in the same dtype first"
            )

    @torch.no_grad()
    def _put(self, delta: Delta) -> None:
        there = self._ever()
        for name, parameter in there.items():
            put(parameter, delta.parameters[name])
        self._left = {layer: {name: digest(there[name]) for name in found} for layer, found in self._left.items()}
        self._buffers.names.update(delta.buffers)
        for name, buffer in saved_buffers(self.model).items():  # one that had not changed is as it was when wrapped
            put(buffer, delta.buffers.get(name, self._base.buffers.get(name, buffer)))

    def _kept(self) -> dict[str, torch.Tensor]:
        """What `_put` writes to."""
        return {**self._ever(), **saved_buffers(self.model)}

    @torch.no_grad()
    def _put_back(self, before: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self._kept().items():
            tensor.copy_(before[name])

    def _cut_and_tie(self) -> tuple[str, str]:
        """The name of the cut, and of the layer that it is tied to where it was not itself chosen."""
        owner = self._cut.owner
        parts = (*self._layers, *self._head)
        for part in parts:
            if owner in part.owners:
                return part.name, ""
        own = {id(parameter) for parameter in self.model.get_submodule(owner).parameters(recurse=False)}
        tied = (part.name for part in parts if any(id(parameter) in own for parameter in part.parameters))
        return owner, next(tied, "")  # neither chosen nor tied: something that was made to train later, an adapter


def _names(parts: tuple[Part, ...]) -> tuple[str, ...]:
    return tuple(part.name for part in parts)


def _class_names(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"class_names must be names, one for each output, not the single string {names!r}")
    names = tuple(names)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"class_names must be strings, and {wrong[0]!r} is a {type(wrong[0]).__name__}")
    return names_in("class_names", names)


_OF_A_CHOICE = ("_layers", "_head", "trainable_names", "_left", "_fresh")
"""What an exchange changes, beside that which goes by it."""


def _stateful(
    optimizer: torch.optim.Optimizer, scheduler: Stateful | None, others: dict[str, Stateful]
) -> dict[str, Stateful]:
    return {"optimizer": optimizer, **({} if scheduler is None else {"scheduler": scheduler}), **others}
