"""Rows of figures of a long training: none of them is encoded, or written, a second time, and the
memory holds the newest alone.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

from tppo.progress import say_once
from tppo.store.jsonl import plain

HELD = 1 << 14  # bytes of rows that are held in memory
PART = 1 << 20  # bytes that are read at once


class Rows(Sequence[dict[str, Any]]):
    """JSON objects that are held as the lines that they are written as, the newest few in memory
    and those before them in a file without a name in the folder for temporary ones.

    What is read from it is what a later process would read from a file, and a checkpoint that holds
    all of them copies text.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self._file: int | None = None  # its descriptor
        self._ends = array("Q")  # of the lines in the file, each the byte behind it
        self._newest: list[bytes] = []  # the lines behind those
        self._nbytes, self._most = 0, HELD  # of these, and how many there may be
        with suppress(OSError), tempfile.TemporaryFile() as file:
            self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        self.extend(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row at the end."""
        self._add(_line(row).encode())

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add several."""
        for row in rows:
            self.append(row)

    def parts(self, first: int = 0) -> Iterator[bytes]:
        """The lines from a row on, in parts of bounded size."""
        start, end = self._begin(first), self._begin(len(self._ends))
        for place in range(start, end, PART):
            assert self._file is not None
            yield _read(self._file, place, min(PART, end - place))
        yield b"".join(self._newest[max(0, first - len(self._ends)) :])

    def __len__(self) -> int:
        return len(self._ends) + len(self._newest)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [json.loads(self._raw(i)) for i in range(len(self))[index]]
        return json.loads(self._raw(range(len(self))[index]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (json.loads(self._raw(i)) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return len(self) == len(other) and all(
            self._raw(i) == other._raw(i) for i in range(len(self))
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _add(self, line: bytes) -> None:
        self._newest.append(line)
        self._nbytes += len(line)
        if self._nbytes > self._most:
            self._put_away()

    def _put_away(self) -> None:
        """Move the lines in memory to the file.  A training is not to end because there is no room
        for them: they stay where they are then.
        """
        start = self._begin(len(self._ends))
        try:
            if self._file is None:
                raise OSError(f"no temporary file in {tempfile.gettempdir()}")
            _write(self._file, start, b"".join(self._newest))
        except OSError as error:
            say_once(f"WARNING: the figures of a training are held in memory: {error}; TMPDIR may "
                     "name another folder for temporary files")  # fmt: skip
            self._most = 2 * self._nbytes  # and not tried again with each row
            return
        for line in self._newest:
            self._ends.append(start := start + len(line))
        self._newest, self._nbytes, self._most = [], 0, HELD

    def _begin(self, row: int) -> int:
        """The byte of the file at which a row begins that is, or would be, in it."""
        return self._ends[min(row, len(self._ends)) - 1] if row and self._ends else 0

    def _raw(self, row: int) -> bytes:
        if row >= len(self._ends):
            return self._newest[row - len(self._ends)]
        assert self._file is not None
        start = self._begin(row)
        return _read(self._file, start, self._ends[row] - start)


def read_rows(path: Path) -> Rows:
    """The rows of a file of `RowFile`."""
    found = Rows()
    with open(path, "rb") as file:  # a line ends at LF alone: U+2028 may stand inside a text
        for line in file:
            found._add(line)
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
        if whole:
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            with open(temporary, "wb") as file:
                self.nbytes = sum(map(file.write, _parts(rows, 0)))
            os.replace(temporary, self.path)
        elif text := b"".join(_parts(rows, self.rows)):
            with open(self.path, "ab", buffering=0) as file:
                file.write(text)
            self.nbytes += len(text)
        self.rows = len(rows)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False) + "\n"


def _parts(rows: Sequence[Mapping[str, Any]], first: int) -> Iterable[bytes]:
    """The rows from the first on as lines."""
    return rows.parts(first) if isinstance(rows, Rows) else (
        _line(row).encode() for row in rows[first:])  # fmt: skip


def _read(file: int, place: int, nbytes: int) -> bytes:
    """So many bytes of a file from a place on."""
    found = os.pread(file, nbytes, place)
    while len(found) < nbytes:
        if not (more := os.pread(file, nbytes - len(found), place + len(found))):
            raise OSError("a temporary file of this process is shorter than it was")
        found += more
    return found


def _write(file: int, place: int, data: bytes) -> None:
    """Write bytes into a file from a place on."""
    while data:
        done = os.pwrite(file, data, place)
        data, place = data[done:], place + done
