"""Readers of real logs: every format becomes the same sessions, one at a time.

sessions  JSONL as `tppo.sessions` describes it: a line is a session
chat      JSONL, {"messages": [{"role", "content"}]}: the last user turn is the target
aol       tab-separated AnonID Query QueryTime ItemRank ClickURL: a user's searches without a long
          pause, the newest are the targets
qac       AmazonQAC parquet: past searches and a prefix, the final search is the target
ikat      TREC iKAT topics, a JSON list: a turn, its self-contained rewrite is the target
sim4ia    Sim4IA-Bench Task A, CSV: a session's searches, the last is the target

Text formats may be gzip files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

from tppo.jsonl import DataError, read_lines, short
from tppo.readers.aol import read_aol
from tppo.readers.chat import read_chat
from tppo.readers.ikat import read_ikat
from tppo.readers.qac import read_qac
from tppo.readers.sim4ia import read_sim4ia
from tppo.sessions import Session, iter_sessions
from tppo.settings import Count, NonNegative, section

__all__ = ["ReadConfig", "SessionLog", "detect_format"]

Format = Literal["sessions", "chat", "aol", "qac", "ikat", "sim4ia"]


@section
class ReadConfig:
    """How a log file is read."""

    format: Literal["auto", "sessions", "chat", "aol", "qac", "ikat", "sim4ia"] = "auto"
    """Format of the file; auto looks at its name and its first line."""
    gap_minutes: NonNegative | None = 30.0
    """aol: a pause longer than this ends a session; None: all of a user's log is one session."""
    targets: Count = 3
    """aol: this many newest searches of a session are its targets; without one before: left out."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Leave out sessions that repeat an earlier one: of the same user with the same events and
    targets (exact), or of anybody with the same queries but for case and punctuation (near)."""


class SessionLog:
    """The sessions of a log file; each iteration reads the file again.

    `left_out` counts, by reason, what the newest iteration made no session of.
    """

    def __init__(self, path: Path, config: ReadConfig) -> None:
        self.path, self.config = path, config
        self.format: Format = detect_format(path) if config.format == "auto" else config.format
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Session]:
        """Raises DataError naming file, line and column, what it was and what was expected."""
        self.left_out.clear()
        return _READERS[self.format](self.path, self.config, self.left_out)


_READERS: dict[str, Callable[[Path, ReadConfig, Counter[str]], Iterator[Session]]] = {
    "sessions": lambda path, config, left_out: iter_sessions(path),
    "chat": lambda path, config, left_out: read_chat(path, left_out),
    "aol": lambda path, config, left_out: read_aol(
        path, config.gap_minutes, config.targets, left_out
    ),
    "qac": lambda path, config, left_out: read_qac(path, left_out),
    "ikat": lambda path, config, left_out: read_ikat(path, left_out),
    "sim4ia": lambda path, config, left_out: read_sim4ia(path, left_out),
}


def detect_format(path: Path) -> Format:
    """The format of a log file, by its name and its first line.

    Raises DataError for a file that cannot be read or that is like none of them.
    """
    raw = next(filter(bytes.strip, read_lines(path)), b"")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if raw.startswith(b"PAR1") or suffix == ".parquet":
        return "qac"
    first = raw.decode("utf-8", "replace").strip()
    if suffix in (".jsonl", ".ndjson") or first.startswith("{"):
        return "chat" if _is_chat(first) else "sessions"
    if first.startswith("["):
        return "ikat"
    if not first:
        raise DataError(f"{path}: empty, expected a log of search sessions")
    if first.count("\t") >= 2:
        return "aol"
    if first.count(",") >= 2:
        return "sim4ia"
    raise DataError(
        f"{path}: first line was {short(first)}, which is like no format that is known; "
        f"expected one of {', '.join(get_args(Format))}"
    )


def _is_chat(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "messages" in value and "targets" not in value
