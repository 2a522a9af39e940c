"""`ppo_loss` on the CPU: one pass over the tokens, vectorised, spread over torch's threads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels import structs
from ..._kernels.losses import arrange, like_slopes, policy_numbers, share_of, supports
from ..._kernels.structs import Column, Layout, Scalar, Share
from ..._math.sequence import KL_ESTIMATORS
from . import reference
from .reference import METRICS, OBJECTIVES, PolicyLossCall, PolicyLossGradient, columns_of

__all__ = ["Call", "PolicyBatch", "bwd", "fwd", "supports"]

_OBJECTIVES = tuple(OBJECTIVES)  # enum Objective of csrc/ppo_loss.h


class PolicyBatch(NamedTuple):
    """The struct of csrc/ppo_loss.h, of those of csrc/loss.h; results are addresses."""

    layout: Layout
    logprobs: Column  # this and the next five: [B, T], [N] or [B]
    old_logprobs: Column
    advantages: Column
    entropy: Column
    ref_logprobs: Column
    weights: Column
    clip_low: Scalar
    clip_high: Scalar
    dual_clip: Scalar  # infinite: none
    limit: Scalar  # of |logprob - old_logprob|
    entropy_coef: Scalar
    kl_coef: Scalar
    kl_clamp: Scalar  # infinite: none
    tau_pos: Scalar  # this and the next: of "sapo"
    tau_neg: Scalar
    share: Share
    estimator: int  # of KL_ESTIMATORS
    objective: int  # of OBJECTIVES
    sequence_ratio: bool
    kl_ratio_weighted: bool
    kl_clamped: bool
    dlogprobs: int  # [N], or none
    dentropy: int  # [N], or none
    loss: int  # []
    metrics: int  # [11]
    scale: int  # []


class Call:
    """The struct of a call, the results that it fills, and what it points to."""

    def __init__(self, call: PolicyLossCall):
        terms, formula, logprobs = call.terms, call.terms.formula, call.logprobs
        grad_logprobs, grad_entropy = call.grad_logprobs, call.grad_entropy
        sequence = formula.ratio == "sequence"
        share = share_of(terms.over, logprobs)
        batch = arrange(columns_of(call), call.mask, terms.cu_seqlens,
                        share.of_sequences or sequence)
        alive: list[Tensor | None] = []

        def empty(size) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=logprobs.device)

        self.loss, self.metrics, self.scale = empty(()), empty(METRICS), empty(())
        self.dlogprobs = empty(logprobs.shape if grad_logprobs else 0)
        self.dentropy = empty(logprobs.shape if grad_entropy else 0)
        self.alive = (batch, alive)
        self.struct = PolicyBatch._make((
            structs.layout(batch), *structs.columns(batch),
            *(structs.scalar(x, alive) for x in policy_numbers(formula)),
            structs.share(share, alive), KL_ESTIMATORS.index(formula.kl_estimator),
            _OBJECTIVES.index(formula.objective), sequence, formula.kl_ratio_weighted,
            formula.kl_clamp is not None,
            self.dlogprobs.data_ptr() if grad_logprobs else 0,
            self.dentropy.data_ptr() if grad_entropy else 0, self.loss.data_ptr(),
            self.metrics.data_ptr(), self.scale.data_ptr()))

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `reference.fwd` returns."""
        return self.loss, self.dlogprobs, self.dentropy, self.metrics, self.scale


def fwd(call: PolicyLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dlogprobs, dentropy, metrics, scale), fp32; see `reference.fwd`."""
    if call.logprobs.numel() == 0:
        return reference.fwd(call)
    given = Call(call)
    _C.ppo_loss_fwd(given.struct, torch.get_num_threads())
    return given.results()


def bwd(call: PolicyLossGradient) -> tuple[Tensor, Tensor]:
    """The gradients in the inputs' dtypes; see `reference.bwd`."""
    factor, threads = float(call.grad_loss) * float(call.scale), torch.get_num_threads()
    results = []
    for given, dtype in ((call.dlogprobs, call.logprobs_dtype),
                         (call.dentropy, call.entropy_dtype)):
        slopes, out = like_slopes(given, dtype)
        _C.loss_bwd(structs.slopes(slopes, out), factor, threads)
        results.append(out)
    return results[0], results[1]
