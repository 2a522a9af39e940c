"""A few of the random calls of `fuzz_gradients.py`, and the cases that it once found."""

import fuzz_gradients as fuzz
import pytest
import torch

import tppo_kernels as tk
from tppo_kernels._core import op as _op

BACKENDS = ["reference"] + ["cpp"] * (_op.missing("cpp") is None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_calls(backend):
    with tk.use_backend(backend):
        beyond, cancelled = fuzz.run(range(500 if backend == "reference" else 1500))
    assert not beyond, "\n".join(map(fuzz.describe, beyond))
    assert cancelled <= 5  # the second bound is for few


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [1600, 2049, 2449])
def test_calls_that_were_beyond(backend, seed):
    """Wrong by 2.5e-2 at softcap 1.5 from kept exponentials, and by 20 times what rounds."""
    with tk.use_backend(backend):
        assert not fuzz.run([seed])[0]


def test_a_gradient_that_is_wrong_is_found(monkeypatch):
    right = fuzz.actual
    monkeypatch.setattr(fuzz, "actual", lambda call: [1.01 * g for g in right(call)])
    beyond, _ = fuzz.run(range(30))
    assert len(beyond) >= 25
    monkeypatch.setattr(fuzz, "actual", lambda call: [g + float("nan") for g in right(call)])
    assert len(fuzz.run(range(30))[0]) == 30


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", [2, 65, 300, 2100])
def test_a_nearly_certain_target(backend, v):
    """1 - p taken as a difference, of a p beside whose 1 an fp32 sum had lost the rest."""
    torch.manual_seed(v)
    logits = torch.randn(16, v)
    targets = torch.randint(v, (16,))
    logits.scatter_(1, targets[:, None], torch.linspace(4, 16, 16)[:, None])
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(exact, -1)
    p = log_p.exp()
    wanted = [torch.autograd.grad(x.sum(), exact, retain_graph=True)[0] for x in
              (log_p.gather(1, targets[:, None]), -(p * log_p).sum(1))]
    leaf = logits.clone().requires_grad_()
    with tk.use_backend(backend):
        out = tk.token_logprobs(leaf, targets)
        for result, gradient in zip(out, wanted, strict=True):
            actual, = torch.autograd.grad(result.sum(), leaf, retain_graph=True)
            assert max(map(relative, actual, gradient)) <= 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["store", "recompute", 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturated_logits(backend, memory, dtype):
    """1 - tanh^2 of a tanh near 1, which no rounded exponential holds: wrong by up to 1.1e-1."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 2, 3, 8, generator=g).to(dtype)
    weight, targets = torch.randn(64, 8, generator=g).to(dtype), torch.zeros(2, 2, 3).long()
    leaf, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    x = exact @ weight.double().T
    targets = x.argmax(-1)
    z = 1.5 * torch.tanh(2 * x / 1.5)
    torch.log_softmax(z, -1).gather(-1, targets[..., None]).sum().backward()
    with tk.use_backend(backend):
        tk.linear_logprobs(leaf, weight, targets, softcap=1.5, logit_scale=2.0, memory=memory
                           ).logprobs.sum().backward()
    assert relative(leaf.grad, exact.grad) <= fuzz.LIMIT[dtype]
