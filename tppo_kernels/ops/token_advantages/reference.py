"""The specification of `token_advantages`: rewards minus KL, `gae`, statistics, `whiten`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.sequence import compute_dtype, kl, on, select
from ..gae import reference as gae
from ..ppo_loss.reference import times
from ..whiten import reference as whitening

EPS = 1e-8  # of `whiten`


class AdvantagesCall(NamedTuple):
    """The arguments of a raw call; per-token tensors are [B, T], or packed [N] with offsets."""

    token_rewards: Tensor  # [B, T] or [N]
    values: Tensor  # [B, T] or [N]
    mask: Tensor | None  # [B, T] or [N] bool
    train_mask: Tensor | None  # [B, T] or [N] bool; None: mask
    logprobs: Tensor | None  # [B, T] or [N]
    ref_logprobs: Tensor | None  # [B, T] or [N]
    kl_coef: Tensor  # []
    gamma: Tensor  # []
    lam: Tensor  # [] or [B]
    value_lam: Tensor | None  # [] or [B]; None: lam
    bootstrap: Tensor | None  # [B]
    cu_seqlens: Tensor | None  # [B + 1] int32
    kl_estimator: str
    unbiased: bool
    whitened: bool  # whether the advantages are, by the moments of this process


class WhitenAdvantages(NamedTuple):
    """The arguments of a raw call that whitens by moments of a process group."""

    advantages: Tensor  # [B, T] or [N]
    trained: Tensor | None  # [B, T] or [N] bool
    moments: Tensor  # [4] fp64: n, mean, M2, max
    unbiased: bool


def fwd(call: AdvantagesCall) -> tuple[Tensor, ...]:
    """(advantages, returns, rewards, statistics [7], n [], moments of what is trained [4]).

    statistics, over `mask`: mean of the KL, means of rewards, raw advantages and returns, their
    standard deviations; n: its tokens, int64. moments: (n, mean, M2, max) in fp64. advantages: raw,
    or `whitened` by those moments.
    """
    mask, train_mask = call.mask, call.train_mask
    dtype = compute_dtype(call.token_rewards, call.values, call.logprobs, call.ref_logprobs)
    rewards = select(call.token_rewards, mask, dtype).clone()  # [B, T] or [N]
    divergence = torch.zeros_like(rewards)
    if call.logprobs is not None and call.ref_logprobs is not None:
        divergence, _ = kl(call.logprobs.to(dtype), call.ref_logprobs.to(dtype), mask,
                           call.kl_estimator)
        rewards = rewards - times(on(call.kl_coef, rewards), divergence)
    advantages, returns = gae.fwd(gae.GaeCall(
        rewards, call.values.to(dtype), mask, call.gamma, call.lam, call.value_lam, call.bootstrap,
        call.cu_seqlens))
    kl_part, *parts = (whitening.stats(whitening.WhitenStats(x, mask))
                       for x in (divergence, rewards, advantages, returns))  # n, mean, M2, max
    n = kl_part[0]
    deviations = [torch.sqrt(m2 / (n - int(call.unbiased)).clamp(min=1)) for _, _, m2, _ in parts]
    stats = torch.stack([kl_part[1], *(mean for _, mean, _, _ in parts), *deviations]).to(dtype)
    trained = mask if train_mask is None else train_mask if mask is None else train_mask & mask
    moments = whitening.stats(whitening.WhitenStats(advantages, trained))
    if call.whitened:
        advantages = whiten(WhitenAdvantages(advantages, trained, moments, call.unbiased))
    return advantages, returns, rewards, stats, n.long(), moments


def whiten(call: WhitenAdvantages) -> Tensor:
    """The advantages, whitened by the given moments; see `tppo_kernels.whiten`."""
    eps = torch.full((), EPS, dtype=torch.float64, device=call.moments.device)
    return whitening.fwd(whitening.WhitenCall(call.advantages, call.trained, call.moments, eps,
                                              call.unbiased, True))
