"""Parquet files of others, read only where what they unfold to fits. pyarrow is imported by the functions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from zest_fast.profiling.documents import check_regular, shown

if TYPE_CHECKING:
    import pyarrow

MOST_VALUES, MOST_UNFOLDED = 10**7, 2**30
"""Of a whole file: values of all columns, and bytes once dictionaries and runs are written out."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


def read_parquet(path: str | os.PathLike[str]) -> pyarrow.Table:
    """The whole table. Raises FileNotFoundError, and ValueError that names the file for all else that is wrong with it.

    A file of a megabyte can unfold to gigabytes: what the metadata says is added up first, then the strings, of which
    it says too little, while they still stand in dictionaries.
    """
    check_regular(path)
    try:
        from pyarrow import parquet

        strings = _check_metadata(parquet.ParquetFile(path))
        _check_strings(parquet.ParquetFile(path, read_dictionary=strings) if strings else None)
        return parquet.read_table(path, partitioning=None)
    except _TooLarge as error:
        raise ValueError(f"{os.fspath(path)!r} {error}; split it, or keep the columns that are needed") from error
    except Exception as error:  # of bytes that are no Parquet, pyarrow raises nearly anything
        raise ValueError(f"{os.fspath(path)!r} is no whole Parquet file: {_line(error)}") from error


def parquet_schema(path: str | os.PathLike[str]) -> pyarrow.Schema:
    """Names, types and metadata of the table. Raises as `read_parquet`."""
    check_regular(path)
    try:
        from pyarrow import parquet

        return parquet.read_schema(path)
    except Exception as error:  # as above
        raise ValueError(f"{os.fspath(path)!r} is no whole Parquet file: {_line(error)}") from error


class _TooLarge(Exception):
    pass


def _line(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 200).strip("'\"") or type(error).__name__


def _check_metadata(file: Any) -> list[str]:
    """The columns of strings."""
    metadata, schema = file.metadata, file.schema
    values = fixed = packed = 0
    strings = []
    for number in range(len(schema)):
        column = schema.column(number)
        if column.physical_type == "BYTE_ARRAY":
            strings.append(column.path)
        width = _WIDTHS.get(column.physical_type, max(1, column.length))
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(number)
            if chunk.num_values < 0 or chunk.total_uncompressed_size < 0:
                raise ValueError(f"column {column.path!r} has a negative size")
            values += max(chunk.num_values, metadata.row_group(group).num_rows)
            fixed += chunk.num_values * width
            packed += chunk.total_uncompressed_size
    if max(values, metadata.num_rows) > MOST_VALUES:
        raise _TooLarge(f"holds {max(values, metadata.num_rows):,} values, and at most {MOST_VALUES:,} are read")
    if max(fixed, packed) > MOST_UNFOLDED:
        raise _TooLarge(f"unfolds to {max(fixed, packed):,} bytes, and at most {MOST_UNFOLDED:,} are read")
    return strings


def _check_strings(file: Any) -> None:
    if file is None:
        return
    unfolded = 0
    for batch in file.iter_batches(batch_size=2**16):
        unfolded += sum(_unfolded(column) for column in batch.columns)
        if unfolded > MOST_UNFOLDED:
            raise _TooLarge(f"unfolds to {unfolded:,} bytes or more, and at most {MOST_UNFOLDED:,} are read")


def _unfolded(array: Any) -> int:
    """Bytes of an Arrow array without dictionaries."""
    import pyarrow
    from pyarrow import compute, types

    kind = array.type
    if isinstance(kind, pyarrow.ExtensionType):
        return _unfolded(array.storage)
    if types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary) if _is_text(kind.value_type) else None
        if lengths is None:
            return len(array) * max(1, array.dictionary.nbytes)
        return int(compute.sum(lengths.take(array.indices)).as_py() or 0)
    if types.is_map(kind):
        return _unfolded(array.keys) + _unfolded(array.items)
    if types.is_struct(kind):
        return sum(_unfolded(array.field(number)) for number in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return array.nbytes if not len(array) else 8 * len(array) + _unfolded(array.flatten())
    return int(array.nbytes)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind)
    )
