"""`prefix_attention` by FlashAttention-3 on a Hopper GPU, where its package is installed.

The two calls of `_varlen`, by the raw functions of `flash_attn_interface`: the public ones
differentiate by their own result alone, and each call here needs the merged one. An installation
whose raw functions have no defaults yet (before they were custom operators of torch) is refused.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from ..._kernels import varlen as _varlen
from ..._math.layout import PrefixAttentionCall, PrefixAttentionGradient

WIDEST = 192  # a deterministic backward has no head size that is rounded up to 256


def supports(call: PrefixAttentionCall | PrefixAttentionGradient) -> str | None:
    """The reason for refusing, or None."""
    given = _varlen.attention_of(call)
    reason, q = _varlen.half_refusal(given), given.q
    if reason is None and q.shape[-1] > WIDEST:
        reason = f"q has {q.shape[-1]} values a head, expected up to {WIDEST}"
    return reason or _too_old() or (_gpu_refusal(q.device) if q.is_cuda else None)


def _interface() -> Any:
    return importlib.import_module("flash_attn_interface")


def _too_old() -> str | None:
    forward = _interface()._flash_attn_forward
    parameters = inspect.signature(getattr(forward, "_init_fn", forward)).parameters
    if "k_new" in parameters and parameters["k_new"].default is None:
        return None
    return "the raw functions of flash_attn_interface take no keywords: build a newer one"


@functools.cache
def _gpu_refusal(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) == (9, 0) else f"the GPU is sm_{major}{minor}, expected sm_90"


def _forward(q: Tensor, k: Tensor, v: Tensor, call: _varlen.Call, scale: float
             ) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _interface()._flash_attn_forward(
        q, k, v, cu_seqlens_q=call.cu_queries, cu_seqlens_k=call.cu_keys,
        max_seqlen_q=call.longest_query, max_seqlen_k=call.longest_key, softmax_scale=scale,
        causal=call.causal)
    return out, lse


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
              call: _varlen.Call, scale: float) -> tuple[Tensor, ...]:
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _interface()._flash_attn_backward(
        grad, q, k, v, out, lse, call.cu_queries, call.cu_keys, None, None, call.longest_query,
        call.longest_key, *grads, scale, call.causal, deterministic=True)
    return grads


KERNELS = _varlen.Kernels(_forward, _backward, lambda q, groups: False)
fwd = functools.partial(_varlen.fwd, KERNELS)
bwd = functools.partial(_varlen.bwd, KERNELS)
