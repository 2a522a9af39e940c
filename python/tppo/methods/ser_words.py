"""Self-evolved reward learning (`tppo.methods.ser`) with labels of words, which the paper has not.

A token is labelled with its most probable class where that has a probability of at least
`tau_token`; the other tokens of the answer are left out of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from tppo.methods.config import RewardModelConfig, SERConfig
from tppo.methods.reward_model import (
    NOT_LABELLED,
    RELEVANT,
    LabelledAnswer,
    Reader,
    class_logits_of,
    enough_passes,
    evaluate_reward_model,
    part_size,
    train_reward_model,
)
from tppo.methods.ser import Found
from tppo.models.keeper import NOTHING_KEPT, Keeper

TokenLabel = tuple[list[int], int]  # classes of the tokens, NOT_LABELLED where unsure; the whole


class Tokens:
    """Labels of words: the token reward model labels tokens that it is sure of.

    start: gives the model, as it is before any training.  few: as in `tppo.methods.ser.Pairs`.

    An answer as a whole is relevant where at least `sentence_threshold` of the tokens are that the
    model takes for relevant or irrelevant; an answer with no token to be sure of is not kept.
    """

    def __init__(
        self,
        start: Callable[[], Reader],
        heldout: Sequence[LabelledAnswer],
        config: SERConfig,
        training: RewardModelConfig,
        seed: int,
        sentence_threshold: float = 0.6,
        few: bool = False,
    ):
        self.start, self.config, self.training, self.seed = start, config, training, seed
        self.few = few
        self.heldout, self.threshold = heldout, sentence_threshold
        self.reader = start()
        self.keeper: Keeper = NOTHING_KEPT

    @property
    def model(self) -> nn.Module:
        """The newest model."""
        return self.reader.model

    def train(self, items: Sequence[LabelledAnswer], labels: Sequence[TokenLabel | None]) -> None:
        """By `train_reward_model`."""
        self.reader = self.start()
        rows = [item if label is None else item._replace(categories=label[0], sentence=label[1])
                for item, label in zip(items, labels, strict=True)]  # fmt: skip
        training = enough_passes(self.training, len(rows)) if self.few else self.training
        train_reward_model(self.reader, rows, training, seed=self.seed, keeper=self.keeper)

    def sure_of(self, items: Sequence[LabelledAnswer], enough: int) -> Found[TokenLabel]:
        """Tokens by the probability of their class; `right` counts those of class 1 and 2."""
        labels: dict[int, TokenLabel] = {}
        right, known, size = 0, 0, part_size(self.training)
        for first in range(0, len(items), self.training.batch_size):
            rows = items[first : first + self.training.batch_size]
            logits, _ = class_logits_of(self.reader, rows, size)  # [B, T, 3]
            p, classes = logits.softmax(-1).max(-1)
            sure = p >= self.config.tau_token
            for i, row in enumerate(rows):
                n = len(row.response_ids)
                said = classes[i, :n].tolist()
                kept = torch.where(sure[i, :n], classes[i, :n], NOT_LABELLED).tolist()
                if max(kept) <= 0:
                    continue
                judged = [c for c in said if c > 0]
                relevant = judged.count(RELEVANT) >= self.threshold * len(judged)
                labels[first + i] = kept, 1 + relevant
                pairs = [(c, t) for c, t in zip(kept, row.categories, strict=True) if c > 0 <= t]
                right, known = right + sum(c == t for c, t in pairs), known + len(pairs)
        return Found("tokens", labels, right, known)

    def figures(self) -> dict[str, float | None]:
        """AUC of relevant against irrelevant held-out tokens, and the accuracy of all."""
        if not self.heldout:
            return {}
        found = evaluate_reward_model(self.reader, self.heldout, self.training)
        return {"auc": found["auc"], "accuracy": found["accuracy"]}
