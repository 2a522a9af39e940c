"""The specification of `prefix_attention`: attention with an explicit mask, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._math.layout import PrefixAttentionCall, PrefixAttentionGradient
from ..._math.sequence import compute_dtype, on


def visible(segment_lengths: Tensor, is_prompt: Tensor, length: int) -> Tensor:
    """Which keys j a query i sees: those of its own group up to itself, and of the responses of
    that group only its own.

    segment_lengths, is_prompt: [S], the prompts and responses in the order of the tokens.
    """  # [L, L]
    segments = torch.arange(segment_lengths.shape[0], device=segment_lengths.device)
    segment = torch.repeat_interleave(segments, segment_lengths, output_size=length)  # [L]
    group = is_prompt.long().cumsum(0)[segment]
    token = torch.arange(length, device=segment.device)
    causal = token[:, None] >= token
    shared = is_prompt[segment] | (segment[:, None] == segment)
    return causal & shared & (group[:, None] == group)


def _grouped(call: PrefixAttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q [Hkv, G, L, D], k and v with a size of 1 for G, the scores [Hkv, G, L, L], `visible`).

    Of q, k and v those tokens are 0 that are not finite, since 0 NaN is NaN for a query that does
    not see it; the scores of a query that is one, or sees one, are NaN.
    """
    q, k, v, plan, scale = call
    dtype = compute_dtype(q, k, v)
    q = q.to(dtype).unflatten(0, (k.shape[0], q.shape[0] // k.shape[0]))
    k, v = k.to(dtype)[:, None], v.to(dtype)[:, None]
    seen = visible(plan.cu_segments.diff(), plan.is_prompt, q.shape[2])
    fine_q, fine_k, fine_v = (x.isfinite().all(-1, keepdim=True) for x in (q, k, v))
    q, k, v = (torch.where(fine, x, 0) for fine, x in ((fine_q, q), (fine_k, k), (fine_v, v)))
    spoilt = ~fine_q | (seen & ~(fine_k & fine_v).mT).any(-1, keepdim=True)
    scores = ((q @ k.mT) * on(scale, q)).masked_fill(spoilt, math.nan)
    return q, k, v, scores.masked_fill(~seen, -math.inf), seen


def token_major(x: Tensor) -> Tensor:
    """The same values, laid out token by token: what the projections before and behind want."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)  # [H, L, D]


def fwd(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """(attention [Hq, L, Dv] in the dtype of q, logsumexp of the scores [Hq, L])."""
    with torch.autocast(call.q.device.type, enabled=False):
        _, _, v, scores, _ = _grouped(call)
        out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
        return token_major(out.flatten(0, 1).to(call.q.dtype)), lse.flatten(0, 1)


def bwd(call: PrefixAttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): with p the probabilities and dp = dO v^T, dS = p (dp - sum(p dp)).

    The sum is dO O, and p is exp(S - lse): what other backends compute it by.
    """
    given = call.attention
    with torch.autocast(given.q.device.type, enabled=False):
        dtypes = given.q.dtype, given.k.dtype, given.v.dtype
        q, k, v, scores, seen = _grouped(given)
        grad = call.grad.to(q.dtype).unflatten(0, q.shape[:2])  # [Hkv, G, L, Dv]
        p, d_p = torch.where(seen, scores.softmax(-1), 0), grad @ v.mT
        d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * on(given.scale, q)
        d_scores = torch.where(seen, d_scores, 0)
        grads = ((d_scores @ k).flatten(0, 1), (d_scores.mT @ q).sum(1), (p.mT @ grad).sum(1))
        dq, dk, dv = (token_major(g).to(dtype) for g, dtype in zip(grads, dtypes, strict=True))
        return dq, dk, dv
