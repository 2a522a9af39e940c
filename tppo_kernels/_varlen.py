"""Attention of a shared prefix by kernels for sequences of variable length: two calls, merged.

    own      every segment (a prompt or a response) to itself, causal: all rows as they lie
    shared   the responses of each group to the whole of its prompt: their queries are gathered,
             keys and values are read where they lie; those of responses get no query

A prompt token is done by the first call. A response token has a part of each, with the logsumexps
s1 and s2 of its scores:

    s = log(exp s1 + exp s2)        out = out1 + sigmoid(s2 - s1) (out2 - out1)

The backward kernels recompute p = exp(score - s) and dS = p (dO v - dO out): with the merged out
and s each call gives its share of the exact gradient, and the shares are added. Which kernels run
the calls is a `Kernels`; on a GPU nothing here reads a value of a tensor on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._native import FP64
from ._sequence import compute_dtype

MAX_SEGMENTS = 65535  # the kernels lay sequences along the second or third axis of a grid


class Call(NamedTuple):
    """Which sequences one call attends over, and from which of them to which."""

    cu_queries: Tensor  # [S + 1] int32
    cu_keys: Tensor  # [S + 1] int32
    longest_query: int
    longest_key: int
    causal: bool


class Kernels(NamedTuple):
    """The two functions of an implementation, on token-major tensors.

    forward(q, k, v, call, scale) -> (out [n, Hq, D] that may be written to, logsumexp [Hq, n])
    backward(grad, q, k, v, out, lse, call, scale) -> (dq, dk, dv) that may be written to; a key
    without a query has the gradient 0
    """

    forward: Callable
    backward: Callable


def refusal(q: Tensor, k: Tensor, v: Tensor, cu_segments: Tensor, is_prompt: Tensor,
            cu_shared: Tensor, response_tokens: Tensor, longest: Tensor, scale: Tensor,
            *_: Tensor) -> str | None:
    """Why no such kernels can take these arguments of the raw operator, or None."""
    if compute_dtype(q, k, v) == torch.float64:
        return FP64
    if q.shape[-1] != v.shape[-1]:
        return f"v has {v.shape[-1]} values a head, expected {q.shape[-1]} as q"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"q has {q.shape[-1]} values a head, expected a multiple of 8 up to 256"
    if scale.is_cuda:
        return "scale is on the GPU, expected a number or a CPU tensor: its kernels take a float"
    if cu_segments.shape[0] - 1 > MAX_SEGMENTS:
        return f"layout has {cu_segments.shape[0] - 1} segments, expected up to {MAX_SEGMENTS}"
    return None


def half_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why kernels for bf16 and fp16 alone cannot take q, k and v, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        return f"q, k, v are {names}, expected all bf16 or all fp16"
    return None


def fwd(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, cu_segments: Tensor, is_prompt: Tensor,
        cu_shared: Tensor, response_tokens: Tensor, longest: Tensor, scale: Tensor
        ) -> tuple[Tensor, Tensor]:
    """(attention [Hq, L, D], logsumexp of the scores [Hq, L])."""
    q, k, v = (_rows(x) for x in (q, k, v))  # [L, H, D]
    if q.shape[0] == 0:
        return torch.empty_like(q).transpose(0, 1), q.new_empty((q.shape[1], 0), dtype=torch.float)
    own, shared = _calls(cu_segments, cu_shared, longest)
    out, lse = kernels.forward(q, k, v, own, float(scale))
    part, weight = kernels.forward(q.index_select(0, response_tokens), k, v, shared, float(scale))
    before = lse.index_select(1, response_tokens)  # [Hq, n]
    share = (weight - before).sigmoid().t()[..., None]  # [n, Hq, 1]
    merged = torch.lerp(out.index_select(0, response_tokens).to(lse.dtype), part.to(lse.dtype),
                        share)
    out.index_copy_(0, response_tokens, merged.to(out.dtype))
    lse.index_copy_(1, response_tokens, torch.logaddexp(before, weight))
    return out.contiguous().transpose(0, 1), lse


def bwd(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, cu_segments: Tensor, is_prompt: Tensor,
        cu_shared: Tensor, response_tokens: Tensor, longest: Tensor, scale: Tensor,
        grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    q, k, v, grad, out = (_rows(x) for x in (q, k, v, grad, out))  # [L, H, D]
    if q.shape[0] == 0:
        dq, dk, dv = (torch.empty_like(x).transpose(0, 1) for x in (q, k, v))
        return dq, dk, dv
    own, shared = _calls(cu_segments, cu_shared, longest)
    dq, dk, dv = kernels.backward(grad, q, k, v, out, lse, own, float(scale))
    own_grad, own_q, own_out = (x.index_select(0, response_tokens) for x in (grad, q, out))
    share = kernels.backward(own_grad, own_q, k, v, own_out, lse.index_select(1, response_tokens),
                             shared, float(scale))
    dq.index_copy_(0, response_tokens, dq.index_select(0, response_tokens).add_(share[0]))
    dq, dk, dv = (x.contiguous().transpose(0, 1)
                  for x in (dq, dk.add_(share[1]), dv.add_(share[2])))
    return dq, dk, dv


def _calls(cu_segments: Tensor, cu_shared: Tensor, longest: Tensor) -> tuple[Call, Call]:
    segment, responses, keys = longest.tolist()  # on the CPU, as the layout says
    return (Call(cu_segments, cu_segments, segment, segment, True),
            Call(cu_shared[0], cu_shared[1], responses, keys, False))


def _rows(x: Tensor) -> Tensor:
    """Token-major, and such that each row of D values starts at a multiple of 16 bytes."""
    x = x.transpose(0, 1)  # [H, L, D] -> [L, H, D]
    every = 16 // x.element_size()
    aligned = not any(stride % every for stride in x.stride()[:2])
    if x.stride(2) == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
