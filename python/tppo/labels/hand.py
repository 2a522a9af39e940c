"""The journal of what people have judged: a line an answer, on disk before the next is shown.

A later line about the same answer by the same person replaces the earlier one; `undone` takes it
back.  A line that was cut off by a kill is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from tppo.labels.label import Label
from tppo.labels.words import word_spans
from tppo.progress import say
from tppo.store.jsonl import append_line

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


@dataclass(frozen=True)
class Without:
    """An answer that a person left out, or a judgement that he took back."""

    id: str
    annotator: str
    how: Literal["skipped", "undone"]


_LINE: TypeAdapter[Judged | Without] = TypeAdapter(Judged | Without)


class HandLabels:
    """The journal of a run, read and continued."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, str], Judged | Without] = {}  # in the order of judging
        damaged: list[int] = []
        for number, line in self._lines():
            try:
                found = _LINE.validate_json(line)
                if isinstance(found, Judged):
                    found.label()  # as many verdicts as words
            except (ValidationError, ValueError):
                damaged.append(number)
                continue
            self._note(found)
        if damaged:
            say(f"{path}: {len(damaged)} damaged lines are passed over, the first is line "
                f"{damaged[0]}; their answers are asked again")  # fmt: skip

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if self.path.exists():
            with open(self.path, "rb") as file:
                yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())

    def __iter__(self) -> Iterator[Judged]:
        """The judgements that stand, the oldest first."""
        return (found for found in self._known.values() if isinstance(found, Judged))

    def __contains__(self, asked: tuple[str, str]) -> bool:
        """Whether (annotator, id of an answer) was judged or left out."""
        return asked in self._known

    def get(self, annotator: str, id: str) -> Judged | None:
        """What a person said of an answer, if he did."""
        found = self._known.get((annotator, id))
        return found if isinstance(found, Judged) else None

    def add(self, entry: Judged | Without) -> None:
        """Keep a judgement, on disk first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, entry)
        self._note(entry)

    def keep(self, texts: Mapping[str, str]) -> int:
        """Forget, but for the file, what was said of answers that are other ones now.

        texts: the answers by id.  Returns how many judgements those were.
        """
        stale = [
            key for key, found in self._known.items()
            if isinstance(found, Judged) and texts.get(found.id) != found.response
        ]  # fmt: skip
        for key in stale:
            del self._known[key]
        return len(stale)

    def _note(self, entry: Judged | Without) -> None:
        key = entry.annotator, entry.id
        self._known.pop(key, None)
        if isinstance(entry, Judged) or entry.how == "skipped":
            self._known[key] = entry


def is_journal(path: Path) -> bool:
    """Whether a file holds judgements by hand rather than labels: by its first line."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        return isinstance(_LINE.validate_json(first), Judged | Without)
    except ValidationError:
        return False
