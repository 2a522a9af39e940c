"""`linear_ppo_loss` against `ppo_loss` of log-probs from logits, forward and backward. Goals on a
CPU: all rows valid at least 1.0 times eager, 6 % of the rows valid 6 times."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from _harness import Case, Function
from bench_linear_logprobs import FEW, SHAPES, eager, make_inputs, nbytes
from torch import Tensor

import tppo_kernels as tk

OPTIONS = {"entropy_coef": 0.01, "reduction": "token-mean"}


def inputs(n: int, d: int, v: int, dtype: torch.dtype, valid: float, seed: int
           ) -> tuple[Tensor, ...]:
    """(hidden [1, N, D], weight [V, D], targets, old_logprobs, advantages, mask [1, N])."""
    hidden, weight, targets, mask = make_inputs(n, d, v, dtype, valid, seed)
    g = torch.Generator().manual_seed(seed + 1)
    logits = hidden.double() @ weight[targets].double().T
    old = logits.diagonal().float() - 11 + 0.1 * torch.randn(n, generator=g)
    advantages = torch.randn(n, generator=g)
    return hidden[None], weight, targets[None], old[None], advantages[None], mask[None]


def by_logits(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor,
              mask: Tensor) -> Tensor:
    """What users write today, with this package's `ppo_loss`."""
    logprobs, entropy = eager(hidden[0], weight, targets[0], mask[0])
    return tk.ppo_loss(logprobs[None], old, advantages, mask, entropy=entropy[None],
                       **OPTIONS).loss


def operator(*given: Tensor, memory: str | int = "auto") -> Tensor:
    """The operator."""
    return tk.linear_ppo_loss(*given, memory=memory, **OPTIONS).loss


def with_backward(function: Callable, frozen: bool) -> Function:
    """(loss, gradients of hidden and, unless frozen, of weight)."""
    def both(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]
        loss = function(*leaves, *rest)
        return loss.detach(), *torch.autograd.grad(loss, leaves[:1] if frozen else leaves)
    return both


@pytest.mark.parametrize("few", (False, True), ids=("all valid", "few valid"))
@pytest.mark.parametrize("dtype, frozen", ((torch.float32, False), (torch.bfloat16, False),
                                           (torch.bfloat16, True)))
def test_linear_ppo_loss(measure, device, smoke, dtype, frozen, few):
    n, d, v = SHAPES["smoke" if smoke else device]
    valid = FEW[device] if few else 1.0
    contenders = {"op": operator, "eager": by_logits}
    if device != "cpu":
        contenders["8 GiB"] = functools.partial(operator, memory=8 << 30)
    wrap = functools.partial(with_backward, frozen=frozen)
    name = str(dtype).removeprefix("torch.") + (", frozen head" if frozen else "")
    measured = measure(Case(
        "linear_ppo_loss", f"{n} x {d} x {v} {name} {valid:.1%} valid", nbytes(n, d, v, dtype),
        functools.partial(inputs, n, d, v, dtype, valid), wrap(by_logits), wrap(by_logits),
        {k: wrap(f) for k, f in contenders.items()}, grad=True,
        floor=1e-5 if dtype == torch.float32 else 1e-2))
    if device == "cpu" and dtype == torch.float32 and not smoke:
        assert measured["op"].speed_up["eager"] >= (6.0 if few else 1.0)
