"""Read and write JSON and JSONL: errors name file, line and field; a write is whole or nothing."""

from __future__ import annotations

import dataclasses
import enum
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from tppo.errors import DataError, short
from tppo.store.fingerprints import Fingerprints

LONGEST = 64 << 20  # bytes of a line, or characters of an item of a list, that are held in memory
SUM = "sum"  # the last entry of a line that was added to a file
_SUMMED = re.compile(rb'(\{.*), "sum": "([0-9a-f]{8})"\}\s*', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRows:
    """What becomes of the rows of a file that are wrong: a context manager around each of them.

    The first DataError ends the reading; with `skip` each one is counted and reported, and its row
    is left out.
    """

    FIRST = 5  # of their messages are kept

    def __init__(
        self, skip: bool = False, remedy: str = "", tell: Callable[[str], None] | None = None
    ) -> None:
        self.skip, self.remedy, self.tell = skip, remedy, tell
        self.clear()

    def clear(self) -> None:
        """Forget what an earlier reading has met."""
        self.count = 0
        self.first: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DataError):
            return False
        if not self.skip:  # a block inside another one has added the remedy already
            raise DataError(str(error).removesuffix(self.remedy) + self.remedy) from None
        self.count += 1
        if self.count <= self.FIRST:
            self.first.append(str(error))
        if self.tell is not None:
            self.tell(str(error))
        return True


STOP = BadRows()


class Line:
    """One JSON object of a JSONL file, with its path and line number."""

    def __init__(self, path: Path, number: int, values: dict[str, Any]) -> None:
        self.path, self.number, self.values = path, number, values

    def error(self, field: str, was: object, expected: str) -> DataError:
        """The error for a field: its place, what it was, what was expected."""
        return DataError(
            f"{self.path}: line {self.number}: field '{field}': "
            f"was {short(was)}, expected {expected}"
        )

    def get(
        self, field: str, ok: Callable[[Any], Any], expected: str, *, default: Any = ...
    ) -> Any:
        """The value of `field` if `ok`; the default where absent or null; an error otherwise."""
        value = self.values.get(field)
        if value is None and default is not ...:
            return default
        if field not in self.values:
            raise DataError(
                f"{self.path}: line {self.number}: field '{field}': missing, expected {expected}"
            )
        if not ok(value):
            raise self.error(field, value, expected)
        return value


def check_new(first_line: Fingerprints, line: Line, id: str) -> None:
    """Raises DataError for an id that an earlier line has; notes it otherwise."""
    earlier = first_line.setdefault(id, line.number)
    if earlier != line.number:
        raise line.error("id", id, f"an id that is used once (line {earlier} has it too)")


def is_text(value: object) -> bool:
    """Whether a value is a string that is not blank and that UTF-8 can hold."""
    return is_encodable(value) and bool(value.strip())


def is_encodable(value: object) -> TypeGuard[str]:
    """Whether a value is a string that UTF-8 can hold."""
    return isinstance(value, str) and not has_surrogate(value)


def has_surrogate(text: str) -> bool:
    """Whether half of a UTF-16 pair stands alone, which JSON can escape and UTF-8 cannot hold."""
    return _SURROGATE.search(text) is not None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """One JSON document, as `write_json` writes it."""
    return json.loads(bounded_bytes(Path(path)))


