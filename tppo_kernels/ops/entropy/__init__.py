"""Entropy of the distribution that each row of logits stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core.check import FP32_MAX, Check
from ..._core.derivatives import first_only, savable, wanted
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.linear import Scaling
from ..._math.sequence import compute_dtype
from ..token_logprobs import check_columns, check_scaling
from ..token_logprobs.reference import EntropyCall, EntropyGradient
from . import reference

_op = Op("entropy", cpu=("cpp", "reference"), cuda=("triton", "reference"))


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 17, 100, generator=g, dtype=torch.float64)
    return (logits, torch.rand(3, 17, generator=g) < 0.7), {
        "temperature": 0.7, "softcap": 10.0, "valid_vocab": 90}


def nbytes(logits: Tensor, *, backward: bool = False) -> int:
    """Bytes that the operator must move when every row is valid: the logits once, three numbers a
    row; backward once more with their gradient."""
    rows = logits.numel() // logits.shape[-1]
    size = logits.numel() * logits.element_size()
    return size + rows * 3 * 4 + backward * (2 * size + rows * 4 * 4)


def _check_values(call: EntropyCall) -> None:
    temperature, softcap, logit_scale = call.scaling
    values_between("entropy", "temperature", temperature, 0.0, FP32_MAX, call.mask, open_low=True)
    values_between("entropy", "softcap", softcap, 0.0, FP32_MAX, call.mask, open_low=True)
    values_between("entropy", "logit_scale", logit_scale, -FP32_MAX, FP32_MAX, call.mask)


def _fake(call: EntropyCall) -> tuple[Tensor, ...]:
    logits, dtype = call.logits, compute_dtype(call.logits)
    rows = tuple(logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(3))
    return (logits.new_empty(0, dtype=dtype), *rows)


_fwd = _op.define("entropy_fwd -> (Tensor, Tensor entropy, Tensor, Tensor)", reference.fwd,
                  _fake, _check_values, record=EntropyCall)
_bwd = _op.define("entropy_bwd -> (Tensor dlogits)", reference.bwd, lambda backward: (
    backward.call.logits.new_empty(backward.call.logits.shape)), record=EntropyGradient)


class _Entropy(torch.autograd.Function):
    """The logits are an argument beside the record, because autograd sees no tensor inside one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: EntropyCall) -> Tensor:
        _, entropy, top, log_sum = _fwd(EntropyCall(logits, *call[1:]))
        ctx.valid_vocab = call.valid_vocab
        ctx.save_for_backward(logits, *map(savable, (call.mask, *call.scaling)), entropy, top,
                              log_sum)
        return entropy

    @staticmethod
    @first_only(1)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, mask, *scaling, entropy, top, log_sum = ctx.saved_tensors
        call = EntropyCall(logits, mask, Scaling._make(scaling), ctx.valid_vocab)
        return _bwd(EntropyGradient(grad, call, entropy, top, log_sum)), None


@suggests
def entropy(
        logits: Tensor,  # [..., V]
        mask: Tensor | None = None,  # [...] bool or whole numbers
        *,
        temperature: float | Tensor = 1.0,  # [], or [...]: one a row
        softcap: float | Tensor | None = None,  # []
        logit_scale: float | Tensor = 1.0,  # []
        valid_vocab: int | None = None,
) -> Tensor:
    """Entropy of every row of logits in nats, from one read of them: `token_logprobs` without
    targets.

        z       = softcap tanh(logit_scale logits / softcap) / temperature
                  (logit_scale logits / temperature without a softcap)
        entropy = logsumexp(z) - sum(p z),  p = softmax(z),  0 * -inf = 0
        dz      = -g p (log p + entropy)

    logits: [..., V] with any leading shape, also none; fp32, bf16 and fp16 are read as they are,
    computed in fp32; fp64 by the reference. mask, temperature, valid_vocab, strides: as in
    `token_logprobs`. Masked rows are not read, and give 0. Returns fp32 [...].

    Differentiable in logits, once; the gradient has their dtype. A row of -inf only, or with a NaN
    or +inf, gives NaN. Under `torch.compile` a Python float is a constant; give 0-d tensors for
    scalars that change.

    Raises ValueError / TypeError that name the argument. Source: TRL's entropy_from_logits.
    """
    check = Check("entropy")
    valid_vocab = check_columns(check, logits, valid_vocab)
    mask = check.mask("mask", mask, "...")
    scaling = check_scaling(check, "...", temperature, softcap, logit_scale)
    call = EntropyCall(logits, mask, scaling, valid_vocab)
    return recorded(_Entropy, logits, call) if wanted(logits) else _fwd(call)[1]
