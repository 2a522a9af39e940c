"""TREC iKAT topics: a JSON list of conversations, each with what is known about the person.

2023 and 2024 name the lists "turns" and "utterance", 2025 "responses" and "user_utterance".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tppo.sessions.readers.array import read_array
from tppo.sessions.session import Event, Session, collapse
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import BadRows, Line, check_new, is_text


def read_ikat(path: Path, left_out: Counter[str], bad: BadRows) -> Iterator[Session]:
    """Each turn from the second on: the utterances so far are the history, the self-contained
    rewrite of the last one is the target, the person's statements are the profile.

    A topic's variants (1-1, 1-2) count as one user.  The file is read whole: topics are few.

    Raises DataError naming the line where a topic begins, and the field in it.
    """
    first_line = Fingerprints()
    for line in read_array(path, bad, "topic", "an object with 'number', 'ptkb' and 'turns'"):
        with bad:
            given = line.get("number", _is_number, "a text or a whole number")
            number = collapse(str(given))
            sessions = list(_sessions(line, number, left_out))  # of a wrong topic none
            check_new(first_line, line, number)
            yield from sessions


def _sessions(line: Line, number: str, left_out: Counter[str]) -> Iterator[Session]:
    """The sessions of one topic."""
    profile = _profile(line)
    history: list[Event] = []
    for index, (turn, utterance, rewrite) in enumerate(_turns(line)):
        history.append(Event("utterance", utterance))
        if index == 0:
            left_out["first turn of a topic"] += 1
        elif rewrite is None:
            left_out["turn without a resolved utterance"] += 1
        else:
            yield Session(
                id=f"ikat-{number}-{turn}",
                user=f"ikat-topic-{number.split('-')[0].strip()}",
                source="ikat",
                profile=profile,
                history=tuple(history),
                targets=(rewrite,),
            )


def _profile(line: Line) -> tuple[str, ...]:
    """What is known about the person: a list, or an object with numbers as keys."""
    expected = "a list or an object of texts"
    known = line.get("ptkb", lambda v: isinstance(v, (list, dict)), expected, default=[])
    for key, text in known.items() if isinstance(known, dict) else enumerate(known):
        if not is_text(text):
            raise line.error(f"ptkb[{key}]", text, "a text that is not blank")
    return tuple(map(collapse, known.values() if isinstance(known, dict) else known))


def _turns(line: Line) -> Iterator[tuple[str, str, str | None]]:
    """(number, utterance, rewrite) of each turn."""
    name = "responses" if "turns" not in line.values and "responses" in line.values else "turns"
    for index, turn in enumerate(line.get(name, lambda v: isinstance(v, list), "a list of turns")):
        place = f"{name}[{index}]"
        if not isinstance(turn, dict):
            raise line.error(place, turn, "an object with 'utterance' and 'resolved_utterance'")
        key = "utterance" if "user_utterance" not in turn else "user_utterance"
        fields = Line(line.path, line.number, {f"{place}.{k}": v for k, v in turn.items()})
        rewrite = fields.get(
            f"{place}.resolved_utterance", _is_text_or_blank, "a text", default=None
        )
        number = fields.get(
            f"{place}.turn_id", _is_number, "a text or a whole number", default=index + 1
        )
        utterance = fields.get(f"{place}.{key}", is_text, "a text that is not blank")
        yield collapse(str(number)), collapse(utterance), collapse(rewrite or "") or None


def _is_number(value: Any) -> bool:
    return is_text(value) or type(value) is int


def _is_text_or_blank(value: Any) -> bool:
    return isinstance(value, str) and (is_text(value) or not value.strip())
