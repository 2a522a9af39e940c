"""`reduce` forward and backward against masked means as users write them, and those compiled."""

from __future__ import annotations

import pytest
from _harness import Case
from _machine import generator, normal, random_mask
from _one_result import one_result
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.reduce import NBYTES_PER_TOKEN

SHAPES = {"cpu": [(64, 2048)], "cuda": [(64, 2048), (8192, 4096)]}


def eager(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over sequences of their token means: as in verl and TRL."""
    valid = mask.to(x.dtype)
    lengths = valid.sum(-1)
    means = (x * valid).sum(-1) / lengths.clamp(min=1)
    return means.sum() / (lengths > 0).sum().clamp(min=1)


def op(x: Tensor, mask: Tensor) -> Tensor:
    """The operator on its best backend."""
    return tk.reduce(x, mask, reduction="seq-mean-token-mean")


def case(batch: int, tokens: int, smoke: bool, device: str = "cpu") -> Case:
    """One shape in fp32; a quarter of the tokens are masked. The values are positive, so that no
    sum nearly cancels."""
    def make(seed: int) -> tuple[Tensor, Tensor]:
        g = generator(device, seed)
        return normal(g, batch, tokens).abs(), random_mask(g, batch, tokens)

    return one_result("reduce", f"{batch} x {tokens}", NBYTES_PER_TOKEN * batch * tokens, make, op,
                      eager, smoke=smoke)


@pytest.mark.parametrize("index", range(2))
def test_reduce(measure, shape_of, device, smoke, index):
    measure(case(*shape_of(SHAPES, index, (3, 17)), smoke, device))
