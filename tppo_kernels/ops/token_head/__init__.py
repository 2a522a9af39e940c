"""Per-token linear head in fp32 on a trunk of any dtype: values, rewards, reward classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core.check import Check
from ..._core.derivatives import first_only, savable, wanted
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._core.record import flat
from ..._math.sequence import compute_dtype
from . import reference
from .reference import TokenHeadCall, TokenHeadGradient

_op = Op("token_head", cuda=("cuda", "triton", "reference"))


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 17, 8, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(3, 9, generator=g, dtype=torch.float64).split([8, 1], 1)
    return (hidden, weight, bias[:, 0], torch.rand(3, 17, generator=g) < 0.7), {}


def nbytes(hidden: Tensor, weight: Tensor) -> int:
    """Bytes that forward and backward must move when every row is valid.

    hidden twice and its gradient; per row and output the fp32 result and its gradient; weight in
    each pass and its gradient.
    """
    rows = hidden.numel() // hidden.shape[-1]
    return (3 * hidden.numel() * hidden.element_size() + 8 * rows * weight.shape[0]
            + 3 * weight.numel() * weight.element_size())


def _fake_fwd(call: TokenHeadCall) -> Tensor:
    hidden, weight, bias, _ = call
    return hidden.new_empty((*hidden.shape[:-1], weight.shape[0]),
                            dtype=compute_dtype(hidden, weight, bias))


def _fake_bwd(call: TokenHeadGradient) -> tuple[Tensor, Tensor, Tensor]:
    _, (hidden, weight, bias, _), grad_hidden, grad_weight, grad_bias = call
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(0)
    if grad_bias and bias is not None:
        dbias = bias.new_empty(bias.shape)
    return (hidden.new_empty(hidden.shape if grad_hidden else (0,)),
            weight.new_empty(weight.shape if grad_weight else (0,)), dbias)


_fwd = _op.define("token_head_fwd -> (Tensor out)", reference.fwd, _fake_fwd,
                  record=TokenHeadCall)
_bwd = _op.define("token_head_bwd -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
                  reference.bwd, _fake_bwd,
                  record=TokenHeadGradient)


class _TokenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None,
                mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(*map(savable, (hidden, weight, bias, mask)))
        out = _fwd(TokenHeadCall(hidden, weight, bias, mask))
        if weight.shape[0] != 1:
            return out
        if torch.compiler.is_compiling():  # in place, torch 2.11 would compile a gradient of 0
            return out.squeeze(-1)
        return out.squeeze_(-1)  # outside `apply`: autograd has one node less

    @staticmethod
    @first_only(3)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        head = TokenHeadCall(*ctx.saved_tensors)
        if head.weight.shape[0] == 1:
            grad = grad.unsqueeze(-1)
        grads = _bwd(TokenHeadGradient(grad, head, *needed))
        return (*(g if want else None for g, want in zip(grads, needed, strict=True)), None)


@suggests
def token_head(
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [K, D]
        bias: Tensor | None = None,  # [K]
        mask: Tensor | None = None,  # [...] bool or whole numbers
        ) -> Tensor:
    """A linear head at the valid tokens, in fp32 whatever the dtype of the trunk.

        out[..., k] = sum_d hidden[..., d] weight[k, d] + bias[k], 0 where masked

    hidden: [..., D], padded or packed alike. weight: [K, D], bias: [K], of any floating dtype, not
    necessarily that of hidden. mask: bool or whole numbers, exactly hidden.shape[:-1]. Returns
    [..., K], or [...] where K = 1: values and scalar rewards at K = 1, reward classes at K = 3.

    bf16 and fp16 are multiplied and added in fp32, also under autocast, and the result is fp32;
    with any fp64 input all is fp64. No TF32 unless the user turned it on in torch. Differentiable
    in hidden, weight and bias: gradients are added up in fp32 and come in the dtype of their
    tensor; they are 0 at masked rows of hidden. On CPU the cost follows the valid rows.

    Raises ValueError / TypeError that name the argument.
    """
    check = Check("token_head")
    check.tensor("hidden", hidden, "... D")
    check.tensor("weight", weight, "K D")
    check.tensor("bias", bias, "K", optional=True)
    mask = check.mask("mask", mask, "...")
    call = TokenHeadCall(hidden, weight, bias, mask)
    if wanted(hidden, weight, bias):
        return recorded(_TokenHead, *flat(call))
    out = _fwd(call)
    return out.squeeze(-1) if weight.shape[0] == 1 else out
