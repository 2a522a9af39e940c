"""`gae` on the CPU: one sequence a walk, sequences spread over torch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.memory import FP64, address, per_sequence
from ..._math.sequence import compute_dtype
from .reference import GaeCall


def supports(call: GaeCall) -> str | None:
    """The reason for refusing, or None."""
    return FP64 if compute_dtype(call.rewards, call.values) == torch.float64 else None


def dense(call: GaeCall) -> tuple[int, tuple[Tensor | None, ...]]:
    """B, and the arguments as the kernels read them: fp32, contiguous, one lam a sequence."""
    rewards, values, mask, _, lam, value_lam, bootstrap, cu_seqlens = call
    batch = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    lams = per_sequence(lam, batch, rewards)  # [B]
    return batch, (
        rewards.float().contiguous(), values.float().contiguous(),
        None if mask is None else mask.contiguous(), lams,
        lams if value_lam is None else per_sequence(value_lam, batch, rewards),
        per_sequence(bootstrap, batch, rewards),
        None if cu_seqlens is None else cu_seqlens.contiguous())


def fwd(call: GaeCall) -> tuple[Tensor, Tensor]:
    """(advantages, returns), fp32, of padded [B, T] or packed [N] inputs."""
    batch, arguments = dense(call)
    rewards = call.rewards
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    _C.gae_fwd(*map(address, arguments), float(call.gamma), batch, rewards.shape[-1],
               advantages.data_ptr(), returns.data_ptr(), torch.get_num_threads())
    return advantages, returns
