"""`linear_logprobs` against logits and their log-softmax, forward and backward, and against what
else computes them in chunks. Goals on a CPU: all rows valid, "store" at least 1.0 times eager and
"recompute" 0.7; 6 % of the rows valid, 6 times."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _harness import Case, Function
from torch import Tensor

import tppo_kernels as tk

SHAPES = {"cpu": (1024, 512, 16_000), "cuda": (16_384, 4096, 128_256), "smoke": (16, 8, 100)}
FEW = {"cpu": 0.06, "cuda": 0.012}  # valid; of a prompt of 2,048 and a response of 24: 1.2 %


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


def peers(device: str) -> dict[str, Callable]:
    """What an installed trainer computes both results with."""
    found: dict[str, Callable] = {}
    if importlib.util.find_spec("trl") and importlib.util.find_spec("trl.kernels"):
        from trl.kernels import ChunkedLogProbFunction

        def trl(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> tuple:
            logprobs, entropy = ChunkedLogProbFunction.apply(
                hidden[mask], weight, None, targets[mask], 1.0, 256, None, 1.0, ("entropy",))[:2]
            zeros = logprobs.new_zeros(mask.shape)
            return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)

        found["trl"] = trl
    if device != "cpu" and importlib.util.find_spec("verl"):
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        def verl(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> tuple:
            both = linear_cross_entropy(hidden, weight, targets, 1.0, "none")
            return tuple(torch.where(mask, x, 0) for x in both)

        found["verl"] = verl
    return found


def sum_peers(device: str) -> dict[str, Callable]:
    """What computes a sum of log-probs only."""
    def by_torch(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, torch.where(mask, targets, -100),
                                       reduction="sum", ignore_index=-100)

    found: dict[str, Callable] = {"torch": by_torch}
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cce"] = lambda hidden, weight, targets, mask: -linear_cross_entropy(
            hidden, weight, torch.where(mask, targets, -100), reduction="sum", filter_eps=None,
            impl="torch_compile" if device == "cpu" else "cce")
    if device != "cpu" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        found["liger"] = lambda hidden, weight, targets, mask: (
            -LigerFusedLinearCrossEntropyFunction.apply(
                hidden, weight, torch.where(mask, targets, -100), None, None, -100, 0.0, 0.0,
                "sum")[0])
    return found


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


def case_of(name: str, device: str, smoke: bool, dtype: torch.dtype, few: bool, wrap: Callable,
            baseline: Callable, contenders: dict[str, Callable]) -> Case:
    """One shape; every contender is wrapped."""
    n, d, v = SHAPES["smoke" if smoke else device]
    valid = FEW[device] if few else 1.0
    kind = str(dtype).removeprefix("torch.")
    return Case("linear_logprobs", f"{n} x {d} x {v} {kind} {valid:.1%} valid{name}",
                nbytes(n, d, v, dtype), functools.partial(make_inputs, n, d, v, dtype, valid),
                wrap(baseline), wrap(baseline), {k: wrap(f) for k, f in contenders.items()},
                grad=True, floor=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("few", (False, True), ids=("all valid", "few valid"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_linear_logprobs(measure, device, smoke, dtype, few):
    contenders = {"op": functools.partial(tk.linear_logprobs, memory="store"),
                  "recompute": functools.partial(tk.linear_logprobs, memory="recompute"),
                  "eager": eager, **peers(device)}
    if device != "cpu":
        contenders["8 GiB"] = functools.partial(tk.linear_logprobs, memory=8 << 30)
    if not smoke:
        contenders["compiled"] = torch.compile(eager)
    measured = measure(case_of("", device, smoke, dtype, few, with_backward, eager, contenders))
    if device == "cpu" and dtype == torch.float32 and not smoke:
        assert measured["op"].speed_up["eager"] >= (6.0 if few else 1.0)
        assert measured["recompute"].speed_up["eager"] >= 0.7


@pytest.mark.parametrize("few", (False, True), ids=("all valid", "few valid"))
def test_frozen_head(measure, device, smoke, few):
    contenders = {"op": functools.partial(tk.linear_logprobs, entropy_grad=False), "eager": eager}
    measure(case_of(", frozen head", device, smoke, torch.bfloat16, few,
                    functools.partial(with_backward, frozen=True), eager, contenders))


@pytest.mark.parametrize("few", (False, True), ids=("all valid", "few valid"))
def test_sum_of_logprobs(measure, device, smoke, few):
    """Beside what has no entropy and no log-prob of a token."""
    def by_logits(*given: Tensor) -> Tensor:
        return eager(*given)[0].sum()

    contenders = {"op": lambda *given: tk.linear_logprobs(*given)[0].sum(), "eager": by_logits,
                  **sum_peers(device)}
    measure(case_of(", sum of log-probs", device, smoke, torch.bfloat16, few, with_sum, by_logits,
                    contenders))
