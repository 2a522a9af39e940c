"""The specification of `ppo_loss` in plain PyTorch: the per-token formula, once, and its sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.check import Reduction
from ..._math.sequence import (
    compute_dtype,
    kl,
    on,
    reduction_weights,
    select,
    sequence_sum,
    spread,
    valid_mask,
)


class Formula(NamedTuple):
    """The constants of the per-token formula: 0-d tensors, and two choices."""

    clip_low: Tensor
    clip_high: Tensor
    dual_clip: Tensor | None
    max_log_ratio: Tensor
    entropy_coef: Tensor
    kl_coef: Tensor
    ratio: str
    kl_estimator: str


class TokenTerms(NamedTuple):
    """What each token adds to the loss, the loss's derivatives, and the sums of the metrics."""

    loss: Tensor  # [B, T] or [N]; the loss is its sum
    dlogprobs: Tensor  # [B, T] or [N]
    dentropy: Tensor  # [B, T] or [N]
    metrics: Tensor  # [11], in the order of `PolicyMetrics`


def token_terms(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                share: Tensor, formula: Formula, *, entropy: Tensor | None = None,
                ref_logprobs: Tensor | None = None, weights: Tensor | None = None,
                cu_seqlens: Tensor | None = None) -> TokenTerms:
    """The formula of `tppo_kernels.ppo_loss` per token, with its derivatives written out.

    All tensors [B, T] or [N] in one dtype. `share`: the weight of each token in the reduction, from
    the global denominators, so that chunks of tokens may be given one by one and added up
    (`ratio="token"`; a sequence ratio needs all tokens of a sequence at once).
    """
    limit = on(formula.max_log_ratio, logprobs)
    raw = select(logprobs - old_logprobs, mask)
    clamped = raw.abs() > limit
    token_d = torch.clamp(raw, -limit, limit)
    d = token_d
    lengths = share.new_ones(())
    if formula.ratio == "sequence":
        lengths = sequence_sum(mask.to(share.dtype), cu_seqlens).clamp(min=1)  # [B]
        d = spread(sequence_sum(token_d, cu_seqlens) / lengths, raw, cu_seqlens)
    ratio = torch.exp(d)
    clip_loss, slope, clips = _clipped(ratio, select(advantages, mask), formula)
    if weights is not None:
        weight = select(weights, mask)
        clip_loss, slope = times(weight, clip_loss), times(weight, slope)
    loss, dlogprobs = share * clip_loss, share * slope
    if formula.ratio == "sequence":
        dlogprobs = spread(sequence_sum(dlogprobs, cu_seqlens) / lengths, raw, cu_seqlens)
    dlogprobs = select(dlogprobs, mask & ~clamped)

    kl_value = entropy_value = torch.zeros_like(raw)
    if ref_logprobs is not None:
        kl_value, kl_slope = kl(logprobs, ref_logprobs, mask, formula.kl_estimator)
        kl_share = share * on(formula.kl_coef, share)
        loss = loss + times(kl_share, kl_value)
        dlogprobs = dlogprobs + times(kl_share, kl_slope)
    dentropy = select(share * on(-formula.entropy_coef, share), mask)
    if entropy is not None:
        entropy_value = select(entropy, mask)
        loss = loss + times(dentropy, entropy_value)
    sums = [mask, *clips, clamped, -token_d, torch.expm1(token_d) - token_d, select(ratio, mask)]
    metrics = [x.sum(dtype=torch.float64) for x in (*sums, entropy_value, kl_value)]
    highest = torch.cat([ratio.new_zeros(1), select(ratio, mask).flatten()]).max()
    return TokenTerms(loss, dlogprobs, dentropy,
                      torch.stack([*(m.to(raw.dtype) for m in metrics), highest]))