def read_object(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """One JSON object; None where there is no such file, or none that holds one."""
    try:
        value = json.loads(bounded_bytes(Path(path)))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_jsonl(path: str | os.PathLike[str], bad: BadRows = STOP) -> Iterator[Line]:
    """The JSON objects of a UTF-8 file, one a line; a byte-order mark, CRLF, blank lines are fine.

    Raises DataError for a file that cannot be read or holds nothing, and for a line that is not
    UTF-8, not JSON, or not an object.
    """
    path = Path(path)
    empty = True
    for number, raw in enumerate(read_lines(path), start=1):
        if not raw.strip():
            continue
        empty, values = False, None
        with bad:
            values = parse_object(path, number, raw)
        if values is not None:
            yield Line(path, number, values)
    if empty:
        raise DataError(f"{path}: empty, expected one JSON object a line")


def refuse_pipe(path: Path) -> None:
    """Raise DataError for a log that cannot be read more than once, or is a folder."""
    if path.is_dir():
        raise DataError(f"{path}: a folder, expected a file")
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path}: a pipe or a device, which can be read only once, and a log is read several "
            "times; give a file (gzip files are read as they are)"
        )


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file or of a gzip file, without their byte-order mark, one at a time.

    A line ends at LF alone: U+2028 and the like may occur inside a text.

    Raises DataError for a file that cannot be read or whose gzip data is damaged, and as
    `bounded_lines` does.
    """
    number = 0
    try:
        with open(path, "rb") as plain_file:
            zipped = plain_file.peek(2)[:2] == b"\x1f\x8b"
            file: Any = gzip.open(plain_file) if zipped else plain_file
            for number, raw in enumerate(bounded_lines(file, path), start=1):
                yield raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: line {number + 1}: gzip data is damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def bounded_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of an opened file, in memory that is bounded whatever the file holds.

    Raises DataError naming a line of more than LONGEST bytes: a file without line breaks, or a few
    bytes of gzip data that stand for gigabytes.
    """
    number = 0
    while raw := file.readline(LONGEST + 1):
        number += 1
        if len(raw) > LONGEST:
            raise DataError(
                f"{path}: line {number}: has more than {LONGEST >> 20} MB, expected shorter lines: "
                "is the file damaged, or without line breaks?"
            )
        yield raw


def bounded_bytes(path: Path, most: int = LONGEST) -> bytes:
    """What a file holds that is read as a whole.

    Raises DataError for more than `most` bytes, and OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise DataError(f"{path}: has more than {most >> 20} MB, expected a shorter document")
    return found


def decode_line(path: Path, number: int, raw: bytes) -> str:
    """The text of a line.  Raises DataError naming the byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: line {number}: not UTF-8: byte 0x{raw[error.start]:02x} "
            f"at byte {error.start + 1} of the line"
        ) from None


def parse_object(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    """The JSON object of a line.  Raises DataError naming what is wrong with it."""
    where = f"{path}: line {number}"
    text = decode_line(path, number, raw)
    try:
        value = json.loads(text)
    except RecursionError:
        raise DataError(f"{where}: not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.colno}: {short(text.strip())}"
        ) from None
    except ValueError as error:  # an integer with thousands of digits
        raise DataError(f"{where}: not JSON that can be held: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: was {short(value)}, expected a JSON object {{...}}")
    return value


def plain(value: Any) -> Any:
    """A value as JSON holds it: dataclasses become objects, paths text, NaN and infinities null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # a number of torch or numpy
        return plain(value.item())
    raise TypeError(f"value was a {type(value).__name__}, expected something that JSON can hold")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    write_text(path, json.dumps(plain(value), ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Write one JSON document a line, as they come; the whole file or none of it."""
    with atomic_file(path) as write:
        for row in rows:
            write(json.dumps(plain(row), ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_file(path) as write:
        write(text)


def summed(row: Any) -> str:
    """A JSON object as a line that ends with its checksum, so that a change to it is noticed."""
    text = json.dumps(plain(row), ensure_ascii=False)
    return f"{text[:-1]}, {json.dumps(SUM)}: \"{zlib.crc32(text.encode()):08x}\"}}\n"


def append_line(path: Path, row: Any) -> int:
    """Add one JSON object as a line, on disk when it returns; the byte at which it begins.

    Half a line that a killed process has left at the end stays a line of its own.  The last entry
    of a line is its checksum (`is_as_written`).
    """
    line = summed(row)
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(("\n" if torn else "").encode() + line.encode())
        file.flush()
        os.fsync(file.fileno())
    return end + torn


def may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a text that is no JSON may be the first part of one: it is wrong near its end only,
    or in a string that does not end.
    """
    return error.pos > len(text) - 16 or error.msg.startswith("Unterminated")


def whole_lines(path: Path) -> tuple[list[bytes], bool]:
    """The lines of a file of `append_line`, and whether a last one was cut, as by a kill: that one
    is taken off the file.
    """
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    return whole.splitlines(), whole != text


def is_as_written(line: bytes) -> bool:
    """Whether a line of `append_line` has not changed since.  One without a checksum is as it is:
    earlier versions wrote none.
    """
    found = _SUMMED.fullmatch(line)
    return found is None or f"{zlib.crc32(found[1] + b'}'):08x}".encode() == found[2]


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Callable[[str], object]]:
    """A function that adds text to a UTF-8 file, which appears at `path` when the block succeeds.

    It is written through a temporary one: a kill leaves the old file or the new.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
