"""The specification of `ppo_loss` in plain PyTorch: the per-token formula, once, and its sum."""

from __future__ import annotations

from typing import Any, NamedTuple

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

METRICS = 11  # ten sums, and a maximum at the end: the order of `PolicyMetrics`

# [l, dl/dd through the ratio, dl/dlogprob beside it], None for 0; where a token counts as clipped
# low, high and by the dual clip
Objective = tuple[list[Tensor | None], tuple[Tensor, Tensor, Tensor]]


class Formula(NamedTuple):
    """The constants of the per-token formula."""

    clip_low: Tensor  # []
    clip_high: Tensor  # []
    dual_clip: Tensor | None  # []
    max_log_ratio: Tensor  # []
    entropy_coef: Tensor  # []
    kl_coef: Tensor  # []
    kl_clamp: Tensor | None  # []
    tau_pos: Tensor | None  # []; only "sapo" has them
    tau_neg: Tensor | None  # []
    ratio: str  # "token", "sequence"
    kl_estimator: str  # of KL_ESTIMATORS
    kl_ratio_weighted: bool
    objective: str  # of OBJECTIVES


class PolicyTerms(NamedTuple):
    """What the loss takes beside the log-probs, their entropy and the mask."""

    old_logprobs: Tensor  # [B, T] or [N]
    advantages: Tensor  # [B, T], [N] or [B]
    ref_logprobs: Tensor | None  # [B, T] or [N]
    weights: Tensor | None  # [B, T], [N] or [B]
    formula: Formula
    over: Reduction
    cu_seqlens: Tensor | None  # [B + 1] int32


class PolicyLossCall(NamedTuple):
    """The arguments of the raw forward op."""

    logprobs: Tensor  # [B, T] or [N]
    entropy: Tensor | None  # [B, T] or [N]
    mask: Tensor | None  # [B, T] or [N] bool
    terms: PolicyTerms
    grad_logprobs: bool  # whether that derivative is wanted
    grad_entropy: bool


class PolicyLossGradient(NamedTuple):
    """The arguments of the raw backward op."""

    grad_loss: Tensor  # []
    scale: Tensor  # []
    dlogprobs: Tensor  # [B, T] or [N], or [0]
    dentropy: Tensor  # [B, T] or [N], or [0]
    logprobs_dtype: torch.dtype
    entropy_dtype: torch.dtype


def columns_of(call: PolicyLossCall) -> tuple[Tensor | None, ...]:
    """The per-token and per-sequence arguments in the order of the kernels."""
    old_logprobs, advantages, ref_logprobs, weights, *_ = call.terms
    return call.logprobs, old_logprobs, advantages, call.entropy, ref_logprobs, weights


class Tokens(NamedTuple):
    """The per-token arguments of the loss at every token, [B, T] or [N], or at some, [R]."""

    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor  # bool
    share: Tensor  # the weight of a token in the reduction
    ref_logprobs: Tensor | None
    weights: Tensor | None


class TokenTerms(NamedTuple):
    """What each token adds to the loss, the loss's derivatives, and the sums of the metrics."""

    loss: Tensor  # [B, T] or [N]; the loss is its sum
    dlogprobs: Tensor  # [B, T] or [N]
    dentropy: Tensor  # [B, T] or [N]
    metrics: Tensor  # [11], in the order of `PolicyMetrics`


def tokens_of(terms: PolicyTerms, mask: Tensor | None, dtype: torch.dtype) -> Tokens:
    """Every per-token and per-sequence argument at every token, in the dtype of the computation;
    N = B is per token."""
    valid = valid_mask(terms.old_logprobs, mask)

    def at_tokens(x: Tensor | None) -> Any:
        if x is None:
            return None
        return (x if x.shape == valid.shape else spread(x, valid, terms.cu_seqlens)).to(dtype)

    old, advantages, ref, weights = map(at_tokens, terms[:4])
    share = reduction_weights(valid, terms.over, terms.cu_seqlens, dtype)
    return Tokens(old, advantages, valid, share, ref, weights)


