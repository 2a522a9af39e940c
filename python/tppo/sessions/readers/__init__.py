"""Readers of real logs: every format becomes the same sessions, one at a time.

sessions  objects as `tppo.sessions.session` describes them: each is a session
chat      {"messages": [{"role", "content"}]}, or ShareGPT's {"conversations": [{"from", "value"}]}:
          the last user turn is the target
aol       tab-separated AnonID Query QueryTime ItemRank ClickURL: a user's searches without a long
          pause, the newest are the targets
qac       AmazonQAC parquet: past searches and a prefix, the final search is the target
ikat      TREC iKAT topics, a JSON list: a turn, its self-contained rewrite is the target
sim4ia    Sim4IA-Bench Task A, CSV: a session's searches, the last is the target

sessions and chat have an object a line, or all in one JSON list.  Text formats may be gzip files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

from tppo.errors import DataError, short
from tppo.sessions.readers.aol import read_aol
from tppo.sessions.readers.array import begins, head, is_jsonl, read_objects
from tppo.sessions.readers.chat import LISTS, read_chat
from tppo.sessions.readers.ikat import read_ikat
from tppo.sessions.readers.qac import read_qac
from tppo.sessions.readers.sim4ia import read_sim4ia
from tppo.sessions.session import Session, sessions_of
from tppo.settings import Count, NonNegative, section
from tppo.store.jsonl import BadRows, refuse_pipe

__all__ = ["ReadConfig", "SessionLog", "detect_format"]

Format = Literal["sessions", "chat", "aol", "qac", "ikat", "sim4ia"]


@section
class ReadConfig:
    """How a log file is read."""

    format: Literal["auto", "sessions", "chat", "aol", "qac", "ikat", "sim4ia"] = "auto"
    """Format of the file; auto goes by its name and its first line."""
    gap_minutes: NonNegative | None = 30.0
    """aol: a pause longer than this ends a session; None: all of a user's log is one session."""
    targets: Count = 3
    """aol: this many newest searches of a session are its targets; without one before: left out."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a row, line or topic that is wrong does: it stops the reading, or is left out and
    counted, the first five named."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Leave out sessions that repeat an earlier one: of the same user with the same events and
    targets (exact), or of anybody with the same queries but for case and punctuation (near)."""


class SessionLog:
    """The sessions of a log file; each iteration reads the file again.

    `left_out` counts, by reason, what the newest iteration made no session of; `bad` what was
    wrong.  With `tell` a wrong row does not stop the reading: `tell` gets each message.
    """

    def __init__(
        self, path: Path, config: ReadConfig, tell: Callable[[str], None] | None = None
    ) -> None:
        self.path, self.config = path, config
        refuse_pipe(path)
        self.format: Format = detect_format(path) if config.format == "auto" else config.format
        self.left_out: Counter[str] = Counter()
        skip = config.on_bad_row == "skip" or tell is not None
        self.bad = BadRows(skip, "; --on-bad-row skip leaves such rows out", tell)

    def __iter__(self) -> Iterator[Session]:
        """Raises DataError naming file, line and column, what it was and what was expected."""
        self.left_out.clear()
        self.bad.clear()
        return _READERS[self.format](self.path, self.config, self.left_out, self.bad)


_Reader = Callable[[Path, ReadConfig, Counter[str], BadRows], Iterator[Session]]
_READERS: dict[str, _Reader] = {
    "sessions": lambda path, config, left_out, bad: sessions_of(read_objects(path, bad), bad),
    "chat": lambda path, config, left_out, bad: read_chat(path, left_out, bad),
    "aol": lambda path, config, left_out, bad: read_aol(
        path, config.gap_minutes, config.targets, left_out, bad
    ),
    "qac": lambda path, config, left_out, bad: read_qac(path, left_out, bad),
    "ikat": lambda path, config, left_out, bad: read_ikat(path, left_out, bad),
    "sim4ia": lambda path, config, left_out, bad: read_sim4ia(path, left_out, bad),
}
# The formats of a JSON list, by the first of these keys in it.
_KEYS: dict[str, Format] = {
    "messages": "chat", "conversations": "chat", "turns": "ikat", "responses": "ikat",
    "ptkb": "ikat", "history": "sessions", "targets": "sessions",
}  # fmt: skip
_KEY = re.compile(f'"({"|".join(_KEYS)})"\\s*:')


def detect_format(path: Path) -> Format:
    """The format of a log file, by its name and how it begins.

    Raises DataError for a file that cannot be read or that is like none of them.
    """
    first = begins(path)
    if first.startswith("PAR1") or path.suffix.lower() == ".parquet":
        return "qac"
    if is_jsonl(path) or first.startswith("{"):
        return "chat" if _is_chat(first) else "sessions"
    if first.startswith("["):
        found = _KEY.search(head(path))
        return "ikat" if found is None else _KEYS[found[1]]
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
    return isinstance(value, dict) and not value.keys().isdisjoint(LISTS) and "targets" not in value
