"""Self-evolved reward learning: a reward model labels the pairs that it is sure of, and learns from
them (SER; Huang et al., ICLR 2025, arXiv 2411.00418).

    a seed of labelled pairs                            reward model 0
    round n: score the pairs that are left, p = sigmoid(score)
        status 1, easy:  p1 > tau_high and p2 < tau_low, or the other way round, if such pairs are
                         enough
        status 2, hard:  else |p1 - p2| > tau_delta
        neither:         stop
    the higher score is the winner; D_n = D_(n-1) and these pairs; reward model n is trained on D_n

Every model is trained anew from the same start, by -log sigmoid(r_w - r_l) as always.

What the paper leaves open, and what is done here:
- how many pairs are enough: a share of those that were not labelled (its 600 of HH-RLHF are about
  that); fewer in either status end the rounds;
- where the middle of the scores lies: the loss knows differences alone, so that the scores are
  centred on their mean over the pairs that are scored before p is taken;
- whether a pair is labelled again: it keeps the first label, and leaves the pairs that are left.
The authors' code keeps a pair that is easy or hard, without a status: `filter="any"`.

The same rounds with labels of words, which the paper has not: `tppo.methods.ser_words`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from tppo.methods.config import RewardModelConfig, SERConfig
from tppo.methods.reward_model import enough_passes
from tppo.methods.sentence_model import (
    Pair,
    SentenceReader,
    evaluate_sentence_model,
    train_sentence_model,
)
from tppo.models.keeper import NOTHING_KEPT, Keeper
from tppo.progress import say

Item = TypeVar("Item", contravariant=True)  # what is not labelled
Label = TypeVar("Label")  # what the model says of it


class Found(NamedTuple, Generic[Label]):
    """What a model is sure of."""

    status: str
    labels: Mapping[int, Label]  # by place among the items that it was given
    right: int  # labels that agree with the truth, of `known` whose truth is known
    known: int


class Learner(Protocol[Item, Label]):
    """A kind of label: how a model learns from it, and what it is sure of."""

    keeper: Keeper
    """Has what an earlier process did of the training that is next."""

    def train(self, items: Sequence[Item], labels: Sequence[Label | None]) -> None:
        """A model, anew from the same start, of items with these labels; None: their true ones."""

    def sure_of(self, items: Sequence[Item], enough: int) -> Found[Label]:
        """What the model is sure of among items that nobody has labelled; fewer than `enough` of a
        kind are as good as none.
        """

    def figures(self) -> dict[str, float | None]:
        """How good the model is on held-out items."""


@dataclass
class State(Generic[Label]):
    """How far the rounds are."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[int, Label] = field(default_factory=dict)  # by place in the pool
    stopped: str = ""


def evolve(
    learner: Learner[Item, Label],
    seed: Sequence[Item],
    pool: Sequence[Item],
    config: SERConfig,
    state: State[Label],
    after_round: Callable[[State[Label]], None] = lambda state: None,
    before_round: Callable[[State[Label]], None] = lambda state: None,
) -> State[Label]:
    """The rounds that are still to do; afterwards the learner holds the last model.

    state: of a new training, or as it was when `after_round` last saw it, the learner's model with
    it.  before_round: called when the labels of a round are known and no model has learned them.
    """

    def train(**row: Any) -> None:
        before_round(state)
        places = sorted(state.labels)
        learner.train([*seed, *(pool[i] for i in places)],
                      [*[None] * len(seed), *(state.labels[i] for i in places)])  # fmt: skip
        row |= {"trained_on": len(seed) + len(places), **learner.figures()}
        state.rounds.append({"round": len(state.rounds), **row})
        after_round(state)

    enough = max(1, math.ceil(config.min_share * len(pool)))
    if not state.rounds:
        train(status="seed", kept=0, kept_accuracy=None)
    while len(state.rounds) <= config.rounds and not state.stopped:
        left = [i for i in range(len(pool)) if i not in state.labels]
        if len(left) < enough or not left:
            state.stopped = f"{len(left)} of {len(pool)} are left"
            break
        found = learner.sure_of([pool[i] for i in left], enough)
        if len(found.labels) < enough:
            state.stopped = (f"the model is sure of {len(found.labels)} of {len(pool)}, fewer than "
                             f"{enough}")  # fmt: skip
            break
        state.labels |= {left[k]: label for k, label in found.labels.items()}
        train(status=found.status, kept=len(found.labels),
              kept_accuracy=found.right / found.known if found.known else None)  # fmt: skip
    state.stopped = state.stopped or f"all {config.rounds} rounds are done"
    say(f"ser: {len(state.rounds) - 1} rounds, then it stops: {state.stopped}")
    return state


