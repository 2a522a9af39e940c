"""Rows of figures of a long training: none of them is encoded, or written, a second time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from tppo.store.jsonl import plain


class Rows(Sequence[dict[str, Any]]):
    """JSON objects that are held as the lines that they are written as.

    A row of 30 figures takes a third of the memory of its dict, and a checkpoint that holds all of
    them copies text.  What is read from it is what a later process would read from a file.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self.lines: list[str] = []
        self.extend(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row at the end."""
        self.lines.append(_line(row))

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add several."""
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [json.loads(line) for line in self.lines[index]]
        return json.loads(self.lines[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self.lines)

    def __eq__(self, other: object) -> bool:
        return self.lines == other.lines if isinstance(other, Rows) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it changes


def read_rows(path: Path) -> Rows:
    """The rows of a file of `RowFile`."""
    found = Rows()
    with open(path, encoding="utf-8", newline="\n") as file:  # U+2028 may stand inside a text
        found.lines = [*file]
    return found


class RowFile:
    """A file of rows that grows with them: what is in it is written once.

    What a power failure takes of it is written again by the process that resumes, so that no row
    waits for the disk.
    """

    def __init__(self, path: Path):
        self.path, self.rows, self.nbytes = path, 0, 0

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Bring the file up to these rows, which begin with those of the call before; whole where
        it is not as that call has left it.
        """
        whole = not self.rows or len(rows) < self.rows or not self.path.is_file()
        whole = whole or self.path.stat().st_size != self.nbytes
        text = "".join(_lines(rows, 0 if whole else self.rows)).encode()
        if whole:
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(text)
            os.replace(temporary, self.path)
        elif text:
            with open(self.path, "ab", buffering=0) as file:
                file.write(text)
        self.nbytes = len(text) + (0 if whole else self.nbytes)
        self.rows = len(rows)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False) + "\n"


def _lines(rows: Sequence[Mapping[str, Any]], first: int) -> list[str]:
    """The rows from the first on as lines."""
    return rows.lines[first:] if isinstance(rows, Rows) else [*map(_line, rows[first:])]
