"""`value_loss` forward and backward, with the metrics that trainers log, against what users write
and that compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal, random_mask
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.value_loss import NBYTES_PER_TOKEN

SHAPES = {"cpu": [(64, 512)], "cuda": [(64, 512), (8192, 4096)]}
CLIP = 0.5


def eager(values: Tensor, returns: Tensor, old: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The clipped loss and its clip fraction by masked means: as in verl and TRL."""
    valid = mask.to(values.dtype)
    tokens = valid.sum()
    held_values = torch.clamp(values, old - CLIP, old + CLIP)
    free, held = (values - returns).square(), (held_values - returns).square()
    loss = 0.5 * (torch.maximum(free, held) * valid).sum() / tokens
    return loss, (((held > free) * valid).sum() / tokens).detach()


def op(values: Tensor, returns: Tensor, old: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The operator on its best backend."""
    loss, metrics = tk.value_loss(values, returns, mask, old_values=old, clip=CLIP)
    return loss, metrics.clip_fraction


def with_backward(function: Callable) -> Function:
    """(loss, clip fraction, gradient of the values)."""
    def both(values: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaf = values.detach().requires_grad_()
        loss, fraction = function(leaf, *rest)
        return loss.detach(), fraction, torch.autograd.grad(loss, leaf)[0]
    return both


def case(batch: int, tokens: int, smoke: bool, device: str = "cpu") -> Case:
    """One shape in fp32; a quarter of the tokens are masked."""
    def make(seed: int) -> tuple[Tensor, ...]:
        g = generator(device, seed)
        drift, returns, old = normal(g, 3, batch, tokens)
        return old + 0.3 * drift, returns, old, random_mask(g, batch, tokens)

    functions: dict[str, Callable] = {"op": op, "eager": eager}
    if not smoke:
        functions["compiled"] = torch.compile(eager)
    return Case("value_loss", f"{batch} x {tokens} forward+backward",
                NBYTES_PER_TOKEN * batch * tokens, make, with_backward(eager),
                with_backward(eager), {n: with_backward(f) for n, f in functions.items()},
                grad=True, beats="eager")


@pytest.mark.parametrize("index", range(2))
def test_value_loss(measure, shape_of, device, smoke, index):
    measure(case(*shape_of(SHAPES, index, (3, 17)), smoke, device))
