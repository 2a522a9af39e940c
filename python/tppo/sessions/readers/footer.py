"""How large the columns of a parquet file are, by the metadata at its end.

pyarrow says it too, but ends the process where the statistics of a column contradict themselves.
The metadata is a struct of Thrift's compact protocol, as parquet.thrift of Apache Parquet defines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

# FileMetaData.row_groups[].columns[].meta_data.(path_in_schema, num_values,
# total_uncompressed_size), by the numbers of the fields; all else is passed over.
_PATH, _VALUES, _NBYTES = 3, 5, 6
_WANTED: Mapping[int, Any] = {4: {1: {3: {_PATH: {}, _VALUES: {}, _NBYTES: {}}}}}


class ColumnSize(NamedTuple):
    """What a column of a row group holds."""

    group: int  # from 0 on
    path: str  # a.b for the field b of the column a
    values: int
    nbytes: int  # unpacked


def column_sizes(content: BinaryIO) -> Iterator[ColumnSize]:
    """Those of a file that pyarrow has opened.  Errors: ValueError where its metadata is none."""
    content.seek(-8, os.SEEK_END)
    length = int.from_bytes(content.read(4), "little")
    content.seek(-8 - length, os.SEEK_END)
    try:
        found = _Compact(content.read(length)).struct(_WANTED)
        for group, of_group in enumerate(found.get(4, ())):
            for column in of_group.get(1, ()):
                of_column = column.get(3, {})
                path = ".".join(part.decode() for part in of_column[_PATH])
                yield ColumnSize(group, path, of_column[_VALUES], of_column[_NBYTES])
    except (IndexError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read ({type(error).__name__})") from None


class _Compact:
    """Values of Thrift's compact protocol, one behind the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        """A number without a sign, seven bits a byte."""
        found = shift = 0
        while True:
            byte = self.byte()
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found
            if shift > 63:
                raise ValueError("a number of its metadata has more than 64 bits")

    def struct(self, wanted: Mapping[int, Any]) -> dict[int, Any]:
        """The fields by their numbers, those that are wanted."""
        found, field = {}, 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self._signed()
            inner = wanted.get(field)
            value = self._value(head & 15, inner)
            if inner is not None:
                found[field] = value
        return found

    def _signed(self) -> int:
        number = self.number()
        return (number >> 1) ^ -(number & 1)

    def _value(self, kind: int, wanted: Mapping[int, Any] | None) -> Any:
        if kind in (1, 2):  # true and false, which the field's head says
            return kind == 1
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 8:
            return self._bytes(self.number())
        if kind in (9, 10):
            head = self.byte()
            size = self.number() if head >> 4 == 15 else head >> 4
            if wanted is not None:
                return [self._item(head & 15, wanted) for _ in range(size)]
            for _ in range(size):
                self._item(head & 15, None)
            return None
        if kind == 11:
            size = self.number()
            kinds = self.byte() if size else 0
            for _ in range(size):
                self._item(kinds >> 4, None)
                self._item(kinds & 15, None)
            return None
        if kind == 12:
            return self.struct(wanted or {})
        if kind not in (3, 7, 13):
            raise ValueError(f"its metadata has a value of kind {kind}")
        return self._bytes({3: 1, 7: 8, 13: 16}[kind])

    def _item(self, kind: int, wanted: Mapping[int, Any] | None) -> Any:
        return self.byte() == 1 if kind in (1, 2) else self._value(kind, wanted)

    def _bytes(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("its metadata is cut")
        return self.data[self.at - size : self.at]
