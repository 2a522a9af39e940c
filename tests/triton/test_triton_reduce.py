"""`reduce` in Triton against fp64, interpreted."""

import itertools

import pytest
import torch

import tppo_kernels as tk
from tppo_kernels._core.check import REDUCTIONS
from tppo_kernels._kernels import triton_losses as _triton_losses
from tppo_kernels.ops.reduce import _triton
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    pack,
    sample_mask,
)

COUNTS = [{}, {"num_sequences": "all"}, {"num_tokens": 40, "num_sequences": torch.tensor(7),
                                         "norm_length": 11}]


def run(x, mask=None, slope=1.5, **options):
    x = x.detach().requires_grad_()
    value = tk.reduce(x, mask, **options)
    return value.detach(), torch.autograd.grad(value * slope, x)[0]


def hold_to_fp64(x, mask=None, **options):
    actual = run(x, mask, **options)
    with tk.use_backend("reference"):
        exact, eager = (run(t, mask, **options) for t in (x.double(), x))
        added = run(x.double().abs(), mask, **options)
    for a, e, p, scale in zip(actual, exact, eager, added, strict=True):
        assert_accurate(a, e, p, scale=scale)
    assert_same_bits(run(x, mask, **options), actual)
    return actual


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_accuracy(triton, reduction):
    for case, (kind, tokens) in enumerate(zip(MASKS, (1, 63, 7, 65, 600, 64, 5), strict=True)):
        x, mask = torch.randn(3, tokens).to(DTYPES[case % 3]), sample_mask(kind, 3, tokens, case)
        hold_to_fp64(x, mask, reduction=reduction, **COUNTS[case % 3])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed(triton, reduction):
    lengths = [13, 1, 0, 600]
    x, mask = torch.randn(4, 600), torch.arange(600) < torch.tensor(lengths)[:, None]
    options = {"norm_length": 600, "reduction": reduction}
    value, grad = hold_to_fp64(x, mask, **options)
    packed, cu = pack(x, lengths)
    torch.testing.assert_close(hold_to_fp64(packed, cu_seqlens=cu, **options),
                               (value, pack(grad, lengths)[0]))


@pytest.mark.parametrize("poison", POISONS)
def test_poison(triton, poison):
    for kind, reduction in itertools.product(("left", "row", "all-false"), REDUCTIONS[::2]):
        x, mask = torch.randn(4, 9), sample_mask(kind, 4, 9)
        clean, dirty = (run(torch.where(mask, x, v), mask, reduction=reduction)
                        for v in (0.0, poison))
        assert_same_bits(dirty, clean)


def test_more_sequences_than_programs_and_the_ticket(triton, monkeypatch):
    ticket = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(_triton, "PROGRAMS", 4)
    monkeypatch.setattr(_triton, "ticket", lambda like: ticket)
    for reduction in REDUCTIONS[2:4]:
        hold_to_fp64(torch.randn(11, 9), sample_mask("row", 11, 9), reduction=reduction)
        assert not ticket.any()
    assert _triton_losses.ticket(torch.zeros(1)) is not ticket
