"""`prefix_attention` by the kernels of the flash-attn package, where it is installed.

The two calls of `_varlen`. Its backward takes `deterministic` as an argument; PyTorch's own flash
kernels, which are the same, take it from a process-wide flag.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..._kernels import varlen as _varlen
from ..._math.layout import PrefixAttentionCall, PrefixAttentionGradient


def supports(call: PrefixAttentionCall | PrefixAttentionGradient) -> str | None:
    """The reason for refusing, or None."""
    return _varlen.half_refusal(_varlen.attention_of(call))


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


fwd = functools.partial(_varlen.fwd, KERNELS)
bwd = functools.partial(_varlen.bwd, KERNELS)
