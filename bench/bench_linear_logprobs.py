"""`linear_logprobs` against logits and their log-softmax, forward and backward. Goals on a CPU: all
rows valid, "store" at least 1.0 times eager and "recompute" 0.7; 6 % of the rows valid, 6 times."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from _harness import Case, Function
from torch import Tensor

import tppo_kernels as tk

SHAPES = {"cpu": (1024, 512, 16_000), "cuda": (16_384, 4096, 128_256), "smoke": (16, 8, 100)}


def make_inputs(n: int, d: int, v: int, dtype: torch.dtype, valid: float, seed: int
                ) -> tuple[Tensor, ...]:
    """(hidden [N, D], weight [V, D], targets [N], mask [N])."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, d, generator=g) / d ** 0.5).to(dtype)
    mask = torch.rand(n, generator=g) < valid
    return hidden, weight, torch.randint(v, (n,), generator=g), mask


def nbytes(n: int, d: int, v: int, dtype: torch.dtype) -> int:
    """Hidden states and weight, read twice, and their gradients: what must move beside products."""
    return 3 * (n + v) * d * dtype.itemsize


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """All logits, an fp32 log-softmax, both results from it."""
    logits = hidden @ weight.T
    log_p = logits.log_softmax(-1, dtype=None if logits.dtype == torch.float64 else torch.float32)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(mask, logprobs, 0), torch.where(mask, entropy, 0)


def with_backward(function: Callable) -> Function:
    """(logprobs, entropy, gradients of hidden and weight)."""
    def both(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        logprobs, entropy = function(*leaves, *rest)
        total = logprobs.sum() + 0.5 * entropy.sum()
        return logprobs.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)
    return both


@pytest.mark.parametrize("valid", (1.0, 0.06), ids=("all valid", "6 % valid"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_linear_logprobs(measure, device, smoke, dtype, valid):
    n, d, v = SHAPES["smoke" if smoke else device]
    contenders = {"op": functools.partial(tk.linear_logprobs, memory="store"),
                  "recompute": functools.partial(tk.linear_logprobs, memory="recompute"),
                  "eager": eager}
    if not smoke:
        contenders["compiled"] = torch.compile(eager)
    name = str(dtype).removeprefix("torch.")
    measured = measure(Case(
        "linear_logprobs", f"{n} x {d} x {v} {name} {valid:.0%} valid", nbytes(n, d, v, dtype),
        functools.partial(make_inputs, n, d, v, dtype, valid), with_backward(eager),
        with_backward(eager), {k: with_backward(f) for k, f in contenders.items()}, grad=True,
        floor=1e-5 if dtype == torch.float32 else 1e-2))
    if device == "cpu" and dtype == torch.float32 and not smoke:
        assert measured["op"].speed_up["eager"] >= (1.0 if valid == 1.0 else 6.0)
        assert measured["recompute"].speed_up["eager"] >= 0.7
