"""`value_loss` in Triton against fp64, interpreted."""

import itertools

import pytest
import torch
from _loss_cases import (
    check_layouts,
    check_mixed_dtypes_and_nan,
    check_packed,
    check_poison,
    critic_run,
    critic_sample,
    flat,
    hold_to_fp64,
)
from _matrix import third

from tppo_kernels._core.check import REDUCTIONS
from tppo_kernels.ops.value_loss import _triton
from tppo_kernels.testing import DTYPES, MASKS, POISONS, assert_same_bits, sample_mask

VARIANTS = list(itertools.product(REDUCTIONS, (None, 0.2, 0.0)))
SHAPES = (1, 7, 63, 64, 65, 600)
CASES = third(itertools.product(SHAPES, MASKS, (False, True)))
CASES = [(DTYPES[i % 3], *case, VARIANTS[4 * i % len(VARIANTS)]) for i, case in enumerate(CASES)]


def options_of(variant):
    return {"reduction": variant[0], "clip": variant[1]}


def test_accuracy_over_dtypes_shapes_masks_strides(triton):
    check_layouts(critic_run, critic_sample, CASES, options_of)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed(triton, reduction):
    check_packed(critic_run, critic_sample, {"clip": 0.2, "reduction": reduction,
                                             "norm_length": 70})


@pytest.mark.parametrize("poison", POISONS)
def test_poison(triton, poison):
    for clip in (None, 0.2):
        check_poison(critic_run, critic_sample, poison, {"clip": clip})


def test_mixed_dtypes_and_nan(triton):
    check_mixed_dtypes_and_nan(critic_run, critic_sample, {"clip": 0.2}, "values")
    check_mixed_dtypes_and_nan(critic_run, critic_sample, {"clip": 0.2}, "returns")


def test_more_sequences_than_programs(triton, monkeypatch):
    monkeypatch.setattr(_triton, "PROGRAMS", 4)
    for reduction in ("token-mean", "seq-mean-token-mean"):
        hold_to_fp64(critic_run, critic_sample(11, 9, seed=4), sample_mask("row", 11, 9),
                     clip=0.2, reduction=reduction)


def test_moments_far_from_zero(triton):
    x = {k: v + 1000 for k, v in critic_sample(4, 50, seed=2).items()}
    mask = sample_mask("interior", 4, 50)
    metrics = hold_to_fp64(critic_run, x, mask)[-1]
    returns, errors = x["returns"][mask].double(), (x["returns"] - x["values"])[mask].double()
    torch.testing.assert_close(metrics.explained_variance.double(), 1 - errors.var() /
                               returns.var(), rtol=1e-5, atol=0)


def test_numbers_by_pointer(triton, monkeypatch):
    x = critic_sample(3, 9)
    options = {"clip": 0.2, "num_tokens": torch.tensor(20)}
    expected = critic_run(x, **options)
    monkeypatch.setattr("tppo_kernels._kernels.losses.on_host", lambda x: False)
    torch.testing.assert_close(flat(critic_run(x, **options)), flat(expected))


def test_empty(triton):
    for shape in ((0, 5), (3, 0)):
        loss, gradient, metrics = critic_run(critic_sample(*shape), clip=0.2)
        assert not loss and not any(metrics)
        assert_same_bits(gradient, torch.zeros(shape))
