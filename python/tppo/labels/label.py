"""Labels of generated answers: 0 or 1 for each word and for the whole, one JSON object a line.

`{"id", "response", "words": [[word, 0|1|-1], ...], "sentence": 0|1, "labeller"}`; -1 stands for a
word that the labeller did not judge, from which nothing is learnt.  With `"check": true` the answer
was drawn to rate a reward model by, which is not to learn from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tppo.labels.words import NOT_LABELLED, map_labels
from tppo.store.jsonl import Line, is_encodable, is_text, read_jsonl, write_jsonl

if TYPE_CHECKING:
    from tppo.labels.config import LabelConfig


@dataclass(frozen=True)
class Label:
    """A labeller's verdict on one response: 1 = relevant to the true next queries, 0 = not."""

    id: str
    response: str
    words: tuple[tuple[str, int], ...]
    sentence: int
    labeller: str
    check: bool = False
    """Whether the answer was drawn to rate a reward model by, and is not learnt from."""


def read_labels(path: str | os.PathLike[str]) -> list[Label]:
    """Read and check a label file.

    Raises DataError naming file, line and field, also for a word that the response does not have.
    """
    return list(iter_labels(path))


def iter_labels(path: str | os.PathLike[str]) -> Iterator[Label]:
    """The labels of a file one at a time, checked like `read_labels`."""
    return map(_label, read_jsonl(path))


def write_labels(path: str | os.PathLike[str], labels: Iterable[Label]) -> None:
    """Write a label file, whole or not at all."""
    write_jsonl(path, map(_row, labels))


def _row(label: Label) -> dict[str, object]:
    row = vars(label).copy()
    if not row.pop("check"):
        return row
    return row | {"check": True}


def _label(line: Line) -> Label:
    words = line.get("words", lambda v: isinstance(v, list), "a list of [word, 0 or 1]")
    for index, word in enumerate(words):
        if not (isinstance(word, list) and len(word) == 2 and is_text(word[0])
                and (_binary(word[1]) or type(word[1]) is int and word[1] == NOT_LABELLED)):
            raise line.error(f"words[{index}]", word, "[word, 0 or 1] (-1: not judged)")
    label = Label(
        id=line.get("id", is_text, "a text that is not blank"),
        response=line.get("response", is_encodable, "a text that UTF-8 can hold"),
        words=tuple((word, value) for word, value in words),
        sentence=line.get("sentence", _binary, "0 or 1"),
        labeller=line.get("labeller", is_text, "a text that is not blank"),
        check=line.get("check", lambda v: isinstance(v, bool), "true or false", default=False),
    )
    try:
        map_labels(label.response, label.words, [])
    except ValueError as error:
        raise line.error("words", words, f"words of the response ({error})") from None
    return label


def _binary(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in (0, 1)


def machine_of(label: LabelConfig) -> Literal["rule", "endpoint"] | None:
    """Who labels besides people, or instead of them."""
    return label.hand.rest if label.labeller == "hand" else label.labeller
