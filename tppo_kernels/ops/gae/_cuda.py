"""`gae` on an NVIDIA GPU through the compiled extension, on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._native import address, per_sequence
from ._cpp import dense, supports

__all__ = ["fwd", "supports"]


def fwd(rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: Tensor, lam: Tensor,
        value_lam: Tensor | None, bootstrap: Tensor | None,
        cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(advantages, returns), fp32, of padded [B, T] or packed [N] inputs."""
    batch, arguments = dense(rewards, values, mask, lam, value_lam, bootstrap, cu_seqlens)
    discount = per_sequence(gamma, 1, rewards)  # on the device: gamma may be a tensor there
    advantages = torch.empty(rewards.shape, device=rewards.device)
    returns = torch.empty_like(advantages)
    with torch.cuda.device(rewards.device):
        _C.gae_fwd_cuda(*map(address, arguments), discount.data_ptr(), batch, rewards.shape[-1],
                        advantages.data_ptr(), returns.data_ptr(),
                        torch.cuda.current_stream().cuda_stream)
    return advantages, returns
