"""`gae` on the CPU: one sequence a walk, sequences spread over torch's threads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.memory import address, per_sequence, supports
from .reference import GaeCall

__all__ = ["GaeRows", "fwd", "supports"]


class GaeRows(NamedTuple):
    """The struct of csrc/kernels.h: addresses of dense fp32, 0 for none."""

    rewards: int  # [B, T] or [N]
    values: int  # [B, T] or [N]
    mask: int  # [B, T] or [N] bool
    lam: int  # [B]
    value_lam: int  # [B]
    bootstrap: int  # [B]
    offsets: int  # [B + 1] int32
    gamma: float
    B: int
    T: int


def fwd(call: GaeCall) -> tuple[Tensor, Tensor]:
    """(advantages, returns), fp32, of padded [B, T] or packed [N] inputs."""
    rewards, values, mask, gamma, lam, value_lam, bootstrap, cu_seqlens = call
    batch = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    lams = per_sequence(lam, batch, rewards)  # [B]
    alive = (rewards.float().contiguous(), values.float().contiguous(),
             None if mask is None else mask.contiguous(), lams,
             lams if value_lam is None else per_sequence(value_lam, batch, rewards),
             per_sequence(bootstrap, batch, rewards),
             None if cu_seqlens is None else cu_seqlens.contiguous())
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    rows = GaeRows._make((*map(address, alive), float(gamma), batch, rewards.shape[-1]))
    _C.gae_fwd(rows, advantages.data_ptr(), returns.data_ptr(), torch.get_num_threads())
    return advantages, returns
