"""Supervised fine-tuning on the true next queries, to the early stop on held-out loss."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tppo_kernels as tk
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tppo.batch import Batch, collate
from tppo.config import SFTConfig
from tppo.models import hidden_states, policy_logprobs
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
    history: list[dict[str, Any]]


def train_sft(
    model: PreTrainedModel,
    train: Examples,
    heldout: Examples,
    config: SFTConfig,
    *,
    pad_id: int,
    prompt_loss: bool,
    seed: int,
) -> SFTResult:
    """Train until the held-out loss has stopped falling; keep the best weights."""
    start = time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    batches = _batches(train, config.batch_size, pad_id, model.device, seed)
    best_loss, best_step, best, history = float("inf"), 0, _copy(model), []
    for step in range(1, config.max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _decay(step, config)
        loss = sft_step(model, next(batches), optimizer, config.grad_norm, prompt_loss)
        if step % config.eval_every == 0 or step == config.max_steps:
            heldout_loss = answer_loss(model, heldout, config.batch_size, pad_id)
            history.append({"step": step, "loss": loss, "heldout_loss": heldout_loss})
            if heldout_loss < best_loss - config.min_delta:
                best_loss, best_step, best = heldout_loss, step, _copy(model)
            elif step - best_step >= config.patience * config.eval_every:
                break
        status(f"sft step {step}, loss {loss:.3f}, best held-out {best_loss:.3f} at {best_step}")
    model.load_state_dict(best)
    return SFTResult(step, best_step, best_loss, time.monotonic() - start, history)


def continue_sft(
    model: PreTrainedModel,
    train: Examples,
    config: SFTConfig,
    *,
    pad_id: int,
    prompt_loss: bool,
    seconds: float,
    seed: int,
) -> int:
    """Train on at the final learning rate for `seconds`; returns the number of steps."""
    lr = config.lr * config.final_lr_share
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    batches = _batches(train, config.batch_size, pad_id, model.device, seed)
    start, step = time.monotonic(), 0
    while (spent := time.monotonic() - start) < seconds:
        sft_step(model, next(batches), optimizer, config.grad_norm, prompt_loss)
        step += 1
        status(f"sft continued: step {step}, {spent:.0f} of {seconds:.0f} s")
    return step


def sft_step(
    model: PreTrainedModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    grad_norm: float,
    prompt_loss: bool,
) -> float:
    """One optimiser step on the mean negative log-likelihood of a batch."""
    model.train()
    loss = _full_loss(model, batch) if prompt_loss else _answer_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_norm)
    optimizer.step()
    model.eval()
    return loss.item()


@torch.no_grad()
def answer_loss(model: PreTrainedModel, data: Examples, batch_size: int, pad_id: int) -> float:
    """Mean negative log-likelihood of the answers' tokens, in nats."""
    total, count = 0.0, 0
    for i in range(0, len(data.prompts), batch_size):
        part = slice(i, i + batch_size)
        batch = collate(data.prompts[part], data.answers[part], pad_id, model.device)
        logprobs, _ = policy_logprobs(model, batch, 1.0)  # [B, T]
        total -= logprobs.sum().item()
        count += int(batch.mask.sum())
    return total / count


def _answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    logprobs, _ = policy_logprobs(model, batch, 1.0)  # [B, T], 0 where masked
    return -logprobs.sum() / batch.mask.sum()


def _full_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """As `_answer_loss`, prompt tokens after the first included."""
    hidden = hidden_states(model.base_model, batch)[:, :-1]  # [B, P+T-1, D]
    mask = batch.attention_mask[:, :-1].bool() & batch.attention_mask[:, 1:].bool()
    logits = model.get_output_embeddings()(hidden)  # [B, P+T-1, V]
    logprobs, _ = tk.token_logprobs(logits, batch.input_ids[:, 1:], mask)
    return -logprobs.sum() / mask.sum()


def _batches(
    data: Examples, batch_size: int, pad_id: int, device: torch.device, seed: int
) -> Iterator[Batch]:
    """Endless shuffled batches; a small data set gives batches of its own size."""
    rng = random.Random(seed)
    order: list[int] = []
    size = min(batch_size, len(data.prompts))
    while True:
        if len(order) < size:
            order = rng.sample(range(len(data.prompts)), len(data.prompts))
        rows, order = order[:size], order[size:]
        yield collate(
            [data.prompts[i] for i in rows], [data.answers[i] for i in rows], pad_id, device
        )


def _decay(step: int, config: SFTConfig) -> float:
    progress = min(1.0, step / config.decay_steps)
    return 1.0 - (1.0 - config.final_lr_share) * progress


def _copy(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
