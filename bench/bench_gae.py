"""`gae` against a Python loop over T."""

from __future__ import annotations

import functools

import _peers
import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.gae import NBYTES_PER_TOKEN
from tppo_kernels.testing import SEQUENTIAL_FLOOR

SHAPES = {"cpu": [(8, 2048), (64, 512), (512, 2048)], "cuda": [(512, 2048), (8192, 4096)]}
GAMMA, LAM = 0.99, 0.95


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One step of Python a token, from the last to the first: how trainers compute it."""
    zero = torch.zeros_like(values[:, 0])
    behind, carry, advantages = zero, zero, []
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + GAMMA * behind - values[:, t] + GAMMA * LAM * carry
        carry = torch.where(mask[:, t], step, carry)
        behind = torch.where(mask[:, t], values[:, t], behind)
        advantages.append(carry)
    result = torch.stack(advantages[::-1], 1)
    return torch.where(mask, result, 0), torch.where(mask, result + values, 0)


def op(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The operator on its best backend."""
    return tuple(tk.gae(rewards, values, mask, gamma=GAMMA, lam=LAM))  # type: ignore[return-value]


def on_triton(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What runs on a GPU without the compiled part."""
    with tk.use_backend("triton"):
        return op(*inputs)


def case(batch: int, tokens: int, smoke: bool, device: str = "cpu") -> Case:
    """One shape; responses of half to all of T tokens, right-padded as trainers have them."""
    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        g = generator(device, seed)
        rewards, values = normal(g, 2, batch, tokens)
        lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=g, device=device)
        return rewards, values, torch.arange(tokens, device=device) < lengths

    contenders: dict[str, Function] = {"op": op, "loop": loop}
    if device == "cuda":
        contenders["triton"] = on_triton
    if not smoke and tokens <= 128:  # it unrolls the loop: at 2,048 steps it compiles for an hour
        contenders["compiled"] = torch.compile(loop)
    peers = _peers.collect(
        device, {"torchrl": functools.partial(_peers.torchrl, gamma=GAMMA, lam=LAM)})
    return Case("gae", f"{batch} x {tokens}", NBYTES_PER_TOKEN * batch * tokens, make, loop, loop,
                contenders, floor=SEQUENTIAL_FLOOR, beats="loop", peers=peers)


@pytest.mark.parametrize("index", range(3))
def test_gae(measure, shape_of, device, smoke, index):
    measure(case(*shape_of(SHAPES, index, (3, 17)), smoke, device))
