"""`reduce` forward and backward against masked means as users write them, and those compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal, random_mask
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.reduce import NBYTES_PER_TOKEN

SHAPES = {"cpu": [(64, 2048)], "cuda": [(64, 2048), (8192, 4096)]}


def eager(x: Tensor, mask: Tensor) -> tuple[Tensor]:
    """The mean over sequences of their token means: as in verl and TRL."""
    valid = mask.to(x.dtype)
    lengths = valid.sum(-1)
    means = (x * valid).sum(-1) / lengths.clamp(min=1)
    return (means.sum() / (lengths > 0).sum().clamp(min=1),)


def op(x: Tensor, mask: Tensor) -> tuple[Tensor]:
    """The operator on its best backend."""
    return (tk.reduce(x, mask, reduction="seq-mean-token-mean"),)


def with_backward(function: Callable) -> Function:
    """(reduction, its gradient)"""
    def both(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        value, = function(leaf, mask)
        return value.detach(), torch.autograd.grad(value, leaf)[0]
    return both


def case(batch: int, tokens: int, smoke: bool, device: str = "cpu") -> Case:
    """One shape in fp32; a quarter of the tokens are masked. The values are positive, so that no
    sum nearly cancels."""
    def make(seed: int) -> tuple[Tensor, Tensor]:
        g = generator(device, seed)
        return normal(g, batch, tokens).abs(), random_mask(g, batch, tokens)

    functions: dict[str, Callable] = {"op": op, "eager": eager}
    if not smoke:
        functions["compiled"] = torch.compile(eager)
    return Case("reduce", f"{batch} x {tokens} forward+backward", NBYTES_PER_TOKEN * batch * tokens,
                make, with_backward(eager), with_backward(eager),
                {n: with_backward(f) for n, f in functions.items()}, grad=True, beats="eager")


@pytest.mark.parametrize("index", range(2))
def test_reduce(measure, shape_of, device, smoke, index):
    measure(case(*shape_of(SHAPES, index, (3, 17)), smoke, device))
