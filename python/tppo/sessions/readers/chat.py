"""Conversations: `{"messages": [{"role", "content"}], "id"?, "user"?}`, or as ShareGPT has them,
`{"conversations": [{"from", "value"}]}`; one a line, or all in one JSON list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tppo.sessions.readers.array import read_objects
from tppo.sessions.session import Event, Session, collapse
from tppo.store.fingerprints import Fingerprints, fingerprint
from tppo.store.jsonl import BadRows, Line, check_new, has_surrogate, is_text

SEPARATOR = "\n"
LISTS = ("messages", "conversations")  # what the list of messages is called
KEYS = ("role", "content")
USER = ("user", "human")  # who speaks where the user does


def read_chat(path: Path, left_out: Counter[str], bad: BadRows) -> Iterator[Session]:
    """The last user turn is the target, the user turns before it are the history.

    A line without "user" gets a hash of its turns: equal conversations stay in one split.

    Raises DataError naming line and field.
    """
    first_line = Fingerprints()
    for line in read_objects(path, bad):
        with bad:
            turns = _turns(line)
            if len(turns) < 2:
                left_out["conversation with fewer than 2 user turns"] += 1
                continue
            identity = f"chat-{fingerprint(SEPARATOR.join(turns)):016x}"
            session = Session(
                id=_name(line, "id", f"chat-{line.number}"),
                user=_name(line, "user", identity),
                source="chat",
                profile=(),
                history=tuple(Event("utterance", text) for text in turns[:-1]),
                targets=(turns[-1],),
            )
            check_new(first_line, line, session.id)
            yield session


def _turns(line: Line) -> list[str]:
    """The texts of the user's turns."""
    name = next((name for name in LISTS if name in line.values), LISTS[0])
    messages = line.get(name, lambda v: isinstance(v, list), "a list of messages")
    turns = [_turn(line, f"{name}[{index}]", message) for index, message in enumerate(messages)]
    return [text for text in turns if text]


def _name(line: Line, field: str, default: str) -> str:
    value = line.get(
        field,
        lambda v: is_text(v) or type(v) is int,
        "a text that is not blank or a whole number",
        default=default,
    )
    return collapse(str(value))


def _turn(line: Line, name: str, message: Any) -> str:
    """The user's text in a message; empty where somebody else speaks."""
    if not isinstance(message, dict):
        raise line.error(name, message, "an object with 'role' and 'content'")
    role, text_key = ("from", "value") if "role" not in message and "from" in message else KEYS
    fields = Line(line.path, line.number, {f"{name}.{key}": v for key, v in message.items()})
    speaker = fields.get(f"{name}.{role}", is_text, "a text such as user or assistant")
    if speaker.strip().lower() not in USER:
        return ""
    expected = "a text, or a list of parts with 'type' and 'text'"
    content = fields.get(f"{name}.{text_key}", lambda v: isinstance(v, (str, list)), expected)
    texts = [content] if isinstance(content, str) else [_part(part) for part in content]
    if any(not isinstance(text, str) or has_surrogate(text) for text in texts):
        raise fields.error(f"{name}.{text_key}", content, expected)
    return collapse(" ".join(texts))


def _part(part: Any) -> Any:
    """The text of a part of a message; an image or the like has none."""
    if not isinstance(part, dict):
        return None
    return part.get("text") if part.get("type") in ("text", "input_text") else ""
