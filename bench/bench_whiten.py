"""`whiten` against masked whitening as trainers write it, and that compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _harness import Case
from _machine import generator, normal, random_mask
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.whiten import NBYTES_PER_TOKEN
from tppo_kernels.testing import SEQUENTIAL_FLOOR

SHAPES = {"cpu": [(64, 512), (512, 2048)], "cuda": [(512, 2048), (8192, 4096)]}


def eager(x: Tensor, mask: Tensor) -> tuple[Tensor]:
    """Mean and variance by masked sums, n - 1: as in verl and TRL."""
    valid = mask.to(x.dtype)
    tokens = valid.sum()
    mean = (x * valid).sum() / tokens
    variance = ((x - mean).square() * valid).sum() / (tokens - 1)
    return ((x - mean) * torch.rsqrt(variance + 1e-8) * valid,)


def op(x: Tensor, mask: Tensor) -> tuple[Tensor]:
    """The operator on its best backend."""
    return (tk.whiten(x, mask),)


def case(batch: int, tokens: int, smoke: bool, device: str = "cpu") -> Case:
    """One shape in fp32; a quarter of the tokens are masked."""
    def make(seed: int) -> tuple[Tensor, Tensor]:
        g = generator(device, seed)
        return 3 + normal(g, batch, tokens), random_mask(g, batch, tokens)

    contenders: dict[str, Callable] = {"op": op, "eager": eager}
    if not smoke:
        contenders["compiled"] = torch.compile(eager)
    return Case("whiten", f"{batch} x {tokens}", NBYTES_PER_TOKEN * batch * tokens, make, eager,
                eager, contenders, floor=SEQUENTIAL_FLOOR, beats="eager")


@pytest.mark.parametrize("index", range(2))
def test_whiten(measure, shape_of, device, smoke, index):
    measure(case(*shape_of(SHAPES, index, (3, 17)), smoke, device))
