"""SelectiveBackward, watch and Reselect in transformers' Trainer: freeze before the optimizer exists, check that it
holds what trains, see how, and choose again.

Trainer builds its optimizer from the parameters that require a gradient when `train()` is called. A callback that
freezes later, at the beginning of training, leaves the optimizer with the old ones; one at the end of Trainer's
`__init__` is in time.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import operator
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.finetuning.trainable_layers import layer_names, reusable_head
from zest_fast.foundation.nearest import some
from zest_fast.lean.master_weights import LOW, MasterWeights
from zest_fast.planning.choose import choose
from zest_fast.prefix.cache import PrefixCache
from zest_fast.probing.budget import TooFewSamples
from zest_fast.probing.collecting import collect
from zest_fast.probing.probe import probe as run_probe
from zest_fast.profiling.borrowing.training_modes import in_eval_mode
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.profile import profile, unwrapped
from zest_fast.ranking.ranking import Ranking, rank
from zest_fast.watching.reselect import Reselect
from zest_fast.watching.watch import Log, Watch, watch

DELTA = "zest_delta.safetensors"

_log = logging.getLogger("zest_fast")


class ZestCallback(TrainerCallback):
    """Train only these layers: `Trainer(model=model, callbacks=[ZestCallback(ranking.top(5))], ...)`.

    At the end of training what `tuned.verify()` finds is logged (logger "zest_fast"), as a warning where it fails.

    Args:
        layers: names, or a Ranking of which the `n` best are taken.
        n: how many layers of a Ranking.
        head: as in SelectiveBackward.
        save_delta: write what trained as zest_delta.safetensors into every checkpoint folder, beside Trainer's files.
        **options: others of SelectiveBackward. Of a `cache` the samples of an epoch are known here; a collator that
            pads to the longest of a batch makes other samples in every epoch: give it padding="max_length".

    Attributes:
        tuned: the SelectiveBackward once a Trainer has taken the callback; `tuned.remove()` gives the model back.

    Raises:
        ValueError: the optimizer was built before (`Trainer(optimizers=...)`) from other parameters than those that
            train; also when training begins, should it hold others by then, or other parameters require a gradient.
            A value head that would be frozen without a word: name it in `head`.
    """

    def __init__(
        self,
        layers: Ranking | Iterable[str],
        *,
        n: int | None = None,
        head: str | Iterable[str] | None = "auto",
        save_delta: bool = False,
        **options: Any,
    ) -> None:
        self.layers = layer_names(layers, n)
        self.options = {"head": reusable_head(head), **options}
        self.save_delta = save_delta
        self.tuned: SelectiveBackward | None = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """The model is there and the optimizer is not: the moment to freeze."""
        if self.tuned is not None:
            raise RuntimeError("this ZestCallback is in a Trainer already; make another one")
        _refuse_frozen_value_head(model, self.options["head"])
        tuned = SelectiveBackward(model, self.layers, **self.options)
        try:
            tuned.summary(optimizer)  # ValueError where it lacks what trains or holds what is frozen
        except BaseException:
            tuned.remove()
            raise
        self.tuned = tuned
        _log.info("%s", tuned.summary())

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        """The optimizer is there: does it hold what trains, and nothing else?"""
        if self.tuned is None:
            raise RuntimeError(
                "ZestCallback was added after the Trainer was made, which may be too late to freeze: pass it in "
                "Trainer(callbacks=[...]), or call zest_fast.integrations.trainer.prepare(trainer, layers) instead"
            )
        cache = self.options.get("cache")
        if isinstance(cache, PrefixCache) and cache.samples is None:
            with contextlib.suppress(TypeError, AttributeError):  # data without a length
                cache.samples = len(train_dataloader.dataset) or None
        chosen = set(self.tuned.trainable_names)
        others = [name for name, p in self.tuned.model.named_parameters() if p.requires_grad and name not in chosen]
        if others:
            raise ValueError(
                f"{some(map(repr, others))} were made to train after the layers were chosen, by what unfreezes "
                "parameters (an option of the trainer, another callback): take that out, or name them in head="
            )
        self.tuned.summary(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What moved and what did not, in the log: a warning, since an error would throw the trained model away."""
        if self.tuned is None or not state.global_step or not state.is_world_process_zero:
            return
        try:
            found = self.tuned.verify()
        except Exception as error:
            _log.warning("%s", error)
        else:
            _log.info("%s", found)
        if self.options.get("cache") is not None:
            _log.info("prefix cache: %s", self.options["cache"])
        if self.tuned.frozen_format:
            _log.warning(
                "the model's frozen weights are packed in %s, which from_pretrained does not read: call tuned.remove() "
                "before save_model(); a delta (save_delta=True) holds what was trained",
                self.tuned.frozen_format,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.save_delta and self.tuned is not None and state.is_world_process_zero:
            self.tuned.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / DELTA)


