"""Finds the lines of a large JSONL file by their ids, in memory that holds 8-byte hashes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from tppo.errors import DataError
from tppo.progress import status
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import Line, bounded_lines, check_new, parse_object


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_HasId)


class LineIndex(Generic[T]):
    """What the lines of a file hold, by id; every line is checked once, when the index is made.

    Errors: DataError naming file, line and field, also for an id that is used twice.
    """

    def __init__(self, path: str | os.PathLike[str], parse: Callable[[Line], T]) -> None:
        self.path, self.parse = Path(path), parse
        self._offsets = Fingerprints()
        try:
            self._file = open(self.path, "rb")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        try:
            self._scan()
        except BaseException:
            self._file.close()
            raise

    def _scan(self) -> None:
        first_line, offset = Fingerprints(), 0
        with status(f"index {self.path.name}") as bar:
            for number, raw in enumerate(bounded_lines(self._file, self.path), start=1):
                if raw.strip():
                    line = self._line(number, raw)
                    id = self.parse(line).id
                    check_new(first_line, line, id)
                    self._offsets.setdefault(id, offset)
                    bar.advance()
                offset += len(raw)

    def _line(self, number: int, raw: bytes) -> Line:
        return Line(self.path, number, parse_object(self.path, number, raw))

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, id: str) -> T | None:
        """What the line with this id holds, or None."""
        offset = self._offsets.get(id)
        if offset is None:
            return None
        self._file.seek(offset)
        item = self.parse(self._line(0, self._file.readline()))
        return item if item.id == id else None

    def __enter__(self) -> LineIndex[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