class Doubtful(NamedTuple):
    """Two answers to one prompt; all token ids."""

    prompt_ids: Sequence[int]
    first_ids: Sequence[int]
    second_ids: Sequence[int]
    better: int | None  # 0: the first is, 1: the second; None: nobody knows

    def pair(self, better: int | None = None) -> Pair:
        """With its true label, or another."""
        better = self.better if better is None else better
        answers = (self.first_ids, self.second_ids)
        assert better is not None
        return Pair(self.prompt_ids, answers[better], answers[1 - better])


class Pairs:
    """SER's own labels: which of two answers is the better one.

    start: gives the model, as it is before any training.  few: whether the seed may be so small
    that the passes of `training` are too few updates to learn anything (`enough_passes`).
    """

    def __init__(
        self,
        start: Callable[[], SentenceReader],
        heldout: Sequence[Doubtful],
        config: SERConfig,
        training: RewardModelConfig,
        seed: int,
        few: bool = False,
    ):
        self.start, self.config, self.training, self.seed = start, config, training, seed
        self.few = few
        self.heldout = [item.pair() for item in heldout]
        self.reader = start()
        self.keeper: Keeper = NOTHING_KEPT

    @property
    def model(self) -> nn.Module:
        """The newest model."""
        return self.reader.model

    def train(self, items: Sequence[Doubtful], labels: Sequence[int | None]) -> None:
        """By `train_sentence_model`, all epochs."""
        self.reader = self.start()
        pairs = [item.pair(label) for item, label in zip(items, labels, strict=True)]
        training = enough_passes(self.training, len(pairs)) if self.few else self.training
        train_sentence_model(self.reader, pairs, [], training, seed=self.seed, keeper=self.keeper)

    def sure_of(self, items: Sequence[Doubtful], enough: int) -> Found[int]:
        """Pairs by the filter, the winner is the higher score."""
        scores = self.reader.scores([item.pair(0) for item in items]).float()  # [2 N]
        p = (scores - scores.mean()).sigmoid()
        status, kept = confident(p[::2], p[1::2], self.config, enough)
        winners = (p[1::2] > p[::2]).long()
        labels = {i: int(winners[i]) for i in kept.nonzero().flatten().tolist()}
        known = [(label, items[i].better) for i, label in labels.items()
                 if items[i].better is not None]  # fmt: skip
        return Found(status, labels, sum(a == b for a, b in known), len(known))

    def figures(self) -> dict[str, float | None]:
        """Loss, and the share of held-out pairs that are ordered rightly."""
        return evaluate_sentence_model(self.reader, self.heldout) if self.heldout else {}


def confident(p1: Tensor, p2: Tensor, config: SERConfig, enough: int) -> tuple[str, Tensor]:
    """The status, and which pairs it keeps, bool [N], of probabilities [N] of their answers."""
    easy = ((p1 > config.tau_high) & (p2 < config.tau_low)) | (
        (p2 > config.tau_high) & (p1 < config.tau_low)
    )
    hard = (p1 - p2).abs() > config.tau_delta
    if config.filter == "any":
        return "any", easy | hard
    return ("easy", easy) if int(easy.sum()) >= enough else ("hard", hard)
