"""Parquet files of others, read only where what they unfold to fits. pyarrow is imported by the functions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from zest_fast.foundation.documents import check_regular, shown

if TYPE_CHECKING:
    import pyarrow

MOST_VALUES, MOST_UNFOLDED = 10**7, 2**30
"""Of a whole file: values of all columns, and bytes once dictionaries and runs are written out."""
_MOST_FIELDS = 10**6  # of the metadata: a second's work
_BYTE_ARRAY, _FIXED = 6, 7
_WIDTHS = {
    0: 1,
    1: 4,
    2: 8,
    3: 12,
    4: 4,
    5: 8,
}  # of physical types in bytes: BOOLEAN, INT32, INT64, INT96, FLOAT, DOUBLE


def read_parquet(path: str | os.PathLike[str], *, most_values: int = MOST_VALUES) -> pyarrow.Table:
    """The whole table. Raises FileNotFoundError, and ValueError that names the file for all else that is wrong with it.

    A file of a megabyte can unfold to gigabytes: what the metadata says is added up first, then the strings, of which
    it says too little, while they still stand in dictionaries.
    """
    check_regular(path)
    try:
        from pyarrow import parquet

        parquet.ParquetFile(path)  # says best what is wrong with a file that is torn
        strings = _check_metadata(_footer(path), most_values)
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


def _footer(path: str | os.PathLike[str]) -> dict[int, Any]:
    """The FileMetaData of parquet.thrift, by the numbers of its fields.

    pyarrow's `metadata.row_group(i).column(j)` ends the process where a column's statistics do not fit together.
    """
    with open(path, "rb") as file:
        end = file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        if length > end:
            raise ValueError("its metadata is longer than the file")
        file.seek(end - length)
        return _Thrift(file.read(length)).struct()


class _Thrift:
    """What Thrift's compact protocol holds: structs as {number of field: value}, lists, integers and bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._fields = data, 0, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > 30:
            raise ValueError("its metadata is nested too deeply")
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            found[number] = self._value(head & 15, depth)
        return found

    def _value(self, kind: int, depth: int, *, listed: bool = False) -> Any:
        self._fields += 1
        if self._fields > _MOST_FIELDS:
            raise _TooLarge(f"has metadata of more than {_MOST_FIELDS:,} fields")
        if kind in (1, 2):
            return self._byte() == 1 if listed else kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            size = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._entry(head & 15, depth) for _ in range(size)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"its metadata holds a value of the unknown kind {kind}")

    def _entry(self, kind: int, depth: int) -> Any:
        return self._value(kind, depth + 1, listed=True)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._data):
            raise ValueError("its metadata is torn")
        return self._data[self._at - size : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("its metadata holds an integer of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)


def _check_metadata(footer: dict[int, Any], most_values: int) -> list[str]:
    """The columns of strings. Numbers are those of parquet.thrift."""
    leaves = [element for element in footer[2][1:] if not element.get(5)]  # of the schema, without children
    values = fixed = packed = 0
    rows = footer[3]
    for group in footer.get(4, ()):
        if len(group[1]) != len(leaves):
            raise ValueError(f"a group of rows has {len(group[1])} columns, the schema {len(leaves)}")
        rows = max(rows, group[3])
        for leaf, chunk in zip(leaves, group[1], strict=True):
            column = chunk[3]
            if min(column[5], column[6], group[3]) < 0:
                raise ValueError("a column has a negative size")
            kind = leaf.get(1)
            width = max(1, leaf.get(2, 1)) if kind == _FIXED else _WIDTHS.get(kind, 1)
            values += max(column[5], group[3])
            fixed += column[5] * width
            packed += column[6]
    if max(values, rows) > most_values:
        raise _TooLarge(f"holds {max(values, rows):,} values, and at most {most_values:,} are read")
    if max(fixed, packed) > MOST_UNFOLDED:
        raise _TooLarge(f"unfolds to {max(fixed, packed):,} bytes, and at most {MOST_UNFOLDED:,} are read")
    return sorted(
        {
            ".".join(part.decode() for part in chunk[3][3])
            for group in footer.get(4, ())
            for leaf, chunk in zip(leaves, group[1], strict=True)
            if leaf.get(1) == _BYTE_ARRAY
        }
    )


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