def _clipped(ratio: Tensor, advantage: Tensor, formula: Formula
             ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The clipped loss l, dl/dd, and where it was clipped low, high and by the dual clip."""
    low, high = on(1 - formula.clip_low, ratio), on(1 + formula.clip_high, ratio)
    free, held = -advantage * ratio, -advantage * torch.clamp(ratio, low, high)
    clipped = held > free
    loss = torch.maximum(free, held)
    slope = torch.where(clipped, torch.zeros_like(free), free)  # d(-A e^d)/dd = -A e^d
    dual = torch.zeros_like(clipped)
    if formula.dual_clip is not None:
        ceiling = on(-formula.dual_clip, ratio) * advantage
        dual = (advantage < 0) & (loss > ceiling)
        loss = torch.where(dual, ceiling, loss)
        slope = torch.where(dual, torch.zeros_like(slope), slope)
    return loss, slope, (clipped & (ratio < low), clipped & (ratio > high), dual)


def times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 where the weight is 0: by selection, so that 0 * inf is 0."""
    return torch.where(weight == 0, torch.zeros_like(x), weight * x)


def fwd(logprobs: Tensor, entropy: Tensor | None, old_logprobs: Tensor, advantages: Tensor,
        mask: Tensor | None, ref_logprobs: Tensor | None, weights: Tensor | None,
        clip_low: Tensor, clip_high: Tensor, dual_clip: Tensor | None, max_log_ratio: Tensor,
        entropy_coef: Tensor, kl_coef: Tensor, num_tokens: Tensor | None,
        num_sequences: Tensor | None, norm_length: Tensor | None, cu_seqlens: Tensor | None,
        ratio: str, kl_estimator: str, reduction: str, grad_logprobs: bool,
        grad_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], dlogprobs, dentropy, metrics [11], scale []); see `tppo_kernels.ppo_loss`.

    d loss/d logprobs = scale * dlogprobs, and so for entropy: a kernel of one pass writes them
    before it has counted the tokens that they are divided by. Here scale is 1. A derivative that
    is not wanted is an empty tensor.
    """
    given = (logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights)
    dtype = compute_dtype(*given)
    valid = valid_mask(logprobs, mask)

    def tokens(x: Tensor) -> Tensor:
        """A per-token or per-sequence argument at every token; N = B is per token."""
        return (x if x.shape == valid.shape else spread(x, valid, cu_seqlens)).to(dtype)

    share = reduction_weights(valid, Reduction(num_tokens, num_sequences, norm_length, reduction),
                              cu_seqlens, dtype)
    formula = Formula(clip_low, clip_high, dual_clip, max_log_ratio, entropy_coef, kl_coef, ratio,
                      kl_estimator)
    terms = token_terms(
        logprobs.to(dtype), old_logprobs.to(dtype), tokens(advantages), valid, share, formula,
        entropy=None if entropy is None else tokens(entropy),
        ref_logprobs=None if ref_logprobs is None else tokens(ref_logprobs),
        weights=None if weights is None else tokens(weights), cu_seqlens=cu_seqlens)
    loss = terms.loss.sum(dtype=torch.float64).to(dtype)
    for coef, term in ((entropy_coef, entropy), (kl_coef, ref_logprobs)):
        if term is None:  # a coefficient that is not 0 asks for a term that is not there
            loss = loss + on(torch.where(coef == 0, 0.0, float("nan")), loss)
    return (loss, terms.dlogprobs.contiguous() if grad_logprobs else loss.new_empty(0),
            terms.dentropy.contiguous() if grad_entropy else loss.new_empty(0), terms.metrics,
            loss.new_ones(()))


def bwd(grad_loss: Tensor, scale: Tensor, dlogprobs: Tensor, dentropy: Tensor,
        logprobs_dtype: torch.dtype, entropy_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients in the inputs' dtypes; a derivative of 0 stays 0 whatever comes in."""
    factor = grad_loss * scale
    return (times(dlogprobs, factor.expand_as(dlogprobs)).to(logprobs_dtype),
            times(dentropy, factor.expand_as(dentropy)).to(entropy_dtype))
