"""`token_logprobs` on the CPU: one read of each valid row, rows spread over torch's threads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.memory import DTYPES, address, refuses_fp64
from .reference import Call, Gradient


def supports(call: Call | Gradient) -> str | None:
    """The reason for refusing, or None."""
    inner: Any = getattr(call, "call", call)
    return refuses_fp64((inner.logits,))


class TokenRows(NamedTuple):
    """The struct of csrc/kernels.h: addresses are 0 for none, row i of the logits is at
    (i / inner) * outer_stride + (i % inner) * inner_stride elements."""

    logits: int
    dtype: int
    N: int
    columns: int  # live ones
    inner: int
    outer_stride: int
    inner_stride: int
    targets: int  # [N] int64, or none: entropy alone
    mask: int  # [N] bool
    row_temperature: int  # [N] fp64
    temperature: float
    softcap: float  # 0: none
    logit_scale: float
    threads: int


def rows_of(call: Call) -> tuple[TokenRows, tuple[Tensor | None, ...]]:
    """The struct of a call, and what keeps its addresses alive."""
    x, columns = call.logits.detach(), call.valid_vocab
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    x = x.reshape(1, 1, -1) if x.dim() == 1 else x[None] if x.dim() == 2 else x.flatten(0, -3)
    target = call.targets if call.targets is None else (
        call.targets.reshape(-1).long().contiguous())  # [N]
    valid = None if call.mask is None else call.mask.reshape(-1).contiguous()  # [N]
    temperature, softcap, logit_scale = call.scaling
    by_row = temperature.reshape(-1).double().contiguous() if temperature.dim() else None  # [N]
    rows = TokenRows(
        x.data_ptr(), DTYPES[x.dtype], math.prod(call.logits.shape[:-1]),
        x.shape[-1] if columns is None else columns, x.shape[1], x.stride(0), x.stride(1),
        address(target), address(valid), address(by_row),
        1.0 if by_row is not None else float(temperature),
        0.0 if softcap is None else float(softcap), float(logit_scale), torch.get_num_threads())
    return rows, (x, target, valid, by_row)


def dense(x: Tensor) -> Tensor:
    """A per-row tensor as contiguous fp32."""  # [N]
    return x.detach().reshape(-1).float().contiguous()


def addresses(*tensors: Tensor | None) -> tuple[list[int], list[Tensor | None]]:
    """Where per-row tensors lie as contiguous fp32, 0 for none, and what keeps them alive."""
    alive = [None if x is None else dense(x) for x in tensors]
    return [address(x) for x in alive], alive


def fwd(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, top, log_sum), fp32; see `reference.fwd`. Without targets the log-probs
    are not computed, and empty."""
    rows, alive = rows_of(call)
    logits = call.logits
    entropy, top, log_sum = (
        logits.new_empty(logits.shape[:-1], dtype=torch.float32) for _ in range(3))
    alone = call.targets is None
    logprobs = top.new_empty(0) if alone else torch.empty_like(top)
    _C.token_logprobs_fwd(rows, 0 if alone else logprobs.data_ptr(), entropy.data_ptr(),
                          top.data_ptr(), log_sum.data_ptr())
    return logprobs, entropy, top, log_sum


def bwd(backward: Gradient) -> Tensor:
    """The gradient of the logits; see `reference.bwd`."""
    call, kept = backward.call, backward[-3:]  # kept: entropy, top, log_sum
    rows, alive = rows_of(call)
    grad = call.logits.new_empty(call.logits.shape)
    given, numbers = addresses(backward.grad_logprobs, backward.grad_entropy, *kept)
    _C.token_logprobs_bwd(rows, *given, call.logits.shape[-1], grad.data_ptr())
    return grad
