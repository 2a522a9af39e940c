"""`kl` on the CPU: one pass over the tokens, vectorised, spread over torch's threads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._core.check import FP32_MAX
from ..._kernels.memory import DTYPES, address, refuses_fp64
from ..._kernels.structs import Column
from ..._math.sequence import KL_ESTIMATORS
from .reference import KlCall, KlGradient


def supports(call: KlCall | KlGradient) -> str | None:
    """The reason for refusing, or None."""
    return refuses_fp64((call.call if isinstance(call, KlGradient) else call)[:2])


class KlTokens(NamedTuple):
    """The struct of csrc/kl.h; tensors are addresses, 0 for none."""

    logprobs: Column  # [N]
    ref_logprobs: Column  # [N]
    mask: int  # [N] bool
    N: int
    estimator: int  # of KL_ESTIMATORS
    clamp: float


def tokens_of(call: KlCall) -> tuple[KlTokens, tuple[Tensor | None, ...]]:
    """The struct of a call, and what keeps its addresses alive."""
    alive = [None if x is None else x.contiguous() for x in call[:3]]
    logprobs, ref_logprobs = (Column(address(x), DTYPES[x.dtype], 0, 1)
                              for x in alive[:2] if x is not None)
    clamp = FP32_MAX if call.clamp is None else min(float(call.clamp), FP32_MAX)
    return KlTokens(logprobs, ref_logprobs, address(alive[2]), call.logprobs.numel(),
                    KL_ESTIMATORS.index(call.estimator), clamp), tuple(alive)


def fwd(call: KlCall) -> Tensor:
    """The estimates, fp32; see `reference.fwd`."""
    tokens, alive = tokens_of(call)
    out = torch.empty(call.logprobs.shape, dtype=torch.float32, device=call.logprobs.device)
    _C.kl_fwd(tokens, out.data_ptr(), torch.get_num_threads())
    return out


def bwd(backward: KlGradient) -> Tensor:
    """The gradient of logprobs, fp32; see `reference.bwd`."""
    tokens, alive = tokens_of(backward.call)
    grad = backward.grad.float().contiguous()
    out = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    _C.kl_bwd(tokens, grad.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out
