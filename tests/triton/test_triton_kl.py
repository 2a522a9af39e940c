"""`kl` in Triton against fp64, interpreted."""

import pytest
import torch

import tppo_kernels as tk
from tppo_kernels._math.sequence import KL_ESTIMATORS
from tppo_kernels.testing import DTYPES, POISONS, assert_accurate, assert_same_bits, sample_mask

SHAPES = [(1,), (3, 63), (65,), (2, 1100), (0, 5)]


def run(x, mask, **options):
    leaves = [t.detach().requires_grad_() for t in x]
    value = tk.kl(*leaves, mask, **options)
    slopes = torch.linspace(-1, 1, value.numel()).to(value.dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad(value, leaves, slopes)


def sample(shape, dtype=torch.float32, spread=1.0):
    ref = -3 * torch.rand(shape)
    return [(ref + spread * torch.randn(shape)).to(dtype), ref.to(dtype)]


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_accuracy(triton, estimator):
    for case, shape in enumerate(SHAPES):
        x = sample(shape, DTYPES[case % 3], (1.0, 8.0)[case % 2])
        mask = None if case % 2 else torch.rand(shape) < 0.7
        options = {"estimator": estimator, "clamp": (None, 2.0, torch.tensor(2.0))[case % 3]}
        actual = run(x, mask, **options)
        with tk.use_backend("reference"):
            exact = run([t.double() for t in x], mask, **options)
            eager = run(x, mask, **options)
        assert_accurate(actual[0], exact[0], eager[0])
        for a, e, p in zip(actual[1:], exact[1:], eager[1:], strict=True):
            assert_accurate(a, e, p)
        assert_same_bits(run(x, mask, **options), actual)


@pytest.mark.parametrize("poison", POISONS)
def test_poison(triton, poison):
    x, mask = sample((4, 70)), sample_mask("row", 4, 70, seed=2)
    clean = run([torch.where(mask, t, 0) for t in x], mask, estimator="k3")
    assert_same_bits(run([torch.where(mask, t, poison) for t in x], mask, estimator="k3"), clean)
    assert not any(t[~mask].any() for t in clean)


def test_a_clamp_by_pointer(triton, monkeypatch):
    x = sample((3, 9))
    expected = run(x, None, estimator="k3", clamp=0.5)
    monkeypatch.setattr("tppo_kernels._kernels.losses.on_host", lambda x: False)
    for clamp in (torch.tensor(0.5), torch.tensor(0.5).bfloat16()):
        torch.testing.assert_close(run(x, None, estimator="k3", clamp=clamp), expected)
