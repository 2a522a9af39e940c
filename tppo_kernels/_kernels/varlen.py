"""Attention of a shared prefix by kernels for sequences of variable length: two calls, merged.

    own      every segment (a prompt or a response) to itself, causal: all rows as they lie
    shared   the responses of each group to the whole of its prompt: their queries are gathered,
             and the keys and values of the prompts

A prompt token is done by the first call. A response token has a part of each, with the logsumexps
s1 and s2 of its scores:

    s = log(exp s1 + exp s2)        out = out1 + sigmoid(s2 - s1) (out2 - out1)

The backward kernels recompute p = exp(score - s) and dS = p (dO v - dO out): with the merged out
and s each call gives its share of the exact gradient, and the shares are added. Which kernels run
the calls is a `Kernels`; nothing here reads a value on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.backends import missing
from .._math.layout import PrefixAttentionCall, PrefixAttentionGradient, PrefixPlan
from .._math.sequence import compute_dtype
from .memory import FP64

MOST_PAIRS = 2**31 - 2**11  # of tokens and heads that the merge counts in 32 bits
MAX_SEGMENTS = 65535  # the kernels lay sequences along the second or third axis of a grid


class Call(NamedTuple):
    """Which sequences one call attends over, and from which of them to which."""

    cu_queries: Tensor  # [S + 1] int32
    cu_keys: Tensor  # [S + 1] int32
    longest_query: int
    longest_key: int
    causal: bool


class Kernels(NamedTuple):
    """The functions of an implementation, on token-major tensors.

    forward(q, k, v, call, scale) -> (out [n, Hq, D], logsumexp [Hq, n])
    backward(grad, q, k, v, out, lse, call, scale) -> (dq, dk, dv)
    separates(q, groups): whether backward is faster with prompts and responses in calls of their
    own, which costs a copy of all rows.

    What they return may be written to.
    """

    forward: Callable
    backward: Callable
    separates: Callable[[Tensor, int], bool]


def refusal(call: PrefixAttentionCall) -> str | None:
    """Why no such kernels can take these arguments of the raw operator, or None."""
    q, k, v, plan, scale = call
    if compute_dtype(q, k, v) == torch.float64:
        return FP64
    if q.shape[-1] != v.shape[-1]:
        return f"v has {v.shape[-1]} values a head, expected {q.shape[-1]} as q"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"q has {q.shape[-1]} values a head, expected a multiple of 8 up to 256"
    if scale.is_cuda:
        return "scale is on the GPU, expected a number or a CPU tensor: its kernels take a float"
    if reason := scale_refusal(scale):
        return reason
    if plan.cu_segments.shape[0] - 1 > MAX_SEGMENTS:
        return f"layout has {plan.cu_segments.shape[0] - 1} segments, expected up to {MAX_SEGMENTS}"
    return None


def scale_refusal(scale: Tensor) -> str | None:
    """Why flash kernels cannot take a scale that lies on the host, or None."""
    if not float(scale) > 0:  # they take the largest product for the largest score
        return f"scale is {float(scale):g}, expected above 0"
    return None


def few_prompts(q: Tensor, groups: int) -> bool:
    """Whether prompts leave half of a GPU idle in a deterministic backward of the flash kernels.

    It runs ceil(multiprocessors / (sequences x heads)) blocks a sequence and head, so that prompts
    get the fewer, and wait the longer for them, the more responses are in the same call.
    """
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return 2 * groups * q.shape[1] <= processors


def half_refusal(call: PrefixAttentionCall) -> str | None:
    """Why kernels for bf16 and fp16 alone cannot take these arguments, or None."""
    q, k, v, *_ = call
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        return f"q, k, v are {names}, expected all bf16 or all fp16"
    return refusal(call)


def attention_of(call: PrefixAttentionCall | PrefixAttentionGradient) -> PrefixAttentionCall:
    """The arguments of forward, of either pass: which kernels can take both depends on them."""
    return call.attention if isinstance(call, PrefixAttentionGradient) else call


def fwd(kernels: Kernels, call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """(attention [Hq, L, D], logsumexp of the scores [Hq, L])."""
    plan, scale = call.plan, float(call.scale)
    q, k, v = (_rows(x) for x in call[:3])  # [L, H, D]
    if q.shape[0] == 0:
        return torch.empty_like(q).transpose(0, 1), q.new_empty((q.shape[1], 0), dtype=torch.float)
    prompts, responses = _split(plan)
    own, shared, *_ = _calls(plan)
    out, lse = kernels.forward(q, k, v, own, scale)
    part, weight = kernels.forward(*_pick(responses, q), *_pick(prompts, k, v), shared, scale)
    if out.is_cuda and missing("triton") is None and part.shape[:2].numel() < MOST_PAIRS:
        from .triton_prefix import merge as in_one_launch

        out, lse = in_one_launch(out, lse, part, weight, responses)
    else:
        out, lse = merge(out, lse, part, weight, responses)
    return out.contiguous().transpose(0, 1), lse


def merge(out: Tensor, lse: Tensor, part: Tensor, weight: Tensor, responses: Tensor
          ) -> tuple[Tensor, Tensor]:
    """(out [L, Hq, D], lse [Hq, L]), in place, with the parts [n, Hq, D], [Hq, n] of responses."""
    before = lse.index_select(1, responses)  # [Hq, n]
    share = (weight - before).sigmoid().t()[..., None]  # [n, Hq, 1]
    merged = torch.lerp(out.index_select(0, responses).to(lse.dtype), part.to(lse.dtype), share)
    out.index_copy_(0, responses, merged.to(out.dtype))
    lse.index_copy_(1, responses, torch.logaddexp(before, weight))
    return out, lse


def bwd(kernels: Kernels, call: PrefixAttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    plan, scale, lse = call.attention.plan, float(call.attention.scale), call.lse
    q, k, v, grad, out = (_rows(x) for x in (*call.attention[:3], call.grad, call.out))  # [L, H, D]
    if q.shape[0] == 0:
        dq, dk, dv = (torch.empty_like(x).transpose(0, 1) for x in (q, k, v))
        return dq, dk, dv
    prompts, responses = _split(plan)
    own, shared, *apart = _calls(plan)

    def backward(queries: Tensor | None, keys: Tensor | None, part: Call) -> tuple[Tensor, ...]:
        of_queries, of_keys = _pick(queries, grad, q, out), _pick(keys, k, v)
        own_lse = lse if queries is None else lse.index_select(1, queries)
        return kernels.backward(*of_queries[:2], *of_keys, of_queries[2], own_lse, part,
                                scale)

    if kernels.separates(q, plan.cu_shared.shape[1] - 1):
        parts = (backward(rows, rows, part)
                 for rows, part in zip((prompts, responses), apart, strict=True))
        grads = [x.new_empty(x.shape).index_copy_(0, prompts, a).index_copy_(0, responses, b)
                 for x, a, b in zip((q, k, v), *parts, strict=True)]
    else:
        grads = list(backward(None, None, own))
    rest = backward(responses, prompts, shared)
    for total, rows, share in zip(grads, (responses, prompts, prompts), rest, strict=True):
        total.index_copy_(0, rows, total.index_select(0, rows).add_(share))
    dq, dk, dv = (x.contiguous().transpose(0, 1) for x in grads)
    return dq, dk, dv


def _split(plan: PrefixPlan) -> tuple[Tensor, Tensor]:
    """(the tokens of prompts, the tokens of responses); sizes lies on the CPU."""
    of_prompts = int(plan.sizes[0])
    return plan.prompts_first[:of_prompts], plan.prompts_first[of_prompts:]


def _pick(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return list(tensors) if rows is None else [x.index_select(0, rows) for x in tensors]


def _calls(plan: PrefixPlan) -> tuple[Call, Call, Call, Call]:
    """own, shared, and own of the prompts and of the responses apart."""
    prompt, response, group = plan.sizes.tolist()[1:]
    cu_groups, cu_prompts = plan.cu_shared
    cu_segments, cu_responses = plan.cu_segments, plan.cu_responses
    longest = max(prompt, response)
    return (Call(cu_segments, cu_segments, longest, longest, True),
            Call(cu_groups, cu_prompts, group, prompt, False),
            Call(cu_prompts, cu_prompts, prompt, prompt, True),
            Call(cu_responses, cu_responses, response, response, True))


def _rows(x: Tensor) -> Tensor:
    """Token-major, and such that each row of D values starts at a multiple of 16 bytes."""
    x = x.transpose(0, 1)  # [H, L, D] -> [L, H, D]
    every = 16 // x.element_size()
    aligned = not any(stride % every for stride in x.stride()[:2])
    if x.stride(2) == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