class WatchCallback(TrainerCallback):
    """`zest_fast.watch` while a Trainer trains: `Trainer(model=model, callbacks=[WatchCallback(log=...)], ...)`.

    Gradient accumulation, mixed precision, clipping and evaluation in between are those of the Trainer, and nothing of
    its training changes by a bit. With several processes figures are of all of them, as of `zest_fast.watch`: callbacks
    get the model without its DistributedDataParallel, which is looked for.

    Args:
        every: optimizer steps from one that is logged to the next.
        log: as of `zest_fast.watch`.
        **options: others of `zest_fast.watch`.

    Attributes:
        watched: the watch of the last `train()`; `watched.last` is its last WatchedStep.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as `zest_fast.watch`, when training begins.
    """

    def __init__(self, every: int = 100, log: Log | Iterable[Log] | None = None, **options: Any) -> None:
        self.every, self.log, self.options = every, log, options
        self.watched: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Weights are where they will train, and nothing has run."""
        self.remove()  # of a training that ended in an exception, of which nobody tells a callback
        options = {"first_step": state.global_step, **self.options}
        self.watched = watch(_as_it_is_called(model), self.every, log=self.log, **options)
        self.watched.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook away, after a training that ended in an exception. A second call does nothing."""
        if self.watched is not None:
            self.watched.remove()


