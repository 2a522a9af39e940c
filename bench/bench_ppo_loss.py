"""`ppo_loss` forward and backward, with the metrics that trainers log, against what users write and
that compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal, random_mask
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.ppo_loss import NBYTES_PER_TOKEN

SHAPES = {"cpu": [(64, 512)], "cuda": [(64, 512), (8192, 4096)]}
CLIP = 0.2


def eager(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The loss, its clip fraction and approximate KL by masked means: as in verl and TRL."""
    valid = mask.to(logprobs.dtype)
    tokens = valid.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * valid).sum() / tokens

    d = (logprobs - old).clamp(-20, 20)
    ratio = d.exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    return (mean(torch.maximum(free, held)), mean((held > free).to(valid.dtype)).detach(),
            mean(-d).detach())


def op(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The operator on its best backend."""
    loss, metrics = tk.ppo_loss(logprobs, old, advantages, mask, clip_low=CLIP, clip_high=CLIP)
    return loss, metrics.clip_fraction, metrics.approx_kl_k1


def with_backward(function: Callable) -> Function:
    """(loss, clip fraction, KL, gradient of the log-probs)."""
    def both(logprobs: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaf = logprobs.detach().requires_grad_()
        loss, *metrics = function(leaf, *rest)
        return loss.detach(), *metrics, torch.autograd.grad(loss, leaf)[0]
    return both


def case(batch: int, tokens: int, smoke: bool, device: str = "cpu") -> Case:
    """One shape in fp32; a quarter of the tokens are masked."""
    def make(seed: int) -> tuple[Tensor, ...]:
        g = generator(device, seed)
        old = -3 * torch.rand(batch, tokens, generator=g, device=device)
        drift, advantages = normal(g, 2, batch, tokens)
        return old + 0.2 * drift, old, advantages, random_mask(g, batch, tokens)

    functions: dict[str, Callable] = {"op": op, "eager": eager}
    if not smoke:
        functions["compiled"] = torch.compile(eager)
    return Case("ppo_loss", f"{batch} x {tokens} forward+backward",
                NBYTES_PER_TOKEN * batch * tokens, make, with_backward(eager),
                with_backward(eager), {n: with_backward(f) for n, f in functions.items()},
                grad=True, beats="eager")


@pytest.mark.parametrize("index", range(2))
def test_ppo_loss(measure, shape_of, device, smoke, index):
    measure(case(*shape_of(SHAPES, index, (3, 17)), smoke, device))
