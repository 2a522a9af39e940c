"""`whiten` in Triton against fp64, interpreted."""

import itertools

import pytest
import torch
from _matrix import third

import tppo_kernels as tk
from tppo_kernels.ops.whiten import _triton
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    SEQUENTIAL_FLOOR,
    assert_accurate,
    assert_same_bits,
    poisoned,
    sample_mask,
    strided,
)

SHAPES = [(1, 1), (7,), (64, 1), (2, 3, 5), (2, 1000), (4, 1024), (3, 3000), (0, 5), (3, 0)]
CASES = third(itertools.product(DTYPES, SHAPES, MASKS, (False, True), (False, True),
                                (0.0, 50.0)))


def reference(x, mask, **options):
    with tk.use_backend("reference"):
        return tk.whiten(x, mask, **options)


def test_accuracy_over_dtypes_shapes_masks_strides(triton):
    for case, (dtype, shape, kind, unbiased, shift_mean, mean) in enumerate(CASES):
        x = (mean + torch.randn(shape, generator=torch.Generator().manual_seed(case))).to(dtype)
        mask = sample_mask(kind, x.numel() // max(shape[-1], 1), shape[-1], case)
        mask = mask if mask is None else mask.reshape(shape)
        options = {"unbiased": unbiased, "shift_mean": shift_mean}
        exact, eager = (reference(y, mask, **options) for y in (x.double(), x.float()))
        if case % 2:
            x, mask = strided(x), mask if mask is None else strided(mask)
        actual = tk.whiten(x, mask, **options)
        assert actual.dtype == torch.float32
        assert_accurate(actual, exact, eager, floor=SEQUENTIAL_FLOOR, name=str(CASES[case]))


@pytest.mark.parametrize("tokens", [5, 5000])
def test_statistics(triton, tokens):
    x, mask = torch.randn(3, tokens) * 2 + 7, sample_mask("row", 3, tokens)
    moments = torch.ops.tppo_kernels.whiten_stats(x, mask)
    valid = x[mask].double()
    exact = torch.stack([mask.sum().double(), valid.mean(),
                         (valid - valid.mean()).square().sum(), valid.abs().max()])
    torch.testing.assert_close(moments, exact, rtol=1e-6, atol=0)


def test_more_blocks_than_programs(triton, monkeypatch):
    """Each program then takes several blocks, of which the last may be cut or absent."""
    monkeypatch.setattr(_triton, "BLOCK", 64)
    monkeypatch.setattr(_triton, "PROGRAMS", 4)
    for tokens in (64 * 4, 64 * 9 + 1, 64 * 12 - 1):
        x, mask = torch.randn(tokens) + 3, torch.rand(tokens) < 0.7
        mask[128:192] = False
        exact, eager = (reference(y, mask) for y in (x.double(), x))
        assert_accurate(tk.whiten(x, mask), exact, eager, floor=SEQUENTIAL_FLOOR)


def test_eps_on_a_gpu(triton, scalars_on_a_gpu):
    x = torch.randn(100)
    expected = tk.whiten(x, eps=0.5)
    scalars_on_a_gpu(_triton)
    assert_same_bits(tk.whiten(x, eps=torch.tensor(0.5, dtype=torch.float64)), expected)


def test_poison_changes_no_bit(triton):
    for kind, poison in itertools.product(("left", "interior", "row"), POISONS):
        x, mask = torch.randn(6, 33), sample_mask(kind, 6, 33)
        clean = tk.whiten(poisoned(x, mask, 0.0), mask)
        assert_same_bits(tk.whiten(poisoned(x, mask, poison), mask), clean)
        assert not clean[~mask].any()


def test_a_value_that_is_not_a_number_shows(triton):
    for bad in (float("nan"), float("inf")):
        x = torch.randn(50)
        x[3] = bad
        assert tk.whiten(x).isnan().all()


def test_no_variance_gives_zero_or_the_mean(triton):
    x = torch.full((70,), 0.1)
    assert not tk.whiten(x).any()
    torch.testing.assert_close(tk.whiten(x, shift_mean=False), x, rtol=1e-6, atol=0)
