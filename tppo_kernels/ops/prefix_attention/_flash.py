"""`prefix_attention` by PyTorch's own flash-attention kernels; the cost follows the tokens.

On a GPU: the two calls of `_varlen`, in bf16 or fp16.

On the CPU, in fp32, two calls cover a token: one a group, in which prompt and responses are the
queries and the prompt alone is the keys (the causal mask counts from the top left, so that a token
behind the prompt sees all of it), and one over the responses, each to itself. They are merged by
their logsumexps, and with the merged output and logsumexp the backward kernels give shares of the
exact gradient, as in `_varlen`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._kernels import varlen as _varlen
from ..._kernels.memory import FP64
from ..._math.layout import PrefixAttentionCall, PrefixAttentionGradient
from ..._math.sequence import compute_dtype

_aten = torch.ops.aten
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
SHORT = 16  # responses up to this length share a bucket; above it, those between two powers of two


def supports(call: PrefixAttentionCall | PrefixAttentionGradient) -> str | None:
    """The reason for refusing, or None."""
    given = _varlen.attention_of(call)
    q, k, v, _, scale = given
    if q.is_cuda:
        return _varlen.half_refusal(given) or _gpu_refusal(q.device)
    if compute_dtype(q, k, v) == torch.float64:
        return FP64
    if q.shape[-1] != v.shape[-1]:
        return f"v has {v.shape[-1]} values a head, expected {q.shape[-1]} as q"
    if not hasattr(_aten, _FORWARD):
        return f"torch {torch.__version__} has no aten::{_FORWARD}"
    return _varlen.scale_refusal(scale)


@functools.cache
def _gpu_refusal(device: torch.device) -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without flash attention"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU is sm_{major}{minor}, expected sm_80 or later"


@dataclass(frozen=True)
class _Bucket:
    """Responses of similar length, right-padded to `width` by repeating their last token."""

    width: int
    rows: Tensor  # [m * width], the token in each slot
    slots: Tensor  # [n], the slots that hold a token of their own
    tokens: Tensor  # [n], those tokens
    padding: Tensor  # [m, 1, width, 1], the slots that repeat one


@functools.lru_cache(maxsize=32)
def _plan(lengths: tuple[int, ...], prompts: tuple[bool, ...]
          ) -> tuple[list[tuple[int, int, int]], list[_Bucket]]:
    """([(start, end of the prompt, end) of each group], buckets of responses)."""
    groups: list[tuple[int, int, int]] = []
    spans: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length, is_prompt in zip(lengths, prompts, strict=True):
        end = start + length
        if is_prompt:
            groups.append((start, end, end))
        else:
            groups[-1] = (*groups[-1][:2], end)
            spans.setdefault((max(length, SHORT) - 1).bit_length(), []).append((start, length))
        start = end
    return groups, [_bucket(spans[size]) for size in sorted(spans)]


def _bucket(spans: list[tuple[int, int]]) -> _Bucket:
    start, length = torch.tensor(spans, device="cpu").unbind(1)  # [m]
    width = int(length.max())
    slot = torch.arange(width, device="cpu")
    rows = (start[:, None] + torch.minimum(slot, length[:, None] - 1)).flatten()
    padding = slot >= length[:, None]  # [m, width]
    slots = (~padding).flatten().nonzero().squeeze(1)
    return _Bucket(width, rows, slots, rows[slots], padding[:, None, :, None])


def _prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32, token-major and grouped: q [L, Hkv, G, D]; k, v [L, Hkv, G, D], G a stride of 0."""
    groups = q.shape[0] // k.shape[0]
    q = _fp32(q).transpose(0, 1).unflatten(1, (k.shape[0], groups))
    k, v = (_fp32(x).transpose(0, 1)[:, :, None].expand(-1, -1, groups, -1) for x in (k, v))
    return q, k, v


