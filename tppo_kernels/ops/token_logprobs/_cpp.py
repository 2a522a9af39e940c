"""`token_logprobs` on the CPU: one read of each valid row, rows spread over torch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.memory import address, refuses_fp64

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/kernels.h


def supports(*args: object) -> str | None:
    """The reason for refusing, or None."""
    return refuses_fp64(args[:3])


class _Rows:
    """The C++ struct TokenRows of a call, as a tuple, and what keeps its addresses alive."""

    def __init__(self, logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: Tensor,
                 softcap: Tensor | None, logit_scale: Tensor, valid_vocab: int | None):
        x = logits.detach()
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        x = x.reshape(1, 1, -1) if x.dim() == 1 else x[None] if x.dim() == 2 else x.flatten(0, -3)
        target = targets.reshape(-1).long().contiguous()  # [N]
        valid = None if mask is None else mask.reshape(-1).contiguous()  # [N]
        by_row = temperature.reshape(-1).double().contiguous() if temperature.dim() else None
        self.alive = (x, target, valid, by_row)
        self.tuple = (x.data_ptr(), DTYPES[x.dtype], target.shape[0],
                      x.shape[-1] if valid_vocab is None else valid_vocab,
                      x.shape[1], x.stride(0), x.stride(1), target.data_ptr(), address(valid),
                      address(by_row), 1.0 if by_row is not None else float(temperature),
                      0.0 if softcap is None else float(softcap), float(logit_scale),
                      torch.get_num_threads())


def dense(x: Tensor) -> Tensor:
    """A per-row tensor as contiguous fp32."""  # [N]
    return x.detach().reshape(-1).float().contiguous()


def fwd(logits: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, top, log_sum), fp32; see `reference.fwd`."""
    rows = _Rows(logits, *arguments)
    logprobs, entropy, top, log_sum = (
        logits.new_empty(logits.shape[:-1], dtype=torch.float32) for _ in range(4))
    _C.token_logprobs_fwd(rows.tuple, logprobs.data_ptr(), entropy.data_ptr(), top.data_ptr(),
                          log_sum.data_ptr())
    return logprobs, entropy, top, log_sum


def bwd(grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor,
        *arguments) -> Tensor:
    """The gradient by logits; see `reference.bwd`."""
    rows = _Rows(logits, *arguments[:-3])
    grads = [None if g is None else dense(g) for g in (grad_logprobs, grad_entropy)]
    kept = [dense(x) for x in arguments[-3:]]  # entropy, top, log_sum
    grad = logits.new_empty(logits.shape)
    _C.token_logprobs_bwd(rows.tuple, *map(address, grads), *map(address, kept), logits.shape[-1],
                          grad.data_ptr())
    return grad
