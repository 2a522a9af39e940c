"""Histories of users: lines that somebody types, rows of a JSONL file, or Python values.

A line of text is an event; `click: trail shoes`, with a type that the training data had, is one of
that type, any other line is one of its most frequent type.  `profile: lives in Oslo` is a line of
the profile.  A blank line parts two histories.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tppo.errors import DataError, short
from tppo.sessions.session import Event, Session, collapse
from tppo.stages.answering.recipe import Recipe
from tppo.store.jsonl import (
    LONGEST,
    Line,
    decode_line,
    is_encodable,
    is_text,
    parse_object,
    read_lines,
)

PROFILE = "profile"
USER = "user"
UNKNOWN = "?"  # stands for a next query that is asked for; a prompt says how many there are
EXPECTED = (
    "a text with an event a line, a list of such texts or of {'type', 'text'}, the oldest first, "
    "or {'history': such a list, 'profile': a list of texts}"
)
CHAT = "expected a text, or a chat: a list of messages {'role': ..., 'content': ...}"


class Asked(NamedTuple):
    """One question to a model: a user's history, or for a model without histories a prompt."""

    id: str
    session: Session | None = None
    prompt: Any = None
    queries: int | None = None
    """How many next queries are asked for; None: as many as in training."""


def asked(given: Any, recipe: Recipe, id: str) -> Asked:
    """The question that a Python value is, in any of the forms of EXPECTED.

    A model that was trained on prompts as they were given takes a text, a chat, or {"prompt": one}.
    Errors: DataError naming `id`, what it was and what was expected.
    """
    if isinstance(given, Mapping):
        return _row(Line(Path(id), 0, dict(given)), recipe, id)
    if recipe.prompt == "as given":
        if not (is_text(given) or isinstance(given, list) and given):
            raise DataError(f"{id}: prompt was {short(given)}, {CHAT}")
        return Asked(id, prompt=given)
    return _question(id, (), _events(given, recipe, id), recipe)


def read_histories(lines: Iterable[bytes], name: Path, recipe: Recipe) -> Iterator[Asked]:
    """The questions of a file: JSON objects, one a line, or text; what comes first decides.

    Rows: {"history": [...], "profile"?, "id"?, "queries"?}, {"prompt": ...} for a model without
    histories, or {"messages": [...]}.
    Errors: DataError naming file, line and field.
    """
    numbered = ((n, raw) for n, raw in enumerate(lines, 1))
    first = next(((n, raw) for n, raw in numbered if raw.strip()), None)
    if first is None:
        raise DataError(f"{name}: empty, expected histories: {EXPECTED}")
    rest = _chain(first, numbered)
    if first[1].lstrip().startswith(b"{"):
        for n, raw in rest:
            if raw.strip():
                line = Line(name, n, parse_object(name, n, raw))
                yield _row(line, recipe, f"{name}: line {n}")
        return
    count = 0
    for blank, group in groupby(rest, key=lambda item: not item[1].strip()):
        if not blank:
            count += 1
            texts = [decode_line(name, n, raw) for n, raw in _bounded(group, name)]
            text = "".join(texts) if recipe.prompt == "as given" else texts
            yield asked(text, recipe, f"history {count}")


def read_file(path: Path, recipe: Recipe) -> Iterator[Asked]:
    """`read_histories` of a file, or of a gzip file."""
    return read_histories(read_lines(path), path, recipe)