def _fp32(x: Tensor) -> Tensor:
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _own(x: Tensor, bucket: _Bucket) -> Tensor:
    """The responses of a bucket."""  # [L, Hkv, G, D] -> [m, Hq, width, D]
    return (x.index_select(0, bucket.rows).flatten(1, 2)
            .unflatten(0, (-1, bucket.width)).transpose(1, 2))


def _heads(x: Tensor, start: int, end: int) -> Tensor:
    return x[start:end].permute(1, 2, 0, 3)  # [L, Hkv, G, D] -> [Hkv, G, n, D]


def _finite_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(keys that are finite, with their values [L, Hkv, G, 1], k and v with 0 at the others).

    torch's kernels take no notice of such a key, and let such a value reach queries that do not
    see it.
    """
    fine = (k.isfinite() & v.isfinite()).all(-1, keepdim=True)
    return fine, torch.where(fine, k, 0), torch.where(fine, v, 0)


def _spoilt(q: Tensor, fine: Tensor, lengths: Sequence[int], prompts: Sequence[bool]) -> Tensor:
    """Queries that are not finite, of which torch's kernel makes 0, or see such a key: [L, Hq]."""
    spoilt, of_prompt = ~q.isfinite().all(-1, keepdim=True), torch.zeros_like(fine[0])
    segments = (x.split(list(lengths)) for x in (spoilt, ~fine))
    for (out, lost), is_prompt in zip(zip(*segments, strict=True), prompts, strict=True):
        of_prompt = lost.any(0) if is_prompt else of_prompt
        out |= lost.cumsum(0) > 0
        out |= of_prompt & (not is_prompt)
    return spoilt.flatten(1)


def fwd(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """(attention [Hq, L, D] in the dtype of q, logsumexp of the scores [Hq, L] in fp32)."""
    if call.q.is_cuda:
        return _varlen.fwd(KERNELS, call)
    q, k, v, plan, scale = call
    dtype = q.dtype
    lengths, prompts = tuple(plan.cu_segments.diff().tolist()), tuple(plan.is_prompt.tolist())
    groups, buckets = _plan(lengths, prompts)
    attend = functools.partial(_aten._scaled_dot_product_flash_attention_for_cpu.default,
                               dropout_p=0.0, is_causal=True, scale=float(scale))
    q, k, v = _prepare(q, k, v)
    spoilt = None
    if not all(math.isfinite(x.sum()) for x in (q, k[:, :, 0], v[:, :, 0])):
        fine, k, v = _finite_keys(k, v)
        spoilt = _spoilt(q, fine, lengths, prompts)
    out = q.new_empty(q.shape)  # [L, Hkv, G, D]
    lse = q.new_empty(q.shape[:-1])
    for start, prompt_end, end in groups:
        part, weight = attend(_heads(q, start, end), *(_heads(x, start, prompt_end)
                                                       for x in (k, v)))
        out[start:end] = part.permute(2, 0, 1, 3)
        lse[start:end] = weight.permute(2, 0, 1)
    out, lse = out.flatten(1, 2), lse.flatten(1, 2)  # [L, Hq, D], [L, Hq]
    for bucket in buckets:
        part, weight = attend(*(_own(x, bucket) for x in (q, k, v)))
        part = part.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slots)  # [n, Hq, D]
        weight = weight.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slots).double()
        before = lse.index_select(0, bucket.tokens).double()
        merged = torch.logaddexp(before, weight)
        lse.index_copy_(0, bucket.tokens, merged.float())
        share = (weight - merged).exp().float()[..., None]
        out.index_copy_(0, bucket.tokens,
                        torch.lerp(out.index_select(0, bucket.tokens), part, share))
    if spoilt is not None:
        out.masked_fill_(spoilt[..., None], torch.nan)
        lse.masked_fill_(spoilt, torch.nan)
    return out.to(dtype).transpose(0, 1), lse.t().contiguous()