class ReselectCallback(TrainerCallback):
    """`zest_fast.Reselect` while a Trainer trains: `Trainer(callbacks=[zest, ReselectCallback(zest, every=200)], ...)`.

    The batch that is profiled is the last one that the model was called with in the step; nothing is taken from the
    data loader. The last step of a training chooses nothing any more.

    Args:
        tuned: the ZestCallback, or what `prepare` returned.
        every: optimizer steps from one choice to the next.
        **options: others of `zest_fast.Reselect`.

    Attributes:
        reselect: that of the last `train()`; `.exchanges` says what was done.

    Raises:
        RuntimeError: training begins without a SelectiveBackward, or from a checkpoint: its optimizer states are those
            of the layers that trained when it was written. Of a step: the model was not called with keyword arguments
            (compiled code shows no call): give a fixed `batch=`.
        TypeError, ValueError, NotImplementedError: as `zest_fast.Reselect`, when training begins.
    """

    def __init__(self, tuned: ZestCallback | SelectiveBackward, every: int = 200, **options: Any) -> None:
        self._source, self.every, self.options = tuned, every, options
        self.reselect: Reselect | None = None
        self._batch: Any = None
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """The optimizer holds what trains."""
        self._unhook()
        tuned = self._source.tuned if isinstance(self._source, ZestCallback) else self._source
        if tuned is None:
            raise RuntimeError(
                "ReselectCallback: its ZestCallback is in no Trainer; pass both in Trainer(callbacks=[...])"
            )
        if state.global_step:
            raise RuntimeError(
                f"ReselectCallback: training goes on at step {state.global_step} of a checkpoint, whose optimizer "
                "states belong to the layers that trained when it was written; start anew, or leave the callback out"
            )
        self.reselect = Reselect(tuned, optimizer, every=self.every, **self.options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.reselect is not None and (self.reselect.steps + 1) % self.every == 0:
            self._hook = self.reselect.tuned.model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the step: of the optimizer, and of the schedule."""
        reselect, batch = self.reselect, self._batch
        self._unhook()
        if reselect is None:
            return
        if state.global_step >= state.max_steps or (reselect.steps + 1) % self.every:
            reselect.steps += 1
            return
        if batch is None and not reselect.has_a_batch:
            raise RuntimeError(
                "ReselectCallback saw no call of the model with keyword arguments in this step; give it a fixed batch="
            )
        reselect.step(None if reselect.has_a_batch else batch)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._unhook()

    def _seen(self, module: Any, args: Any, kwargs: Any) -> None:
        if not args and kwargs:
            self._batch = dict(kwargs)

    def _unhook(self) -> None:
        self._batch = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _as_it_is_called(model: Any) -> Any:
    """The DistributedDataParallel around a model, where there is one: Trainer has it, and hands over what is inside."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return model
    inside = unwrapped(model)[1]
    gc.collect()  # that of a training before may still lie around
    found: list[Any] = [
        one
        for one in gc.get_objects()
        if issubclass(type(one), nn.parallel.DistributedDataParallel) and unwrapped(one)[1] is inside
    ]
    return found[0] if len(found) == 1 else model


def prepare(
    trainer: Trainer,
    layers: int | Ranking | Iterable[str],
    *,
    by: Any = None,
    probe: float | Literal["auto"] | None = "auto",
    max_memory: str | int | None = None,
    masters: bool = True,
    **options: Any,
) -> SelectiveBackward:
    """Freeze all but `layers` in a Trainer that is there already, before its `train()`; also in TRL's, which are
    Trainers.

    Args:
        trainer: it has no optimizer yet.
        layers: names, a Ranking with n=, or how many: then the first batch of the trainer's own training data is
            profiled and ranked; by the trainer's `compute_loss` where the model itself makes no such loss of it
            (preferences, rewards). Of several processes the first says which.
        by: as in `rank`.
        probe: where `layers` is how many, the share of a sweep's cost that `zest_fast.probe` may take on the trainer's
            own training data before they are ranked; "auto" = 0.05 where the Ranker has not seen the model, none where
            it has, `by` says how to rank, or the loss is the trainer's; None = never.
        max_memory: where `layers` is how many, what a step of AdamW may take: the lowest layers are then exchanged for
            others above, as in `choose`.
        masters: where what trains is bfloat16 or float16, let the optimizer that the arguments name step float32
            masters (`zest_fast.MasterWeights`); False = as Trainer does. Not with DeepSpeed and FSDP, nor where
            `optimizer_cls_and_kwargs` or an optimizer of another making says how; the log says so.
        **options: those of ZestCallback.

    Returns:
        The SelectiveBackward.

    Raises:
        RuntimeError: the Trainer has its optimizer already; the model is then as it was.
        ValueError: max_memory beside names; a probe or max_memory where the loss is the trainer's; a loss of the first
            batch that has no gradient.
    """
    callback = prepared_callback(trainer, layers, by=by, probe=probe, max_memory=max_memory, masters=masters, **options)
    trainer.add_callback(callback)
    assert callback.tuned is not None
    return callback.tuned


def prepared_callback(
    trainer: Any,
    layers: int | Ranking | Iterable[str],
    *,
    by: Any = None,
    probe: float | Literal["auto"] | None = "auto",
    max_memory: str | int | None = None,
    masters: bool = True,
    **options: Any,
) -> ZestCallback:
    """What `prepare` adds to the trainer, for who adds it another way."""
    if trainer.optimizer is not None:
        raise RuntimeError(
            "the Trainer has its optimizer already, built from all parameters that required a gradient: call prepare() "
            "before train(), and leave the optimizer to the Trainer"
        )
    if isinstance(layers, bool):
        raise TypeError(f"layers must be names or how many, not {layers}")
    names: Any = layers
    options["head"] = reusable_head(options.get("head", "auto"))
    if isinstance(layers, Integral):
        _refuse_frozen_value_head(trainer.model, options["head"])
        names = _of_the_first_process(_best(trainer, operator.index(layers), by, probe, max_memory))
    elif max_memory is not None:
        raise ValueError("max_memory chooses among ranked layers: say how many, or leave it out where they are named")
    callback = ZestCallback(names, **options)
    callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert callback.tuned is not None
    if masters and any(parameter.dtype in LOW for parameter in callback.tuned.parameters()):
        _keep_masters(trainer)
    return callback


_VALUE_HEADS = ("v_head", "value_head")  # of TRL and of those that follow it


def _refuse_frozen_value_head(model: nn.Module, head: Any) -> None:
    """A value head is new, and frozen it would stay at random values; "auto" takes it for no head."""
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _VALUE_HEADS]
    named = [head] if isinstance(head, str) else list(head or ())
    if head is None or not found or any(f"{one}.".startswith(f"{name}.") for one in found for name in named):
        return
    raise ValueError(f"the model has the value head {found[0]!r}: head={found[0]!r} trains it, head=None freezes it")


