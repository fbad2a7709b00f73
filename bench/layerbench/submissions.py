"""Somebody's ranking, as a file of scores or of code, made a contestant; whatever is wrong with it is said by name."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas

from bench.layerbench.profiles import PAIR, mean_gain
from bench.layerbench.protocol import HEAD_STATES
from zest_fast.foundation.documents import check_regular
from zest_fast.foundation.nearest import nearest, some

_MOST_BYTES = 2**28
_NEEDED = (*PAIR, "layer", "score")
_OPTIONAL = ("seed", "head_state")
_numbers = itertools.count()


class ScoresFile:
    """A CSV of scores: model, dataset, layer, score and, where they differ by them, seed and head_state.

    Args:
        path: the file.
        records: of the pairs that are judged; the file has to name their layers, each once.
        head_state: of the profiles that are judged.
        partial: pairs that the file lacks are left out; else they are an error.

    Attributes:
        lacking: the names of the pairs that it lacks.

    Raises:
        ValueError: what is wrong with it, and where.
        FileNotFoundError: there is none.
    """

    learns = False

    def __init__(self, path: Path, records: pandas.DataFrame, *, head_state: str = "fresh", partial: bool = False):
        self._path = path
        frame = self._read()
        frame["score"] = self._numbers(frame)
        if "head_state" in frame:
            if wrong := sorted(set(frame.head_state) - set(HEAD_STATES)):
                raise self._wrong(f"head_state is {some(map(repr, wrong))}; there are {', '.join(HEAD_STATES)}")
            frame = frame[frame.head_state == head_state]
        self._keys = [name for name in (*PAIR, "seed") if name in frame]
        twice = frame[frame.duplicated([*self._keys, "layer"])]
        if len(twice):
            raise self._wrong(f"{len(twice)} layers have two scores, the first is {_place(twice.iloc[0], self._keys)}")
        records = records[records.head_state == head_state]
        self._check_pairs(frame, records)
        there = set(map(tuple, frame[PAIR].drop_duplicates().to_numpy()))
        wanted = sorted(set(map(tuple, records[PAIR].drop_duplicates().to_numpy())))
        self.lacking = ["/".join(pair) for pair in wanted if pair not in there]
        if self.lacking and not partial:
            raise self._wrong(
                f"no scores of {len(self.lacking)} of {len(wanted)} pairs: {some(self.lacking)}; --partial leaves "
                "them out of every figure"
            )
        self._scores = {_key(key): rows.set_index("layer").score for key, rows in frame.groupby(self._keys)}
        for key, rows in records.groupby(self._keys):
            if _key(key)[:2] in there:
                self._check_layers(_key(key), rows.layer.unique())

    def fit(self, train: pandas.DataFrame) -> ScoresFile:
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        key = _key(tuple(profile[name].iloc[0] for name in self._keys))
        return self._scores[key][profile.layer].to_numpy(np.float64)

    def _read(self) -> pandas.DataFrame:
        check_regular(self._path, _MOST_BYTES)
        try:
            frame = pandas.read_csv(self._path, dtype=str, keep_default_na=False)
        except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise self._wrong(f"it is no CSV: {error}") from error
        for name in _NEEDED:
            if name not in frame:
                raise self._wrong(f"column {name!r} is missing; there are {', '.join(map(repr, frame))}")
        if unknown := [name for name in frame if name not in (*_NEEDED, *_OPTIONAL)]:
            raise self._wrong(f"column {unknown[0]!r} is unknown; {', '.join((*_NEEDED, *_OPTIONAL))} are read")
        if frame.empty:
            raise self._wrong("it holds no scores")
        return frame

    def _numbers(self, frame: pandas.DataFrame) -> pandas.Series:
        scores = pandas.to_numeric(frame.score, errors="coerce").astype(np.float64)
        wrong = frame[~np.isfinite(scores)]
        if len(wrong):
            first = wrong.iloc[0]
            raise self._wrong(
                f"{len(wrong)} scores are no finite number, the first is {first.score!r} of {_place(first, list(PAIR))}"
            )
        return scores

    def _check_pairs(self, frame: pandas.DataFrame, records: pandas.DataFrame) -> None:
        for name in (*PAIR, *(("seed",) if "seed" in frame else ())):
            known = set(map(str, records[name]))
            if unknown := sorted(set(frame[name]) - known):
                raise self._wrong(f"{name} {unknown[0]!r} is not in the records; {nearest(unknown[0], sorted(known))}")
        pairs = {"/".join(pair) for pair in records[PAIR].drop_duplicates().to_numpy()}
        found = {"/".join(pair) for pair in frame[PAIR].drop_duplicates().to_numpy()}
        if unknown := sorted(found - pairs):
            raise self._wrong(f"the records have no {unknown[0]!r}; {nearest(unknown[0], sorted(pairs))}")

    def _check_layers(self, key: tuple[str, ...], layers: Iterable[str]) -> None:
        what = f"{key[0]}/{key[1]}" + (f", seed {key[2]}" if len(key) > 2 else "")
        if key not in self._scores:
            raise self._wrong(f"no scores of {what}")
        found, wanted = set(self._scores[key].index), set(layers)
        if unknown := sorted(found - wanted):
            raise self._wrong(f"{what} has no layer {unknown[0]!r}; {nearest(unknown[0], sorted(wanted))}")
        if missing := [layer for layer in layers if layer not in found]:
            raise self._wrong(f"{what}: no score of {len(missing)} of {len(wanted)} layers: {some(missing)}")

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{str(self._path)!r}: {what}")


class RankingFile:
    """Python code with `score(profile)` and, where it learns from records, `fit(train)`. It is run: name your own.

    score: gets a DataFrame, the rows of one profile (columns of `load_records()` without outcomes), and returns as many
        numbers in their order, larger is better.
    fit: gets the rows of the training pairs with their outcomes and the column "gain", before the profiles of a fold;
        each fold has the module anew, so that nothing is carried over.

    Raises ValueError where the file cannot be imported or has no `score`, and, from `predict`, where scores are no
    finite numbers or not as many as layers.
    """

    lacking: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        check_regular(path, _MOST_BYTES)
        self._module = self._imported()
        self.learns = hasattr(self._module, "fit")

    def fit(self, train: pandas.DataFrame) -> RankingFile:
        if self.learns:
            self._module = self._imported()
            self._call(self._module.fit, train.assign(gain=mean_gain(train)), "fit")
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        first = profile.iloc[0]
        what = f"{first.model}/{first.dataset}, seed {first.seed}, {first.head_state} head"
        found = self._call(self._module.score, profile.reset_index(drop=True), f"score of {what}")
        try:
            scores = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise self._wrong(f"score of {what} is a {type(found).__name__}; numbers are needed: {error}") from error
        if scores.shape != (len(profile),):
            raise self._wrong(f"score of {what} has shape {list(scores.shape)}, there are {len(profile)} layers")
        if not np.isfinite(scores).all():
            layers = profile.layer[~np.isfinite(scores)]
            raise self._wrong(f"score of {what} is no finite number for {len(layers)} layers: {some(layers)}")
        return scores

    def _imported(self) -> ModuleType:
        specification = importlib.util.spec_from_file_location(f"_layerbench_ranking_{next(_numbers)}", self._path)
        if specification is None or specification.loader is None:
            raise self._wrong("it is no Python file; its name has to end in .py")
        module = importlib.util.module_from_spec(specification)
        self._call(specification.loader.exec_module, module, "the import")
        for name, needed in (("score", True), ("fit", False)):
            if (needed or hasattr(module, name)) and not callable(getattr(module, name, None)):
                raise self._wrong(f"it has no function {name!r}")
        return module

    def _call(self, function: Any, argument: Any, what: str) -> Any:
        try:
            return function(argument)
        except Exception as error:  # somebody's code: anything
            raise self._wrong(f"{what} ended in {type(error).__name__}: {error}") from error

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{str(self._path)!r}: {what}")


def check_records(sweeps: Iterable[Mapping[str, Any]], recipes: Mapping[str, str], definitions: int) -> None:
    """Raises ValueError where a sweep is of another protocol: another recipe, or metrics that mean something else.

    recipes: model -> hash of the recipe that the protocol's records were made by.
    """
    for sweep in sweeps:
        name = f"{sweep['model']}/{sweep['dataset']}"
        wanted, found = recipes.get(sweep["model"]), sweep["recipe_hash"]
        if wanted is not None and found != wanted:
            raise ValueError(
                f"{name} was swept by the recipe {found}, the protocol's is {wanted}: gains do not compare"
            )
        version = sweep.get("versions", {}).get("definitions")
        if version != definitions:
            raise ValueError(f"{name} has metrics of version {version}, the protocol's have {definitions}")


def _key(values: Any) -> tuple[str, ...]:
    return tuple(map(str, values))


def _place(row: pandas.Series, keys: list[str]) -> str:
    seed = f", seed {row['seed']}" if "seed" in keys else ""
    return f"{row['model']}/{row['dataset']}{seed}, layer {row['layer']!r}"
