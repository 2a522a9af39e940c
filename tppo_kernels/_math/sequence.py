"""What the references share about sequences: layouts, selection, reductions, KL estimators.

A token tensor is padded [B, T], or packed [N] with `cu_seqlens` [B + 1]; nothing here reads a
tensor's value on the host, and everything runs in the dtype of its input.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._core.check import Reduction
from .._core.packed import sequence_index

Optional = TypeVar("Optional", Tensor, Tensor | None)  # a tensor stays one
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+")  # enum KlEstimator of csrc/kl.h
KL_CLAMP = 20.0


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of a computation and of its results: fp64 where a per-token input is, else fp32."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def detached(x: Optional) -> Optional:
    """An input without its graph; None stays None.

    Dynamo refuses an `autograd.Function` that gets one tensor twice; each detach gives a new one.
    """
    if x is None or not (x.requires_grad or is_compiling()):
        return x
    return x.detach()


def on(scalar: Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor in the dtype and on the device of `like`.

    It is added to a zero, because a CPU scalar enters a CUDA kernel as an argument, while a copy
    would synchronise with the host, which graph capture forbids.
    """
    return like.new_zeros(()) + scalar.to(like.dtype)


def select(x: Tensor, mask: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """x at valid tokens, 0 elsewhere: a selection, so that a masked NaN reaches no result."""
    x = x if dtype is None else x.to(dtype)
    return x if mask is None else torch.where(mask, x, torch.zeros((), dtype=x.dtype,
                                                                  device=x.device))


def valid_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mask itself, or all True."""
    return torch.ones(x.shape, dtype=torch.bool, device=x.device) if mask is None else mask


def spread(per_sequence: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A per-sequence tensor [B], or a 0-d one, at every token of `like`."""  # [B, T] or [N]
    if per_sequence.dim() == 0:
        return torch.zeros_like(like, dtype=per_sequence.dtype) + per_sequence
    if cu_seqlens is None:
        return per_sequence[:, None].expand(like.shape)
    return per_sequence[sequence_index(like.shape[0], cu_seqlens)]


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums over the tokens of each sequence, in a fixed order."""  # [B]
    if cu_seqlens is None:
        return x.sum(1)
    if x.shape[0] == 0:
        return x.new_zeros(cu_seqlens.shape[0] - 1)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True, initial=0.0)


def has_valid_token(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Which sequences have a valid token; the arguments of the others are not read."""  # [B]
    return sequence_sum(valid_mask(x, mask).to(torch.float32), cu_seqlens) > 0


def shares(
        mask: Tensor,  # [B, T] or [N] bool
        over: Reduction,
        cu_seqlens: Tensor | None,  # [B + 1] int32
        dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(c, size) of Red(x) = sum(c x) / size: c [B, T] or [N] is 0 where masked, size [] >= 1."""
    reduction, num_sequences, norm_length = over.reduction, over.num_sequences, over.norm_length
    tokens = mask.to(dtype)
    one = tokens.new_ones(())
    if reduction == "token-sum":
        return tokens, one
    if reduction == "token-mean":
        total = tokens.sum() if over.num_tokens is None else on(over.num_tokens, one)
        return tokens, torch.maximum(total, one)
    lengths = sequence_sum(tokens, cu_seqlens)  # [B]
    sequences = (lengths > 0).to(dtype).sum() if num_sequences is None else on(num_sequences, one)
    size = torch.maximum(sequences, one)
    if reduction == "seq-mean-token-mean":
        return tokens / spread(torch.maximum(lengths, one), mask, cu_seqlens), size
    if reduction == "seq-mean-token-sum-norm":
        length = one * mask.shape[1] if norm_length is None else on(norm_length, one)
        size = size * torch.maximum(length, one)
    return tokens, size


def reduction_weights(mask: Tensor, over: Reduction, cu_seqlens: Tensor | None,
                      dtype: torch.dtype) -> Tensor:
    """The weight of each token in a reduction, 0 where masked: c / size of `shares`."""
    c, size = shares(mask, over, cu_seqlens, dtype)  # [B, T] or [N], []
    return c / size


def kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str,
       clamp: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A KL estimate per token and its derivative with respect to logprob, both 0 where masked.

    d = logprob - ref clamped to +-20. k1: d; k2: d^2/2; k3: exp(-d) - 1 + d; abs: |d|;
    "k1+" and "k3+" take the value of k1 and k3 and the derivative of k2, d.
    clamp, []: the value is then clamped to +-clamp, with derivative 0 beyond, as torch.clamp has
    it; "k1+" and "k3+" keep theirs, because it is not that of the value.
    Source: Schulman, "Approximating KL divergence".
    """
    raw = select(logprobs - ref_logprobs, mask)
    d = raw.clamp(-KL_CLAMP, KL_CLAMP)
    inside = ~(raw.abs() > KL_CLAMP) & valid_mask(raw, mask)  # NaN: inside
    value, slope = {
        "k1": lambda: (d, torch.ones_like(d)),
        "k2": lambda: (0.5 * d * d, d),
        "k3": lambda: (torch.expm1(-d) + d, -torch.expm1(-d)),
        "abs": lambda: (d.abs(), d.sign() + (d - d)),  # the sign of NaN is 0
        "k1+": lambda: (d, d),
        "k3+": lambda: (torch.expm1(-d) + d, d),
    }[estimator]()
    if clamp is not None:
        bound = on(clamp, value)
        if not estimator.endswith("+"):
            inside = inside & ~(value.abs() > bound)
        value = torch.clamp(value, -bound, bound)
    return value, select(slope, inside)
