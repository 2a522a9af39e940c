"""Two answers to one history: what people and models compare in a run of stages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tppo.stages.answers import Answer, answer_of
from tppo.store.jsonl import read_jsonl


class AnswerPair(NamedTuple):
    """Two answers to one history."""

    id: str
    """Of the session, and which of its pairs it is."""
    first: Answer
    second: Answer
    rounds: tuple[int, int]
    """In which each was generated: two rounds may give answers the same id."""


def answer_pairs(answers: Sequence[Path]) -> list[AnswerPair]:
    """The answers of a session, paired as they come, each once; equal ones make no pair.

    answers: files of the stage generate, one a round, the oldest first; a later round leaves the
    pairs of the earlier ones as they were.
    """
    of_session: dict[str, list[tuple[Answer, int]]] = {}
    for path in answers:
        for answer in map(answer_of, read_jsonl(path)):
            of_session.setdefault(answer.session, []).append((answer, round_of(path)))
    return [
        AnswerPair(f"{session}~{place}", one, two, (round, other))
        for session, found in of_session.items()
        for place, ((one, round), (two, other)) in enumerate(
            zip(found[::2], found[1::2], strict=False)
        )
        if [*one.response_ids] != [*two.response_ids]
    ]


def round_of(path: Path) -> int:
    """The round in which a stage has written a file."""
    found = re.search(r"-(\d+)$", path.parent.name)
    return int(found[1]) if found else 1
