"""`kl` forward and backward against verl's formula of k3 as users write it, and that compiled."""

from __future__ import annotations

import pytest
from _harness import Case
from _machine import generator, normal, random_mask
from _one_result import one_result
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.kl import NBYTES_PER_TOKEN

SHAPES = {"cpu": [(64, 2048)], "cuda": [(64, 2048), (8192, 4096)]}
CLAMP = 10.0


def eager(logprobs: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """k3 with both clamps, as in verl and SkyRL."""
    d = (ref - logprobs).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-CLAMP, CLAMP) * mask


def op(logprobs: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """The operator on its best backend."""
    return tk.kl(logprobs, ref, mask, estimator="k3", clamp=CLAMP)


def case(batch: int, tokens: int, smoke: bool, device: str = "cpu") -> Case:
    """One shape in fp32; a quarter of the tokens are masked."""
    def make(seed: int) -> tuple[Tensor, ...]:
        g = generator(device, seed)
        drift, ref = normal(g, 2, batch, tokens)
        return ref + drift, ref, random_mask(g, batch, tokens)

    return one_result("kl", f"{batch} x {tokens}", NBYTES_PER_TOKEN * batch * tokens, make, op,
                      eager, smoke=smoke)


@pytest.mark.parametrize("index", range(2))
def test_kl(measure, shape_of, device, smoke, index):
    measure(case(*shape_of(SHAPES, index, (3, 17)), smoke, device))
