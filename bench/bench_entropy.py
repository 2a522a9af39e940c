"""`entropy` against what users write and that compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.entropy import nbytes

SHAPES = {"cpu": [(512, 32_000)], "cuda": [(8192, 151_936)]}


def eager(logits: Tensor) -> tuple[Tensor]:
    """By log_softmax, in fp32 at least."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return (-(log_p.exp() * log_p).sum(-1),)


def op(logits: Tensor) -> tuple[Tensor]:
    """The operator on its best backend."""
    return (tk.entropy(logits),)


def with_backward(function: Callable) -> Function:
    """(entropy, gradient of its sum)."""
    def both(logits: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        entropy, = function(leaf)
        return entropy.detach(), torch.autograd.grad(entropy.sum(), leaf)[0]
    return both


def case(rows: int, vocabulary: int, backward: bool, smoke: bool, device: str = "cpu") -> Case:
    """One shape in bf16 on a GPU, in fp32 on a CPU, whose eager computes bf16 no faster."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make(seed: int) -> tuple[Tensor]:
        return ((3 * normal(generator(device, seed), rows, vocabulary)).to(dtype),)

    wrap = with_backward if backward else lambda f: f
    functions: dict[str, Callable] = {"op": op, "eager": eager}
    if not smoke:
        functions["compiled"] = torch.compile(eager)
    logits = torch.empty(rows, vocabulary, dtype=dtype, device="meta")
    return Case("entropy", f"{rows} x {vocabulary} {str(dtype).removeprefix('torch.')} "
                f"{'forward+backward' if backward else 'forward'}",
                nbytes(logits, backward=backward), make, wrap(eager), wrap(eager),
                {n: wrap(f) for n, f in functions.items()}, grad=backward, beats="eager")


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "both"))
def test_entropy(measure, shape_of, device, smoke, backward):
    measure(case(*shape_of(SHAPES, 0, (8, 100)), backward, smoke, device))
