"""`token_head` in Triton against fp64, interpreted."""

import itertools

import pytest
import torch
from _matrix import third
from torch.nn import functional as F

import tppo_kernels as tk
from tppo_kernels.ops.token_head import _triton
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    poisoned,
    sample_mask,
    strided,
)

NAMES = ("out", "dhidden", "dweight", "dbias")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Rows of several tiles, columns of several programs, several parts."""
    monkeypatch.setattr(_triton, "WARPS", 1)
    monkeypatch.setattr(_triton, "PROGRAMS", 6)


def sample(shape, K=3, D=8, dtype=torch.float32, weight_dtype=None, seed=0):
    """hidden [..., D], weight [K, D], bias [K], and a gradient of the result [..., K]."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*shape, D), (K, D), (K,), (*shape, K))
    dtypes = (dtype, weight_dtype or dtype, weight_dtype or dtype, torch.float32)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(d)
            for s, d in zip(shapes, dtypes, strict=True)]


def run(hidden, weight, bias, grad, mask=None, head=tk.token_head):
    """(out, dhidden, dweight, dbias)."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    out = head(*leaves, mask)
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype).reshape(out.shape))
    return out.detach().reshape(grad.shape), *grads


def eager(hidden, weight, bias, mask):
    """Without this operator, the trunk's states brought to the head's dtype."""
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    out = F.linear(hidden.to(wide), weight.to(wide), bias.to(wide))
    return out if mask is None else out.masked_fill(~mask[..., None], 0)


def hold(x, mask, layout=lambda x: x, name=""):
    with tk.use_backend("triton"):
        actual = run(*map(layout, x), mask)
    exact = run(*(v.double() for v in x), mask, head=eager)
    added = run(*(v.double().abs() for v in x), mask, head=eager)
    for what, a, e, p, scale in zip(NAMES, actual, exact, run(*x, mask, head=eager), added,
                                    strict=True):
        assert_accurate(a, e, p, scale=scale, name=f"{what} {name}")
    assert [a.dtype for a in actual] == [torch.float32, *(v.dtype for v in x[:3])]
    if mask is not None:
        assert not actual[0][~mask].any() and not actual[1][~mask].any()
    return actual


def sliced(x):
    """As full[:, P - 1:-1], for what has rows."""
    if x.dim() < 3:
        return x
    wide = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), 7, dtype=x.dtype)
    wide[:, 2:2 + x.shape[1]] = x
    return wide[:, 2:2 + x.shape[1]]


LAYOUTS = (lambda x: x, strided, sliced, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
SHAPES = ((1, 1), (3, 7), (2, 65), (30,), (), (0, 5), (2, 1, 3))
CASES = third(itertools.product(DTYPES, (None, torch.float32), SHAPES, (1, 3), (8, 33, 400),
                                range(len(LAYOUTS))))


def test_accuracy_over_dtypes_shapes_masks_strides():
    for case, (dtype, wide, shape, K, D, layout) in enumerate(CASES[::5]):
        x = sample(shape, K, D, dtype, wide, seed=case)
        mask = sample_mask(MASKS[case % len(MASKS)], 1, x[0][..., 0].numel(), case)
        hold(x, mask if mask is None else mask.reshape(shape), LAYOUTS[layout], str(CASES[case]))


@pytest.mark.parametrize("K", (2, 4, 5, 8))
def test_outputs(K):
    for dtype, D in ((torch.float32, 264), (torch.bfloat16, 520)):
        hold(sample((2, 9), K, D, dtype, torch.float32), sample_mask("row", 2, 9))


def test_who_runs():
    with tk.use_backend("triton"):
        hidden, weight, bias, _ = sample((3,), 9)
        with pytest.raises(tk.BackendError, match="9 outputs, expected at most 8"):
            tk.token_head(hidden, weight)
        with pytest.raises(tk.BackendError, match="fp64"):
            tk.token_head(hidden, weight[:1].double())


def test_a_masked_row_has_no_gradient_even_from_a_weight_that_is_not_finite():
    hidden, weight, bias, grad = sample((3, 7))
    weight[0, 1] = float("nan")
    mask = sample_mask("interior", 3, 7)
    with tk.use_backend("triton"):
        assert not run(hidden, weight, bias, grad, mask)[1][~mask].any()


@pytest.mark.parametrize("poison", POISONS)
def test_poison_changes_no_bit(poison):
    for kind in ("left", "interior", "all-false"):
        hidden, weight, bias, grad = sample((2, 9), 3, 40)
        mask = sample_mask(kind, 2, 9, seed=2)
        with tk.use_backend("triton"):
            clean, dirty = (run(poisoned(hidden, mask, fill), weight, bias,
                                poisoned(grad, mask, fill), mask) for fill in (0.0, poison))
        assert_same_bits(dirty, clean)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
def test_only_what_is_asked_for(wanted):
    hidden, weight, bias, grad = sample((3, 4))
    with tk.use_backend("triton"):
        full = run(hidden, weight, bias, grad)[1:]
        raw = torch.ops.tppo_kernels.token_head_bwd(grad, hidden, weight, bias, None, *wanted)
        assert [x.numel() > 0 for x in raw] == list(wanted)
        for x, expected, want in zip(raw, full, wanted, strict=True):
            assert not want or torch.equal(x, expected)
        _, dweight, dbias = torch.ops.tppo_kernels.token_head_bwd(
            grad, hidden, weight, None, None, *wanted)
        assert dbias.numel() == 0 and (not wanted[1] or torch.equal(dweight, full[1]))


def test_twice_and_expanded_gradients():
    hidden, weight, bias, grad = sample((4, 33), 3, 24, torch.bfloat16, torch.float32)
    mask = sample_mask("interior", 4, 33)
    one = torch.ones(()).expand(4, 33, 3)  # as from sum().backward(): strides of 0
    assert_same_bits(hold([hidden, weight, bias, grad], mask),
                     hold([hidden, weight, bias, grad], mask))
    hold([hidden, weight, bias, one], mask)
