"""The specification of `token_advantages` in plain PyTorch: shape, `gae`, statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._sequence import compute_dtype, kl, on, select
from ..gae.reference import fwd as gae_reference
from ..whiten.reference import stats as moments


def compose(gae: Callable[..., tuple[Tensor, Tensor]], token_rewards: Tensor, values: Tensor,
            mask: Tensor | None, train_mask: Tensor | None, logprobs: Tensor | None,
            ref_logprobs: Tensor | None, kl_coef: Tensor, gamma: Tensor, lam: Tensor,
            value_lam: Tensor | None, bootstrap: Tensor | None, cu_seqlens: Tensor | None,
            kl_estimator: str, unbiased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(raw advantages, returns, rewards, statistics [8], moments of what is trained [4]).

    statistics: n, then mean and standard deviation of rewards, mean of the KL, mean and standard
    deviation of raw advantages and of returns, all over `mask`.
    """
    given = [x for x in (token_rewards, values, logprobs, ref_logprobs) if x is not None]
    dtype = compute_dtype(*given)
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
    of_advantages = moments(advantages, mask)
    n, reward, reward_std = summary(moments(rewards, mask), unbiased)
    _, advantage, advantage_std = summary(of_advantages, unbiased)
    _, back, back_std = summary(moments(returns, mask), unbiased)
    stats = torch.stack([n, reward, reward_std, kl_mean, advantage, advantage_std, back, back_std])
    if train_mask is not None:
        trained = train_mask if mask is None else train_mask & mask
        of_advantages = moments(advantages, trained)
    return advantages, returns, rewards, stats, of_advantages


def fwd(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`compose` over the reference of `gae`."""
    return compose(gae_reference, *args)


def summary(of: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(n, mean, standard deviation) from (n, mean, M2, max)."""
    n, mean, m2, _ = of.unbind()
    return n, mean, torch.sqrt(m2 / (n - int(unbiased)).clamp(min=1))
