"""`linear_logprobs` against logits and their log-softmax, forward and backward, and against what
else computes them in chunks.

On a GPU nothing waits for a count of rows: where few are valid, their list is an input, as a
trainer finds it once a batch. On a CPU the operators find it themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable

import _peers
import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal, random_mask
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tppo_kernels as tk

SHAPES = {"cpu": (1024, 512, 16_000), "cuda": (16_384, 4096, 128_256), "smoke": (16, 8, 100)}
FEW, GOAL = 0.012, 0.06  # of a prompt of 2,048 and a response of 24: 1.2 %; a CPU's goal: 6 %
CASES = [(torch.bfloat16, 1.0), (torch.bfloat16, FEW), (torch.float32, 1.0), (torch.float32, FEW),
         (torch.float32, GOAL)]  # 16 bits first: the time of a GPU is short


def states(n: int, d: int, v: int, dtype: torch.dtype, device: str, seed: int
           ) -> tuple[Tensor, ...]:
    """(hidden [N, D], weight [V, D], targets [N])."""
    g = generator(device, seed)
    hidden = normal(g, n, d).to(dtype)
    weight = (normal(g, v, d) / d ** 0.5).to(dtype)
    return hidden, weight, torch.randint(v, (n,), generator=g, device=device)


def make_inputs(n: int, d: int, v: int, dtype: torch.dtype, valid: float, device: str, seed: int
                ) -> tuple[Tensor | None, ...]:
    """(hidden, weight, targets, mask [N], rows or None)."""
    mask = random_mask(generator(device, seed + 1), n, share=valid)
    mask[n // 2] = True
    listed = valid < 1 and device != "cpu"
    return *states(n, d, v, dtype, device, seed), mask, tk.valid_rows(mask) if listed else None


def nbytes(n: int, d: int, v: int, dtype: torch.dtype) -> int:
    """Hidden states and weight, read twice, and their gradients: what must move beside products."""
    return 3 * (n + v) * d * dtype.itemsize


def products(n: int, d: int, v: int, valid: float, factors: int) -> int:
    """Operations of the products of the valid rows: `factors` N V D, 2 of them each product."""
    return factors * round(n * valid) * v * d


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, rows: Tensor | None = None
          ) -> tuple[Tensor, Tensor]:
    """All logits, an fp32 log-softmax, both results from it."""
    logits = hidden @ weight.T
    log_p = logits.log_softmax(-1, dtype=None if logits.dtype == torch.float64 else torch.float32)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(mask, logprobs, 0), torch.where(mask, entropy, 0)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, rows: Tensor | None = None
          ) -> tuple[Tensor, ...]:
    """`eager` by 1,024 rows: in fp64 the logits of a GPU's shape are 17 GB, and backward's more."""
    return in_parts(functools.partial(checkpoint, eager, use_reentrant=False),
                    hidden, weight, targets, mask)


def in_fp64(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor,
            rows: Tensor | None = None) -> tuple[Tensor, ...]:
    """`exact` where no gradient is asked for."""
    return in_parts(eager, hidden, weight, targets, mask)


def in_parts(function: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor
             ) -> tuple[Tensor, ...]:
    """The results of the function on 1,024 rows at a time."""
    parts = [function(h, weight, t, m)
             for h, t, m in zip(*(x.split(1024) for x in (hidden, targets, mask)), strict=True)]
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def op(*given: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """The operator."""
    return tk.linear_logprobs(*given[:4], rows=given[4], **options)  # type: ignore[arg-type]


def with_backward(function: Callable, frozen: bool = False) -> Function:
    """(logprobs, entropy, gradients of hidden and, unless frozen, of weight)."""
    def both(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]
        logprobs, entropy = function(*leaves, *rest)
        total = logprobs.sum() if frozen else logprobs.sum() + 0.5 * entropy.sum()
        return (logprobs.detach(), entropy.detach(),
                *torch.autograd.grad(total, leaves[:1] if frozen else leaves))
    return both


def with_sum(function: Callable) -> Function:
    """(sum of logprobs, gradients of hidden and weight)."""
    def both(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        total = function(*leaves, *rest)
        return total.detach(), *torch.autograd.grad(total, leaves)
    return both


def half(device: str, smoke: bool) -> torch.dtype:
    """bf16 where products of it are fast: PyTorch takes a minute each on a CPU before AVX-512."""
    fast = smoke or device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def shape_of(device: str, smoke: bool, dtype: torch.dtype, valid: float) -> tuple[int, int, int]:
    """(N, D, V); skips what is not for this device."""
    if valid == GOAL and device != "cpu":
        pytest.skip("a shape of a CPU")
    if dtype == torch.bfloat16 and half(device, smoke) != dtype:
        pytest.skip("products in bf16 take minutes on this CPU")
    return SHAPES["smoke" if smoke else device]


def case_of(name: str, device: str, smoke: bool, dtype: torch.dtype, valid: float, wrap: Callable,
            judges: tuple[Callable, Callable], contenders: dict[str, Callable], *,
            peers: dict[str, Callable] | None = None, factors: int = 6) -> Case:
    """One shape; every function is wrapped. judges: exact, and eager. factors: see `products`."""
    n, d, v = shape_of(device, smoke, dtype, valid)
    kind = str(dtype).removeprefix("torch.")
    return Case("linear_logprobs", f"{n} x {d} x {v} {kind} {valid:.1%} valid{name}",
                nbytes(n, d, v, dtype),
                functools.partial(make_inputs, n, d, v, dtype, valid, device),
                *map(wrap, judges), {k: wrap(f) for k, f in contenders.items()},
                grad=factors > 2, floor=1e-5 if dtype == torch.float32 else 1e-2,
                nflop=products(n, d, v, valid, factors), dtype=dtype,
                peers={k: wrap(f) for k, f in (peers or {}).items()})


def with_budgets(device: str, function: Callable, **options: object) -> dict[str, Callable]:
    """The operator as it is, and on a GPU with budgets whatever the card has."""
    budgets = {} if device == "cpu" else {"1 GiB": 1 << 30, "8 GiB": 8 << 30}
    return {"op": functools.partial(function, **options),
            **{name: functools.partial(function, **{**options, "memory": nbytes})
               for name, nbytes in budgets.items()}}


@pytest.mark.parametrize("dtype, valid", CASES)
def test_linear_logprobs(measure, device, smoke, dtype, valid):
    contenders = {**with_budgets(device, op, memory="store"),
                  "recompute": functools.partial(op, memory="recompute"), "eager": eager}
    if not smoke:
        contenders["compiled"] = torch.compile(eager)
    peers = {}
    if dtype == torch.bfloat16 or (device == "cpu" and valid != GOAL):
        peers = _peers.collect(device, with_entropy(device))
    measure(case_of("", device, smoke, dtype, valid, with_backward, (exact, eager), contenders,
                    peers=peers))


def with_entropy(device: str) -> dict[str, _peers.Builder]:
    """The peers that give log-probs and entropies."""
    return {"trl": _peers.trl, "verl": _peers.verl, "verl triton": _peers.verl_triton,
            _peers.liger_names(device)[0]: _peers.liger_scaled}


def test_forward(measure, device, smoke):
    """Log-probs and entropies alone, as a reference model's are computed."""
    dtype = half(device, smoke)
    measure(case_of(", forward", device, smoke, dtype, 1.0, lambda f: f, (in_fp64, eager),
                    {**with_budgets(device, op), "eager": eager},
                    peers=_peers.collect(device, with_entropy(device)), factors=2))


@pytest.mark.parametrize("valid", (1.0, FEW))
def test_frozen_head(measure, device, smoke, valid):
    contenders = {**with_budgets(device, op, entropy_grad=False), "eager": eager}
    measure(case_of(", frozen head", device, smoke, half(device, smoke), valid,
                    functools.partial(with_backward, frozen=True), (exact, eager), contenders,
                    factors=4))


@pytest.mark.parametrize("valid", (1.0, FEW))
def test_sum_of_logprobs(measure, device, smoke, valid):
    """Beside what has no entropy and no log-prob of a token."""
    def summed(function: Callable, *given: Tensor) -> Tensor:
        return function(*given)[0].sum()

    judges = tuple(functools.partial(summed, f) for f in (exact, eager))
    contenders = {name: functools.partial(summed, f)
                  for name, f in with_budgets(device, op).items()}
    measure(case_of(", sum of log-probs", device, smoke, half(device, smoke), valid, with_sum,
                    judges, {**contenders, "eager": judges[1]},
                    peers=_peers.collect(device, {
                        "torch": _peers.torch_linear, "cce": _peers.cce,
                        _peers.liger_names(device)[1]: _peers.liger_ce})))
