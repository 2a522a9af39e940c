"""`entropy` in Triton, interpreted: bit for bit that of `token_logprobs`, and near fp64."""

import pytest
import torch

import tppo_kernels as tk
from tppo_kernels.ops.token_logprobs import _triton
from tppo_kernels.testing import DTYPES, assert_accurate, sample_mask

CASES = [((3, 5), 130, None, None), ((7,), 65, 5.0, 60), ((2, 3), 2, None, None),
         ((), 300, 5.0, None)]


def run(function, x, *args, **options):
    """(entropy, its gradient under slopes)"""
    leaf = x.detach().requires_grad_()
    entropy = function(leaf, *args, **options)
    entropy = getattr(entropy, "entropy", entropy)
    slopes = torch.linspace(-1, 1, max(entropy.numel(), 1)).to(entropy.dtype)
    return entropy.detach(), torch.autograd.grad(entropy, leaf, slopes.reshape(entropy.shape))[0]


@pytest.mark.parametrize("parts", [1, 64])
def test_it_is_the_entropy_of_token_logprobs(triton, monkeypatch, parts):
    monkeypatch.setattr(_triton, "MAX_PARTS", parts)
    for case, (shape, V, softcap, valid) in enumerate(CASES):
        x = (3 * torch.randn(*shape, V)).to(DTYPES[case % 3])
        mask = sample_mask("row", *shape, case) if len(shape) == 2 else None
        options = {"softcap": softcap, "valid_vocab": valid, "temperature": torch.tensor(0.7)}
        actual = run(tk.entropy, x, mask, **options)
        both = run(tk.token_logprobs, x, torch.zeros(shape, dtype=torch.int64), mask, **options)
        assert torch.equal(actual[0], both[0])
        with tk.use_backend("reference"):
            exact, eager = (run(tk.entropy, t, mask, **options) for t in (x.double(), x))
        for a, e, p in zip(actual, exact, eager, strict=True):
            assert_accurate(a, e, p)


def test_rows_of_extremes(triton):
    inf = float("inf")
    x = torch.tensor([[1e4, -1e4, 0.0], [-inf, 2.0, -inf], [-inf] * 3, [float("nan"), 0.0, 1.0]])
    got, grad = run(tk.entropy, x)
    assert got[:2].tolist() == [0.0, 0.0] and got[2:].isnan().all()
    assert not grad[:2].any()
