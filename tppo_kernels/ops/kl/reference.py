"""The specification of `kl` in plain PyTorch: the formula is `kl` of `_math/sequence.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.sequence import compute_dtype
from ..._math.sequence import kl as estimate


class KlCall(NamedTuple):
    """The arguments of the raw forward op."""

    logprobs: Tensor  # [...]
    ref_logprobs: Tensor  # [...]
    mask: Tensor | None  # [...] bool
    clamp: Tensor | None  # []
    estimator: str  # of KL_ESTIMATORS


class KlGradient(NamedTuple):
    """The arguments of the raw backward op."""

    grad: Tensor  # [...]
    call: KlCall


def _estimated(call: KlCall) -> tuple[Tensor, Tensor]:
    """Value and derivative with respect to logprob, in the dtype of the computation."""
    dtype = compute_dtype(call.logprobs, call.ref_logprobs)
    return estimate(call.logprobs.to(dtype), call.ref_logprobs.to(dtype), call.mask,
                    call.estimator, call.clamp)


def fwd(call: KlCall) -> Tensor:
    """The estimate of every token; see `tppo_kernels.kl`."""
    return _estimated(call)[0].contiguous()


def bwd(backward: KlGradient) -> Tensor:
    """The gradient of logprobs, in the dtype of the computation; that of ref_logprobs is its
    negative. A derivative of 0 stays 0 whatever comes in."""
    _, slope = _estimated(backward.call)
    return torch.where(slope == 0, torch.zeros_like(slope), backward.grad * slope).contiguous()
