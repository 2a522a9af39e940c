"""`ppo_loss` on the CPU: one pass over the tokens, vectorised, spread over torch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._core.check import Reduction
from ..._kernels.losses import (
    DTYPES,
    arrange,
    column_tuples,
    layout_tuple,
    like_slopes,
    pair,
    scalar_tuple,
    share_of,
    share_tuple,
    supports,
)
from ..._math.sequence import KL_ESTIMATORS
from . import reference

__all__ = ["Call", "bwd", "fwd", "supports"]

METRICS = 11
NO_DUAL_CLIP = float("inf")


class Call:
    """The C++ struct PolicyBatch of a call, the results that it fills, and what it points to."""

    def __init__(self, logprobs: Tensor, entropy: Tensor | None, old_logprobs: Tensor,
                 advantages: Tensor, mask: Tensor | None, ref_logprobs: Tensor | None,
                 weights: Tensor | None, clip_low: Tensor, clip_high: Tensor,
                 dual_clip: Tensor | None, max_log_ratio: Tensor, entropy_coef: Tensor,
                 kl_coef: Tensor, num_tokens: Tensor | None, num_sequences: Tensor | None,
                 norm_length: Tensor | None, cu_seqlens: Tensor | None, ratio: str,
                 kl_estimator: str, reduction: str, grad_logprobs: bool, grad_entropy: bool):
        share = share_of(Reduction(num_tokens, num_sequences, norm_length, reduction), logprobs)
        columns = (logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights)
        batch = arrange(columns, mask, cu_seqlens, share.of_sequences or ratio == "sequence")
        alive: list[Tensor | None] = []
        scalars = [scalar_tuple(x, alive) for x in (
            pair(clip_low), pair(clip_high), pair(dual_clip, NO_DUAL_CLIP), pair(max_log_ratio),
            pair(entropy_coef), pair(kl_coef))]

        def empty(size) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=logprobs.device)

        self.loss, self.metrics, self.scale = empty(()), empty(METRICS), empty(())
        self.dlogprobs = empty(logprobs.shape if grad_logprobs else 0)
        self.dentropy = empty(logprobs.shape if grad_entropy else 0)
        out = [self.dlogprobs.data_ptr() if grad_logprobs else 0,
               self.dentropy.data_ptr() if grad_entropy else 0, self.loss.data_ptr(),
               self.metrics.data_ptr(), self.scale.data_ptr()]
        self.alive = (batch, alive)
        self.arguments = (layout_tuple(batch), column_tuples(batch), scalars,
                          share_tuple(share, alive), KL_ESTIMATORS.index(kl_estimator),
                          ratio == "sequence", out)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `reference.fwd` returns."""
        return self.loss, self.dlogprobs, self.dentropy, self.metrics, self.scale


def fwd(logprobs: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dlogprobs, dentropy, metrics, scale), fp32; see `reference.fwd`."""
    if logprobs.numel() == 0:
        return reference.fwd(logprobs, *arguments)
    call = Call(logprobs, *arguments)
    _C.ppo_loss_fwd(*call.arguments, torch.get_num_threads())
    return call.results()


def bwd(grad_loss: Tensor, scale: Tensor, dlogprobs: Tensor, dentropy: Tensor,
        logprobs_dtype: torch.dtype, entropy_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients in the inputs' dtypes; see `reference.bwd`."""
    factor, threads = float(grad_loss) * float(scale), torch.get_num_threads()
    results = []
    for given, dtype in ((dlogprobs, logprobs_dtype), (dentropy, entropy_dtype)):
        slopes, out = like_slopes(given, dtype)
        _C.loss_bwd((slopes.data_ptr(), slopes.numel(), DTYPES[dtype], out.data_ptr()), factor,
                    threads)
        results.append(out)
    return results[0], results[1]
