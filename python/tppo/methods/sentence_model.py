"""The sentence reward model: one score an answer, from labels of whole answers or from pairs.

It is what a token reward model is measured against: the same trunk, the same answers, and of each
of them one label instead of one a word.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from tppo.methods.auc import area_under_curve
from tppo.methods.config import RewardModelConfig
from tppo.methods.early_stop import Best, train_to_best
from tppo.methods.optimizer import AdamW
from tppo.methods.reward_model import RELEVANT, LabelledAnswer
from tppo.models.batch import Batch
from tppo.models.config import Prefix
from tppo.models.guards import check_step, check_weights, trainable
from tppo.models.keeper import (
    NOTHING_KEPT,
    NUMBER,
    Keeper,
    Rest,
    check,
    fitting,
    rest_of,
    resumed,
    state_of,
)
from tppo.models.part_size import PartSize

REMEDY = "usually a smaller learning rate helps"
STATE = {"total": NUMBER, "losses": [NUMBER], "heldout": [NUMBER]}  # of a checkpoint


class Pair(NamedTuple):
    """Two answers to one prompt, of which the first is the better one; all token ids."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]


Example = LabelledAnswer | Pair


class SentenceReader:
    """A sentence model with how it reads answers, in parts of at most `max_tokens` tokens.

    model: a `SentenceModel`, or any other module that gives scores [B] of a batch.
    """

    def __init__(
        self, model: nn.Module, pad_id: int, prefix: Prefix = "shared", max_tokens: int = 65_536
    ):
        self.model, self.pad_id, self.prefix = model, pad_id, prefix
        self.part_size = PartSize(max_tokens, "--reward-model.max-tokens")

    def batch(self, rows: Sequence[Example]) -> Batch:
        """Answers as they stand; of pairs both, the better one first."""
        prompts: list[Sequence[int]] = []
        responses: list[Sequence[int]] = []
        for row in rows:
            found = (row.chosen_ids, row.rejected_ids) if isinstance(row, Pair) else (
                row.response_ids,)  # fmt: skip
            prompts += [row.prompt_ids] * len(found)
            responses += found
        device = next(self.model.parameters()).device
        return Batch(prompts, responses, self.pad_id, device, self.prefix)

    def loss(self, rows: Sequence[Example]) -> Callable[[Tensor], Tensor]:
        """The loss of these rows as a function of the scores that `scores` gives of them."""
        answers = [row for row in rows if isinstance(row, LabelledAnswer)]
        if answers and len(answers) < len(rows):
            raise ValueError(f"{len(answers)} of {len(rows)} rows were labelled answers, the "
                             "others pairs; expected all of one kind")  # fmt: skip
        return bernoulli_loss(answers) if answers else pair_loss

    @torch.no_grad()
    def scores(self, rows: Sequence[Example], size: int = 256) -> Tensor:
        """The score of each answer, [N]; of pairs [2 N]."""
        batches = (self.batch(rows[i : i + size]) for i in range(0, len(rows), size))
        return torch.cat([self.part_size.read(batch, self.model) for batch in batches])

    def backward(self, batch: Batch, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Makes the gradients of a loss of the scores [B] of a whole batch; returns the loss.

        A batch in several parts is read first without a graph, for the gradient of the loss by its
        scores; then each part is read again and takes its rows of that gradient.
        """
        return self.part_size.fitted(batch, partial(self._backward, batch, loss_of))

    def _backward(self, batch: Batch, loss_of: Callable[[Tensor], Tensor], most: int) -> Tensor:
        """With at most so many tokens read at once."""
        self.model.zero_grad()
        (parts,) = batch.parts(most)
        if len(parts) == 1:
            loss = loss_of(self.model(batch))
            loss.backward()
            return loss.detach()
        with torch.no_grad():
            scores = batch.in_parts(self.model, most)
        loss = loss_of(scores.requires_grad_())
        (gradient,) = torch.autograd.grad(loss, scores)  # [B]
        for index in parts:
            self.model(batch.rows(index)).backward(gradient[index])
        return loss.detach()


def bernoulli_loss(rows: Sequence[LabelledAnswer]) -> Callable[[Tensor], Tensor]:
    """-mean(y log sigmoid(s) + (1 - y) log(1 - sigmoid(s))), y 1 where the answer is relevant."""
    labels = torch.tensor([float(row.sentence == RELEVANT) for row in rows])

    def loss(scores: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(scores, labels.to(scores))

    return loss


def pair_loss(scores: Tensor) -> Tensor:
    """-mean log sigmoid(s_chosen - s_rejected) of scores [2 N] (Bradley and Terry 1952)."""
    return -logsigmoid(scores[::2] - scores[1::2]).mean()


def train_sentence_model(
    reader: SentenceReader,
    train: Sequence[Example],
    heldout: Sequence[Example],
    config: RewardModelConfig,
    *,
    seed: int,
    name: str = "sentence model",
    keeper: Keeper = NOTHING_KEPT,
) -> list[dict[str, float]]:
    """Train on the labels of whole answers, or on pairs; a row of losses an epoch, from 0.

    Of `config` are used: epochs, batch_size, lr and grad_norm.  With held-out rows it stops one
    epoch past the best and keeps that one's weights; without, after all epochs.  `name` is what
    errors call the model.
    keeper: has what an earlier process did of the same training, which goes on to the same bits.
    Errors: ValueError without rows; GuardError where loss, gradients or weights are not finite.
    """
    if not train:
        raise ValueError("train was empty, expected labelled answers or pairs")
    model = reader.model
    check_weights(f"before {name} step 1", {name: model})
    epochs = _Epochs(reader, train, config, seed, name, keeper)
    if heldout:
        train_to_best(model, config.epochs, epochs.train, lambda: reader.loss(heldout)(
            reader.scores(heldout)).item(), epochs.best)  # fmt: skip
    else:
        for number in range(len(epochs.losses) + 1, config.epochs + 1):
            epochs.train(number)
    check_weights(f"after {name} step {epochs.step}", {name: model})
    losses, held = epochs.losses, epochs.best.losses
    history: list[dict[str, float]] = [{"epoch": n, "loss": x} for n, x in enumerate(losses, 1)]
    if not held:
        return history
    history.insert(0, {"epoch": 0})
    return [row | {"heldout_loss": x} for row, x in zip(history, held, strict=True)]


class _Epochs:
    """The epochs of a training, begun or gone on with."""

    def __init__(
        self,
        reader: SentenceReader,
        rows: Sequence[Example],
        config: RewardModelConfig,
        seed: int,
        name: str,
        keeper: Keeper,
    ):
        assert config.lr is not None
        self.reader, self.rows, self.config = reader, rows, config
        self.name, self.keeper = name, keeper
        self.optimizer = AdamW(trainable(reader.model), lr=config.lr)
        self.per_epoch = math.ceil(len(rows) / config.batch_size)
        kept = resumed(keeper, config.epochs * self.per_epoch, reader.model, self.optimizer)
        self.step, self.total = 0, 0.0  # of the epoch under way, the sum of its losses
        self.losses: list[float] = []
        self.best = Best()
        if kept is not None:
            state = state_of(kept, STATE, reader.part_size)
            self.step, self.total, self.losses = kept.step, state["total"], state["losses"]
            check(kept, losses=(len(self.losses), (self.step - 1) // self.per_epoch))
            self.best = Best(state["heldout"])
            if self.best.losses:
                check(kept, heldout=(len(self.best.losses), len(self.losses) + 1))
                self.best.weights = fitting(kept, "best", reader.model)
        self.rng = random.Random(seed)
        for _ in self.losses:
            self._order()

    def _order(self) -> list[int]:
        return self.rng.sample(range(len(self.rows)), len(self.rows))

    def train(self, number: int) -> None:
        """The steps of an epoch that are still to do."""
        order, model = self._order(), self.reader.model
        size, steps = self.config.batch_size, self.config.epochs * self.per_epoch
        for i in range((self.step - (number - 1) * self.per_epoch) * size, len(order), size):
            rows = [self.rows[j] for j in order[i : i + size]]
            loss = self.reader.backward(self.reader.batch(rows), self.reader.loss(rows))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.grad_norm)
            self.step += 1
            check_step(f"{self.name} step {self.step}", {self.name: model}, {"loss": loss},
                       {self.name: norm}, REMEDY)  # fmt: skip
            self.optimizer.step()
            self.total += loss.item() * len(rows)
            self.keeper.after(self.step, steps, self._rest)
        self.losses.append(self.total / len(self.rows))
        self.total = 0.0

    def _rest(self) -> Rest:
        state = {"total": self.total, "losses": self.losses, "heldout": self.best.losses}
        return rest_of(self.reader.model, self.optimizer, state, self.reader.part_size,
                       best=self.best.weights)  # fmt: skip


def evaluate_sentence_model(
    reader: SentenceReader, data: Sequence[Example]
) -> dict[str, float | None]:
    """The loss, and the AUC of relevant against irrelevant answers, or the share of pairs that are
    ordered rightly.
    """
    scores = reader.scores(data)
    figures: dict[str, float | None] = {"loss": reader.loss(data)(scores).item()}
    if isinstance(data[0], Pair):
        gaps = (scores[::2] - scores[1::2]).sign()
        return figures | {"accuracy": ((gaps + 1) / 2).mean().item()}
    labels = [row.sentence for row in data if isinstance(row, LabelledAnswer)]
    relevant = torch.tensor(labels) == RELEVANT
    return figures | {"auc": area_under_curve(scores.cpu(), relevant)}
