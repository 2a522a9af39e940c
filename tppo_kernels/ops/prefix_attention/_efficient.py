"""`prefix_attention` in fp32 on a GPU, by PyTorch's memory-efficient kernels.

The two calls of `_varlen`, for what the flash kernels refuse: fp32, and dtypes that differ, such as
those of q and v under autocast. One key head serves one query head here, so k and v are repeated.
Deterministic, since the keys of a sequence are not split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._kernels import varlen as _varlen
from ..._math.layout import PrefixAttentionCall, PrefixAttentionGradient

_aten = torch.ops.aten
_LSE = 32  # the logsumexps of a sequence are padded to a multiple of this


def supports(call: PrefixAttentionCall | PrefixAttentionGradient) -> str | None:
    """The reason for refusing, or None."""
    return _varlen.refusal(_varlen.attention_of(call))


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1),
                                       v.repeat_interleave(groups, 1))


def _places(call: _varlen.Call, rows: int) -> tuple[Tensor, Tensor]:
    """(the sequence of each query, its place in it)."""  # [n]
    row = torch.arange(rows, dtype=torch.int32, device=call.cu_queries.device)
    sequence = torch.searchsorted(call.cu_queries, row, right=True) - 1
    return sequence, (row - call.cu_queries[sequence]).long()


def _forward(q: Tensor, k: Tensor, v: Tensor, call: _varlen.Call, scale: float
             ) -> tuple[Tensor, Tensor]:
    k, v = _repeated(q, k, v)
    out, lse, *_ = _aten._efficient_attention_forward.default(
        q[None], k[None], v[None], None, call.cu_queries, call.cu_keys, call.longest_query,
        call.longest_key, 0.0, int(call.causal), True, scale=scale)  # lse [S, Hq, padded]
    sequence, place = _places(call, q.shape[0])
    return out[0], lse[sequence, :, place].t().contiguous()


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
              call: _varlen.Call, scale: float) -> tuple[Tensor, ...]:
    sizes = k.shape[1], q.shape[1] // k.shape[1]
    k, v = _repeated(q, k, v)
    padded = lse.new_full((call.cu_queries.shape[0] - 1, q.shape[1],
                           -(-call.longest_query // _LSE) * _LSE), torch.inf)
    sequence, place = _places(call, q.shape[0])
    padded[sequence, :, place] = lse.t()
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # no dropout, no random numbers
    dq, dk, dv, _ = _aten._efficient_attention_backward.default(
        grad[None], q[None], k[None], v[None], None, out.contiguous()[None], call.cu_queries,
        call.cu_keys, call.longest_query, call.longest_key, padded, 0.0, unused, unused,
        int(call.causal), False, scale=scale, num_splits_key=1)
    return dq[0], dk[0].unflatten(1, sizes).sum(2), dv[0].unflatten(1, sizes).sum(2)


KERNELS = _varlen.Kernels(_forward, _backward, lambda q, groups: False)


def _wide(call: PrefixAttentionCall) -> PrefixAttentionCall:
    return call._replace(q=call.q.float(), k=call.k.float(), v=call.v.float())


def fwd(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """(attention [Hq, L, D] in the dtype of q, logsumexp of the scores [Hq, L])."""
    out, lse = _varlen.fwd(KERNELS, _wide(call))
    return out.to(call.q.dtype), lse


def bwd(call: PrefixAttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtypes of q, k, v."""
    grads = _varlen.bwd(KERNELS, PrefixAttentionGradient(
        _wide(call.attention), call.grad.float(), call.out.float(), call.lse.float()))
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, call.attention[:3], strict=True))
    return dq, dk, dv