def _bounded(group: Iterable[tuple[int, bytes]], name: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a history, which is held in memory."""
    size = 0
    for n, raw in group:
        size += len(raw)
        if size > LONGEST:
            raise DataError(f"{name}: line {n}: a history of more than {LONGEST >> 20} MB without "
                            "a blank line, expected shorter ones")  # fmt: skip
        yield n, raw


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _row(line: Line, recipe: Recipe, place: str) -> Asked:
    id = str(line.get("id", lambda v: is_text(v) or type(v) is int, "a text or a whole number",
                      default=place))  # fmt: skip
    queries = line.get("queries", lambda v: type(v) is int and 0 < v < 1000,
                       "a whole number from 1 to 999", default=None)  # fmt: skip
    if recipe.prompt == "as given":
        prompt = line.get("prompt" if "prompt" in line.values else "messages",
                          lambda v: is_text(v) or isinstance(v, list) and v,
                          CHAT.removeprefix("expected "))
        return Asked(id, prompt=prompt)
    if "messages" in line.values and "history" not in line.values:
        messages = line.get("messages", lambda v: isinstance(v, list), "a list of messages")
        return of_messages(messages, recipe, place)._replace(id=id, queries=queries)
    profile = line.get("profile", lambda v: isinstance(v, list) and all(map(is_text, v)),
                       "a list of texts that are not blank", default=[])  # fmt: skip
    history = line.get("history", lambda v: isinstance(v, str | list), EXPECTED)
    events = _events(history, recipe, place)
    found = _question(place, tuple(profile), events, recipe)
    return found._replace(id=id, queries=queries)


def of_messages(messages: Sequence[Any], recipe: Recipe, id: str) -> Asked:
    """A chat as a question.

    Of histories: what the user has written are the events, a line each; a system message is the
    profile; answers of the assistant are no part of it.
    Errors: DataError naming the message.
    """
    checked = [_message(message, i) for i, message in enumerate(messages)]
    if recipe.prompt == "as given":
        return Asked(id, prompt=[{"role": r, "content": text} for r, text in checked])
    profile = [line for role, text in checked if role in ("system", "developer")
               for line in text.split("\n") if line.strip()]  # fmt: skip
    lines = [text for role, text in checked if role == USER]
    return _question(id, tuple(profile), _events(lines, recipe, id), recipe)


def _message(message: Any, i: int) -> tuple[str, str]:
    if isinstance(message, Mapping) and isinstance(message.get("role"), str):
        content = message.get("content")
        if isinstance(content, list):  # parts, as newer clients send them
            parts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if is_encodable(content) and is_encodable(message["role"]):
            return message["role"], content
    raise DataError(f"messages[{i}] was {short(message)}, expected {{'role': a text, 'content': a "
                    "text}")  # fmt: skip


def _events(given: Any, recipe: Recipe, id: str) -> list[Event]:
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, list | tuple):
        raise DataError(f"{id}: history was {short(given)}, expected {EXPECTED}")
    found = []
    for i, item in enumerate(items):
        if isinstance(item, Event):
            found.append(item)
        elif isinstance(item, Mapping) and is_text(item.get("text")):
            kind = item.get("type", recipe.events[0])
            if not is_text(kind):
                raise DataError(f"{id}: history[{i}].type was {short(kind)}, expected a text")
            found.append(Event(collapse(kind), collapse(item["text"])))
        elif isinstance(item, str) and (is_text(item) or not item.strip()):
            lines = (line for line in item.split("\n") if line.strip())
            found += [_event(line, recipe) for line in lines]
        else:
            raise DataError(f"{id}: history[{i}] was {short(item)}, expected {EXPECTED}")
    return found


def _event(line: str, recipe: Recipe) -> Event:
    kind, colon, text = line.partition(":")
    if colon and text.strip() and collapse(kind) in (*recipe.events, PROFILE):
        return Event(collapse(kind), collapse(text))
    return Event(recipe.events[0], collapse(line))


def _question(
    id: str, profile: tuple[str, ...], events: Sequence[Event], recipe: Recipe
) -> Asked:
    """A session whose next queries are not known: so many stand for them as are asked for."""
    own = [event.text for event in events if event.type == PROFILE]
    history = tuple(event for event in events if event.type != PROFILE)
    lines = tuple(map(collapse, (*profile, *own)))
    if not history and not lines:
        raise DataError(f"{id}: the history is empty, expected at least one event: {EXPECTED}")
    return Asked(id, Session(id, "", "asked", lines, history, (UNKNOWN,) * recipe.queries))


def with_queries(session: Session, queries: int) -> Session:
    """The session, asked for so many next queries."""
    return replace(session, targets=(UNKNOWN,) * queries)
