"""The generated answers, as the generate stage writes them and the later ones read them."""

from __future__ import annotations

from typing import NamedTuple

from tppo.store.jsonl import Line, is_text


class Answer(NamedTuple):
    """A generated answer, as `generate` writes it."""

    id: str
    session: str
    prompt_ids: list[int]
    response_ids: list[int]
    finish: str
    text: str


def answer_of(line: Line) -> Answer:
    """The answer that a line holds.  Errors: DataError naming file, line and field."""
    return Answer(
        id=line.get("id", is_text, "a text"),
        session=line.get("session", is_text, "a text"),
        prompt_ids=line.get("prompt_ids", _is_ids, "a list of token ids"),
        response_ids=line.get("response_ids", _is_ids, "a list of token ids"),
        finish=line.get("finish", lambda v: v in ("eos", "length"), "eos or length"),
        text=line.get("text", lambda v: isinstance(v, str), "a text"),
    )


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
