"""The token reward model: three classes a token, trained on mapped labels, frozen in PPO."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import tppo_kernels as tk
from tppo.batch import Batch, collate, pad_rows
from tppo.config import RewardModelConfig
from tppo.models import class_logits
from tppo.progress import say, status

IRRELEVANT, RELEVANT = 1, 2  # classes of a token; 0 is a token of no labelled word


class LabelledAnswer(NamedTuple):
    """An answer with a class for each token and one (1 or 2) for the whole."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    categories: Sequence[int]  # 0, 1 or 2 a response token
    sentence: int  # 1 irrelevant, 2 relevant


class GuardError(RuntimeError):
    """A check that stands before PPO did not hold."""


def train_reward_model(
    model: PreTrainedModel,
    train: Sequence[LabelledAnswer],
    config: RewardModelConfig,
    *,
    pad_id: int,
    seed: int,
) -> list[dict[str, float]]:
    """Train on local and global loss; returns one row of losses an epoch.

    Errors: GuardError if a parameter of the trunk gets no gradient in the first step.
    """
    rng = random.Random(seed)
    assert config.lr is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    per_epoch = math.ceil(len(train) / config.batch_size)
    step, history = 0, []
    with status("reward model", config.epochs * per_epoch) as bar:
        for epoch in range(1, config.epochs + 1):
            order = rng.sample(range(len(train)), len(train))
            losses = []
            for i in range(0, len(order), config.batch_size):
                rows = [train[j] for j in order[i : i + config.batch_size]]
                parts = _losses(model, rows, config, pad_id, seed + step)
                optimizer.zero_grad()
                parts[0].backward()
                if step == 0:
                    check_trunk_gradients(model)
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm)
                optimizer.step()
                step += 1
                losses.append(torch.stack(parts).detach())
                bar.advance()
            mean = torch.stack(losses).mean(0).tolist()
            names = ("loss", "local_loss", "global_loss")
            history.append({"epoch": epoch, **dict(zip(names, mean, strict=True))})
            bar.note(f"loss {mean[0]:.3f}")
    return history


def _losses(
    model: PreTrainedModel,
    rows: Sequence[LabelledAnswer],
    config: RewardModelConfig,
    pad_id: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, local and global loss of a batch."""
    batch, labels, sentences = _collate(rows, pad_id, model.device)
    result = tk.token_reward_loss(
        class_logits(model, batch),  # [B, T, 3]
        labels,
        batch.mask,
        sentences,
        local_weight=config.local_weight,
        global_weight=config.global_weight,
        balance=config.balance,
        seed=seed,
    )
    return result.loss, result.local_loss, result.global_loss


@torch.no_grad()
def evaluate_reward_model(
    model: PreTrainedModel,
    data: Sequence[LabelledAnswer],
    config: RewardModelConfig,
    pad_id: int,
) -> dict[str, Any]:
    """Accuracy over all tokens, and AUC of relevant against irrelevant ones."""
    scores, labels, hits, count = [], [], 0, 0
    for i in range(0, len(data), config.batch_size):
        batch, label, _ = _collate(data[i : i + config.batch_size], pad_id, model.device)
        logits = class_logits(model, batch)  # [B, T, 3]
        hits += int((logits.argmax(-1) == label)[batch.mask].sum())
        count += int(batch.mask.sum())
        judged = batch.mask & (label > 0)
        scores.append((logits[..., RELEVANT] - logits[..., IRRELEVANT])[judged].cpu())
        labels.append(label[judged].cpu() == RELEVANT)
    score, relevant = torch.cat(scores), torch.cat(labels)
    return {
        "auc": area_under_curve(score, relevant),
        "accuracy": hits / max(count, 1),
        "relevant_tokens": int(relevant.sum()),
        "irrelevant_tokens": int((~relevant).sum()),
    }


def area_under_curve(score: Tensor, positive: Tensor) -> float | None:
    """P(score of a positive > score of a negative), ties a half; None without both classes."""
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return None
    _, rank, tied = score.double().unique(return_inverse=True, return_counts=True)
    mean_rank = tied.cumsum(0) - (tied - 1) / 2  # 1-based, ties share their mean
    rank_sum = mean_rank[rank][positive].sum().item()
    return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)


def check_auc(report: dict[str, Any], config: RewardModelConfig) -> None:
    """Stop before PPO optimises a reward that cannot tell relevant from irrelevant.

    Errors: GuardError below `min_auc`; with few labelled sessions only a warning that says why.
    """
    auc, sessions = report["auc"], report["sessions"]
    if auc is not None and auc >= config.min_auc:
        return
    shown = "unknown (the held-out labels are all alike)" if auc is None else f"{auc:.3f}"
    problem = f"the reward model's AUC is {shown}, expected at least {config.min_auc}"
    if sessions >= config.min_auc_sessions:
        raise GuardError(
            f"{problem}: PPO would raise this reward without raising relevance. Label more answers "
            "or train longer; --reward-model.min-auc lowers the bound"
        )
    say(
        f"WARNING: {problem}. Only {sessions} sessions are labelled (fewer than "
        f"{config.min_auc_sessions}), too few to judge by: PPO runs, but do not trust its reward"
    )


def check_trunk_gradients(model: PreTrainedModel) -> None:
    """Stop if the trunk is frozen or gets no gradient: a head alone learns next to nothing."""
    moves = False
    for name, parameter in model.base_model.named_parameters():
        if not parameter.requires_grad or parameter.grad is None:
            raise GuardError(f"trunk parameter {name!r} gets no gradient: is it frozen?")
        if not parameter.grad.isfinite().all():
            raise GuardError(f"trunk parameter {name!r} has a gradient that is not finite")
        moves = moves or bool(parameter.grad.any())
    if not moves:
        raise GuardError("every gradient of the reward model's trunk is zero")


def _collate(
    rows: Sequence[LabelledAnswer], pad_id: int, device: torch.device
) -> tuple[Batch, Tensor, Tensor]:
    batch = collate([r.prompt_ids for r in rows], [r.response_ids for r in rows], pad_id, device)
    labels = pad_rows([r.categories for r in rows], batch.targets)  # [B, T] int64
    sentences = torch.tensor([float(r.sentence) for r in rows], device=device)  # [B]
    return batch, labels, sentences
