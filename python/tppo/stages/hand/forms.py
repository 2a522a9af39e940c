"""What a page is shown of a question and what it gives back, for words and for pairs."""

from __future__ import annotations

import unicodedata
from typing import Any, Protocol

from tppo.errors import short
from tppo.labels.hand import Judged, Preferred
from tppo.labels.words import word_spans
from tppo.sessions.prompts import history_lines
from tppo.sessions.session import Session
from tppo.stages.hand import page, page_pairs
from tppo.stages.hand.asking import Asking
from tppo.stages.hand.desk import Desk, Item
from tppo.stages.hand.pairs import PairDesk, PairItem, side_of

SHOWN = 2_000  # characters of one event of a history, or of one piece of an answer


class Given:
    """What a page has sent."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def text(self, name: str, most: int = 200) -> str:
        """A field that is a text.  Errors: ValueError naming it."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip() or len(value) > most:
            raise ValueError(f"{name} was {short(value)}, expected a text of at most {most} "
                             "characters")  # fmt: skip
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} was {short(value)}, expected a text that UTF-8 can hold"
                             ) from None  # fmt: skip
        return value

    def person(self) -> tuple[str, str]:
        """The tab, and who sits before it."""
        return self.text("client"), self.text("annotator").strip()


class Form(Protocol):
    """A kind of question, as the server and its page exchange it."""

    policy: str
    """The Content-Security-Policy of the page."""

    @property
    def desk(self) -> Asking[Any, Any]:
        """Where answers are kept."""

    def page(self) -> str:
        """The page, without any question."""

    def shown(self, item: Any) -> dict[str, Any]:
        """A question as the page draws it."""

    def judge(self, given: Given) -> None:
        """Keep what a person says.  Errors: ValueError."""

    def said(self, before: Any) -> dict[str, Any]:
        """What a person had said of a question that is shown again."""


class WordForm:
    """The words of an answer, each wanted or not; threshold: `--label.sentence-threshold`."""

    policy = page.POLICY

    def __init__(self, desk: Desk, threshold: float) -> None:
        self.desk, self.threshold = desk, threshold

    def page(self) -> str:
        """The page on which words are judged."""
        return page.label_page(self.desk.config.annotator, self.desk.guidance)

    def shown(self, item: Item) -> dict[str, Any]:
        """The history, and the answer in lines of words."""
        drawn = answer_shown(item.answer.text)
        return {
            **session_shown(item.session, self.desk.config.show_targets), **drawn,
            "id": item.id, "threshold": self.threshold,
        }  # fmt: skip

    def judge(self, given: Given) -> None:
        """Of every word -1, 0 or 1, and 0 or 1 of the whole.  Errors: ValueError."""
        words, sentence = given.values.get("words"), given.values.get("sentence")
        if not isinstance(words, list) or not all(type(word) is int for word in words):
            raise ValueError(f"words were {short(words)}, expected a list of -1, 0, 1")
        if type(sentence) is not int:
            raise ValueError(f"sentence was {short(sentence)}, expected 0 or 1")
        self.desk.judge(*given.person(), given.text("id"), words, sentence)

    def said(self, before: Judged) -> dict[str, Any]:
        """As it was sent."""
        return {"words": list(before.words), "sentence": before.sentence}


class PairForm:
    """Two answers, of which one is better, or both are equally good."""

    policy = page_pairs.POLICY

    def __init__(self, desk: PairDesk) -> None:
        self.desk = desk

    def page(self) -> str:
        """The page on which pairs are compared."""
        return page_pairs.pair_page(self.desk.config.annotator, self.desk.guidance)

    def shown(self, item: PairItem) -> dict[str, Any]:
        """The history, and the answers by their sides."""
        sides = [[_cut(line.strip()) for line in text.split("\n") if line.strip()]
                 for text in item.sides()]  # fmt: skip
        return {
            **session_shown(item.session, self.desk.config.show_targets), "id": item.id,
            "sides": sides, "rtl": [[_from_right(line) for line in side] for side in sides],
        }  # fmt: skip

    def judge(self, given: Given) -> None:
        """left, right or equal.  Errors: ValueError."""
        self.desk.judge(*given.person(), given.text("id"), given.text("better"))

    def said(self, before: Preferred) -> dict[str, Any]:
        """As it was sent."""
        return {"better": side_of(before)}


def session_shown(session: Session, targets: bool) -> dict[str, Any]:
    """What is drawn of a history, and of the true next queries where they are to be seen."""
    return {
        "history": [_cut(line) for line in history_lines(session)],
        "targets": [_cut(line) for line in session.targets] if targets else None,
    }


def answer_shown(text: str) -> dict[str, Any]:
    """An answer as lines of pieces, of which some are words, by number."""
    lines: list[list[dict[str, Any]]] = [[]]
    end = 0
    spans = word_spans(text)
    for number, (start, stop) in enumerate([*spans, (len(text), len(text))]):
        for turn, between in enumerate(text[end:start].split("\n")):
            if turn:
                lines.append([])
            if between.strip():
                lines[-1].append({"text": _cut(between.strip()), "word": None})
        if start < stop:
            lines[-1].append({"text": _cut(text[start:stop]), "word": number})
        end = stop
    return {
        "lines": [line for line in lines if line],
        "rtl": [_from_right("".join(part["text"] for part in line)) for line in lines if line],
        "texts": [_cut(text[a:b]) for a, b in spans],
    }


def _from_right(line: str) -> bool:
    """Whether the first letter of a line is of a script that is written from right to left."""
    kinds = map(unicodedata.bidirectional, line)
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"


def _cut(text: str) -> str:
    left = len(text) - SHOWN
    return text if left <= 0 else f"{text[:SHOWN]} … ({left:,} more characters)"
