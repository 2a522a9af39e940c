"""`prefix_attention` by the kernels of the flash-attn package, where it is installed.

The two calls of `_varlen`. Its backward takes `deterministic` as an argument; PyTorch's own flash
kernels, which are the same, take it from a process-wide flag.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..._kernels import varlen as _varlen


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> str | None:
    """The reason for refusing, or None."""
    return _varlen.half_refusal(q, k, v) or _varlen.refusal(q, k, v, *rest)


def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _forward(q: Tensor, k: Tensor, v: Tensor, call: _varlen.Call, scale: float
             ) -> tuple[Tensor, Tensor]:
    # With a longest query of 1 the package regroups the heads, and the logsumexp with them.
    out, lse, *_ = _interface()._flash_attn_varlen_forward(
        q, k, v, call.cu_queries, call.cu_keys, max(call.longest_query, 2), call.longest_key,
        dropout_p=0.0, softmax_scale=scale, causal=call.causal)
    return out, lse


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
              call: _varlen.Call, scale: float) -> tuple[Tensor, ...]:
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _interface()._flash_attn_varlen_backward(
        grad, q, k, v, out, lse, *grads, call.cu_queries, call.cu_keys,
        max(call.longest_query, 2), call.longest_key, dropout_p=0.0, softmax_scale=scale,
        causal=call.causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=True)
    return grads


KERNELS = _varlen.Kernels(_forward, _backward, _varlen.few_prompts)


def fwd(*args: Tensor) -> tuple[Tensor, Tensor]:
    """(attention [Hq, L, D], logsumexp of the scores [Hq, L])."""
    return _varlen.fwd(KERNELS, *args)


def bwd(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtype of q, k and v."""
    return _varlen.bwd(KERNELS, *args)
