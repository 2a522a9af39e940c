"""Supervised fine-tuning on the true next queries, to the early stop on held-out loss.

A batch of more tokens than `max_tokens` is read in parts.  Their losses have the denominator of the
whole batch and their gradients are added up, so that the step is that of the batch in one piece.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tppo.methods.config import SFTConfig
from tppo.methods.optimizer import AdamW
from tppo.models.batch import Batch
from tppo.models.config import Prefix
from tppo.models.guards import GuardError, check_step, check_weights, trainable
from tppo.models.keeper import (
    NOTHING_KEPT,
    NUMBER,
    Keeper,
    Kept,
    Rest,
    check,
    fitting,
    rest_of,
    resumed,
    state_of,
)
from tppo.models.part_size import PartSize
from tppo.models.policy import (
    load_trained,
    policy_head,
    policy_logprobs,
    policy_states,
    snapshot,
)
from tppo.progress import status


class Examples(NamedTuple):
    """Prompts with their true answers, as token ids."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]


class SFTResult(NamedTuple):
    """What a run of SFT did; the model holds the weights of `best_step`."""

    steps: int
    best_step: int
    heldout_loss: float
    seconds: float
    tokens: int
    """Tokens of prompts and answers that were trained on, each as often as it was read."""
    history: list[dict[str, Any]]


def train_sft(
    model: PreTrainedModel,
    train: Examples,
    heldout: Examples,
    config: SFTConfig,
    *,
    pad_id: int,
    seed: int,
    prefix: Prefix = "shared",
    each: Callable[[list[dict[str, Any]]], None] = lambda history: None,
    keeper: Keeper = NOTHING_KEPT,
) -> SFTResult:
    """Train until the held-out loss has stopped falling; keep the best weights.

    each: called with the history so far behind each evaluation.
    keeper: has what an earlier process did of the same training, which goes on to the same bits.

    Answers of one prompt share it where they meet in a batch and the prompt is not trained on.
    """
    assert config.lr is not None
    check_weights("before sft step 1", {"model": model})
    steps, eval_every = schedule(len(train.prompts), config)
    optimizer = AdamW(trainable(model), lr=config.lr)
    kept = resumed(keeper, steps, model, optimizer)
    size = part_size(config)
    course = _Course.of(kept, size)
    best = fitting(kept, "best", model) if kept and course.best_step else {}
    start = time.monotonic() - course.seconds
    batches = _batches(train, config, pad_id, model.device, seed, prefix, course.steps)

    def rest() -> Rest:
        course.seconds = time.monotonic() - start
        return rest_of(model, optimizer, asdict(course), size, best=best)

    with status("sft") as bar:
        bar.resume(course.steps)
        for step in range(course.steps + 1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _decay(step, config)
            batch = next(batches)
            loss = sft_step(model, batch, optimizer, config, step, size)
            course.steps = step
            course.tokens += sum(map(len, (*batch.prompt_ids, *batch.response_ids)))
            bar.advance()
            if step % eval_every == 0 or step == steps:
                heldout_loss = answer_loss(model, heldout, config, pad_id, prefix, size)
                if course.is_best(loss, heldout_loss, model, config):
                    best = snapshot(model, best)
                each(course.history)
                bar.note(f"held-out loss {heldout_loss:.3f}, best at step {course.best_step}")
                if step - course.best_step >= config.patience * eval_every:
                    break
            if step < steps:
                keeper.after(step, steps, rest)
    load_trained(model, best)
    course.seconds = time.monotonic() - start
    return SFTResult(**vars(course))


COURSE = {"steps": int, "best_step": int, "heldout_loss": (*NUMBER, type(None)),
          "seconds": NUMBER, "tokens": int, "history": [dict]}  # fmt: skip


@dataclass
class _Course:
    """What `SFTResult` says, of a training under way."""

    steps: int = 0
    best_step: int = 0
    heldout_loss: float = math.inf
    seconds: float = 0.0
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, kept: Kept | None, size: PartSize) -> _Course:
        """As it was kept; JSON has null for the infinity before the first evaluation."""
        if kept is None:
            return cls()
        found = cls(**state_of(kept, COURSE, size))
        check(kept, steps=(found.steps, kept.step))
        if found.heldout_loss is None:
            found.heldout_loss = math.inf
        return found

    def is_best(
        self, loss: float, heldout_loss: float, model: PreTrainedModel, config: SFTConfig
    ) -> bool:
        """Adds a row to the history; whether no weights before these were as good.

        Errors: GuardError where the held-out loss is not finite.
        """
        if not math.isfinite(heldout_loss):
            check_weights(f"after sft step {self.steps}", {"model": model})
            raise GuardError(f"sft step {self.steps}: the held-out loss is {heldout_loss}")
        self.history.append({"step": self.steps, "loss": loss, "heldout_loss": heldout_loss,
                             "num_tokens": self.tokens})  # fmt: skip
        if heldout_loss >= self.heldout_loss - config.min_delta:
            return False
        self.heldout_loss, self.best_step = heldout_loss, self.steps
        return True


def schedule(sessions: int, config: SFTConfig) -> tuple[int, int]:
    """Most optimiser steps, and the steps between two evaluations of the held-out loss."""
    per_pass = sessions / min(config.batch_size, sessions)
    steps = max(1, min(config.max_steps, math.ceil(config.max_passes * per_pass)))
    return steps, max(1, min(config.eval_every, math.ceil(3 * per_pass)))


