"""The specification of `gae` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.packed import sequence_index
from ..._math.sequence import compute_dtype, select, spread


class GaeCall(NamedTuple):
    """The arguments of a raw call; per-token tensors are [B, T], or packed [N] with offsets."""

    rewards: Tensor  # [B, T] or [N]
    values: Tensor  # [B, T] or [N]
    mask: Tensor | None  # [B, T] or [N] bool
    gamma: Tensor  # []
    lam: Tensor  # [] or [B]
    value_lam: Tensor | None  # [] or [B]; None: lam
    bootstrap: Tensor | None  # [B]
    cu_seqlens: Tensor | None  # [B + 1] int32


def fwd(call: GaeCall) -> tuple[Tensor, Tensor]:
    """(advantages, returns); see `tppo_kernels.gae`.

    One walk from the last token to the first. A packed batch is one row in which the carry starts
    anew behind the last token of each sequence; a masked token leaves the carry alone.
    """
    mask, cu_seqlens = call.mask, call.cu_seqlens
    dtype = compute_dtype(call.rewards, call.values)
    reward = select(call.rewards, mask, dtype)  # [B, T] or [N]
    value = select(call.values, mask, dtype)

    def at_tokens(x: Tensor) -> Tensor:
        return spread(x.to(dtype), reward, cu_seqlens)

    lam = at_tokens(call.lam)
    value_lam = lam if call.value_lam is None else at_tokens(call.value_lam)
    behind = at_tokens(reward.new_zeros(()) if call.bootstrap is None else call.bootstrap)
    shape = reward.shape if cu_seqlens is None else (1, reward.shape[0])
    valid = None if mask is None else mask.reshape(shape)
    restart = _restarts(reward.reshape(shape), cu_seqlens)
    advantage, target = _walk(reward.reshape(shape), value.reshape(shape), lam.reshape(shape),
                              value_lam.reshape(shape), behind.reshape(shape), valid, restart,
                              call.gamma.to(dtype))
    return (select(advantage.reshape(reward.shape), mask),
            select(target.reshape(reward.shape) + value, mask))


def _restarts(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """True at the last token of each sequence."""  # [B, T], or [1, N] of a packed batch
    last = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    if cu_seqlens is not None and like.shape[1]:
        owner = sequence_index(like.shape[1], cu_seqlens)
        last[0, :-1] = owner[1:] != owner[:-1]
    last[:, -1:] = True
    return last


def _walk(reward: Tensor, value: Tensor, lam: Tensor, value_lam: Tensor, behind: Tensor,
          valid: Tensor | None, restart: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """(advantages at lam, advantages at value_lam)."""  # [B, T] each
    advantage, target = torch.zeros_like(reward), torch.zeros_like(reward)
    zero = reward.new_zeros(reward.shape[0])  # [B]
    next_value, next_advantage, next_target = zero, zero, zero
    for t in reversed(range(reward.shape[1])):
        next_value = torch.where(restart[:, t], behind[:, t], next_value)
        next_advantage = torch.where(restart[:, t], zero, next_advantage)
        next_target = torch.where(restart[:, t], zero, next_target)
        delta = reward[:, t] + gamma * next_value - value[:, t]
        a = delta + gamma * lam[:, t] * next_advantage
        b = delta + gamma * value_lam[:, t] * next_target
        step = torch.ones_like(restart[:, t]) if valid is None else valid[:, t]
        next_value = torch.where(step, value[:, t], next_value)
        next_advantage = torch.where(step, a, next_advantage)
        next_target = torch.where(step, b, next_target)
        advantage[:, t], target[:, t] = a, b
    return advantage, target
