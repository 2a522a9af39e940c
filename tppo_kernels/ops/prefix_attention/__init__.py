"""Attention over packed groups: one prompt and its responses, the prompt computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core.check import Check, describe
from ..._core.derivatives import first_only, savable
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._core.record import build, flat
from ..._math.layout import (
    PrefixAttentionCall,
    PrefixAttentionGradient,
    PrefixLayout,
    PrefixPlan,
)
from ..._math.sequence import compute_dtype
from . import reference

_op = Op("prefix_attention", cpu=("flash", "reference"),
         cuda=("flash_attn_3", "flash", "flash_attn", "efficient", "reference"))


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test and the benchmarks' gate."""
    g = torch.Generator().manual_seed(0)
    layout = PrefixLayout.from_lengths([5, 3], [[4, 1, 7], [19]])
    length = layout.position_ids.shape[1]
    q, k, v = (torch.randn(1, heads, length, 8, generator=g, dtype=torch.float64)
               for heads in (4, 2, 2))
    return (q, k, v, layout), {}


def nbytes(q: Tensor, k: Tensor, v: Tensor, *, backward: bool = False) -> int:
    """Bytes that the operator must move.

    Forward: q, k, v once, the result and an fp32 logsumexp a query. Backward: q, k, v, the result,
    its gradient and the logsumexps once, and the gradients of q, k, v.
    """
    inputs = sum(x.numel() * x.element_size() for x in (q, k, v))
    out = q.numel() // q.shape[-1] * v.shape[-1] * q.element_size()
    lse = 4 * q.numel() // q.shape[-1]
    return inputs + out + lse + (2 * inputs + 2 * out + lse if backward else 0)


def _check_values(call: PrefixAttentionCall) -> None:
    total, length = int(call.plan.cu_segments[-1]), call.q.shape[1]
    if total != length:
        raise ValueError(f"prefix_attention: layout holds {total} tokens, q has L = {length}")


def _fake_fwd(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    q, k, v, *_ = call
    heads, length = q.shape[:2]
    return (q.new_empty((length, heads, v.shape[2])).transpose(0, 1),
            q.new_empty((heads, length), dtype=compute_dtype(q, k, v)))


def _fake_bwd(call: PrefixAttentionGradient) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((x.shape[1], x.shape[0], x.shape[2])).transpose(0, 1)
                 for x in call.attention[:3])


_fwd = _op.define("prefix_attention_fwd -> (Tensor out, Tensor)", reference.fwd, _fake_fwd,
                  _check_values, record=PrefixAttentionCall)
_bwd = _op.define("prefix_attention_bwd -> (Tensor dq, Tensor dk, Tensor dv)", reference.bwd,
                  _fake_bwd, record=PrefixAttentionGradient)


def plan(layout: PrefixLayout) -> PrefixPlan:
    """What the raw operators take of a layout."""
    return PrefixPlan(layout.cu_segments, layout.is_prompt, layout.prompts_first,
                      layout.cu_shared, layout.cu_responses, layout.sizes)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        out, lse = _fwd(build(PrefixAttentionCall, args))
        ctx.save_for_backward(*map(savable, args), out, lse)
        return out

    @staticmethod
    @first_only(3)
    def backward(ctx, grad):
        *args, out, lse = ctx.saved_tensors
        call = build(PrefixAttentionCall, args)
        grads = _bwd(PrefixAttentionGradient(call, grad, out, lse))
        wanted = (g if need else None
                  for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))
        return (*wanted, *[None] * (len(args) - 3))


@suggests
def prefix_attention(
        q: Tensor,  # [1, Hq, L, D] or [Hq, L, D]
        k: Tensor,  # [1, Hkv, L, D] or [Hkv, L, D]
        v: Tensor,  # [1, Hkv, L, Dv] or [Hkv, L, Dv]
        layout: PrefixLayout,
        *,
        scale: float | Tensor | None = None,  # []
        ) -> Tensor:
    """Attention over packed groups *prompt, response_1, ..., response_G*.

    A prompt token attends causally within its prompt; a response token to the whole prompt of its
    group and causally within its own response:

        out_i = sum_j p_ij v_j,   p_ij = softmax over the visible j of scale q_i . k_j

    which is each (prompt, response) run apart, forward and backward, with P + G R tokens a group
    instead of G (P + R).

    q: [1, Hq, L, D] or [Hq, L, D]; k, v: the same with Hkv heads, Hq a multiple of Hkv (query head
    h reads head h // (Hq / Hkv)). layout: a `PrefixLayout` of L tokens; one that lies on another
    device is copied once, by its `to`. scale: D ** -0.5 where None. Gives the shape of q, with the
    head size of v, and the dtype of q; computed in fp32 (fp64 where an input is fp64, by the
    reference). Differentiable in q, k and v.

    On a CPU a query, key or value that is not finite gives NaN to the queries that it is or that
    see it, and changes no other; on a GPU, where no value is read on the host, it may give NaN to
    others of its group.

    Flash-attention kernels run over the prompt and within each response, merged by logsumexp, and
    nothing of size L x L exists: FlashAttention-3 on a Hopper GPU where its package
    (`flash_attn_interface`) is installed, PyTorch's own, or those of the flash-attn package; on a
    GPU in bf16 and fp16, with a head size that is a multiple of 8 up to 256 (192 for the first) and
    a scale that lies on the host, and PyTorch's memory-efficient kernels for fp32. Else the
    reference, with an explicit L x L mask. On a GPU a layout is moved there once; nothing is read
    from it on the host.
    """
    check = Check("prefix_attention")
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"prefix_attention: layout is {describe(layout)}, expected a PrefixLayout")
    batched = isinstance(q, Tensor) and q.dim() == 4
    one = "1 " if batched else ""
    check.tensor("q", q, f"{one}Hq L D")
    check.tensor("k", k, f"{one}Hkv L D")
    check.tensor("v", v, f"{one}Hkv L Dv")
    layout = layout.to(q.device)
    heads, kv_heads = check.sizes["Hq"], check.sizes["Hkv"]
    if heads == 0 or check.sizes["D"] == 0:
        raise ValueError(f"prefix_attention: q has shape {list(q.shape)}, expected one or more "
                         "heads, of one or more values each")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"prefix_attention: q has {heads} heads, expected a multiple of the "
                         f"{kv_heads} of k and v")
    if layout.position_ids.shape[1] != check.sizes["L"]:
        raise ValueError(f"prefix_attention: q has L = {check.sizes['L']}, expected the "
                         f"{layout.position_ids.shape[1]} tokens of layout")
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError("prefix_attention: scale requires a gradient, expected a constant")
    factor = check.scalar("scale", q.shape[-1] ** -0.5 if scale is None else scale)
    if batched:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
    out = recorded(_PrefixAttention, *flat(PrefixAttentionCall(q, k, v, plan(layout), factor)))
    return out.unsqueeze(0) if batched else out
