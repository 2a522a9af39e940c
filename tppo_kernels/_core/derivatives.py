"""Whether a call is differentiated, in any mode of torch; derivatives that do not exist raise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its `autograd.Function` because of these inputs.

    Also where `vmap` hides that a tensor requires a gradient, and in forward mode, which needs no
    such tensor: there the Function refuses the call, while a raw op would drop the derivative.
    """
    if torch.is_grad_enabled() and any(map(_requires_grad, tensors)):
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _requires_grad(x: Tensor | None) -> bool:
    while x is not None and not x.requires_grad:
        if (torch.compiler.is_compiling()
                or not torch._C._functorch.is_functorch_wrapped_tensor(x)):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return x is not None


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """For an operator without a Function, whose raw op would drop the derivative."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{op}: an input has a tangent, and there is no jvp: forward "
                                  "mode is not computed here")


def savable(x: Tensor | None) -> Tensor | None:
    """x, or a copy where inference mode made it, as it does in a rollout: autograd cannot save it.

    In a compiled call autograd saves no tensor of the caller's that it could refuse.
    """
    if x is None or torch.compiler.is_compiling() or not x.is_inference():
        return x
    return x.clone()


class _NoSecond(torch.autograd.Function):
    """Passes a first derivative through; differentiating it with respect to its inputs raises."""

    @staticmethod
    def forward(ctx, derivative, *_):
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a fused operator has no second derivative: its gradient was to be "
                           "differentiated, after backward with create_graph=True")


def first_only(count: int) -> Callable[[Callable], Callable]:
    """For the backward of a Function whose first `count` saved tensors are the inputs that it
    differentiates with respect to; those that need no gradient may be None.

    Torch's `once_differentiable` gives a second derivative of 0 where the incoming gradient is a
    constant, as that of a loss is.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def refusing(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return results
            by = (*grads, *ctx.saved_tensors[:count])
            return tuple(x if x is None else _NoSecond.apply(x, *by) for x in results)

        return refusing

    return decorate
