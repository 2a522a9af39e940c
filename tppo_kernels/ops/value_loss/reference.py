"""The specification of `value_loss` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.check import Reduction
from ..._math.sequence import compute_dtype, on, reduction_weights, select, valid_mask


class ValueLossCall(NamedTuple):
    """The arguments of a raw call; per-token tensors are [B, T], or packed [N] with offsets."""

    values: Tensor  # [B, T] or [N]
    returns: Tensor  # [B, T] or [N]
    mask: Tensor | None  # [B, T] or [N] bool
    old_values: Tensor | None  # [B, T] or [N]
    clip: Tensor | None  # []
    reduction: Reduction
    cu_seqlens: Tensor | None  # [B + 1] int32
    grad: bool  # whether dvalues is wanted


class ValueLossGradient(NamedTuple):
    """The arguments of a raw call of backward."""

    grad_loss: Tensor  # []
    scale: Tensor  # []
    dvalues: Tensor  # [B, T] or [N]
    dtype: torch.dtype  # of values


def fwd(call: ValueLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], dvalues, metrics [6], scale []); see `tppo_kernels.value_loss`.

    d loss/d values = scale * dvalues: a kernel of one pass writes it before it has counted the
    tokens that it is divided by. Here scale is 1. dvalues is empty where it is not wanted.
    """
    values, returns, mask, old_values, clip, reduction, cu_seqlens, grad = call
    dtype = compute_dtype(values, returns, old_values)
    valid = valid_mask(values, mask)
    value, target = select(values, valid, dtype), select(returns, valid, dtype)  # [B, T] or [N]
    error = value - target
    loss, slope, clipped = 0.5 * error.square(), error, torch.zeros_like(valid)
    if clip is not None and old_values is not None:
        loss, slope, clipped = _clipped(value, target, select(old_values, valid, dtype),
                                        on(clip, value))
    share = reduction_weights(valid, reduction, cu_seqlens, dtype)
    metrics = [valid.sum(dtype=torch.float64), clipped.sum(dtype=torch.float64),
               *_moments(target, valid), *_moments(-error, valid)]
    return ((share * loss).sum(dtype=torch.float64).to(dtype),
            select(share * slope, valid).contiguous() if grad else loss.new_empty(0),
            torch.stack(metrics).to(dtype), loss.new_ones(()))


def _clipped(value: Tensor, target: Tensor, old: Tensor, clip: Tensor
             ) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped loss, its derivative with respect to V, and where the clipped branch is taken.

    Within the clip V_clip is V itself, not V_old + (V - V_old), which rounds; beyond it V_clip is
    constant in V. A NaN of any input stays NaN in both results.
    """
    drift = value - old
    held_value = torch.where(drift.abs() <= clip, value, old + torch.clamp(drift, -clip, clip))
    free, held = 0.5 * (value - target).square(), 0.5 * (held_value - target).square()
    slope = torch.where(free >= held, value - target, 0.0 * held)
    return torch.maximum(free, held), slope, held > free


def _moments(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations from it, over the valid tokens, in two passes."""
    n = valid.sum(dtype=torch.float64).clamp(min=1)
    mean = x.sum(dtype=torch.float64) / n  # x is 0 where masked
    return mean, select((x - mean).square(), valid).sum(dtype=torch.float64)


def bwd(call: ValueLossGradient) -> Tensor:
    """The gradient of values in their dtype; a derivative of 0 stays 0 whatever comes in."""
    grad_loss, scale, dvalues, dtype = call
    return torch.where(dvalues == 0, torch.zeros_like(dvalues),
                       grad_loss * scale * dvalues).to(dtype)
