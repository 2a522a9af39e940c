"""`token_advantages` against what trainers run: a KL penalty, a Python loop over T, whitening."""

from __future__ import annotations

import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal, random_mask
from bench_gae import GAMMA, LAM, loop
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.token_advantages import NBYTES_PER_TOKEN
from tppo_kernels.testing import SEQUENTIAL_FLOOR

SHAPES = {"cpu": [(8, 2048), (64, 512)], "cuda": [(64, 512), (512, 2048), (8192, 4096)]}
KL_COEF = 0.05


def composed(rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor,
             mask: Tensor) -> tuple[Tensor, ...]:
    """(whitened advantages, returns, shaped rewards)."""
    shaped = torch.where(mask, rewards - KL_COEF * (logprobs - ref_logprobs), 0)
    advantages, returns = loop(shaped, values, mask)
    n = mask.sum()
    mean = advantages.sum() / n
    var = torch.where(mask, advantages - mean, 0).square().sum() / (n - 1)
    return torch.where(mask, (advantages - mean) * torch.rsqrt(var + 1e-8), 0), returns, shaped


def op(rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor,
       mask: Tensor) -> tuple[Tensor, ...]:
    """The operator on its best backend; it gives statistics as well."""
    return tk.token_advantages(rewards, values, mask, logprobs=logprobs, ref_logprobs=ref_logprobs,
                               kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)[:3]


def on_triton(*inputs: Tensor) -> tuple[Tensor, ...]:
    """What runs on a GPU without the compiled part."""
    with tk.use_backend("triton"):
        return op(*inputs)


def case(batch: int, tokens: int, device: str) -> Case:
    """One shape; a quarter of the tokens are masked."""
    def make(seed: int) -> tuple[Tensor, ...]:
        g = generator(device, seed)
        rewards, values, logprobs, noise = normal(g, 4, batch, tokens)
        return (rewards, values, logprobs, logprobs + 0.1 * noise,
                random_mask(g, batch, tokens))

    contenders: dict[str, Function] = {"op": op, "composed": composed}
    if device == "cuda":
        contenders["triton"] = on_triton
    return Case("token_advantages", f"{batch} x {tokens}", NBYTES_PER_TOKEN * batch * tokens, make,
                composed, composed, contenders, floor=SEQUENTIAL_FLOOR, beats="composed")


@pytest.mark.parametrize("index", range(3))
def test_token_advantages(measure, shape_of, device, smoke, index):
    measure(case(*shape_of(SHAPES, index, (3, 17)), device))
