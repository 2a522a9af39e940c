"""`entropy` against what users write and that compiled."""

from __future__ import annotations

import pytest
import torch
from _harness import Case
from _machine import generator, normal
from _one_result import one_result
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.entropy import nbytes

SHAPES = {"cpu": [(512, 32_000)], "cuda": [(8192, 151_936)]}


def eager(logits: Tensor) -> Tensor:
    """By log_softmax, in fp32 at least."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return -(log_p.exp() * log_p).sum(-1)


def case(rows: int, vocabulary: int, backward: bool, smoke: bool, device: str = "cpu") -> Case:
    """One shape in bf16 on a GPU, in fp32 on a CPU, whose eager computes bf16 no faster."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make(seed: int) -> tuple[Tensor]:
        return ((3 * normal(generator(device, seed), rows, vocabulary)).to(dtype),)

    logits = torch.empty(rows, vocabulary, dtype=dtype, device="meta")
    return one_result("entropy", f"{rows} x {vocabulary} {str(dtype).removeprefix('torch.')}",
                      nbytes(logits, backward=backward), make, tk.entropy, eager, smoke=smoke,
                      backward=backward)


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "both"))
def test_entropy(measure, shape_of, device, smoke, backward):
    measure(case(*shape_of(SHAPES, 0, (8, 100)), backward, smoke, device))
