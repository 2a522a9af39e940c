"""The objects of a file, a line each or all in one JSON list, and the lines where they begin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tppo.errors import DataError, short
from tppo.store.jsonl import BadRows, Line, decode_line, read_jsonl, read_lines


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
    """The objects of a JSON list.  The file is held in memory.

    Raises DataError naming line and column: for what is no list, and for an item that is no object.
    """
    text = "".join(
        decode_line(path, number, raw) for number, raw in enumerate(read_lines(path), start=1)
    )
    if text[(at := _skip(text, 0)) : at + 1] != "[":
        raise _error(path, text, at, f"a JSON list of {item}s")
    at = _skip(text, at + 1)
    line, counted = 1, 0  # the line breaks before `counted` are counted
    while text[at : at + 1] != "]":
        try:
            found, end = json.JSONDecoder().raw_decode(text, at)
        except RecursionError:
            raise _error(path, text, at, f"a {item}, not nested so deeply") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}: line {error.lineno}: not JSON: {error.msg} at column {error.colno}"
            ) from None
        except ValueError as error:  # an integer with thousands of digits
            raise _error(path, text, at, f"JSON that can be held ({error})") from None
        line, counted = line + text.count("\n", counted, at), at
        with bad:
            if not isinstance(found, dict):
                raise _error(path, text, at, expected)
            yield Line(path, line, found)
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise _error(path, text, at, "a comma or the end of the list")
    if (at := _skip(text, at + 1)) < len(text):
        raise _error(path, text, at, "nothing after the list")


def _skip(text: str, at: int) -> int:
    """The next place that is not white space."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _error(path: Path, text: str, at: int, expected: str) -> DataError:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    was = short(text[at : at + 80].split("\n")[0]) if at < len(text) else "the end of the file"
    return DataError(f"{path}: line {line}: column {column}: was {was}, expected {expected}")
