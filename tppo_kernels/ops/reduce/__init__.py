"""The sums and means by which a loss of tokens becomes one number."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core.check import Check, Reduction, offsets
from ..._core.derivatives import first_only, savable, wanted
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._math.sequence import compute_dtype
from . import reference
from .reference import ReduceCall, ReduceGradient

_op = Op("reduce", cpu=("cpp", "reference"), cuda=("triton", "reference"))

NBYTES_PER_TOKEN = 10  # x in fp32 and the mask; the mask once more, and the gradient


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 17, generator=g, dtype=torch.float64)
    return (x, torch.rand(3, 17, generator=g) < 0.7), {
        "reduction": "seq-mean-token-mean", "num_sequences": "all"}


def _check_values(call: ReduceCall) -> None:
    offsets("reduce", call.cu_seqlens, call.x.shape[0])


def _fake(call: ReduceCall) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(call.x)
    return call.x.new_empty((), dtype=dtype), call.x.new_empty((), dtype=dtype)


_fwd = _op.define("reduce_fwd -> (Tensor out, Tensor)", reference.fwd, _fake, _check_values,
                  record=ReduceCall)
_bwd = _op.define("reduce_bwd -> (Tensor dx)", reference.bwd, lambda backward: (
    backward.mask.new_empty(backward.mask.shape, dtype=backward.dtype)), record=ReduceGradient)


class _Reduce(torch.autograd.Function):
    """Backward needs the mask and the scale, and no value of x.

    x is an argument beside the record, because autograd sees no tensor inside one.
    """

    @staticmethod
    def forward(ctx, x, call):
        total, scale = _fwd(ReduceCall(x, *call[1:]))
        mask, over, cu_seqlens = call[1:]
        if mask is None:
            mask = torch.ones((), dtype=torch.bool, device=x.device).expand(x.shape)
        ctx.reduction, ctx.dtype = over.reduction, x.dtype
        ctx.save_for_backward(scale, *map(savable, (mask, *over[:-1], cu_seqlens)))
        return total

    @staticmethod
    @first_only(0)
    def backward(ctx, grad):
        scale, mask, *counts, cu_seqlens = ctx.saved_tensors
        over = Reduction._make((*counts, ctx.reduction))
        return _bwd(ReduceGradient(grad, scale, mask, over, cu_seqlens, ctx.dtype)), None


@suggests
def reduce(
        x: Tensor,  # [B, T] or [N]
        mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        *,
        reduction: str = "token-mean",  # of REDUCTIONS
        num_tokens: int | Tensor | None = None,  # []
        num_sequences: int | str | Tensor | None = None,  # [], or "all"
        norm_length: int | Tensor | None = None,  # []
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
) -> Tensor:
    """One number from a value a token, as the losses of this library add theirs up.

        "token-mean"               sum of x / num_tokens
        "token-sum"                sum of x
        "seq-mean-token-sum"       sum_b sum_t x_bt / num_sequences
        "seq-mean-token-mean"      sum_b (mean of x_b over its valid tokens) / num_sequences
        "seq-mean-token-sum-norm"  sum of x / (norm_length num_sequences)

    x: [B, T], or packed [N] with `cu_seqlens` [B + 1] int32. mask: bool or whole numbers. Sums are
    over valid tokens. num_tokens: the valid tokens of x. num_sequences: the sequences with a valid
    token, as verl; "all": those without one too, as TRL and SkyRL. norm_length: T, required when
    packed. Denominators are at least 1; counts of a whole batch, given as whole numbers or 0-d
    tensors, make its micro-batches add up to it. A denominator of another reduction is not used.

    Gives a 0-d tensor: fp32, added up in fp64; fp64 for fp64 by the reference. No valid token is 0.
    Differentiable in x, once; the gradient is 0 where masked.

    Raises ValueError / TypeError that name the argument. Source: verl's agg_loss; "token-mean" and
    "seq-mean-token-sum-norm": Dr. GRPO (Liu et al. 2025), DAPO (Yu et al. 2025).
    """
    check = Check("reduce")
    mask = check.sequences("x", x, mask, cu_seqlens)
    over = check.reduction(reduction, num_tokens, num_sequences, norm_length, cu_seqlens)
    call = ReduceCall(x, mask, over, cu_seqlens)
    return recorded(_Reduce, x, call) if wanted(x) else _fwd(call)[0]