def continue_sft(
    model: PreTrainedModel,
    train: Examples,
    config: SFTConfig,
    *,
    pad_id: int,
    steps: int,
    seed: int,
    prefix: Prefix = "shared",
    keeper: Keeper = NOTHING_KEPT,
) -> float:
    """Train on for `steps` optimiser steps at the final learning rate; the seconds that it took,
    those of earlier processes included.
    """
    assert config.lr is not None
    lr = config.lr * config.final_lr_share
    optimizer = AdamW(trainable(model), lr=lr)
    kept = resumed(keeper, steps, model, optimizer)
    done, seconds, size = 0, 0.0, part_size(config)
    if kept is not None:
        done, seconds = kept.step, state_of(kept, {"seconds": NUMBER}, size)["seconds"]
    start = time.monotonic() - seconds
    batches = _batches(train, config, pad_id, model.device, seed, prefix, done)

    def rest() -> Rest:
        return rest_of(model, optimizer, {"seconds": time.monotonic() - start}, size)

    with status("sft continued", steps) as bar:
        bar.resume(done)
        for step in range(done + 1, steps + 1):
            sft_step(model, next(batches), optimizer, config, step, size)
            bar.advance()
            keeper.after(step, steps, rest)
    return time.monotonic() - start


def sft_step(
    model: PreTrainedModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    config: SFTConfig,
    step: int,
    size: PartSize | None = None,
) -> float:
    """One optimiser step on the mean negative log-likelihood of a batch.

    size: of a training, which remembers what its memory holds.
    Errors: GuardError, before the step, where its loss or gradient is not finite.
    """
    if config.prompt_loss:
        batch = batch.dense()
        count = sum(len(p) + len(r) - 1 for p, r in zip(batch.prompt_ids, batch.response_ids,
                                                        strict=True))  # fmt: skip
    else:
        count = int(batch.mask.sum())

    def gradients(most: int) -> list[Tensor]:
        optimizer.zero_grad()
        losses = []
        for part in _parts(batch, most):
            summed = _full_loss(model, part) if config.prompt_loss else _answer_loss(model, part)
            loss = summed / torch.tensor(count, device=summed.device)
            loss.backward()
            losses.append(loss.detach())
        return losses

    losses = (size or part_size(config)).fitted(batch, gradients)
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm)
    figures = check_step(f"sft step {step}", {"model": model}, {"loss": total}, {"model": norm},
                         "usually a smaller --sft.lr helps")  # fmt: skip
    optimizer.step()
    return figures[0]


@torch.no_grad()
def answer_loss(
    model: PreTrainedModel,
    data: Examples,
    config: SFTConfig,
    pad_id: int,
    prefix: Prefix = "shared",
    size: PartSize | None = None,
) -> float:
    """Mean negative log-likelihood of the answers' tokens, in nats."""
    total, count, size = 0.0, 0, size or part_size(config)
    for i in range(0, len(data.prompts), config.batch_size):
        rows = slice(i, i + config.batch_size)
        batch = Batch(data.prompts[rows], data.answers[rows], pad_id, model.device, prefix)
        for loss, tokens in size.fitted(batch, partial(_losses, model, batch)):
            total += loss
            count += tokens
    return total / count


def _losses(model: PreTrainedModel, batch: Batch, most: int) -> list[tuple[float, int]]:
    """Of each part its negative log-likelihood, summed, and its tokens."""
    return [(-policy_logprobs(model, part, 1.0)[0].sum().item(), int(part.mask.sum()))
            for part in _parts(batch, most)]  # fmt: skip


def part_size(config: SFTConfig) -> PartSize:
    """How many tokens of a batch are read at once."""
    return PartSize(config.max_tokens, "--sft.max-tokens")


def _parts(batch: Batch, most: int) -> Iterator[Batch]:
    """The batch in parts of at most so many tokens; itself where it is within that."""
    return (batch.rows(index) for index in batch.parts(most)[0])


def _answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Negative log-likelihood of the answers' tokens, summed."""
    states = policy_states(model, batch)  # [B, T, D]
    return _summed_loss(model, states, batch.targets, batch.mask)


def _full_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """As `_answer_loss`, prompt tokens after the first included."""
    padded = batch.padded
    hidden = padded.hidden(model.base_model)[:, :-1]  # [B, P+T-1, D]
    real = padded.attention_mask.bool()
    mask = real[:, :-1] & real[:, 1:]
    return _summed_loss(model, hidden, padded.input_ids[:, 1:], mask)


def _summed_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood; nothing as large as the logits is kept for backward."""
    logprobs, _ = policy_head(model)(hidden, targets, mask, memory="recompute")  # 0 where masked
    return -logprobs.sum()


def _batches(
    data: Examples,
    config: SFTConfig,
    pad_id: int,
    device: torch.device,
    seed: int,
    prefix: Prefix,
    done: int = 0,
) -> Iterator[Batch]:
    """Endless shuffled batches, in which the answers of one prompt follow each other; without the
    first `done`.

    A small data set gives batches of its own size.
    """
    size = min(config.batch_size, len(data.prompts))
    for chosen in islice(_shuffled(len(data.prompts), size, seed), done, None):
        rows = sorted(chosen, key=lambda i: list(data.prompts[i]))
        prompts, answers = [data.prompts[i] for i in rows], [data.answers[i] for i in rows]
        yield Batch(prompts, answers, pad_id, device, prefix)


def _shuffled(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """`size` of the numbers below n at a time, all of them before one comes again."""
    rng = random.Random(seed)
    order: list[int] = []
    while True:
        if len(order) < size:
            order = rng.sample(range(n), n)
        yield order[:size]
        order = order[size:]


def _decay(step: int, config: SFTConfig) -> float:
    progress = min(1.0, step / config.decay_steps)
    return 1.0 - (1.0 - config.final_lr_share) * progress
