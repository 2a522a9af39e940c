"""Lines of gigabytes and gzip files that grow a thousandfold, in every reader: memory is bounded.

An input is a number, of a reader and of what its file holds. The reader ends with DataError that
names file, line and limit, or reads what there is, and holds at most `PEAK` times the limit.
"""

import functools
import gzip
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from files import folder
from fuzz_labels import CONFIG, ITEMS
from guided import REFUSED, Target, Wrong

from tppo.errors import DataError
from tppo.labels.endpoint.batch import import_batch
from tppo.labels.endpoint.cache import Work
from tppo.labels.endpoint.config import need_libraries
from tppo.labels.endpoint.lost import lost_by_endpoint
from tppo.labels.hand import HandLabels, HandPairs, is_journal
from tppo.labels.label import read_labels
from tppo.sessions.readers import ReadConfig, SessionLog
from tppo.sessions.session import session_of
from tppo.stages.answering.histories import read_file
from tppo.stages.answering.recipe import FILE, Recipe, read_recipe
from tppo.stages.preferences import read_preferences
from tppo.stages.prompts import read_prompts
from tppo.store import jsonl
from tppo.store.jsonl import read_object
from tppo.store.line_index import LineIndex
from tppo.store.yaml_file import read_yaml

WHOLE = 2 << 30  # bytes of a file, or of what a gzip file stands for
PEAK = 8  # times the limit of a line is held at most, whatever the format makes of it
BASE = 64 << 20  # bytes that are held beside it


def log(kind: str) -> Callable[[Path], Any]:
    def call(path: Path) -> None:
        for config in (
            ReadConfig(),
            ReadConfig(format=kind),  # type: ignore[arg-type]
            ReadConfig(format=kind, on_bad_row="skip"),
        ):  # type: ignore[arg-type]
            for _ in SessionLog(path, config):
                pass

    return call


def index(path: Path) -> None:
    with LineIndex(path, session_of):
        pass


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{
        kind: (f"log.{end}", log(kind))
        for kind, end in (
            ("sessions", "jsonl"),
            ("chat", "json"),
            ("aol", "tsv"),
            ("ikat", "json"),
            ("sim4ia", "csv"),
        )
    },
    "labels": ("labels.jsonl", read_labels),
    "prompts": ("prompts.jsonl", read_prompts),
    "pairs": ("pairs.jsonl", read_preferences),
    "lost": ("lost.jsonl", lost_by_endpoint),
    "histories": ("histories.txt", lambda path: list(read_file(path, Recipe()))),
    "batch": ("batch.jsonl", lambda path: import_batch(ITEMS, CONFIG, path.with_name("c"), path)),
    "journal": ("journal.jsonl", HandLabels),
    "journal of pairs": ("pairs.jsonl", HandPairs),
    "is it a journal": ("journal.jsonl", is_journal),
    "cache": ("cache.jsonl", lambda path: Work(CONFIG, path)),
    "index": ("index.jsonl", index),
    "manifest": ("manifest.json", read_object),
    "settings": ("run.yaml", read_yaml),
    "recipe": (FILE, lambda path: read_recipe(path.parent)),
}
SEARCH = b"1,u,s1," + b"shoes " * 99 + b",2025-01-10 20:55:48,1,q,"


class Case(NamedTuple):
    """A reader and its file: bytes that begin it, and bytes that are repeated behind them."""

    reader: str
    packed: str
    begin: bytes
    row: bytes
    share: float = 1.0
    """Of WHOLE that the repeated bytes stand for."""


@functools.cache
def cases() -> list[Case]:
    """A line without an end in every reader, and of some what they hold of many lines."""
    need_libraries()  # here, because what their import takes is not held for a file
    found = [Case(name, "sparse", b'{"a": "', b"") for name in READERS]
    found += [Case(name, "gzip", b'{"a": "', b"x" * 50) for name in READERS]
    return [
        *found,
        Case("aol", "gzip", b"", b"7\t" + b"boots " * 99 + b"\t2006-03-01 07:17:12\n", 0.05),
        Case("sim4ia", "gzip", b"", SEARCH + b"[]\n", 0.05),
        Case("sim4ia", "gzip", SEARCH, b'"\n' + b"x" * 99 + b'",', 0.05),  # one record
        Case("sim4ia", "gzip", SEARCH, b'"' + b"x" * 60 + b"\n", 0.05),
        Case("histories", "gzip", b"", b"search: boots " * 99 + b"\n", 0.05),
        Case("ikat", "gzip", b'[{"turns": [', b'"' + b"x" * 99 + b'",\n', 0.05),
        Case("ikat", "gzip", b'[{"turns": "', b"x" * 99 + b"\\n", 0.05),
        Case("chat", "gzip", b"[", b" " * 999 + b"\n"),
        Case("chat", "gzip", b"[", b'{"messages": []' + b" " * 999 + b"},\n", 0.05),
    ]  # fmt: skip


def written(path: Path, case: Case) -> None:
    """A file that stands for gigabytes and takes next to nothing on the disk."""
    if case.packed == "sparse":
        with open(path, "wb") as file:
            file.write(case.begin)
            file.truncate(WHOLE)
        return
    member = case.row * ((1 << 20) // len(case.row))
    parts = int(case.share * WHOLE) // len(member) + 1
    first = gzip.compress(case.begin, 6, mtime=0)
    path.write_bytes(first + gzip.compress(member, 6, mtime=0) * parts)


def measured(call: Callable[[Path], Any], path: Path) -> tuple[int, str]:
    """(bytes that were held at most, the message of the error)."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        call(path)
        return tracemalloc.get_traced_memory()[1] - before, ""
    except DataError as error:
        return tracemalloc.get_traced_memory()[1] - before, str(error)
    finally:
        if not tracing:
            tracemalloc.stop()


def check(case: Case) -> str | None:
    name, limit = case.reader, jsonl.LONGEST
    file, call = READERS[name]
    path = folder() / file
    written(path, case)
    try:
        peak, message = measured(call, path)
    finally:
        path.unlink()
    if peak > PEAK * limit + BASE:
        raise Wrong(f"{case}: held {peak >> 20} MB")
    if message and not (str(path) in message and (" MB" in message or case.packed == "gzip")):
        raise Wrong(f"{case}: the message is {message!r}")
    if case.packed == "sparse" and not (message or name in ("manifest", "lost")):
        raise Wrong(f"{name}: {WHOLE} bytes in a line are no error")
    return REFUSED if message else None


def call(data: bytes) -> str | None:
    found = cases()
    return check(found[int.from_bytes(data, "little") % len(found)])


def numbers() -> Iterator[bytes]:
    return (number.to_bytes(1, "little") for number in range(len(cases())))


TARGETS = [Target("gigabytes in bounded memory", call, 90, lambda: list(numbers()))]
