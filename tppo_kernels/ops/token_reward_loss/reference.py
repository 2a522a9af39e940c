"""The specification of `token_reward_loss` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.sequence import (
    compute_dtype,
    has_valid_token,
    on,
    select,
    sequence_sum,
    spread,
    valid_mask,
)

_LOW_32 = 0xFFFFFFFF


class TokenRewardLossCall(NamedTuple):
    """The arguments of a raw call."""

    logits: Tensor  # [B, T, 3] or [N, 3]
    labels: Tensor  # [B, T] or [N]
    mask: Tensor | None  # [B, T] or [N] bool
    sentence_labels: Tensor | None  # [B]
    class_weights: list[Tensor]  # [3], a 0-d tensor each
    balance: Tensor | None  # []
    seed: Tensor | None  # [] int64
    cu_seqlens: Tensor | None  # [B + 1] int32
    local_reduction: str
    grad_logits: bool  # whether the derivatives are wanted


class TokenRewardLossGradient(NamedTuple):
    """The arguments of a raw call of backward."""

    grad_local: Tensor  # []
    grad_global: Tensor  # []
    dlocal: Tensor  # [B, T, 3] or [N, 3]
    dglobal: Tensor  # [B, T, 3] or [N, 3]


def fwd(call: TokenRewardLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(local_loss, global_loss, metrics [12], d local/d logits, d global/d logits).

    See `tppo_kernels.token_reward_loss`. A derivative that is not wanted is an empty tensor.
    """
    logits, labels, _, sentence_labels, class_weights, balance, seed, cu_seqlens, *_ = call
    valid = valid_mask(labels, call.mask)  # [B, T] or [N]
    z = select(logits, valid[..., None], compute_dtype(logits))  # [B, T, 3] or [N, 3]
    label = select(labels, valid).long()
    judged = valid & ((label == 1) | (label == 2))
    log_p = torch.log_softmax(z, -1)
    p, classes = log_p.exp(), torch.arange(3, device=z.device)

    zone = valid if balance is None or seed is None else valid & kept(label, valid, balance, seed)
    terms = zone if call.local_reduction == "token" else has_valid_token(label, valid, cu_seqlens)
    share = zone.to(z.dtype) / terms.sum().clamp(min=1)
    local, slope = _local(log_p, label, share, class_weights)
    dlocal = slope[..., None] * (p - (label[..., None] == classes).to(z.dtype))

    reward = (p * classes).sum(-1)  # sum_c c P(c)
    best = z.argmax(-1)
    total, slope = _global(reward, judged, sentence_labels, cu_seqlens)
    dglobal = slope[..., None] * p * (classes - reward[..., None])
    best_total, _ = _global(best.to(z.dtype), judged, sentence_labels, cu_seqlens)

    by_class = [valid & (label == c) for c in range(3)]
    sums = [valid.sum(), zone.sum(), *(x.sum() for x in by_class),
            *((x & (best == c)).sum() for c, x in enumerate(by_class)),
            has_valid_token(label, judged, cu_seqlens).sum(),
            select(reward, judged).sum() / judged.sum().clamp(min=1),
            select(best, judged).sum() / judged.sum().clamp(min=1), best_total]
    metrics = torch.stack([x.to(z.dtype) for x in sums])
    none = z.new_empty(0)
    return (local, total, metrics, dlocal if call.grad_logits else none,
            dglobal if call.grad_logits else z.new_empty(0))


def bwd(call: TokenRewardLossGradient) -> Tensor:
    """The gradient of the logits; a derivative of 0 stays 0 whatever comes in."""
    grad_local, grad_global, dlocal, dglobal = call
    zero = torch.zeros((), dtype=dlocal.dtype, device=dlocal.device)
    return (torch.where(dlocal == 0, zero, dlocal * grad_local)
            + torch.where(dglobal == 0, zero, dglobal * grad_global))


def _local(log_p: Tensor, label: Tensor, share: Tensor, class_weights: list[Tensor]
           ) -> tuple[Tensor, Tensor]:
    """(sum of share w[label] (-log p[label]), share w[label]); NaN for a label outside 0..2."""
    slot = label.clamp(0, 2)  # never read out of bounds
    share = share * torch.stack([on(w, log_p) for w in class_weights])[slot]
    share = torch.where(slot == label, share, float("nan"))
    surprise = -log_p.gather(-1, slot[..., None])[..., 0]
    return torch.where(share == 0, torch.zeros_like(share), share * surprise).sum(), share


def _global(reward: Tensor, judged: Tensor, sentence_labels: Tensor | None,
            cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean over sequences of (mean reward of judged tokens - label)^2, d/d reward)."""
    if sentence_labels is None:
        return reward.new_zeros(()), torch.zeros_like(reward)
    count = sequence_sum(judged.to(reward.dtype), cu_seqlens)  # [B]
    counted = count > 0
    mean = sequence_sum(select(reward, judged), cu_seqlens) / count.clamp(min=1)
    difference = select(mean - sentence_labels.to(reward.dtype), counted)
    n = counted.sum().clamp(min=1)
    slope = spread(2 * difference / (n * count.clamp(min=1)), reward, cu_seqlens)
    return (difference * difference).sum() / n, select(slope, judged)


def kept(label: Tensor, valid: Tensor, balance: Tensor, seed: Tensor) -> Tensor:
    """The balance draw: the larger of the classes 1 and 2 is thinned, all else is kept.

    With n_1 and n_2 the valid tokens of the two classes, a token of the larger one is kept with
    probability p = min(1, balance min(n_1, n_2) / max(n_1, n_2)), and p = 1 where a class is
    missing. Its uniform number is a hash of the seed and of its index among the valid tokens, so
    that neither padding nor the device changes the draw.
    """
    one, two = valid & (label == 1), valid & (label == 2)
    n_1, n_2 = one.sum().double(), two.sum().double()
    rare, frequent = torch.minimum(n_1, n_2), torch.maximum(n_1, n_2)
    p = torch.where(rare > 0, on(balance, rare) * rare / frequent.clamp(min=1), 1.0)
    majority = (one & (n_1 > n_2)) | (two & (n_2 > n_1))
    index = valid.flatten().cumsum(0).reshape(valid.shape)  # 1, 2, ... over valid tokens
    return ~majority | (uniform(index, seed) < p)


def uniform(index: Tensor, seed: Tensor) -> Tensor:
    """A number in [0, 1) for each index, fp64: a 32-bit hash of (seed, index)."""
    seed = on(seed, index)
    key = _hash(_hash(seed) ^ (seed >> 32))
    return _hash(_hash(index) ^ key).double() / 2**32


def _hash(x: Tensor) -> Tensor:
    """A bijection of the low 32 bits of int64; no product reaches 2^63.

    Source: two rounds of multiply-xorshift, constants of the "hash prospector" (Wellons).
    """
    x = (x + 0x9E3779B9) & _LOW_32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW_32
    return x ^ (x >> 15)
