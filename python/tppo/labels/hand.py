"""Labels by hand: what people have said of the words of an answer, and which of two is better."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from tppo.labels.journal import Journal, Without
from tppo.labels.label import Label
from tppo.labels.words import word_spans
from tppo.store.jsonl import bounded_lines

Kind = Literal["random", "check", "chosen"]  # drawn; drawn, and never learnt from; where unsure
Verdict = Literal[0, 1]
BY_HAND = "hand:"  # and who: the labeller of a label


@dataclass(frozen=True)
class Judged:
    """What a person said of an answer."""

    id: str
    annotator: str
    response: str
    words: tuple[Literal[-1, 0, 1], ...]
    """Of each word of the response; -1 where it was not looked at."""
    sentence: Verdict
    """Of the whole answer."""
    kind: Kind
    """Why it was asked."""
    guidance: str
    """By what sentence was judged."""
    seconds: Annotated[float, Field(ge=0)]
    """How long it was on the screen."""
    foretold: tuple[float, ...] = ()
    """P(wanted) of each word by the model of that moment; () where there was none."""

    def label(self) -> Label:
        """As a label of a file of labels."""
        spans = word_spans(self.response)
        words = tuple((self.response[a:b], value)
                      for (a, b), value in zip(spans, self.words, strict=True))  # fmt: skip
        return Label(self.id, self.response, words, self.sentence, f"{BY_HAND}{self.annotator}",
                     self.kind == "check")  # fmt: skip

    def agreed(self) -> tuple[int, int]:
        """How many words the model had foretold, of how many that it spoke of and were judged."""
        pairs = [(probability > 0.5, value == 1)
                 for probability, value in zip(self.foretold, self.words, strict=False)
                 if value >= 0]  # fmt: skip
        return sum(one == two for one, two in pairs), len(pairs)


    def check(self) -> None:
        """As many verdicts as words.  Errors: ValueError."""
        self.label()


@dataclass(frozen=True)
class Preferred:
    """Which of two answers to one history a person finds better."""

    id: str
    annotator: str
    responses: tuple[str, str]
    better: Verdict | None
    """0: the first, 1: the second; None: they are equally good."""
    left: Verdict
    """Which of them stood on the left, drawn at random: people like one side more."""
    guidance: str
    """By what sentence was judged."""
    seconds: Annotated[float, Field(ge=0)]
    """How long they were on the screen."""

    def check(self) -> None:
        """Nothing beyond its types."""


_LINE: TypeAdapter[Judged | Without] = TypeAdapter(Judged | Without)


class HandLabels(Journal[Judged]):
    """The journal of labels of words."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Judged, _LINE)

    def keep(self, texts: Mapping[str, str]) -> int:
        """Forget, but for the file, what was said of answers that are other ones now.

        texts: the answers by id.  Returns how many judgements those were.
        """
        return self.leave_out(lambda found: texts.get(found.id) != found.response)


class HandPairs(Journal[Preferred]):
    """The journal of compared pairs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Preferred, TypeAdapter(Preferred | Without))


def is_journal(path: Path) -> bool:
    """Whether a file holds judgements of words by hand rather than labels: by its first line that
    is whole.
    """
    if not path.exists():
        return False
    with open(path, "rb") as file:
        for line in bounded_lines(file, path):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # blank, cut off by a kill, or foreign
                continue
            return isinstance(row, dict) and "annotator" in row and "responses" not in row
    return False
