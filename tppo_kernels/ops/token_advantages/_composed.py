"""`token_advantages` composed of one backend of `gae` and of `whiten`: what cpp and triton share.

The statistics of the raw advantages serve as moments of what is trained, where all that is valid
is; without both log-probs nothing is read for the KL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._core.eager import constant
from ..._kernels.memory import FP64
from ..._math.sequence import compute_dtype, kl, on, select
from ..gae.reference import GaeCall
from ..ppo_loss.reference import times
from ..whiten.reference import WhitenCall, WhitenStats
from .reference import EPS, AdvantagesCall, WhitenAdvantages


def supports(call: AdvantagesCall | WhitenAdvantages) -> str | None:
    """The reason for refusing, or None: fp64 of what is given a token."""
    tokens: tuple[Tensor | None, ...] = call[:1]
    if isinstance(call, AdvantagesCall):
        tokens = (call.token_rewards, call.values, call.logprobs, call.ref_logprobs)
    return FP64 if compute_dtype(*tokens) == torch.float64 else None


def composed(gae: Callable[[GaeCall], tuple[Tensor, Tensor]],
             statistics: Callable[[WhitenStats], Tensor],
             whitening: Callable[[WhitenCall], Tensor]) -> tuple[Callable, Callable]:
    """(fwd, whiten) over one backend of `gae`, and of the statistics and forward of `whiten`."""

    def whiten(call: WhitenAdvantages) -> Tensor:
        """See `reference.whiten`."""
        return whitening(WhitenCall(call.advantages, call.trained, call.moments, constant(EPS),
                                    call.unbiased, True))

    def fwd(call: AdvantagesCall) -> tuple[Tensor, ...]:
        """See `reference.fwd`."""
        mask = call.mask
        dtype = compute_dtype(call.token_rewards, call.values, call.logprobs, call.ref_logprobs)
        rewards = select(call.token_rewards, mask, dtype)  # [B, T] or [N]
        kl_mean = rewards.new_zeros((), dtype=torch.float64)
        if call.logprobs is not None and call.ref_logprobs is not None:
            divergence, _ = kl(call.logprobs.to(dtype), call.ref_logprobs.to(dtype), mask,
                               call.kl_estimator)
            rewards = rewards - times(on(call.kl_coef, rewards), divergence)
            kl_mean = statistics(WhitenStats(divergence, mask))[1]
        elif rewards is call.token_rewards:
            rewards = rewards.clone()  # the result is never the argument itself
        advantages, returns = gae(GaeCall(rewards, call.values.to(dtype), mask, call.gamma,
                                          call.lam, call.value_lam, call.bootstrap,
                                          call.cu_seqlens))
        parts = torch.stack([statistics(WhitenStats(x, mask))
                             for x in (rewards, advantages, returns)])  # [3, 4]
        n = parts[0, 0]
        std = torch.sqrt(parts[:, 2] / (n - int(call.unbiased)).clamp(min=1))  # [3]
        stats = torch.cat([kl_mean[None], parts[:, 1], std]).to(dtype)
        trained, moments = mask, parts[1].clone()
        if call.train_mask is not None:
            trained = call.train_mask if mask is None else call.train_mask & mask
            moments = statistics(WhitenStats(advantages, trained))
        if call.whitened:
            advantages = whitening(WhitenCall(advantages, trained, moments, constant(EPS),
                                              call.unbiased, True))
        return advantages, returns, rewards, stats, n.long(), moments

    return fwd, whiten
