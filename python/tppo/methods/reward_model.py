"""The token reward model: three classes a token, trained on mapped labels, frozen in PPO."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

import tppo_kernels as tk
from tppo.methods.auc import Rated, area_under_curve, calibration
from tppo.methods.config import RewardModelConfig
from tppo.methods.optimizer import AdamW
from tppo.models.adapters import has_adapter
from tppo.models.batch import Batch, pad_rows
from tppo.models.config import Prefix
from tppo.models.guards import GuardError, check_step, check_weights, trainable
from tppo.models.keeper import (
    NOTHING_KEPT,
    Keeper,
    Rest,
    check,
    rest_of,
    resumed,
    state_of,
    weights_of,
)
from tppo.models.part_size import PartSize
from tppo.models.policy import class_logits
from tppo.progress import say, status

RM_REMEDY = "usually a smaller --reward-model.lr helps"
IRRELEVANT, RELEVANT = 1, 2  # classes of a token; 0 is a token of no labelled word
NOT_LABELLED = -1  # in place of a class: nobody knows it, and the token is left out of the loss


class LabelledAnswer(NamedTuple):
    """An answer in the reward model's tokens, a class for each and one (1 or 2) for the whole."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    categories: Sequence[int]  # 0, 1 or 2 a response token, or NOT_LABELLED
    sentence: int  # 1 irrelevant, 2 relevant
    labeller: str = ""
    weight: float = 1.0  # of its part of both losses


_NO_LABEL = torch.zeros(0, dtype=torch.bool)


def enough_passes(config: RewardModelConfig, rows: int, updates: int = 25) -> RewardModelConfig:
    """The settings with as many passes over the rows as so many updates take, and no fewer than
    they had.
    """
    a_pass = math.ceil(rows / config.batch_size)
    return replace(config, epochs=max(config.epochs, math.ceil(updates / a_pass)))


class Reader(Protocol):
    """A token classifier, and how it reads prompts and responses, both as its token ids."""

    model: PreTrainedModel
    prefix: Prefix  # whether answers that share a prompt are read with one of it

    def __call__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits [B, T, 3] of the response tokens, and where there are any [B, T]."""


class PolicyTokens:
    """The reader of a classifier that shares the policy's tokenizer."""

    def __init__(self, model: PreTrainedModel, pad_id: int, prefix: Prefix = "shared"):
        self.model, self.pad_id, self.prefix = model, pad_id, prefix

    def __call__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        batch = Batch(prompts, responses, self.pad_id, self.model.device, self.prefix)
        return class_logits(self.model, batch), batch.mask


