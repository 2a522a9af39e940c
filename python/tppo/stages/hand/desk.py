"""What a person is asked next, and how well a model of the labels so far foretells them.

The first 25 answers are drawn at random, spread over users.  Ten of them are the check: every
annotator is asked about them, and the model never learns from them while people label, so that its
agreement with a person on them is not flattered.  Later answers are those of which it is unsure.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from tppo.labels.choice import most_doubtful
from tppo.labels.config import HandConfig
from tppo.labels.hand import HandLabels, Judged, Kind
from tppo.labels.rule import relevance_share
from tppo.labels.shares import wilson
from tppo.labels.words import word_spans
from tppo.sessions.session import Session
from tppo.stages.answers import Answer
from tppo.stages.hand.asking import LAST, Asking, spread

FIRST = 25  # answers that are drawn before any is chosen
CHECK = 10  # of them; the third and the fifth of every five
POOL = 400  # answers among which is chosen, besides the first
STEADY = 0.01  # an agreement that grows by less has stopped growing


class Teacher(Protocol):
    """A model of the labels so far."""

    learnt: int
    """Answers that the newest model has learnt from; 0: there is none."""

    def learn(self, judged: Sequence[Judged]) -> None:
        """Take note of what is judged; a new model may come later."""

    def foretell(self, id: str) -> tuple[float, ...]:
        """P(wanted) of each word of an answer, () where nothing is known of it."""

    def doubt(self, id: str) -> float | None:
        """How unsure it is of an answer (`tppo.methods.doubt`), None where it does not know it."""


class Item(NamedTuple):
    """What is on somebody's screen."""

    answer: Answer
    session: Session
    kind: Kind
    foretold: tuple[float, ...]
    shown: float
    """When, by the monotonic clock."""

    @property
    def id(self) -> str:
        """Of the answer."""
        return self.answer.id


