"""Which of two answers to one history is better: what a person is asked next.

Pairs are drawn at random, spread over users, so that a set of them favours nothing.  Which answer
of a pair stands on the left is drawn too, for every annotator anew, and kept with what he says.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tppo.labels.config import HandConfig
from tppo.labels.hand import HandPairs, Preferred, Verdict
from tppo.labels.words import word_spans
from tppo.sessions.session import Session
from tppo.stages.answer_pairs import AnswerPair
from tppo.stages.hand.asking import Asking, spread
from tppo.stages.hand.desk import CHECK

POOL = 400  # pairs that are kept ready, at least


class PairItem(NamedTuple):
    """What is on somebody's screen."""

    pair: AnswerPair
    session: Session
    left: Verdict
    """Which of the two stands on the left."""
    shown: float
    """When, by the monotonic clock."""

    @property
    def id(self) -> str:
        """Of the pair."""
        return self.pair.id

    def sides(self) -> tuple[str, str]:
        """The text on the left, and that on the right."""
        one, two = self.pair.first.text, self.pair.second.text
        return (two, one) if self.left else (one, two)


class PairDesk(Asking[PairItem, Preferred]):
    """The comparing of pairs of a run; the first ten are asked of everyone."""

    def __init__(
        self,
        pairs: Iterable[AnswerPair],
        session_of: Callable[[AnswerPair], Session],
        labels: HandPairs,
        config: HandConfig,
        seed: int,
    ) -> None:
        super().__init__(labels, config.pairs, config.pair_guidance)
        self.config, self.session_of, self.seed = config, session_of, seed
        # Two texts that look the same cannot be told apart, and one without a word says nothing.
        told_apart = (
            pair for pair in pairs
            if word_spans(pair.first.text) and word_spans(pair.second.text)
            and pair.first.text.split() != pair.second.text.split()
        )  # fmt: skip
        self.drawn = spread(told_apart, lambda pair: pair.id, lambda pair: session_of(pair).user,
                            max(POOL, 4 * config.pairs), seed)  # fmt: skip
        self._known = {pair.id: pair for pair in self.drawn}

    def judge(self, client: str, annotator: str, id: str, side: str) -> None:
        """Keep which side of the pair on a client's screen is better: left, right or equal.

        Errors: ValueError naming what is wrong with it.
        """
        with self.lock:
            item = self._on_screen(client, id)
            if side not in ("left", "right", "equal"):
                raise ValueError(f"better was {side!r}, expected left, right or equal")
            found = Preferred(
                id, annotator, (item.pair.first.text, item.pair.second.text),
                better_of(side, item.left), item.left, self.guidance,
                time.monotonic() - item.shown,
            )  # fmt: skip
            self._keep(client, found)

    def _choose(self, annotator: str) -> PairItem | None:
        taken = self._on_screens()
        judged = {found.id for found in self.labels}
        for place, pair in enumerate(self.drawn):
            if (annotator, pair.id) in self.labels or pair.id in taken:
                continue
            if place < CHECK or pair.id not in judged:
                return self._item(pair, annotator)
        return None

    def _again(self, said: Preferred) -> PairItem | None:
        pair = self._known.get(said.id)
        return None if pair is None else self._item(pair, said.annotator)

    def _item(self, pair: AnswerPair, annotator: str) -> PairItem:
        drawn = hashlib.sha256(f"{self.seed}/side/{annotator}/{pair.id}".encode()).digest()[0]
        left: Verdict = 1 if drawn % 2 else 0
        return PairItem(pair, self.session_of(pair), left, time.monotonic())


def better_of(side: str, left: int) -> Verdict | None:
    """The better answer of a pair by the better side; None: they are equally good."""
    if side == "equal":
        return None
    return 1 if (side == "left") == (left == 1) else 0


def side_of(said: Preferred) -> str:
    """Which side a person found better."""
    if said.better is None:
        return "equal"
    return "left" if said.better == said.left else "right"
