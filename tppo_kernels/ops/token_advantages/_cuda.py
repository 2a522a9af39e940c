"""`token_advantages` on an NVIDIA GPU: two launches, see csrc/token_advantages.cu.

The first reads and writes 29 B a token, the second whitens in place, 8 B a token and the masks, and
writes the statistics. Where a process group merges moments, whitening is a third, behind it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.launch import current_stream, launching_on
from ..._kernels.memory import address
from ..._math.sequence import KL_ESTIMATORS
from ..gae._cuda import (
    Arguments,
    GaeInputs,
    Mask,
    PerSequence,
    Tokens,
    column,
    dense,
    mask_rows,
    rows,
)
from ..gae.reference import GaeCall
from ._composed import supports
from .reference import AdvantagesCall, WhitenAdvantages

__all__ = ["fwd", "supports", "whiten"]

BLOCKS = 1024  # of the first launch at most, each with its statistics; the same on every GPU


class AdvantageInputs(NamedTuple):
    """This and the following are structs of csrc/kernels.h; what is no struct is an address."""

    walk: GaeInputs
    logprobs: Tokens
    ref_logprobs: Tokens
    train_mask: Mask
    kl_coef: PerSequence
    estimator: int  # of KL_ESTIMATORS


class AdvantageOutputs(NamedTuple):
    """Results of the first launch, the advantages raw."""

    advantages: int  # [B, T] or [N]
    returns: int  # [B, T] or [N]
    rewards: int  # [B, T] or [N]


class AdvantageStatistics(NamedTuple):
    """Results of the second launch; all 0 where none are wanted."""

    scalars: int  # [7]
    n: int  # []
    moments: int  # [4] fp64


class WhitenInputs(NamedTuple):
    """What the second launch whitens."""

    x: int  # [N]
    mask: int  # [N]
    train_mask: int  # [N]
    N: int
    unbiased: bool


def _blocks(batch: int, wide: bool, parts: int) -> int:
    """Of the first launch: they loop over the parts of sequences."""
    return min(BLOCKS, batch * parts if wide else -(-batch // 8))


def fwd(call: AdvantagesCall) -> tuple[Tensor, ...]:
    """See `reference.fwd`."""
    token_rewards, unbiased = call.token_rewards, call.unbiased
    device, n = token_rewards.device, token_rewards.numel()
    advantages, returns, rewards = (
        torch.empty(token_rewards.shape, dtype=torch.float32, device=device) for _ in range(3))
    if n == 0:
        return (advantages, returns, rewards, advantages.new_zeros(7),
                torch.zeros((), dtype=torch.int64, device=device),
                advantages.new_zeros(4, dtype=torch.float64))
    stats = torch.empty(7, dtype=torch.float32, device=device)
    count = torch.empty((), dtype=torch.int64, device=device)
    moments = torch.empty(4, dtype=torch.float64, device=device)
    mask, train_mask = (None if x is None else x.contiguous() for x in (call.mask, call.train_mask))
    with launching_on(token_rewards):
        given = Arguments(GaeCall(token_rewards, call.values, mask, call.gamma, call.lam,
                                  call.value_lam, call.bootstrap, call.cu_seqlens))
        logprobs, ref_logprobs = dense(call.logprobs), dense(call.ref_logprobs)
        coef, kl_coef = column(call.kl_coef)
        inputs = AdvantageInputs(given.inputs, rows(logprobs), rows(ref_logprobs),
                                 mask_rows(train_mask), kl_coef,
                                 KL_ESTIMATORS.index(call.kl_estimator))
        tokens = WhitenInputs(advantages.data_ptr(), address(mask), address(train_mask),
                              n if call.whitened else 0, unbiased)
        blocks = _blocks(given.batch, given.wide, given.parts)
        partials = torch.empty(5 * 4 * blocks, dtype=torch.float64, device=device)
        stream = current_stream(token_rewards)
        _C.token_advantages_fwd_cuda(
            inputs, given.wide, given.parts, blocks, given.maps, partials.data_ptr(),
            AdvantageOutputs(advantages.data_ptr(), returns.data_ptr(), rewards.data_ptr()),
            stream)
        _C.token_advantages_whiten_cuda(
            tokens, partials.data_ptr(), blocks,
            AdvantageStatistics(stats.data_ptr(), count.data_ptr(), moments.data_ptr()),
            advantages.data_ptr(), stream)
    return advantages, returns, rewards, stats, count, moments


def whiten(call: WhitenAdvantages) -> Tensor:
    """See `reference.whiten`."""
    advantages, trained, moments, unbiased = call
    out = torch.empty(advantages.shape, dtype=torch.float32, device=advantages.device)
    if advantages.numel():
        advantages, moments = advantages.contiguous(), moments.contiguous()
        trained = None if trained is None else trained.contiguous()
        with launching_on(advantages):
            _C.token_advantages_whiten_cuda(
                WhitenInputs(advantages.data_ptr(), address(trained), 0, advantages.numel(),
                             unbiased),
                moments.data_ptr(), 1, AdvantageStatistics(0, 0, 0), out.data_ptr(),
                current_stream(advantages))
    return out
