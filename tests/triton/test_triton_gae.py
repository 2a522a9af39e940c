"""`gae` in Triton against fp64, interpreted."""

import itertools

import torch
from _matrix import third

import tppo_kernels as tk
from tppo_kernels.ops.gae import _triton
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
    strided,
)

SHAPES = [(2, 1), (3, 7), (9, 63), (2, 128), (2, 129), (1, 1000), (0, 5), (3, 0)]
CASES = [(*case, DTYPES[i % 3], ("", "rows", "columns")[i // 3 % 3])
         for i, case in enumerate(third(itertools.product(SHAPES, MASKS)))]


def reference(*args, **options):
    with tk.use_backend("reference"):
        return tk.gae(*args, **options)


def batch(B, T, seed=0, kind="interior"):
    rewards, values = torch.randn(2, B, T, generator=torch.Generator().manual_seed(seed))
    return rewards, values, sample_mask(kind, B, T, seed)


def test_accuracy_over_dtypes_shapes_masks_strides(triton):
    for case, ((B, T), kind, dtype, layout) in enumerate(CASES):
        rewards, values, mask = batch(B, T, case, kind)
        rewards, values = rewards.to(dtype), values if case % 4 == 0 else values.to(dtype)
        bootstrap = torch.randn(B).to(dtype)
        options = {"gamma": 0.99, "lam": torch.rand(B) if case % 2 else 0.95,
                   "value_lam": (None, 1.0, torch.rand(B))[case % 3]}
        exact = reference(rewards.double(), values.double(), mask, bootstrap=bootstrap.double(),
                          **options)
        eager = reference(rewards, values, mask, bootstrap=bootstrap, **options)
        if layout == "rows":
            rewards, values = (torch.nn.functional.pad(x, (3, 2))[:, 3:3 + T]
                               for x in (rewards, values))
        elif layout == "columns":
            rewards, values = strided(rewards), strided(values)
            mask = mask if mask is None else strided(mask)
        actual = tk.gae(rewards, values, mask, bootstrap=bootstrap, **options)
        for a, x, e in zip(actual, exact, eager, strict=True):
            assert a.dtype == torch.float32
            assert_accurate(a, x, e, floor=SEQUENTIAL_FLOOR, name=str(CASES[case]))
            assert mask is None or not a[~mask].any()


def test_several_blocks_of_several_packed_sequences(triton, monkeypatch):
    monkeypatch.setattr(_triton, "SHAPES", {True: (4, 16, 4), False: (4, 16, 4)})
    lengths = [5, 0, 40, 1, 33, 0, 17]
    rewards, values, mask = batch(7, 40)
    options = {"lam": torch.rand(7), "value_lam": torch.rand(7), "bootstrap": torch.randn(7),
               "gamma": 0.98}
    there = torch.arange(40) < torch.tensor(lengths)[:, None]
    for m in (mask, None):
        padded = reference(rewards.double(), values.double(), there if m is None else m & there,
                           **options)
        (r, cu), v = pack(rewards, lengths), pack(values, lengths)[0]
        packed = tk.gae(r, v, None if m is None else pack(m, lengths)[0], cu_seqlens=cu, **options)
        for a, e in zip(packed, padded, strict=True):
            assert_accurate(a, pack(e, lengths)[0], floor=SEQUENTIAL_FLOOR)


def test_poison_changes_no_bit(triton):
    for kind, poison in zip(("left", "interior", "row", "all-false"), POISONS, strict=True):
        rewards, values, mask = batch(3, 20, kind=kind)
        args = [torch.rand(3) for _ in range(3)]

        def run(fill, rewards=rewards, values=values, mask=mask, args=args):
            lam, value_lam, bootstrap = (poisoned(x, mask.any(1), fill) for x in args)
            return tk.gae(poisoned(rewards, mask, fill), poisoned(values, mask, fill), mask,
                          lam=lam, value_lam=value_lam, bootstrap=bootstrap)

        assert_same_bits(run(poison), run(0.0))


def test_scalars_on_a_gpu(triton, scalars_on_a_gpu):
    rewards, values, mask = batch(3, 20)
    options = {"gamma": 0.9, "lam": 0.8, "value_lam": 0.7}
    expected = tk.gae(rewards, values, mask, **options)
    scalars_on_a_gpu(_triton)
    assert_same_bits(tk.gae(rewards, values, mask, **{
        name: torch.tensor(x) for name, x in options.items()}), expected)
