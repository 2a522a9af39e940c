"""`token_advantages` in Triton against fp64, interpreted: the composition, not its parts again."""

import itertools

import torch
from _matrix import third

import tppo_kernels as tk
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    SEQUENTIAL_FLOOR,
    assert_accurate,
    assert_same_bits,
    pack,
    poisoned,
    sample_mask,
)

ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+")
CASES = third(itertools.product([(2, 1), (5, 40), (2, 300), (0, 5), (3, 0)], MASKS))


def reference(*args, **options):
    with tk.use_backend("reference"):
        return tk.token_advantages(*args, **options)


def batch(B, T, seed=0, kind="interior"):
    rewards, values, logprobs, noise = torch.randn(
        4, B, T, generator=torch.Generator().manual_seed(seed))
    return rewards, values, logprobs, logprobs + 0.3 * noise, sample_mask(kind, B, T, seed)


def test_accuracy(triton):
    for case, ((B, T), kind) in enumerate(CASES):
        *tensors, mask = batch(B, T, case, kind)
        r, v, lp, ref = (x.to(DTYPES[case % 3]) for x in tensors)
        train = None if case % 2 else torch.rand(B, T) < 0.8
        train = train if train is None or mask is None else train & mask
        options = {"train_mask": train, "kl_coef": 0.1, "kl_estimator": ESTIMATORS[case % 6],
                   "gamma": 0.99, "bootstrap": torch.randn(B), "unbiased": case % 4 < 2,
                   "normalize": case % 5 > 0, "value_lam": (None, 1.0)[case // 2 % 2]}
        exact = reference(r.double(), v.double(), mask, logprobs=lp.double(),
                          ref_logprobs=ref.double(), **options)
        eager = reference(r, v, mask, logprobs=lp, ref_logprobs=ref, **options)
        out = tk.token_advantages(r, v, mask, logprobs=lp, ref_logprobs=ref, **options)
        for a, x, e in zip(out[:3], exact[:3], eager[:3], strict=True):
            assert a.dtype == torch.float32
            assert_accurate(a, x, e, floor=SEQUENTIAL_FLOOR, name=str(CASES[case]))
        assert out.stats.n == exact.stats.n
        for a, x in zip(out.stats[1:], exact.stats[1:], strict=True):
            torch.testing.assert_close(a.double(), x, rtol=1e-5, atol=1e-5)


def test_packed_and_poisoned(triton):
    lengths = [9, 0, 20, 1]
    *tensors, mask = batch(4, 20)
    cu, train = pack(mask, lengths)[1], pack(torch.rand(4, 20) < 0.7, lengths)[0]
    *tensors, mask = (pack(x, lengths)[0] for x in (*tensors, mask))

    def run(fill, dtype=torch.float32):
        r, v, lp, ref = (poisoned(x, mask, fill).to(dtype) for x in tensors)
        return tk.token_advantages(r, v, mask, train_mask=train & mask, logprobs=lp,
                                   ref_logprobs=ref, kl_coef=0.2, cu_seqlens=cu)

    with tk.use_backend("reference"):
        exact = run(0.0, torch.float64)
    for a, x in zip(run(0.0)[:3], exact[:3], strict=True):
        assert_accurate(a, x, floor=SEQUENTIAL_FLOOR)
    for poison in POISONS:
        assert_same_bits(run(poison), run(0.0))
