"""Gradients where 1 - p or 1 - tanh^2 is nearly 0, in Triton, interpreted, against fp64."""

import numpy as np
import pytest
import torch
from _linear_cases import LIMIT, grads, halves, textbook
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import tppo_kernels as tk
from tppo_kernels._math import kept
from tppo_kernels.ops.linear_logprobs import _triton as linear
from tppo_kernels.ops.token_logprobs import _triton

INF = float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small(monkeypatch, triton):
    """Small tiles, as the kernels' own tests have them; a fused multiply-add rounds once."""
    for module, name, value in ((_triton, "WARPS", 1), (_triton, "UNROLL", 2),
                                (linear, "TILE", 256), (linear, "BLOCK_WARPS", 2),
                                (kept, "KEPT_BLOCK", 256)):
        monkeypatch.setattr(module, name, value)

    def fma(self, x, y, z):
        wide = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(wide.astype(x.data.dtype), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


def spread_out(rows, v):
    """Rows whose target is the more certain the further down, and the targets."""
    logits, targets = torch.randn(rows, v), torch.randint(v, (rows,))
    return logits.scatter_(1, targets[:, None], torch.linspace(4, 16, rows)[:, None]), targets


def in_one_lane(rows, v):
    """All that is not -inf lies in the lane of the target: 4 columns in each of the 2 x 128."""
    logits, targets = spread_out(rows, 256)
    lane = torch.arange(256) % 128 // 4
    logits.masked_fill_(lane != lane[targets][:, None], -INF)
    return torch.nn.functional.pad(logits, (0, v - 256), value=-INF), targets


def wanted(logits, targets):
    """The gradients of the logprobs and of the entropy by the logits, in fp64."""
    leaf = logits.double().requires_grad_()
    log_p = torch.log_softmax(leaf, -1)
    p_log_p = torch.where(log_p > -INF, log_p.exp() * log_p.clamp(min=-1e3), 0)
    return [torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in
            (log_p.gather(1, targets[:, None]), -p_log_p.sum(1))]


@pytest.mark.parametrize("busy", (1, 64))
@pytest.mark.parametrize("rows, v", [(spread_out, 2), (spread_out, 65), (spread_out, 300),
                                     (spread_out, 2100), (in_one_lane, 256), (in_one_lane, 2100)])
def test_a_nearly_certain_target(rows, v, busy, monkeypatch):
    """1 - p taken as a difference, of a p beside whose 1 the sum of a lane had lost the rest."""
    monkeypatch.setattr(_triton, "BUSY", busy)
    logits, targets = rows(8, v)
    leaf = logits.clone().requires_grad_()
    out = tk.token_logprobs(leaf, targets)
    for result, gradient in zip(out, wanted(logits, targets), strict=True):
        actual, = torch.autograd.grad(result.sum(), leaf, retain_graph=True)
        assert max(map(relative, actual, gradient)) <= 5e-6


@pytest.mark.parametrize("memory", ("store", "recompute"))
@pytest.mark.parametrize("rows, v", [(spread_out, 300), (spread_out, 2100), (in_one_lane, 600)])
def test_a_nearly_certain_target_of_a_linear_head(rows, v, memory):
    """Its logits are the weight's transpose, and their gradients those of the weight."""
    logits, targets = rows(8, v)
    logits.clamp_(min=-200)
    weight = logits.T.contiguous().requires_grad_()
    out = tk.linear_logprobs(torch.eye(8), weight, targets, memory=memory)
    for result, gradient in zip(out, wanted(logits, targets), strict=True):
        actual, = torch.autograd.grad(result.sum(), weight, retain_graph=True)
        assert max(map(relative, actual.T, gradient)) <= 5e-6


@pytest.mark.parametrize("memory", ("token_logprobs", "store", "recompute"))
def test_several_largest_columns(memory):
    """Each but one is in a sum; in one lane, in several, and in columns of another tile."""
    logits = torch.full((3, 700), -INF if memory == "token_logprobs" else -200.0)
    for row, columns in enumerate(([0, 1, 2, 128], [5, 77, 300, 699], [3, 515, 640])):
        logits[row, columns] = 7.0
    targets = torch.tensor([1, 300, 640])
    count = torch.tensor([4.0, 4.0, 3.0])
    if memory == "token_logprobs":
        out = tk.token_logprobs(logits, targets)
    else:
        out = tk.linear_logprobs(torch.eye(3), logits.T.contiguous(), targets, memory=memory)
    torch.testing.assert_close(out.logprobs, -count.log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.entropy, count.log(), rtol=1e-6, atol=0)


def test_minus_infinity_under_a_softcap_is_a_column():
    """tanh(-inf) = -1: such a column counts with z = -softcap, and a dead one does not."""
    logits = torch.full((2, 300), -INF)
    logits[1, 3] = 1.0
    out = tk.token_logprobs(logits, torch.tensor([5, 5]), softcap=2.0, valid_vocab=290)
    exact = torch.log_softmax(2 * torch.tanh(logits.double()[:, :290] / 2), -1)
    torch.testing.assert_close(out.logprobs.double(), exact[:, 5], rtol=1e-6, atol=0)


@pytest.mark.parametrize("cap, scale", [(1.5, 2.0), (1.0, 9.0)])
def test_the_slope_of_a_saturated_softcap(cap, scale):
    """1 - tanh^2 was 0 from |logit| of 9 softcaps on, and wrong by 1 part in 4 shortly before."""
    logits, targets = torch.randn(6, 300), torch.randint(300, (6,))
    y = scale * logits.double() / cap
    dz, _ = wanted(cap * torch.tanh(y), targets)
    exact = dz * scale / torch.cosh(y).square()
    leaf = logits.clone().requires_grad_()
    tk.token_logprobs(leaf, targets, softcap=cap, logit_scale=scale).logprobs.sum().backward()
    kept = exact.abs() > 1e-30  # smaller ones are not all of fp32's normal numbers
    ratio = leaf.grad.double()[kept] / exact[kept]
    assert float((ratio - 1).abs().max()) <= 1e-5


@pytest.mark.parametrize("memory", ["store", "recompute", 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturated_logits_of_a_linear_head(memory, dtype):
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 2, 3, 8, generator=g).to(dtype)
    weight = torch.randn(64, 8, generator=g).to(dtype)
    options = {"softcap": 1.5, "logit_scale": 2.0}
    targets = (hidden.double() @ weight.double().T).argmax(-1)
    with halves():
        actual = grads(tk.linear_logprobs, hidden, weight, targets, memory=memory, part="logprobs",
                       **options)
    exact = grads(textbook, hidden.double(), weight.double(), targets, part="logprobs", **options)
    assert relative(actual[2], exact[2]) <= LIMIT[dtype]
