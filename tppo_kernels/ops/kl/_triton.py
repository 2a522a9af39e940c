"""`kl` in Triton: one pass over the tokens forward, and one backward, a launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core.check import FP32_MAX
from ..._kernels.launch import launching_on
from ..._kernels.losses import pair
from ..._kernels.memory import refuses_fp64
from ..._kernels.triton_losses import TILE, kl, number, times
from .reference import KlCall, KlGradient


@triton.jit
def _estimates(logprobs_ptr, refs_ptr, mask_ptr, bound, N, ESTIMATOR: tl.constexpr,
               BLOCK: tl.constexpr):
    """Which tokens of a block are there and valid, and their estimates with the derivatives."""
    off = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = off < N
    if mask_ptr is not None:
        valid &= tl.load(mask_ptr + off, mask=off < N, other=0) != 0
    logprob = tl.load(logprobs_ptr + off, mask=valid, other=0.0).to(tl.float32)
    ref = tl.load(refs_ptr + off, mask=valid, other=0.0).to(tl.float32)
    value, slope = kl(logprob, ref, bound, ESTIMATOR)
    return off, valid, tl.where(valid, value, 0.0), tl.where(valid, slope, 0.0)


@triton.jit(do_not_specialize=["N"])
def _kl_fwd_kernel(logprobs_ptr, refs_ptr, mask_ptr, clamp, clamp_ptr, out_ptr, N,
                   ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    """The estimate of every token, 0 where masked."""
    off, _, value, _ = _estimates(logprobs_ptr, refs_ptr, mask_ptr, number((clamp, clamp_ptr)), N,
                                  ESTIMATOR, BLOCK)
    tl.store(out_ptr + off, value, mask=off < N)


@triton.jit(do_not_specialize=["N"])
def _kl_bwd_kernel(grad_ptr, logprobs_ptr, refs_ptr, mask_ptr, clamp, clamp_ptr, out_ptr, N,
                   ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    """grad * slope, 0 where the slope is 0."""
    off, valid, _, slope = _estimates(logprobs_ptr, refs_ptr, mask_ptr, number((clamp, clamp_ptr)),
                                      N, ESTIMATOR, BLOCK)
    grad = tl.load(grad_ptr + off, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + off, times(slope, grad), mask=off < N)


def supports(call: KlCall | KlGradient) -> str | None:
    """The reason for refusing, or None."""
    return refuses_fp64((call.call if isinstance(call, KlGradient) else call)[:2])


def _launch(call: KlCall, grad: Tensor | None) -> Tensor:
    """The estimates, or with a gradient that comes in the gradient of logprobs; fp32."""
    out = torch.empty(call.logprobs.shape, dtype=torch.float32, device=call.logprobs.device)
    n = out.numel()
    if n == 0:
        return out
    columns = [None if x is None else x.contiguous() for x in call[:3]]
    bound = pair(call.clamp, FP32_MAX)
    shape = {"ESTIMATOR": call.estimator, "BLOCK": TILE, "num_warps": 4}
    with launching_on(out):
        if grad is None:
            _kl_fwd_kernel[(triton.cdiv(n, TILE),)](*columns, *bound, out, n, **shape)
        else:
            _kl_bwd_kernel[(triton.cdiv(n, TILE),)](grad.contiguous(), *columns, *bound, out, n,
                                                    **shape)
    return out


def fwd(call: KlCall) -> Tensor:
    """The estimates, fp32; see `reference.fwd`."""
    return _launch(call, None)


def bwd(backward: KlGradient) -> Tensor:
    """The gradient of logprobs, fp32; see `reference.bwd`."""
    return _launch(backward.call, backward.grad)
