"""The specification of `token_head` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.sequence import compute_dtype


class TokenHeadCall(NamedTuple):
    """The arguments of a raw call."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [K, D]
    bias: Tensor | None  # [K]
    mask: Tensor | None  # [...] bool


class TokenHeadGradient(NamedTuple):
    """The arguments of a raw call of backward."""

    grad: Tensor  # [..., K]
    head: TokenHeadCall
    grad_hidden: bool  # whether it is wanted
    grad_weight: bool
    grad_bias: bool


def fwd(call: TokenHeadCall) -> Tensor:
    """hidden @ weight.T + bias at valid rows, 0 elsewhere; see `tppo_kernels.token_head`."""
    hidden, weight, bias, mask = call
    dtype = compute_dtype(hidden, weight, bias)
    x = _rows(hidden, mask).to(dtype)  # [N, D]
    with torch.autocast(hidden.device.type, enabled=False):
        out = x @ weight.to(dtype).T  # [N, K]
    if bias is not None:
        out = out + bias.to(dtype)
    return _place(out, mask, hidden.shape[:-1])


def bwd(call: TokenHeadGradient) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, each in the dtype of its tensor; one that is not wanted is empty.

    dhidden = g @ weight, dweight = g.T @ hidden, dbias = sum(g), over valid rows.
    """
    grad, (hidden, weight, bias, mask), grad_hidden, grad_weight, grad_bias = call
    dtype = compute_dtype(hidden, weight, bias)
    g = _rows(grad, mask).to(dtype)  # [N, K]
    dhidden, dweight = hidden.new_empty(0), weight.new_empty(0)
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        if grad_hidden:
            dhidden = _place((g @ weight.to(dtype)).to(hidden.dtype), mask, hidden.shape[:-1])
        if grad_weight:
            dweight = (g.T @ _rows(hidden, mask).to(dtype)).to(weight.dtype)
    if grad_bias and bias is not None:
        dbias = g.sum(0).to(bias.dtype)
    return dhidden, dweight, dbias


def _compacts(x: Tensor) -> bool:
    """Whether masked rows are left out: counting the valid ones is a host read, free on CPU."""
    return x.device.type == "cpu"


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The valid rows, or all rows with 0 in the masked ones.

    Either way a masked row is gone before arithmetic: its 0 * NaN would reach dweight.
    """
    if mask is not None and _compacts(x):
        return x[mask]
    if mask is not None:
        x = torch.where(mask[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _place(rows: Tensor, mask: Tensor | None, leading: torch.Size) -> Tensor:
    """The inverse of `_rows`: a tensor [..., K], 0 where masked."""
    if mask is not None and _compacts(rows):
        out = rows.new_zeros(*leading, rows.shape[-1])
        out[mask] = rows
        return out
    out = rows.reshape(*leading, rows.shape[-1])
    return out if mask is None else torch.where(mask[..., None], out, torch.zeros_like(out))
