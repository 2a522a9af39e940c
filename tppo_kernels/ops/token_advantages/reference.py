"""The specification of `token_advantages` in plain PyTorch: shape, `gae`, statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._sequence import compute_dtype, kl, on, select
from ..gae.reference import fwd as gae_reference
from ..whiten.reference import fwd as whiten_reference
from ..whiten.reference import stats as moments_reference

EPS = 1e-8  # of `whiten`


def compose(gae: Callable[..., tuple[Tensor, Tensor]], moments: Callable[..., Tensor],
            token_rewards: Tensor, values: Tensor, mask: Tensor | None, train_mask: Tensor | None,
            logprobs: Tensor | None, ref_logprobs: Tensor | None, kl_coef: Tensor, gamma: Tensor,
            lam: Tensor, value_lam: Tensor | None, bootstrap: Tensor | None,
            cu_seqlens: Tensor | None, kl_estimator: str,
            unbiased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(raw advantages, returns, rewards, statistics [8], moments of what is trained [4]).

    statistics, over `mask`: n, mean of the KL, means of rewards, raw advantages and returns, their
    standard deviations. fp64, as the moments.
    """
    dtype = compute_dtype(token_rewards, values, logprobs, ref_logprobs)
    rewards = select(token_rewards, mask, dtype)  # [B, T] or [N]
    kl_mean = rewards.new_zeros((), dtype=torch.float64)
    if logprobs is not None and ref_logprobs is not None:
        divergence, _ = kl(logprobs.to(dtype), ref_logprobs.to(dtype), mask, kl_estimator)
        rewards = rewards - on(kl_coef, rewards) * divergence
        kl_mean = moments(divergence, mask)[1]
    elif rewards is token_rewards:
        rewards = rewards.clone()  # the result is never the argument itself
    advantages, returns = gae(rewards, values.to(dtype), mask, gamma, lam, value_lam, bootstrap,
                              cu_seqlens)
    parts = torch.stack([moments(x, mask) for x in (rewards, advantages, returns)])  # [3, 4]
    n = parts[:1, 0]  # [1]
    std = torch.sqrt(parts[:, 2] / (n - int(unbiased)).clamp(min=1))  # [3]
    stats = torch.cat([n, kl_mean[None], parts[:, 1], std])
    if train_mask is None:
        return advantages, returns, rewards, stats, parts[1].clone()
    trained = train_mask if mask is None else train_mask & mask
    return advantages, returns, rewards, stats, moments(advantages, trained)


def fwd(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`compose` over the references of `gae` and `whiten`."""
    return compose(gae_reference, moments_reference, *args)


def whiten(advantages: Tensor, trained: Tensor | None, moments: Tensor, unbiased: bool) -> Tensor:
    """The advantages, whitened by the given (n, mean, M2, max)."""
    eps = torch.tensor(EPS, dtype=torch.float64)
    return whiten_reference(advantages, trained, moments, eps, unbiased, True)
