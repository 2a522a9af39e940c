"""The objects of a file, a line each or all in one JSON list, and the lines where they begin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tppo.errors import DataError, short
from tppo.store.jsonl import (
    LONGEST,
    BadRows,
    Line,
    decode_line,
    may_go_on,
    read_jsonl,
    read_lines,
)

_SPACE = re.compile(r"[ \t\n\r]*")  # what JSON takes for white space, and no other


def read_objects(path: Path, bad: BadRows) -> Iterator[Line]:
    """The objects of a JSONL file, or of a file that holds one JSON list.

    Raises DataError as `read_jsonl` and `read_array` do.
    """
    if begins(path).startswith("[") and not is_jsonl(path):
        return read_array(path, bad, "session", "an object")
    return read_jsonl(path, bad)


def is_jsonl(path: Path) -> bool:
    """Whether a file, by its name, has one object per line."""
    return not {".jsonl", ".ndjson"}.isdisjoint(suffix.lower() for suffix in path.suffixes[-2:])


def head(path: Path, length: int = 1 << 16) -> str:
    """The first lines of a file, to the one that reaches `length` bytes."""
    found = bytearray()
    for raw in read_lines(path):
        found += raw
        if len(found) >= length:
            break
    return found.decode("utf-8", "replace")


def begins(path: Path) -> str:
    """The first line of a file that is not blank, without the space around it."""
    raw = next(filter(bytes.strip, read_lines(path)), b"")
    return raw.decode("utf-8", "replace").strip()


def read_array(path: Path, bad: BadRows, item: str, expected: str) -> Iterator[Line]:
    """The objects of a JSON list.  One of them is held in memory at a time.

    Raises DataError naming line and column: for what is no list, and for an item that is no object.
    """
    text = _Window(path, item)
    if text.next() != "[":
        raise text.error(f"a JSON list of {item}s")
    text.at += 1
    while (first := text.next()) != "]":
        line, error = text.place()[0], None if first == "{" else text.error(expected)
        found = text.value()
        with bad:
            if error is not None:  # only an object begins so
                raise error
            yield Line(path, line, found)
        after = text.next()
        if after == ",":
            text.at += 1
            text.next()
        elif after != "]":
            raise text.error("a comma or the end of the list")
    text.at += 1
    if text.next():
        raise text.error("nothing after the list")


class _Window:
    """The part of a file's text that is held in memory, from the item that is read now."""

    FIRST = 1 << 16  # characters that are read at a time, at least

    def __init__(self, path: Path, item: str) -> None:
        self.path, self.item = path, item
        self.text, self.at = "", 0
        self._lines = enumerate(read_lines(path), start=1)
        self._line, self._column = 1, 1  # of the place in `text` that was asked for last
        self._told = 0

    def next(self) -> str:
        """The next character that is not white space, where `at` is then; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The JSON value that begins at `at`, which is behind it then."""
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except RecursionError:
                raise self.error(f"a {self.item}, not nested so deeply") from None
            except json.JSONDecodeError as error:
                if may_go_on(error, self.text) and self._more():
                    continue
                self.at = error.pos
                line, column = self.place()
                raise DataError(
                    f"{self.path}: line {line}: not JSON: {error.msg} at column {column}"
                ) from None
            except ValueError as error:  # an integer with thousands of digits
                raise self.error(f"JSON that can be held ({error})") from None
            if end == len(self.text) and self._more():  # a number may go on
                continue
            self.at = end
            return found

    def place(self) -> tuple[int, int]:
        """Line and column of `at`."""
        breaks = self.text.count("\n", self._told, self.at)
        if breaks:
            self._column = self.at - self.text.rfind("\n", self._told, self.at)
        else:
            self._column += self.at - self._told
        self._line, self._told = self._line + breaks, self.at
        return self._line, self._column

    def error(self, expected: str) -> DataError:
        """The error for what stands at `at`."""
        line, column = self.place()
        shown = self.text[self.at : self.at + 80].split("\n")[0]
        was = short(shown) if self.at < len(self.text) else "the end of the file"
        return DataError(
            f"{self.path}: line {line}: column {column}: was {was}, expected {expected}"
        )

    def _more(self) -> bool:
        """Read on, to twice what is held from `at` on; whether anything was left to read."""
        if len(self.text) - self.at > LONGEST:
            raise self.error(f"a {self.item} of at most {LONGEST >> 20} MB")
        self.place()
        held, size = [self.text[self.at :]], len(self.text) - self.at
        wanted = max(2 * size, size + self.FIRST)
        for number, raw in self._lines:
            held.append(decode_line(self.path, number, raw))
            size += len(held[-1])
            if size >= wanted:
                break
        self.text, self.at, self._told = "".join(held), 0, 0
        return len(held) > 1