def token_terms(
        logprobs: Tensor,  # [B, T] or [N]
        entropy: Tensor | None,  # [B, T] or [N]
        tokens: Tokens,
        formula: Formula,
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
) -> TokenTerms:
    """The formula of `tppo_kernels.ppo_loss` per token, with its derivatives written out.

    All in one dtype. The shares come from the global denominators, so that chunks of tokens may be
    given one by one and added up (`ratio="token"`; a sequence ratio needs all tokens of a sequence
    at once).
    """
    old_logprobs, advantages, mask, share, ref_logprobs, weights = tokens
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
    zero = torch.zeros_like(raw)
    policy, clips = OBJECTIVES[formula.objective](ratio, select(logprobs, mask),
                                                  select(advantages, mask), formula)
    if weights is not None:
        weight = select(weights, mask)
        policy = [None if x is None else times(weight, x) for x in policy]
    loss, by_ratio, by_logprob = (zero if x is None else share * select(x, mask) for x in policy)

    kl_value = entropy_value = zero
    if ref_logprobs is not None:
        kl_value, kl_slope = kl(logprobs, ref_logprobs, mask, formula.kl_estimator,
                                formula.kl_clamp)
        kl_share = share * on(formula.kl_coef, share)
        if formula.kl_ratio_weighted:
            kl_value, kl_slope = (select(ratio * x, mask) for x in (kl_value, kl_slope))
            by_ratio = by_ratio + times(kl_share, kl_value)  # d(r k)/dd = r k
        loss = loss + times(kl_share, kl_value)
        by_logprob = by_logprob + times(kl_share, kl_slope)
    if formula.ratio == "sequence":
        by_ratio = spread(sequence_sum(by_ratio, cu_seqlens) / lengths, raw, cu_seqlens)
    dlogprobs = select(by_ratio, mask & ~clamped) + by_logprob
    dentropy = select(share * on(-formula.entropy_coef, share), mask)
    if entropy is not None:
        entropy_value = select(entropy, mask)
        loss = loss + times(dentropy, entropy_value)
    sums = [mask, *(mask & x for x in clips), clamped, -token_d, torch.expm1(token_d) - token_d,
            select(ratio, mask)]
    metrics = [x.sum(dtype=torch.float64) for x in (*sums, entropy_value, kl_value)]
    highest = torch.cat([ratio.new_zeros(1), select(ratio, mask).flatten()]).max()
    return TokenTerms(loss, dlogprobs, dentropy,
                      torch.stack([*(m.to(raw.dtype) for m in metrics), highest]))


def _clip(ratio: Tensor, logprob: Tensor, advantage: Tensor, formula: Formula) -> Objective:
    """l = max(-A r, -A clip(r)), and min(l, -c A) where A < 0."""
    low, high = _edges(ratio, formula)
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
    return [loss, slope, None], (clipped & (ratio < low), clipped & (ratio > high), dual)


def _cispo(ratio: Tensor, logprob: Tensor, advantage: Tensor, formula: Formula) -> Objective:
    """l = -A clip(r) logprob, where clip(r) is a constant of the differentiation."""
    low, high = _edges(ratio, formula)
    slope = -advantage * torch.clamp(ratio, low, high)
    clips = ratio < low, ratio > high, torch.zeros_like(ratio, dtype=torch.bool)
    return [slope * logprob, None, slope], clips


def _sapo(ratio: Tensor, logprob: Tensor, advantage: Tensor, formula: Formula) -> Objective:
    """l = -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0, else tau_neg."""
    assert formula.tau_pos is not None and formula.tau_neg is not None
    tau = torch.where(advantage > 0, on(formula.tau_pos, ratio), on(formula.tau_neg, ratio))
    x = tau * (ratio - 1)
    gate, rest = torch.sigmoid(x), torch.sigmoid(-x)
    slope = -advantage * 4 * times(gate * rest, ratio)  # d sigmoid = sigmoid (1 - sigmoid)
    low, high = _edges(ratio, formula)
    clips = ((advantage < 0) & (ratio < low), (advantage > 0) & (ratio > high),
             torch.zeros_like(ratio, dtype=torch.bool))
    return [-advantage * (4 / tau) * gate, slope, None], clips


def _edges(ratio: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    return on(1 - formula.clip_low, ratio), on(1 + formula.clip_high, ratio)


# "clip" of PPO; "cispo": MiniMax-M1, arXiv 2506.13585; "sapo": arXiv 2511.20347
OBJECTIVES = {"clip": _clip, "cispo": _cispo, "sapo": _sapo}


def times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 where the weight is 0: by selection, so that 0 * inf is 0."""
    return torch.where(weight == 0, torch.zeros_like(x), weight * x)


def fwd(call: PolicyLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], dlogprobs, dentropy, metrics [11], scale []); see `tppo_kernels.ppo_loss`.

    d loss/d logprobs = scale * dlogprobs, and so for entropy: a kernel of one pass writes them
    before it has counted the tokens that they are divided by. Here scale is 1. A derivative that
    is not wanted is an empty tensor.
    """
    terms, entropy = call.terms, call.entropy
    dtype = compute_dtype(call.logprobs, entropy, *terms[:4])
    found = token_terms(call.logprobs.to(dtype), None if entropy is None else entropy.to(dtype),
                        tokens_of(terms, call.mask, dtype), terms.formula, terms.cu_seqlens)
    loss = found.loss.sum(dtype=torch.float64).to(dtype)
    for coef, term in ((terms.formula.entropy_coef, entropy),
                       (terms.formula.kl_coef, terms.ref_logprobs)):
        if term is None:  # a coefficient that is not 0 asks for a term that is not there
            loss = loss + on(torch.where(coef == 0, 0.0, float("nan")), loss)
    return (loss, found.dlogprobs.contiguous() if call.grad_logprobs else loss.new_empty(0),
            found.dentropy.contiguous() if call.grad_entropy else loss.new_empty(0), found.metrics,
            loss.new_ones(()))


def bwd(call: PolicyLossGradient) -> tuple[Tensor, Tensor]:
    """The gradients in the inputs' dtypes; a derivative of 0 stays 0 whatever comes in."""
    factor = call.grad_loss * call.scale
    return (times(call.dlogprobs, factor.expand_as(call.dlogprobs)).to(call.logprobs_dtype),
            times(call.dentropy, factor.expand_as(call.dentropy)).to(call.entropy_dtype))
