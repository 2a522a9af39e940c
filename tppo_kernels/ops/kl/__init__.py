"""An estimate of the KL divergence to a reference policy, of every token."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ..._core.check import Check
from ..._core.derivatives import first_only, savable, wanted
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.sequence import KL_ESTIMATORS, compute_dtype
from . import reference
from .reference import KlCall, KlGradient

_op = Op("kl", cpu=("cpp", "reference"), cuda=("triton", "reference"))

NBYTES_PER_TOKEN = 30  # two log-probs in fp32 and the mask, read twice; the result, and a gradient


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    ref = -3 * torch.rand(3, 17, generator=g, dtype=torch.float64)
    logprobs = ref + torch.randn(3, 17, generator=g, dtype=torch.float64)
    return (logprobs, ref, torch.rand(3, 17, generator=g) < 0.7), {"estimator": "k3", "clamp": 1.0}


def _check_values(call: KlCall) -> None:
    values_between("kl", "clamp", call.clamp, 0.0, inf, open_low=True)


def _fake(call: KlCall) -> Tensor:
    logprobs = call.logprobs
    return logprobs.new_empty(logprobs.shape, dtype=compute_dtype(logprobs, call.ref_logprobs))


_fwd = _op.define("kl_fwd -> (Tensor kl)", reference.fwd, _fake, _check_values, record=KlCall)
_bwd = _op.define("kl_bwd -> (Tensor dlogprobs)", reference.bwd,
                  lambda backward: _fake(backward.call), record=KlGradient)


class _Kl(torch.autograd.Function):
    """The tensors of tokens are arguments beside the record: autograd sees no tensor inside one."""

    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, call):
        ctx.estimator = call.estimator
        ctx.save_for_backward(*map(savable, (logprobs, ref_logprobs, call.mask, call.clamp)))
        return _fwd(KlCall(logprobs, ref_logprobs, *call[2:]))

    @staticmethod
    @first_only(2)
    def backward(ctx, grad):
        logprobs, ref_logprobs, mask, clamp = ctx.saved_tensors
        slopes = _bwd(KlGradient(grad, KlCall(logprobs, ref_logprobs, mask, clamp, ctx.estimator)))
        needed = ctx.needs_input_grad
        return (slopes.to(logprobs.dtype) if needed[0] else None,
                slopes.neg().to(ref_logprobs.dtype) if needed[1] else None, None)


@suggests
def kl(
        logprobs: Tensor,  # [...]
        ref_logprobs: Tensor,  # [...]
        mask: Tensor | None = None,  # [...] bool or whole numbers
        *,
        estimator: str = "k1",  # of KL_ESTIMATORS
        clamp: float | Tensor | None = None,  # []
) -> Tensor:
    """An estimate of KL(policy || reference) at every token that the policy sampled.

        d = logprob - ref_logprob, clamped to +-20
        k1: d      k2: d^2 / 2      k3: exp(-d) - 1 + d      abs: |d|
        "k1+", "k3+": the value of k1 and k3 with the gradient of k2, which is d
        clamp c: the value in [-c, c]

    logprobs, ref_logprobs: any shape, so padded [B, T] and packed [N] alike. mask: bool or whole
    numbers; 0 where masked. fp32, bf16 and fp16 are computed in fp32 and give fp32; fp64 by the
    reference. The mean of it is `tk.reduce(tk.kl(...), mask)`.

    Differentiable in both, once: the gradient of ref_logprobs is the negative of that of logprobs.
    It is 0 beyond a clamp, as torch.clamp has it, but that of "k1+" and "k3+", which is not the
    gradient of the value, feels the clamp of d alone. verl and SkyRL clamp k3 at 10 (clamp=10),
    OpenRLHF every estimate. Under `torch.compile` a Python float is a constant: give a 0-d tensor.

    Raises ValueError / TypeError that name the argument. Source: Schulman, "Approximating KL
    divergence" (2020); "k1+", "k3+": verl's straight-through estimators.
    """
    check = Check("kl")
    check.tensor("logprobs", logprobs, "...")
    check.tensor("ref_logprobs", ref_logprobs, "...")
    mask = check.mask("mask", mask, "...")
    check.choice("estimator", estimator, KL_ESTIMATORS)
    bound = check.scalar("clamp", clamp, above=0.0, high=inf, optional=True)
    call = KlCall(logprobs, ref_logprobs, mask, bound, estimator)
    if wanted(logprobs, ref_logprobs):
        return recorded(_Kl, logprobs, ref_logprobs, call)
    return _fwd(call)
