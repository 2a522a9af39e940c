"""`gae` in Triton: one launch, 17 B a token, each moved once between memory and cache.

A scan over affine maps, as README.md derives it. A program takes several short sequences, or one
long sequence block by block from its end; lane i holds the token i places before the last, so that
the scan runs forward. The result of a token needs the X behind it, so the scan runs over the tokens
one place further on, and each token is loaded a second time for its own result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._kernels.launch import launching_on, scalar
from ..._kernels.memory import supports
from .reference import GaeCall

__all__ = ["fwd", "supports"]

SHORT = 256  # tokens up to which a program takes several sequences
SHAPES = {True: (8, 128, 4), False: (1, 1024, 4)}  # short or not: sequences, tokens, warps


@triton.jit
def _join(decay, add, before_decay, before_add):
    """Two maps X -> add + decay X, the second applied to what the first gives."""
    return decay * before_decay, before_add + before_decay * add


@triton.jit
def _of_sequences(ptr, value, stride, b, inside):
    """A number, a 0-d tensor (stride 0) or a [B] tensor, for each sequence b."""
    if ptr is not None:
        return tl.load(ptr + b * stride, mask=inside, other=0.0).to(tl.float32)
    return tl.full(b.shape, 0.0, tl.float32) + value


@triton.jit
def _load(rewards_ptr, values_ptr, mask_ptr, first_reward, first_value, first_mask, t, there):
    """Tokens t of each sequence in fp32, 0 where masked, and which are valid."""  # [S, BLOCK]
    valid = there
    if mask_ptr is not None:
        valid = tl.load(mask_ptr + first_mask[:, None] + t, mask=there, other=0) != 0
    reward = tl.load(rewards_ptr + first_reward[:, None] + t, mask=there, other=0.0)
    value = tl.load(values_ptr + first_value[:, None] + t, mask=there, other=0.0)
    return (tl.where(valid, reward.to(tl.float32), 0.0),
            tl.where(valid, value.to(tl.float32), 0.0), valid)


@triton.jit
def _scan(reward, value, valid, gamma, lam, x):
    """X before each of these tokens, from the X behind the first of them."""  # [S, BLOCK]
    decay = tl.where(valid, gamma * lam, 1.0)
    add = tl.where(valid, value + lam * (reward - value), 0.0)
    decays, adds = tl.associative_scan((decay, add), 1, _join)
    return adds + decays * x[:, None]


@triton.jit(do_not_specialize=[
    "gamma", "lam", "value_lam", "B", "T", "stride_rewards", "stride_values", "stride_mask",
    "stride_lam", "stride_value_lam", "stride_bootstrap"])
def _gae_fwd_kernel(rewards_ptr, values_ptr, mask_ptr, offsets_ptr, gamma_ptr, gamma, lam_ptr, lam,
                    value_lam_ptr, value_lam, bootstrap_ptr, advantages_ptr, returns_ptr, B, T,
                    stride_rewards, stride_values, stride_mask, stride_lam, stride_value_lam,
                    stride_bootstrap, DECOUPLED: tl.constexpr, S: tl.constexpr,
                    BLOCK: tl.constexpr):
    """S sequences a program. Inputs [B, T] with rows apart, or packed [N] with offsets [B + 1]."""
    b = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)  # [S]
    inside = b < B
    if offsets_ptr is not None:
        begin = tl.load(offsets_ptr + b, mask=inside, other=0).to(tl.int64)
        end = tl.load(offsets_ptr + b + 1, mask=inside, other=0)
        count = end - begin.to(tl.int32)  # [S] int32: a place within a sequence
        first_reward, first_value, first_mask = begin, begin, begin
    else:
        begin = b * T
        count = tl.where(inside, T, 0).to(tl.int32)
        first_reward, first_value = b * stride_rewards, b * stride_values
        first_mask = b * stride_mask
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr)
    lam = _of_sequences(lam_ptr, lam, stride_lam, b, inside)[:, None]
    x = _of_sequences(bootstrap_ptr, 0.0, stride_bootstrap, b, inside)
    if DECOUPLED:
        value_lam = _of_sequences(value_lam_ptr, value_lam, stride_value_lam, b, inside)[:, None]
    y = x
    lane = tl.arange(0, BLOCK)[None, :]
    for start in range(0, tl.max(count, 0), BLOCK):
        t = count[:, None] - 1 - start - lane  # [S, BLOCK]
        reward, value, valid = _load(rewards_ptr, values_ptr, mask_ptr, first_reward, first_value,
                                     first_mask, t + 1, (t >= -1) & (t + 1 < count[:, None]))
        behind = _scan(reward, value, valid, gamma, lam, x)
        x = tl.sum(tl.where(lane == BLOCK - 1, behind, 0.0), 1)
        if DECOUPLED:
            behind_value = _scan(reward, value, valid, gamma, value_lam, y)
            y = tl.sum(tl.where(lane == BLOCK - 1, behind_value, 0.0), 1)
        else:
            behind_value = behind
        reward, value, valid = _load(rewards_ptr, values_ptr, mask_ptr, first_reward, first_value,
                                     first_mask, t, t >= 0)
        out_off = begin[:, None] + t
        advantage = tl.where(valid, reward + gamma * behind - value, 0.0)
        tl.store(advantages_ptr + out_off, advantage, mask=t >= 0)
        tl.store(returns_ptr + out_off, tl.where(valid, reward + gamma * behind_value, 0.0),
                 mask=t >= 0)


def _dense(x: Tensor | None) -> tuple[Tensor | None, int]:
    """Per-token data with adjacent tokens, and the elements from row to row."""
    if x is None:
        return None, 0
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0)


def _column(x: Tensor | None) -> tuple[Tensor | None, float, int]:
    """A 0-d or [B] argument: a tensor or None, the number where None, the stride."""
    if x is None:
        return None, 0.0, 0
    if x.dim() == 0:
        value, tensor = scalar(x)
        return tensor, value, 0
    x = x.float() if x.dtype == torch.float64 else x
    return x, 0.0, x.stride(0)


def fwd(call: GaeCall) -> tuple[Tensor, Tensor]:
    """(advantages, returns), fp32, of padded [B, T] or packed [N] inputs."""
    rewards, values, mask, gamma, lam, value_lam, bootstrap, cu_seqlens = call
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if rewards.numel() == 0:
        return advantages, returns
    batch = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sequences, block, warps = SHAPES[rewards.numel() // batch <= SHORT]
    (rewards, reward_row), (values, value_row), (valid, mask_row) = map(  # type: ignore[assignment]
        _dense, (rewards, values, mask))
    discount, discount_ptr = scalar(gamma)
    lam_ptr, lam_value, lam_row = _column(lam)
    other_ptr, other_value, other_row = _column(value_lam)
    behind_ptr, _, behind_row = _column(bootstrap)
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    with launching_on(advantages):
        _gae_fwd_kernel[(triton.cdiv(batch, sequences),)](
            rewards, values, valid, offsets, discount_ptr, discount, lam_ptr, lam_value, other_ptr,
            other_value, behind_ptr, advantages, returns, batch, advantages.shape[-1], reward_row,
            value_row, mask_row, lam_row, other_row, behind_row, DECOUPLED=value_lam is not None,
            S=sequences, BLOCK=block, num_warps=warps)
    return advantages, returns
