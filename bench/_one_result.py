"""What the benchmarks of operators with one result share: `kl`, `reduce`, `entropy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _harness import Case, Function
from torch import Tensor


def with_gradient(function: Callable[..., Tensor]) -> Function:
    """(result, gradient of its sum with respect to the first input)"""
    def both(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        value = function(leaf, *rest)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]
    return both


def alone(function: Callable[..., Tensor]) -> Function:
    """(result,)"""
    return lambda *given: (function(*given),)


def one_result(op: str, shape: str, nbytes: int, make: Callable[[int], tuple[Any, ...]],
               ours: Callable[..., Tensor], eager: Callable[..., Tensor], *, smoke: bool,
               backward: bool = True) -> Case:
    """A case of the operator against plain PyTorch, and that compiled."""
    wrap = with_gradient if backward else alone
    functions = {"op": ours, "eager": eager}
    if not smoke:
        functions["compiled"] = torch.compile(eager)
    return Case(op, f"{shape} {'forward+backward' if backward else 'forward'}", nbytes, make,
                wrap(eager), wrap(eager), {name: wrap(f) for name, f in functions.items()},
                grad=backward, beats="eager")
