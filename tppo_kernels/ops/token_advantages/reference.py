"""The specification of `token_advantages` in plain PyTorch: shape, `gae`, statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._core.eager import constant
from ..._kernels.memory import FP64
from ..._math.sequence import compute_dtype, kl, on, select
from ..gae.reference import GaeCall
from ..gae.reference import fwd as gae_reference
from ..ppo_loss.reference import times
from ..whiten.reference import fwd as whiten_reference
from ..whiten.reference import stats as moments_reference

EPS = 1e-8  # of `whiten`


def refuse_fp64(tokens: Tensor, *rest: object) -> str | None:
    """Why the compiled backends refuse arguments of `fwd` (values, log-probs: 1, 4, 5) or of
    `whiten`, or None."""
    given = [x for x in (tokens, *rest[:1], *rest[3:5]) if isinstance(x, Tensor)]
    return FP64 if compute_dtype(*given) == torch.float64 else None


def compose(gae: Callable[..., tuple[Tensor, Tensor]], moments: Callable[..., Tensor],
            whiten: Callable[..., Tensor], token_rewards: Tensor, values: Tensor,
            mask: Tensor | None, train_mask: Tensor | None, logprobs: Tensor | None,
            ref_logprobs: Tensor | None, kl_coef: Tensor, gamma: Tensor, lam: Tensor,
            value_lam: Tensor | None, bootstrap: Tensor | None, cu_seqlens: Tensor | None,
            kl_estimator: str, unbiased: bool, whitened: bool) -> tuple[Tensor, ...]:
    """(advantages, returns, rewards, statistics [7], n, moments of what is trained [4]).

    statistics, over `mask`: mean of the KL, means of rewards, raw advantages and returns, their
    standard deviations; n: its tokens, int64. moments: (n, mean, M2, max) in fp64. advantages: raw,
    or `whitened` by those moments.
    """
    dtype = compute_dtype(token_rewards, values, logprobs, ref_logprobs)
    rewards = select(token_rewards, mask, dtype)  # [B, T] or [N]
    kl_mean = rewards.new_zeros((), dtype=torch.float64)
    if logprobs is not None and ref_logprobs is not None:
        divergence, _ = kl(logprobs.to(dtype), ref_logprobs.to(dtype), mask, kl_estimator)
        rewards = rewards - times(on(kl_coef, rewards), divergence)
        kl_mean = moments(divergence, mask)[1]
    elif rewards is token_rewards:
        rewards = rewards.clone()  # the result is never the argument itself
    advantages, returns = gae(GaeCall(rewards, values.to(dtype), mask, gamma, lam, value_lam,
                                      bootstrap, cu_seqlens))
    parts = torch.stack([moments(x, mask) for x in (rewards, advantages, returns)])  # [3, 4]
    n = parts[0, 0]
    std = torch.sqrt(parts[:, 2] / (n - int(unbiased)).clamp(min=1))  # [3]
    stats = torch.cat([kl_mean[None], parts[:, 1], std]).to(dtype)
    if train_mask is None:
        trained, of_trained = mask, parts[1].clone()
    else:
        trained = train_mask if mask is None else train_mask & mask
        of_trained = moments(advantages, trained)
    if whitened:
        advantages = whiten(advantages, trained, of_trained, unbiased)
    return advantages, returns, rewards, stats, n.long(), of_trained


def composed(gae: Callable[..., tuple[Tensor, Tensor]], moments: Callable[..., Tensor],
             whiten_fwd: Callable[..., Tensor]) -> tuple[Callable, Callable]:
    """(fwd, whiten) over one backend of `gae`, and of the statistics and forward of `whiten`."""
    def whiten(advantages: Tensor, trained: Tensor | None, by: Tensor, unbiased: bool) -> Tensor:
        """The advantages, whitened by the given (n, mean, M2, max)."""
        return whiten_fwd(advantages, trained, by, constant(EPS), unbiased, True)

    def fwd(*args: Any) -> tuple[Tensor, ...]:
        """See `compose`."""
        return compose(gae, moments, whiten, *args)

    return fwd, whiten


fwd, whiten = composed(gae_reference, moments_reference, whiten_reference)
