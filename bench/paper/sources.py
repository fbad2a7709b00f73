"""Rows of a data set: from the hub by the library `datasets`, or from JSONL or Parquet files in its schema."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from bench.paper.tasks import DATASETS, DataSet, Item, Labelled
from zest_fast.foundation.nearest import nearest
from zest_fast.integrations.data.tables import read_table


def find(name: str) -> DataSet:
    """Raises ValueError with the nearest names for one that the paper does not use."""
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; {nearest(name, DATASETS)}")
    return DATASETS[name]


def load(name: str, folder: Path | None = None, limit: int | None = None) -> tuple[list[Any], list[Any]]:
    """Training and evaluation samples, as Item or Labelled.

    folder: holds SPLIT.jsonl or SPLIT.parquet for "train" and the evaluated split, with the hub's columns; None = the
        hub. limit: rows of each split.
    Raises ImportError without `datasets`, ValueError for a file that is not there or a row that does not fit.
    """
    data = find(name)
    splits = []
    for split in ("train", data.evaluated):
        rows = _from_hub(data, split) if folder is None else _from_folder(folder, split)
        splits.append([_read(data, row, f"{name}, {split}, row {place}", folder) for place, row in
                       enumerate(itertools.islice(rows, limit), start=1)])  # fmt: skip
    return splits[0], splits[1]


def _read(data: DataSet, row: Any, place: str, folder: Path | None) -> Item | Labelled:
    try:
        sample = data.read(row)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{place}: not a row of {data.hub} ({type(error).__name__}: {error})") from error
    if isinstance(sample, Labelled) and isinstance(sample.sample, str) and folder is not None:
        return Labelled(folder / sample.sample, sample.label)
    return sample


def _from_hub(data: DataSet, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{data.hub} comes from the hub by the library datasets: pip install datasets; or pass --data FOLDER with "
            f"train.jsonl and {data.evaluated}.jsonl in its schema"
        ) from error
    return datasets.load_dataset(data.hub, data.config, split=split)


def _from_folder(folder: Path, split: str) -> Any:
    for ending in (".jsonl", ".parquet"):
        if (path := folder / f"{split}{ending}").is_file():
            columns = read_table(path).columns
            return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    raise ValueError(f"folder {str(folder)!r} holds neither {split}.jsonl nor {split}.parquet")
