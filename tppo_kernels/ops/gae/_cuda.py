"""`gae` on an NVIDIA GPU through the compiled extension, on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ._cpp import address, rows, supports

__all__ = ["fwd", "supports"]


def fwd(rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: Tensor, lam: Tensor,
        value_lam: Tensor | None, bootstrap: Tensor | None,
        cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(advantages, returns), fp32, of padded [B, T] or packed [N] inputs."""
    batch = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    r, v = rewards.float().contiguous(), values.float().contiguous()
    valid = None if mask is None else mask.contiguous()
    lam_rows, cu = rows(lam, batch, r), None if cu_seqlens is None else cu_seqlens.contiguous()
    value_lam_rows = lam_rows if value_lam is None else rows(value_lam, batch, r)
    behind, gamma_row = rows(bootstrap, batch, r), rows(gamma, 1, r)
    advantages, returns = torch.empty_like(r), torch.empty_like(r)
    with torch.cuda.device(r.device):
        _C.gae_fwd_cuda(r.data_ptr(), v.data_ptr(), address(valid), lam_rows.data_ptr(),
                        value_lam_rows.data_ptr(), behind.data_ptr(), address(cu),
                        gamma_row.data_ptr(), batch, r.shape[-1], advantages.data_ptr(),
                        returns.data_ptr(), torch.cuda.current_stream().cuda_stream)
    return advantages, returns
