"""The canonical format of search sessions: what the trainer reads, and what its readers write.

A file is UTF-8 JSONL, one session a line:
`{"id", "user", "source", "profile": [str]?, "history": [{"type", "text", "time"?, "clicks"?}],
"targets": [str], "latent_intent": {str: str}?}`. `history` is in time order; `targets` are the true
next queries, which no model may see in its prompt; data is split by `user`. `latent_intent` is
known of generated sessions: neither a prompt nor a labeller is given it. Other keys are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from tppo.errors import DataError
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import (
    LONGEST,
    STOP,
    BadRows,
    Line,
    atomic_file,
    check_new,
    is_text,
    read_jsonl,
)

__all__ = ["DataError", "Event", "Session", "iter_sessions", "read_sessions", "write_sessions"]


T = TypeVar("T")

MOST_ROWS = 500_000  # of one user or session, in the formats that have a row a search


@dataclass(frozen=True)
class Event:
    """One action of a user: a search, a click, an utterance."""

    type: str
    text: str
    time: str | None = None
    clicks: int | None = None


@dataclass(frozen=True)
class Session:
    """One user's history and the queries that truly came next."""

    id: str
    user: str
    source: str
    profile: tuple[str, ...]
    history: tuple[Event, ...]
    targets: tuple[str, ...]
    intent: tuple[tuple[str, str], ...] = ()
    """What the user is after, as (part, word), where that is known: for judges alone."""


def read_sessions(path: str | os.PathLike[str]) -> list[Session]:
    """Read and check a session file; white space inside texts is collapsed to single spaces.

    Raises DataError naming the file, the line, the field, what it was and what was expected.
    """
    return list(iter_sessions(path))


def iter_sessions(path: str | os.PathLike[str]) -> Iterator[Session]:
    """The sessions of a file one at a time, checked like `read_sessions`."""
    return sessions_of(read_jsonl(path))


def sessions_of(lines: Iterable[Line], bad: BadRows = STOP) -> Iterator[Session]:
    """The sessions that lines hold, one at a time."""
    first_line = Fingerprints()
    for line in lines:
        with bad:
            session = session_of(line)
            check_new(first_line, line, session.id)
            yield session


def write_sessions(path: str | os.PathLike[str], sessions: Iterable[Session]) -> None:
    """Write a session file, whole or not at all; empty fields are left out."""
    with atomic_file(path) as write:
        for session in sessions:
            write(session_line(session))


def session_line(session: Session) -> str:
    """A session as its line of a file."""
    return json.dumps(_row(session), ensure_ascii=False) + "\n"


def session_of(line: Line) -> Session:
    """The session that a line holds.  Raises DataError naming the field that is wrong."""
    history = line.get("history", _is_list, "a list of events in time order")
    return Session(
        id=_text(line, "id"),
        user=_text(line, "user"),
        source=_text(line, "source"),
        profile=_texts(
            line, "profile", line.get("profile", _is_list, "a list of texts", default=[])
        ),
        history=tuple(_event(line, index, value) for index, value in enumerate(history)),
        targets=_targets(line),
        intent=_intent(line),
    )


def _targets(line: Line) -> tuple[str, ...]:
    expected = "a list with at least one true next query"
    return _texts(line, "targets", line.get("targets", lambda v: _is_list(v) and v, expected))


def _intent(line: Line) -> tuple[tuple[str, str], ...]:
    given = line.get(
        "latent_intent", _is_texts, "an object of texts, by names, that are not blank", default={}
    )
    return tuple((part, collapse(word)) for part, word in given.items())


def _event(line: Line, index: int, value: Any) -> Event:
    name = f"history[{index}]"
    if not isinstance(value, dict):
        raise line.error(name, value, "an object with 'type' and 'text'")
    event = Line(line.path, line.number, {f"{name}.{key}": item for key, item in value.items()})
    return Event(
        type=_text(event, f"{name}.type"),
        text=_text(event, f"{name}.text"),
        time=event.get(f"{name}.time", is_text, "a text or null", default=None),
        clicks=event.get(f"{name}.clicks", _is_count, "a whole number >= 0 or null", default=None),
    )


def _text(line: Line, field: str) -> str:
    return collapse(line.get(field, is_text, "a text that is not blank"))


def _texts(line: Line, field: str, values: list[Any]) -> tuple[str, ...]:
    for index, value in enumerate(values):
        if not is_text(value):
            raise line.error(f"{field}[{index}]", value, "a text that is not blank")
    return tuple(collapse(value) for value in values)


def held(rows: Iterable[T], size: Callable[[T], int], of: str) -> list[T]:
    """Rows that belong together and are held in memory, each with so many characters.

    Raises DataError, beginning with `of`, for more than MOST_ROWS of them or LONGEST characters.
    """
    found: list[T] = []
    characters = 0
    for row in rows:
        characters += size(row)
        if len(found) == MOST_ROWS or characters > LONGEST:
            raise DataError(f"{of} more than {MOST_ROWS:,} rows or {LONGEST >> 20} MB, expected "
                            "fewer: is that one user?")  # fmt: skip
        found.append(row)
    return found


def collapse(text: str) -> str:
    """A text with its white space collapsed to single spaces."""
    return " ".join(text.split())


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_text, (*value, *value.values())))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _row(session: Session) -> dict[str, Any]:
    events = [{k: v for k, v in vars(event).items() if v is not None} for event in session.history]
    row = {
        "id": session.id,
        "user": session.user,
        "source": session.source,
        "profile": session.profile,
        "history": events,
        "targets": session.targets,
        "latent_intent": dict(session.intent),
    }
    may_be_left_out = ("profile", "latent_intent")
    return {key: value for key, value in row.items() if key not in may_be_left_out or value}