def _keep_masters(trainer: Any) -> None:
    """Let Trainer build its optimizer around masters, where it makes one of a list of parameters."""
    why = None
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        why = "DeepSpeed and FSDP shard what an optimizer holds"
    elif getattr(trainer, "optimizer_cls_and_kwargs", ()) is not None:
        why = "optimizer_cls_and_kwargs names an optimizer, or this version of transformers takes none"
    else:
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            why = f"{kind} is built by other means than from parameters"
        elif {"params", "model", "optimizer_dict"} & options.keys():
            why = f"{kind.__name__} chooses its parameters itself"
    if why is not None:
        _log.warning("no float32 masters of what trains in low precision: %s", why)
        return
    trainer.optimizer_cls_and_kwargs = (MasterWeights, {"build": kind, **options})
    _log.info("what trains keeps float32 masters: %s around %s", MasterWeights.__name__, kind.__name__)


def _best(
    trainer: Any, n: int, by: Any, share: float | Literal["auto"] | None, max_memory: str | int | None
) -> tuple[str, ...]:
    """The n best layers; neither the random state nor the trainer's data loader moves on."""
    model = trainer.model
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError(
            "the parameters are sharded by DeepSpeed's ZeRO-3, and no profile can be made of them: rank the layers "
            "without it, and name them"
        )
    with torch.random.fork_rng():
        loader = trainer.get_train_dataloader()
        batch = next(iter(loader))
        if not _takes(trainer, batch):
            if share not in (None, "auto") or max_memory is not None:
                raise ValueError(
                    f"{type(trainer).__name__} makes another loss of a batch than the model: a probe and max_memory "
                    "cannot be had here; leave them out"
                )
            return rank(_profile_of(trainer, batch), by=by).top(n)
        profiled = profile(model, batch)
        ranking = rank(profiled, by=by)
        if share == "auto":
            share = 0.05 if by is None and ranking.is_new else None
        if share is not None:
            _log.info("a probe of each layer before they are ranked: %.0f %% of what a sweep would cost", 100 * share)
            try:
                found = run_probe(model, collect(model, loader), layers=profiled.names, budget=share)
            except TooFewSamples as error:
                if by is not None:
                    raise
                _log.warning("no probe: %s. The layers are ranked by one batch alone", error)
            else:
                ranking = rank(profiled, by=by, probe=found)
        if max_memory is None:
            return ranking.top(n)
        choice = choose(ranking, n, model=model, batch=batch, max_memory=max_memory)
        _log.info("%s", choice.explanation)
        return tuple(choice)


@torch.no_grad()
def _takes(trainer: Any, batch: Any) -> bool:
    """Whether the model itself makes the loss of a batch that the trainer makes: not of pairs, say, which it takes for
    texts to learn."""
    model = trainer.model
    if not isinstance(batch, Mapping) or not set(trainer.label_names) <= batch.keys():
        return False
    if type(trainer).compute_loss is Trainer.compute_loss:
        return True
    with in_eval_mode(model):  # nothing is drawn, and no running mean moves
        try:
            own, theirs = model(**batch).loss, trainer.compute_loss(model, dict(batch))
        except (TypeError, ValueError, KeyError, AttributeError):  # a batch that only the trainer understands
            return False
    return bool(torch.isclose(own.float(), theirs.float(), rtol=1e-3))


def _profile_of(trainer: Any, batch: Any) -> LayerProfile:
    """By the trainer's own loss: of preferences, or of what the model generates for it, which is done once here."""
    inputs = trainer._prepare_inputs(batch)
    profiled = profile(trainer.model, closure=lambda: trainer.compute_loss(trainer.model, inputs))
    if not profiled.column("rgn").any():
        raise ValueError(
            f"the loss that {type(trainer).__name__} makes of the first batch has no gradient (are all its rewards the "
            "same?), and nothing can be ranked by it: rank by another batch, and name the layers"
        )
    return profiled


def _of_the_first_process(names: tuple[str, ...]) -> tuple[str, ...]:
    """Each of several processes has a batch of its own, and might choose others."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return names
    told: list[Any] = [names]
    torch.distributed.broadcast_object_list(told, src=0)
    return tuple(told[0])
