"""`token_head` against a linear layer on states brought to fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal
from torch import Tensor
from torch.nn import functional as F

import tppo_kernels as tk
from tppo_kernels.ops.token_head import nbytes

SHAPES = {"cpu": [(4096, 1536, 1), (4096, 1536, 3)], "cuda": [(16_384, 4096, 1), (16_384, 4096, 3)]}


def eager(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An fp32 head on a trunk of any dtype, as users write it."""
    return F.linear(hidden.to(weight.dtype), weight, bias)


def both(function: Callable) -> Function:
    """(out, gradients of a weighted sum)."""
    def run(hidden: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, grad.to(out.dtype).reshape(out.shape))
        return out.detach().reshape(grad.shape), *grads
    return run


def case(rows: int, D: int, K: int, dtype: torch.dtype, smoke: bool, device: str = "cpu") -> Case:
    """One shape, all rows valid; weight and bias in fp32."""
    def make(seed: int) -> tuple[Tensor, ...]:
        g = generator(device, seed)
        hidden, weight, bias, grad = (normal(g, *s) for s in ((rows, D), (K, D), (K,), (rows, K)))
        return hidden.to(dtype), weight / D ** 0.5, bias, grad

    functions: dict[str, Callable] = {"op": tk.token_head, "eager": eager}
    if not smoke:
        functions["compiled"] = torch.compile(eager)
    hidden = torch.empty(rows, D, dtype=dtype, device="meta")
    weight = torch.empty(K, D, device="meta")
    return Case("token_head", f"{rows} x {D} {str(dtype).removeprefix('torch.')}, K {K}, "
                "forward+backward", nbytes(hidden, weight), make, both(eager), both(eager),
                {name: both(f) for name, f in functions.items()}, grad=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("index", range(2))
def test_token_head(measure, device, smoke, index, dtype):
    measure(case(*((9, 16, 3) if smoke else SHAPES[device][index]), dtype, smoke, device))