def bwd(call: PrefixAttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtypes of q, k, v."""
    if call.grad.is_cuda:
        return _varlen.bwd(KERNELS, call)
    (q, k, v, plan, scale), grad, out, lse = call
    dtypes = q.dtype, k.dtype, v.dtype
    groups, buckets = _plan(tuple(plan.cu_segments.diff().tolist()),
                            tuple(plan.is_prompt.tolist()))
    attend = functools.partial(
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        dropout_p=0.0, is_causal=True, scale=float(scale))
    q, k, v = _prepare(q, k, v)
    if not math.isfinite(lse.sum()):
        _, k, v = _finite_keys(k, v)
    heads = q.shape[1:3]
    grad, out = (_fp32(x).transpose(0, 1).unflatten(1, heads) for x in (grad, out))
    lse = lse.t().unflatten(1, heads)  # [L, Hkv, G]
    dq = q.new_empty(q.shape)
    dk, dv = (q.new_zeros(q.shape[0], heads[0], q.shape[3]) for _ in range(2))  # [L, Hkv, D]
    for start, prompt_end, end in groups:
        parts = attend(_heads(grad, start, end), _heads(q, start, end),
                       *(_heads(x, start, prompt_end) for x in (k, v)), _heads(out, start, end),
                       lse[start:end].permute(1, 2, 0))
        dq[start:end] = parts[0].permute(2, 0, 1, 3)
        for total, part in ((dk, parts[1]), (dv, parts[2])):
            torch.sum(part.permute(2, 0, 1, 3), 2, out=total[start:prompt_end])
    dq = dq.flatten(1, 2)  # [L, Hq, D]
    for bucket in buckets:
        own_grad = _own(grad, bucket).masked_fill(bucket.padding, 0.0)
        parts = attend(own_grad, *(_own(x, bucket) for x in (q, k, v, out)),
                       _own(lse[..., None], bucket).squeeze(-1))
        parts = [x.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slots) for x in parts]
        dq.index_add_(0, bucket.tokens, parts[0])  # [n, Hq, D]
        for total, part in ((dk, parts[1]), (dv, parts[2])):
            total.index_copy_(0, bucket.tokens, part.unflatten(1, heads).sum(2))
    dq, dk, dv = (x.transpose(0, 1).to(dtype)
                  for x, dtype in zip((dq, dk, dv), dtypes, strict=True))
    return dq, dk, dv


def _gpu_forward(q: Tensor, k: Tensor, v: Tensor, call: _varlen.Call, scale: float
                 ) -> tuple[Tensor, Tensor]:
    # With a longest query of 1 the kernels regroup the heads, and the logsumexp with them.
    out, lse, *_ = _aten._flash_attention_forward.default(
        q, k, v, call.cu_queries, call.cu_keys, max(call.longest_query, 2), call.longest_key, 0.0,
        call.causal, False, scale=scale)
    return out, lse


def _gpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                  call: _varlen.Call, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # no dropout, no random numbers
    with _deterministic():
        return _aten._flash_attention_backward.default(
            grad, q, k, v, out, lse, call.cu_queries, call.cu_keys, max(call.longest_query, 2),
            call.longest_key, 0.0, call.causal, unused, unused, scale=scale)


KERNELS = _varlen.Kernels(_gpu_forward, _gpu_backward, _varlen.few_prompts)
_flag = threading.Lock()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Inside, dq is summed in a fixed order; by default its blocks are added as they come.

    The kernels have no argument for it and read a flag of the process. Another thread that starts a
    kernel at this very moment reads it too, and raises where that kernel (cuBLAS without
    CUBLAS_WORKSPACE_CONFIG) has no deterministic form: in a process whose threads share the GPU
    force the backend flash_attn, which takes an argument, or set the flag for all.
    """
    with _flag:
        was = torch.are_deterministic_algorithms_enabled()
        only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
        fills = torch._C._get_deterministic_fill_uninitialized_memory()
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        torch._C._set_deterministic_fill_uninitialized_memory(was and fills)  # no needless launch
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(was, warn_only=only_warns)
            torch._C._set_deterministic_fill_uninitialized_memory(fills)
