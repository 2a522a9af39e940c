"""`token_logprobs` against what users write, and that compiled."""

from __future__ import annotations

from collections.abc import Callable

import _peers
import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels.ops.token_logprobs import nbytes

SHAPES = {"cpu": [(512, 32_000)], "cuda": [(8192, 151_936), (8192, 32_000)]}


def eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-softmax in fp32, then both results from it."""
    log_p = logits.log_softmax(-1, dtype=None if logits.dtype == torch.float64 else torch.float32)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def frugal(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-prob by logsumexp row by row, entropy by chunks of 128 rows: TRL's way."""
    lse = torch.stack([row.float().logsumexp(-1) for row in logits])
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - lse
    chunks = [x.float().log_softmax(-1) for x in logits.split(128)]
    return logprobs, torch.cat([-(x.exp() * x).sum(-1) for x in chunks])


def with_backward(function: Callable) -> Function:
    """(logprobs, entropy, gradient of a weighted sum of both)."""
    def both(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        logprobs, entropy = function(leaf, targets)
        total = logprobs.sum() + 0.5 * entropy.sum()
        return logprobs.detach(), entropy.detach(), torch.autograd.grad(total, leaf)[0]
    return both


def case(rows: int, vocabulary: int, dtype: torch.dtype, backward: bool, smoke: bool,
         device: str = "cpu") -> Case:
    """One shape; the contender "op" is the operator on its best backend."""
    def make(seed: int) -> tuple[Tensor, Tensor]:
        g = generator(device, seed)
        logits = (3 * normal(g, rows, vocabulary)).to(dtype)
        return logits, torch.randint(vocabulary, (rows,), generator=g, device=device)

    functions: dict[str, Callable] = {"op": tk.token_logprobs, "eager": eager}
    if dtype == torch.float32:
        functions["frugal"] = frugal
    if not smoke:
        functions["compiled"] = torch.compile(eager)
    peers = _peers.collect(device, {"trl": _peers.trl_logits, "trl triton": _peers.trl_triton})
    wrap = with_backward if backward else lambda f: f
    logits = torch.empty(rows, vocabulary, dtype=dtype, device="meta")
    name = str(dtype).removeprefix("torch.")
    return Case("token_logprobs", f"{rows} x {vocabulary} {name} "
                f"{'forward+backward' if backward else 'forward'}",
                nbytes(logits, backward=backward), make, wrap(eager), wrap(eager),
                {n: wrap(f) for n, f in functions.items()}, grad=backward, beats="eager",
                peers={n: wrap(f) for n, f in peers.items()})


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "both"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("index", range(2))
def test_token_logprobs(measure, shape_of, device, smoke, index, dtype, backward):
    measure(case(*shape_of(SHAPES, index, (8, 100)), dtype, backward, smoke, device))