def train_reward_model(
    reader: Reader,
    train: Sequence[LabelledAnswer],
    config: RewardModelConfig,
    *,
    seed: int,
    each: Callable[[list[dict[str, float]]], None] = lambda history: None,
    keeper: Keeper = NOTHING_KEPT,
) -> list[dict[str, float]]:
    """Train on local and global loss; returns one row of losses an epoch.

    each: called with the rows so far behind each epoch.
    keeper: has what an earlier process did of the same training, which goes on to the same bits.

    Errors: GuardError if the trunk is frozen or no gradient reaches its embeddings in the first
    step, or if loss, gradients or weights are not finite in any.
    """
    model = reader.model
    assert config.lr is not None
    check_weights("before train-rm step 1", {"reward model": model})
    optimizer = AdamW(trainable(model), lr=config.lr)
    per_epoch = math.ceil(len(train) / config.batch_size)
    steps = config.epochs * per_epoch
    kept, size = resumed(keeper, steps, model, optimizer), part_size(config)
    done, history, losses = 0, [], []
    if kept is not None:
        done, history = kept.step, state_of(kept, {"history": [dict]}, size)["history"]
        if done % per_epoch:
            losses = [*weights_of(kept, "epoch", "losses")["losses"]]
        check(kept, epochs=(len(history), done // per_epoch),
              losses=([*map(len, losses)], [3] * (done % per_epoch)))  # fmt: skip
    tokens = sum(len(row.prompt_ids) + len(row.response_ids) for row in train)

    def rest() -> Rest:
        epoch = {"losses": torch.stack([loss.cpu() for loss in losses])} if losses else {}
        return rest_of(model, optimizer, {"history": history}, size, epoch=epoch)

    batches = enumerate(_batches(train, config, seed), 1)
    with status("reward model", steps) as bar:
        bar.resume(done)
        for step, rows in islice(batches, done, None):
            again = partial(_backward, reader, rows, config, seed + step - 1)
            parts = size.fitted(_batch(reader, rows), again)
            if step == 1:
                check_trunk_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm)
            check_step(f"train-rm step {step}", {"reward model": model}, {"loss": parts[0]},
                       {"reward model": norm}, RM_REMEDY)  # fmt: skip
            optimizer.step()
            losses.append(torch.stack(parts))
            bar.advance()
            if step % per_epoch == 0:
                history.append(_epoch_row(step // per_epoch, losses, tokens))
                losses.clear()
                each(history)
                bar.note(f"loss {history[-1]['loss']:.3f}")
            if step < steps:
                keeper.after(step, steps, rest)
    check_weights(f"after train-rm step {steps}", {"reward model": model})
    return history


def _batches(
    train: Sequence[LabelledAnswer], config: RewardModelConfig, seed: int
) -> Iterator[list[LabelledAnswer]]:
    """Of all epochs, each of which has an order of its own."""
    rng = random.Random(seed)
    for _ in range(config.epochs):
        order = rng.sample(range(len(train)), len(train))
        for i in range(0, len(order), config.batch_size):
            yield [train[j] for j in order[i : i + config.batch_size]]


def _epoch_row(epoch: int, losses: Sequence[Tensor], tokens: int) -> dict[str, float]:
    """Means of an epoch's losses, [3] a step, and the tokens that were read up to its end."""
    device = losses[-1].device  # those of a checkpoint lie in the host's memory
    mean = torch.stack([loss.to(device) for loss in losses]).mean(0).tolist()
    names = ("loss", "local_loss", "global_loss")
    return {"epoch": epoch, **dict(zip(names, mean, strict=True)), "num_tokens": epoch * tokens}


def _backward(
    reader: Reader, rows: Sequence[LabelledAnswer], config: RewardModelConfig, seed: int, most: int
) -> list[Tensor]:
    """Makes the gradients of a batch; its total, local and global loss.

    Which tokens the balance keeps, and the denominators, depend on the whole batch.  One of more
    than `most` tokens is therefore read first without a graph, for the gradient of the loss
    by its class logits; then each part is read again and takes its rows of that gradient.
    """
    reader.model.zero_grad()
    (parts,) = _batch(reader, rows).parts(most)
    if len(parts) == 1:
        logits, mask = _read(reader, rows)
        losses = _losses(logits, mask, rows, config, seed)
        losses[0].backward()
        return [loss.detach() for loss in losses]
    logits, mask = _read_in_parts(reader, rows, parts)
    losses = _losses(logits.requires_grad_(), mask, rows, config, seed)
    (gradient,) = torch.autograd.grad(losses[0], logits)  # [B, T, 3]
    for index in parts:
        part, _ = _read(reader, [rows[i] for i in index])
        part.backward(gradient[index, : part.shape[1]])
    return [loss.detach() for loss in losses]


def _losses(
    logits: Tensor,
    mask: Tensor,
    rows: Sequence[LabelledAnswer],
    config: RewardModelConfig,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, local and global loss of a batch with these class logits [B, T, 3]."""
    labels = _labels(rows, mask)
    result = tk.token_reward_loss(
        _weighed(logits, rows),
        labels.clamp(min=0),
        mask & (labels != NOT_LABELLED),
        torch.tensor([float(row.sentence) for row in rows], device=mask.device),  # [B]
        local_weight=config.local_weight,
        global_weight=config.global_weight,
        balance=config.balance,
        seed=seed,
    )
    return result.loss, result.local_loss, result.global_loss


def _weighed(logits: Tensor, rows: Sequence[LabelledAnswer]) -> Tensor:
    """The logits, through which the gradient of an answer comes back times its weight.

    Both losses are sums over answers, so that it is the gradient of their weighted sums; what is
    reported are the losses without weights.
    """
    if all(row.weight == 1 for row in rows):
        return logits
    weight = torch.tensor([row.weight for row in rows], device=logits.device, dtype=logits.dtype)
    fixed = logits.detach()
    return fixed + weight[:, None, None] * (logits - fixed)


def weighed(rows: Sequence[LabelledAnswer], weights: Sequence[float]) -> list[LabelledAnswer]:
    """The answers with these weights, scaled so that their mean is 1."""
    mean = math.fsum(weights) / max(len(weights), 1)
    return [row._replace(weight=weight / mean)
            for row, weight in zip(rows, weights, strict=True)]  # fmt: skip


def evaluate_reward_model(
    reader: Reader, data: Sequence[LabelledAnswer], config: RewardModelConfig
) -> dict[str, Any]:
    """Over all of its own tokens accuracy and how often a token of each class (row) is taken for
    each class (column); of the labelled ones the AUC of relevant against irrelevant, and how far
    P(relevant | relevant or irrelevant) is the share that is relevant (`calibration`): their mean
    distance over the tokens is the expected calibration error (Guo et al. 2017).
    """
    return figures_of(*rate_tokens(reader, data, config))


@torch.no_grad()
def rate_tokens(
    reader: Reader, data: Sequence[LabelledAnswer], config: RewardModelConfig
) -> tuple[Rated, Tensor]:
    """The log-odds of relevant against irrelevant of every token that is labelled 1 or 2, and of
    all tokens the confusion of the classes [3, 3]: rows are labels, columns the likeliest class.
    """
    scores, relevant, whose = [torch.zeros(0)], [_NO_LABEL], [torch.zeros(0, dtype=torch.int64)]
    confusion, size = torch.zeros(3, 3, dtype=torch.long), part_size(config)
    for i in range(0, len(data), config.batch_size):
        rows = data[i : i + config.batch_size]
        logits, mask = class_logits_of(reader, rows, size)
        label = _labels(rows, mask)
        known = mask & (label != NOT_LABELLED)
        pairs = 3 * label[known] + logits.argmax(-1)[known]
        confusion += pairs.bincount(minlength=9).view(3, 3).cpu()
        judged = mask & (label > 0)
        scores.append((logits[..., RELEVANT] - logits[..., IRRELEVANT])[judged].cpu())
        relevant.append(label[judged].cpu() == RELEVANT)
        whose.append(i + judged.nonzero()[:, 0].cpu())
    return Rated(torch.cat(scores), torch.cat(relevant), torch.cat(whose)), confusion


def figures_of(rated: Rated, confusion: Tensor) -> dict[str, Any]:
    """What `evaluate_reward_model` gives."""
    score, relevant = rated.score, rated.relevant
    bins = calibration(score.double().sigmoid(), relevant)
    return {
        "auc": area_under_curve(score, relevant),
        "accuracy": int(confusion.trace()) / max(int(confusion.sum()), 1),
        "relevant_tokens": int(relevant.sum()),
        "irrelevant_tokens": int((~relevant).sum()),
        "confusion": confusion.tolist(),
        "calibration": bins,
        "calibration_error": sum(
            part["tokens"] * abs(part["predicted"] - part["relevant"]) for part in bins
        ) / max(len(score), 1),
    }


def relevant_share(data: Sequence[LabelledAnswer]) -> float:
    """Share of relevant tokens of all that are labelled; 0 where none is."""
    judged = [label for row in data for label in row.categories if label > 0]
    return judged.count(RELEVANT) / max(len(judged), 1)


def check_signal(report: dict[str, Any], allowed: bool) -> None:
    """Stop before PPO where every label is the same: no token is better than another.

    Errors: GuardError unless `allowed`.
    """
    share = report["relevant_share"]
    if 0 < share < 1:
        return
    problem = (
        f"there is nothing to learn from: {'all' if share else 'none'} of the labelled tokens of "
        f"{report['answers']} answers are relevant"
    )
    if not allowed:
        raise GuardError(
            f"{problem}. Label more answers (--generate.samples), or judge otherwise (--label...); "
            "--ppo.without-signal runs PPO all the same"
        )
    say(f"WARNING: {problem}")


def check_trunk_gradients(model: PreTrainedModel) -> None:
    """Stop if the trunk is frozen or gets no gradient: a head alone learns next to nothing.

    A gradient at the input embeddings, or at the adapters of the lowest layer, has come through
    every layer. A parameter that the forward does not use (Longformer's global attention, an expert
    that no token chose) has none.
    """
    adapted, trunk = has_adapter(model), dict(model.base_model.named_parameters())
    for name, parameter in trunk.items():
        if not (parameter.requires_grad or adapted):
            raise GuardError(f"trunk parameter {name!r} gets no gradient: it is frozen")
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise GuardError(f"trunk parameter {name!r} has a gradient that is not finite")
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    lowest, where = [embeddings], "embeddings"
    if adapted:
        names = [name for name, parameter in trunk.items() if parameter.requires_grad]
        layer = re.match(r".*?\.\d+\.", names[0])  # such as layers.0.
        lowest = [trunk[name] for name in names if name.startswith(layer[0] if layer else "")]
        where = "lowest adapters"
    if not any(weight.grad is not None and weight.grad.any() for weight in lowest):
        raise GuardError(f"every gradient of the reward model's {where} is zero")


def _batch(reader: Reader, rows: Sequence[LabelledAnswer]) -> Batch:
    """The answers, as they are cut into parts."""
    prompts, responses = [row.prompt_ids for row in rows], [row.response_ids for row in rows]
    return Batch(prompts, responses, 0, prefix=reader.prefix)


def class_logits_of(
    reader: Reader, rows: Sequence[LabelledAnswer], size: PartSize
) -> tuple[Tensor, Tensor]:
    """Class logits [B, T, 3] and mask [B, T] of answers, read in parts, without a graph.

    size: one of all batches of a loop, which remembers what the memory holds.
    """
    batch = _batch(reader, rows)
    return size.fitted(
        batch, lambda most: _read_in_parts(reader, rows, batch.parts(most)[0])
    )


def part_size(config: RewardModelConfig) -> PartSize:
    """How many tokens of a batch are read at once."""
    return PartSize(config.max_tokens, "--reward-model.max-tokens")


@torch.no_grad()
def _read_in_parts(
    reader: Reader, rows: Sequence[LabelledAnswer], parts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """As `_read`, a part at a time."""
    read = [_read(reader, [rows[i] for i in index]) for index in parts]
    if len(read) == 1:
        return read[0]
    length = max(mask.shape[1] for _, mask in read)
    logits = read[0][0].new_zeros(len(rows), length, 3)
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=logits.device)
    for index, (part, there) in zip(parts, read, strict=True):
        logits[index, : part.shape[1]] = part
        mask[index, : there.shape[1]] = there
    return logits, mask


def _read(reader: Reader, rows: Sequence[LabelledAnswer]) -> tuple[Tensor, Tensor]:
    """Class logits [B, T, 3] and mask [B, T] of some answers."""
    return reader([row.prompt_ids for row in rows], [row.response_ids for row in rows])


def _labels(rows: Sequence[LabelledAnswer], mask: Tensor) -> Tensor:
    """The classes of their tokens, int64 [B, T], 0 behind them."""
    return pad_rows([row.categories for row in rows], mask.long())