class Desk(Asking[Item, Judged]):
    """The labelling of words of a run."""

    def __init__(
        self,
        answers: Iterable[Answer],
        session_of: Callable[[Answer], Session],
        labels: HandLabels,
        config: HandConfig,
        seed: int,
    ) -> None:
        super().__init__(labels, config.answers, config.guidance)
        self.config, self.session_of = config, session_of
        self.teacher: Teacher | None = None
        self.drawn = drawn(answers, session_of, max(POOL, 4 * config.answers), seed)
        self.course: list[tuple[int, int, int]] = []  # of each model: learnt, agreed, of words
        self._known = {answer.id: answer for answer in self.drawn}
        self._user = {answer.id: session_of(answer).user for answer in self.drawn}

    def taught_by(self, teacher: Teacher) -> None:
        """Choose and measure by a teacher from here on."""
        self.teacher = teacher
        self._tell()

    def judge(
        self, client: str, annotator: str, id: str, words: Sequence[int], sentence: int
    ) -> None:
        """Keep a verdict on the answer that is on a client's screen.

        Errors: ValueError naming what is wrong with it.
        """
        with self.lock:
            item = self._on_screen(client, id)
            found = Judged(
                id, annotator, item.answer.text, tuple(words), sentence,  # type: ignore[arg-type]
                item.kind, self.guidance, time.monotonic() - item.shown, item.foretold,
            )  # fmt: skip
            expected = len(word_spans(item.answer.text))
            if len(words) != expected or not set(words) <= {-1, 0, 1} or sentence not in (0, 1):
                raise ValueError(f"words were {list(words)} and sentence {sentence!r}, expected "
                                 f"{expected} of -1, 0, 1, and 0 or 1")  # fmt: skip
            if not any(word >= 0 for word in words):
                raise ValueError("no word was judged, expected one or more; or skip the answer")
            self._keep(client, found)
            self._tell()

    def progress(self) -> dict[str, Any]:
        """What the page says of the work: counts, pace, agreement."""
        with self.lock:
            return super().progress() | {
                "learnt": self.teacher.learnt if self.teacher is not None else 0,
                "agreement": self._agreement(),
                "foretold": _foretold(list(self.labels)),
                "enough": self._enough(),
            }

    def model_changed(self) -> None:
        """Note how well a new model agrees with the people on the check."""
        if self.teacher is None:
            return
        with self.lock:
            agreed = words = 0
            for found in self.labels:
                if found.kind == "check":
                    told = self.teacher.foretell(found.id)
                    for probability, value in zip(told, found.words, strict=False):
                        if value >= 0:
                            agreed, words = agreed + ((probability > 0.5) == value), words + 1
            self.course.append((self.teacher.learnt, agreed, words))

    def _agreement(self) -> dict[str, Any] | None:
        """On the check: by the newest model, and by the one before it."""
        if not self.course or not self.course[-1][2]:
            return None
        _, agreed, words = self.course[-1]
        low, high = wilson(agreed / words, words)
        before = self.course[-2] if len(self.course) > 1 else None
        return {"share": agreed / words, "words": words, "low": low, "high": high,
                "before": before[1] / before[2] if before and before[2] else None}  # fmt: skip

    def _enough(self) -> bool:
        """Whether the agreement has stopped growing: over the last two models."""
        last = [agreed / words for _, agreed, words in self.course[-3:] if words]
        return len(last) == 3 and max(last[1:]) - last[0] < STEADY

    def _choose(self, annotator: str) -> Item | None:
        """The next answer for a person, by where he and the others are."""
        taken = self._on_screens()
        judged = {found.id for found in self.labels} | taken
        for place, answer in enumerate(self.drawn[:FIRST]):
            check = place % 5 in (2, 4)
            if (annotator, answer.id) not in self.labels and answer.id not in taken:
                if check or answer.id not in judged:
                    return self._item(answer, "check" if check else "random")
        judged |= {answer.id for answer in self.drawn if (annotator, answer.id) in self.labels}
        left = [answer for answer in self.drawn[FIRST:] if answer.id not in judged]
        if not left:
            return None
        if self.teacher is not None and self.teacher.learnt:
            doubts = {answer.id: self.teacher.doubt(answer.id) for answer in left}
            known = {id: doubt for id, doubt in doubts.items() if doubt is not None}
            if known:
                asked = Counter(self._user[id] for id in judged if id in self._user)
                users = [self._user[id] for id in known]
                (chosen,) = most_doubtful([*known.values()], users, 1, asked)
                return self._item(self._known[[*known][chosen]], "chosen")
        return self._item(left[0], "random")

    def _again(self, said: Judged) -> Item | None:
        answer = self._known.get(said.id)
        if answer is None:  # generated before, and labelled then
            return None
        return Item(answer, self.session_of(answer), said.kind, said.foretold, time.monotonic())

    def _item(self, answer: Answer, kind: Kind) -> Item:
        told = self.teacher.foretell(answer.id) if self.teacher is not None else ()
        return Item(answer, self.session_of(answer), kind, told, time.monotonic())

    def _tell(self) -> None:
        """The teacher learns from everything but the check."""
        if self.teacher is not None:
            self.teacher.learn([found for found in self.labels if found.kind != "check"])


def drawn(
    answers: Iterable[Answer], session_of: Callable[[Answer], Session], n: int, seed: int
) -> list[Answer]:
    """n of the answers with words in an order that looks random, the first of every user first.

    A larger n only adds to them, at the end of each user's.
    """
    with_words = (answer for answer in answers if word_spans(answer.text))
    return spread(with_words, lambda a: a.id, lambda a: session_of(a).user, n, seed)


def _foretold(done: Sequence[Judged]) -> dict[str, Any] | None:
    """How many words of the last answers a model had foretold before they were judged."""
    last = [found.agreed() for found in done if found.foretold][-LAST:]
    words = sum(n for _, n in last)
    if not words:
        return None
    return {"share": sum(k for k, _ in last) / words, "words": words, "answers": len(last)}


def whole(words: Sequence[int], threshold: float) -> int:
    """The verdict on an answer that its words give: wanted if this share of the judged ones is."""
    judged = [word for word in words if word >= 0]
    return int(bool(judged) and relevance_share(judged) >= threshold)
