"""`linear_ppo_loss` against `ppo_loss` of log-probs from logits, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import _peers
import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal
from bench_linear_logprobs import (
    CASES,
    FEW,
    eager,
    exact,
    half,
    make_inputs,
    nbytes,
    products,
    shape_of,
    with_budgets,
)
from torch import Tensor

import tppo_kernels as tk

OPTIONS = {"entropy_coef": 0.01, "reduction": "token-mean"}
SEQUENCES = 8


def inputs(n: int, d: int, v: int, dtype: torch.dtype, valid: float, device: str,
           by_sequence: bool, seed: int) -> tuple[Tensor | None, ...]:
    """(hidden [B, T, D], weight, targets, old_logprobs, advantages, mask [B, T], rows or None).

    by_sequence: `SEQUENCES` of them with an advantage each, else one with an advantage a token.
    """
    hidden, weight, targets, mask, rows = make_inputs(n, d, v, dtype, valid, device, seed)
    g = generator(device, seed + 2)
    near = (hidden.float() * weight[targets].float()).sum(-1) - 11  # of log V = 10 to 12
    old = near + 0.1 * normal(g, n)
    batch = SEQUENCES if by_sequence else 1
    advantages = normal(g, *((batch,) if by_sequence else (1, n)))
    return (hidden.reshape(batch, -1, d), weight, targets.reshape(batch, -1),
            old.reshape(batch, -1), advantages, mask.reshape(batch, -1), rows)


def by_logits(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor,
              mask: Tensor, rows: Tensor | None, head: Callable = eager) -> Tensor:
    """What users write today, with this package's `ppo_loss`; head gives the log-probs, and the
    entropy if it has one."""
    results = head(hidden.flatten(0, 1), weight, targets.flatten(), mask.flatten(), rows)
    logprobs, *entropy = (x.view_as(mask) for x in results)
    options = {**OPTIONS, "entropy": entropy[0]} if entropy else {"reduction": "token-mean"}
    return tk.ppo_loss(logprobs, old, advantages, mask, **options).loss


def logprobs_alone(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor,
                   rows: Tensor | None) -> tuple[Tensor]:
    """`eager` without the entropy."""
    logits = hidden @ weight.T
    log_p = logits.log_softmax(-1, dtype=None if logits.dtype == torch.float64 else torch.float32)
    return (torch.where(mask, log_p.gather(-1, targets[:, None])[:, 0], 0),)


def exact_alone(*given: Tensor) -> tuple[Tensor]:
    """`exact` without the entropy."""
    return exact(*given)[:1]  # type: ignore[return-value]


def operator(*given: Tensor, **options: object) -> Tensor:
    """The operator."""
    return tk.linear_ppo_loss(*given[:6], rows=given[6], **options).loss  # type: ignore[arg-type]


def with_backward(function: Callable, frozen: bool = False) -> Function:
    """(loss, gradients of hidden and, unless frozen, of weight)."""
    def both(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]
        loss = function(*leaves, *rest)
        return loss.detach(), *torch.autograd.grad(loss, leaves[:1] if frozen else leaves)
    return both


def case_of(name: str, device: str, smoke: bool, dtype: torch.dtype, valid: float,
            by_sequence: bool, wrap: Callable, judges: tuple[Callable, Callable], *,
            contenders: dict[str, Callable], peers: dict[str, Callable], factors: int = 6) -> Case:
    """One shape; every function is wrapped. judges: exact, and eager. factors: see `products`."""
    n, d, v = shape_of(device, smoke, dtype, valid)
    kind = str(dtype).removeprefix("torch.") + name
    return Case(
        "linear_ppo_loss", f"{n} x {d} x {v} {kind} {valid:.1%} valid", nbytes(n, d, v, dtype),
        functools.partial(inputs, n, d, v, dtype, valid, device, by_sequence),
        *map(wrap, judges), {k: wrap(f) for k, f in contenders.items()}, grad=True,
        floor=1e-5 if dtype == torch.float32 else 1e-2,
        nflop=products(n, d, v, valid, factors), dtype=dtype,
        peers={k: wrap(f) for k, f in peers.items()})


@pytest.mark.parametrize("dtype, valid, frozen", [
    *((*case, False) for case in CASES), (torch.bfloat16, 1.0, True), (torch.bfloat16, FEW, True)])
def test_linear_ppo_loss(measure, device, smoke, dtype, valid, frozen):
    contenders = {**with_budgets(device, operator, **OPTIONS), "eager": by_logits}
    if not smoke:
        contenders["compiled"] = functools.partial(by_logits, head=torch.compile(eager))
    measure(case_of(
        ", frozen head" if frozen else "", device, smoke, dtype, valid, False,
        functools.partial(with_backward, frozen=frozen),
        (functools.partial(by_logits, head=exact), by_logits), contenders=contenders,
        peers={}, factors=4 if frozen else 6))


@pytest.mark.parametrize("valid", (1.0, FEW))
def test_an_advantage_a_sequence(measure, device, smoke, valid):
    """The one case that Liger's chunked loss has: no entropy, advantages [B]."""
    alone = functools.partial(by_logits, head=logprobs_alone)
    contenders = {"op": functools.partial(operator, reduction="token-mean"), "eager": alone}
    if not smoke:
        contenders["compiled"] = functools.partial(by_logits, head=torch.compile(logprobs_alone))
    heads = _peers.collect(device, {"trl": functools.partial(_peers.trl, entropy=False)})
    peers = _peers.collect(device, {"liger grpo": _peers.liger_grpo}) | {
        name: functools.partial(by_logits, head=head) for name, head in heads.items()}
    measure(case_of(", an advantage a sequence", device, smoke, half(device, smoke), valid, True,
                    with_backward,
                    (functools.partial(by_logits, head=exact_alone), alone), contenders=contenders,
                    peers=peers))
