"""`token_head` on an NVIDIA GPU through the compiled extension: one launch, backward two.

Memory moved: hidden once a pass, its gradient once, and of weight's gradient the parts that the
second launch adds up, fp32 [parts, K D + 2 K], mostly in the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._core.record import flat
from ..._kernels.launch import current_stream, launching_on, row_layout
from ..._kernels.memory import DTYPES, FP64, address
from . import reference
from .reference import TokenHeadCall, TokenHeadGradient

OUTPUTS = (1, 3)  # what csrc/token_head.cu is compiled for
PROGRAMS = 1024  # blocks of the first launch of backward; the same on every GPU, as results are
COLUMNS = 128 * 16  # bytes of a row that a block of it takes


def supports(call: TokenHeadCall | TokenHeadGradient) -> str | None:
    """The reason for refusing, or None."""
    hidden, weight, *_ = call.head if isinstance(call, TokenHeadGradient) else call
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in flat(call)):
        return FP64
    if weight.dtype not in (hidden.dtype, torch.float32):
        return f"weight is {weight.dtype}, expected {hidden.dtype} as hidden, or fp32"
    if weight.shape[0] not in OUTPUTS:
        return f"weight has {weight.shape[0]} outputs, compiled are {OUTPUTS}"
    if not (_aligned(hidden) and _aligned(weight)):
        return "the rows of hidden and weight do not all begin at multiples of 16 bytes"
    return None


def _aligned(x: Tensor) -> bool:
    """Whether rows [..., D] begin at multiples of 16 bytes; where numbers lie apart, in a copy."""
    steps = [x.shape[-1]]
    if x.stride(-1) == 1:
        steps += [n for n, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return not (any(n * x.element_size() % 16 for n in steps)
                or x.stride(-1) == 1 and x.data_ptr() % 16)


class HeadInputs(NamedTuple):
    """The struct of csrc/kernels.h: addresses (0 for none), dtypes, sizes and strides."""

    hidden: int  # [..., D]
    weight: int  # [K, D]
    bias: int  # [K]
    mask: int  # [...]
    dtype: int
    weight_dtype: int
    bias_dtype: int
    N: int
    D: int
    K: int
    inner: int
    outer: int
    stride: int


def _inputs(call: TokenHeadCall) -> tuple[HeadInputs, tuple]:
    """(the struct, what keeps its addresses alive)."""
    hidden, weight, bias, mask = call
    x, inner, outer, stride = row_layout(hidden)
    alive = (x, weight.contiguous(), None if bias is None else bias.contiguous(),
             None if mask is None else mask.contiguous())
    K, D = weight.shape
    return HeadInputs._make((
        *map(address, alive), DTYPES[hidden.dtype], DTYPES[weight.dtype],
        0 if bias is None else DTYPES[bias.dtype], hidden.numel() // D, D, K, inner, outer,
        stride)), alive


def fwd(call: TokenHeadCall) -> Tensor:
    """hidden @ weight.T + bias at valid rows, 0 elsewhere, fp32."""
    hidden, weight, bias, mask = call
    if hidden.numel() == 0:
        return reference.fwd(call)
    out = hidden.new_empty((*hidden.shape[:-1], weight.shape[0]), dtype=torch.float32)
    with launching_on(hidden):
        inputs, _alive = _inputs(call)
        _C.token_head_fwd_cuda(inputs, out.data_ptr(), current_stream(hidden))
    return out


def bwd(call: TokenHeadGradient) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, each in the dtype of its tensor; one that is not wanted is empty."""
    grad, (hidden, weight, bias, mask), grad_hidden, grad_weight, grad_bias = call
    if hidden.numel() == 0:
        return reference.bwd(call)
    grad_bias = grad_bias and bias is not None
    dx = hidden.new_empty(hidden.shape if grad_hidden else (0,))
    dw = weight.new_empty(weight.shape if grad_weight else (0,))
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(
        bias.shape if grad_bias else (0,))
    (K, D), rows = weight.shape, grad.numel() // weight.shape[0]
    blocks = -(-D * hidden.element_size() // COLUMNS)
    parts = max(1, min(-(-rows // 4), PROGRAMS // blocks))
    sums = None
    if grad_weight or grad_bias:
        sums = hidden.new_empty((parts, K * D + 2 * K), dtype=torch.float32)
    if not grad_hidden and sums is None:
        return dx, dw, dbias
    with launching_on(hidden):
        inputs, _alive = _inputs(call.head)
        grad = grad.to(torch.float32).contiguous()
        _C.token_head_bwd_cuda(inputs, grad.data_ptr(), parts,
                               *(x.data_ptr() if x.numel() else 0 for x in (dx, dw, dbias)),
                               address(sums), current_stream(hidden))
    return dx, dw, dbias
