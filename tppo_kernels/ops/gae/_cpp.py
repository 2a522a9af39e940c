"""`gae` on the CPU: one sequence a walk, sequences spread over torch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._sequence import compute_dtype


def supports(rewards: Tensor, values: Tensor, *_: object) -> str | None:
    """The reason for refusing, or None."""
    if compute_dtype(rewards, values) == torch.float64:
        return "fp64 is computed by the reference only"
    return None


def rows(x: Tensor | None, batch: int, like: Tensor) -> Tensor:
    """A 0-d or [B] argument, or zeros, as a dense fp32 [B]."""
    if x is None:
        return torch.zeros(batch, device=like.device)
    return (torch.zeros(batch, device=like.device) + x.detach().to(torch.float32)).contiguous()


def address(x: Tensor | None) -> int:
    """Where a tensor's data lies; 0 for none."""
    return 0 if x is None else x.data_ptr()


def fwd(rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: Tensor, lam: Tensor,
        value_lam: Tensor | None, bootstrap: Tensor | None,
        cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(advantages, returns), fp32, of padded [B, T] or packed [N] inputs."""
    batch = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    r, v = rewards.float().contiguous(), values.float().contiguous()
    valid = None if mask is None else mask.contiguous()
    lam_rows, cu = rows(lam, batch, r), None if cu_seqlens is None else cu_seqlens.contiguous()
    value_lam_rows = lam_rows if value_lam is None else rows(value_lam, batch, r)
    behind = rows(bootstrap, batch, r)
    advantages, returns = torch.empty_like(r), torch.empty_like(r)
    _C.gae_fwd(r.data_ptr(), v.data_ptr(), address(valid), lam_rows.data_ptr(),
               value_lam_rows.data_ptr(), behind.data_ptr(), address(cu), float(gamma),
               batch, r.shape[-1], advantages.data_ptr(), returns.data_ptr(),
               torch.get_num_threads())
    return advantages, returns
