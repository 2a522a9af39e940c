"""Every operator on every backend of the device: accuracy, poison, strides, bits, scalars."""

import itertools

import pytest
import torch
from _gpu import DEVICE, GRIDS, inputs, pairs, place, placed, poison, run, strided_on_device
from _matrix import third

import tppo_kernels as tk
from tppo_kernels._core.op import OPS
from tppo_kernels.testing import (
    DTYPES,
    FLOOR,
    POISONS,
    SEQUENTIAL_FLOOR,
    assert_accurate,
    assert_same_bits,
    compare,
    sample_mask,
)

SHAPES = [(1, 1), (3, 7), (2, 63), (64, 2), (5, 65), (4, 1000), (2, 4099)]
KINDS = ("none", "left", "interior", "row", "all-false")
CASES = third(itertools.product(DTYPES, SHAPES, KINDS))
FLOORS = {"gae": SEQUENTIAL_FLOOR, "whiten": SEQUENTIAL_FLOOR, "token_advantages": SEQUENTIAL_FLOOR}
SCALARS = {"gae": ("gamma", "lam"), "token_advantages": ("kl_coef", "gamma"),
           "token_logprobs": ("temperature",), "value_loss": ("clip",),
           "ppo_loss": ("dual_clip", "entropy_coef", "kl_coef")}


@pytest.fixture
def forced(backend):
    with tk.use_backend(backend):
        yield backend


@pytest.mark.parametrize("op, backend", pairs(OPS))
def test_sample(op, backend):
    said = compare(op, backend, DEVICE)
    if said and said.startswith("BackendError"):
        pytest.skip(said)
    assert said is None


@pytest.mark.parametrize("op, backend", pairs(GRIDS))
def test_accuracy_over_dtypes_shapes_masks(op, backend, forced):
    for case, (dtype, shape, kind) in enumerate(CASES):
        given = inputs(op, *shape, kind, dtype, seed=case)
        actual = run(op, placed(given, dtype=dtype))
        with tk.use_backend("reference"):
            exact = run(op, placed(given, "cpu", torch.float64))
            eager = run(op, placed(given, "cpu", dtype))
        assert actual.keys() == exact.keys()
        for name, value in exact.items():
            assert_accurate(actual[name].cpu(), value, eager[name],
                            floor=FLOORS.get(op, FLOOR), name=f"{name} of {CASES[case]}")


@pytest.mark.parametrize("terms", [
    {"objective": "clip", "kl_clamp": 1.0, "kl_estimator": "k3+"},
    {"objective": "cispo", "kl_clamp": 1.0, "kl_ratio_weighted": True, "kl_estimator": "k3"},
    {"objective": "cispo", "ratio": "sequence", "kl_ratio_weighted": True},
    {"objective": "sapo", "kl_ratio_weighted": True, "kl_estimator": "abs"},
    {"objective": "sapo", "ratio": "sequence", "num_sequences": "all",
     "reduction": "seq-mean-token-mean"}], ids=str)
@pytest.mark.parametrize("op, backend", pairs(["ppo_loss"]))
def test_objectives_and_kl_terms(op, backend, forced, terms):
    for dtype, shape in zip((*DTYPES, *DTYPES), SHAPES, strict=False):
        args, kwargs = inputs(op, *shape, "row", dtype)
        given = args, kwargs | {"dual_clip": None} | terms
        actual = run(op, placed(given, dtype=dtype))
        with tk.use_backend("reference"):
            exact = run(op, placed(given, "cpu", torch.float64))
            eager = run(op, placed(given, "cpu", dtype))
        for name, value in exact.items():
            assert_accurate(actual[name].cpu(), value, eager[name], name=f"{name} of {terms}")


@pytest.mark.parametrize("op, backend", pairs(GRIDS))
def test_poison_and_repetition_change_no_bit(op, backend, forced):
    mask = sample_mask("interior", 5, 65)
    given = inputs(op, 5, 65, "interior")
    clean = run(op, placed(poison(given, mask, 0.0)))
    for value in POISONS:
        again = run(op, placed(poison(given, mask, value)))
        for name, expected in clean.items():
            assert_same_bits(again[name], expected, f"{name} with {value}")


@pytest.mark.parametrize("op, backend", pairs(GRIDS))
def test_strides(op, backend, forced):
    given = inputs(op, 5, 65)
    dense = run(op, placed(given))
    apart = run(op, placed(given, layout=strided_on_device))
    for name, expected in dense.items():
        torch.testing.assert_close(apart[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, backend", pairs(SCALARS))
def test_scalars_on_the_device(op, backend, forced):
    args, kwargs = inputs(op, 5, 65)
    expected = run(op, placed((args, kwargs)))
    there = {name: torch.tensor(kwargs[name], device=DEVICE) for name in SCALARS[op]}
    args, kwargs = placed((args, {**kwargs, **there}))
    for name, value in run(op, (args, kwargs)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, backend", pairs(GRIDS))
def test_packed_equals_padded(op, backend, forced):
    if op in ("whiten", "token_logprobs", "token_head"):
        pytest.skip("its layout is any")
    lengths, kind = [65, 1, 40, 0, 7], "none"
    args, kwargs = inputs(op, 5, 65, kind)
    mask = torch.arange(65) < torch.tensor(lengths)[:, None]

    def packed(x):
        return x[mask] if isinstance(x, torch.Tensor) and x.shape[:2] == mask.shape else x

    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    padded = run(op, placed(((*args[:-1], mask), kwargs)))
    flat = run(op, placed(([packed(x) for x in args],
                           {**{k: packed(x) for k, x in kwargs.items()}, "cu_seqlens": offsets})))
    for name, value in padded.items():
        value = packed(value.cpu()) if value.shape[:2] == mask.shape else value.cpu()
        torch.testing.assert_close(flat[name].cpu(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, backend", pairs(["token_logprobs"]))
def test_a_target_that_is_no_column_gives_nan_or_an_error(op, backend, forced):
    logits = torch.randn(4, 9, device=DEVICE)
    targets = torch.tensor([0, 9, -1, 8], device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="targets holds"):
            tk.token_logprobs(logits, targets)
        return
    assert tk.token_logprobs(logits, targets).logprobs.isnan().tolist() == [False, True, True,
                                                                            False]


def test_place_keeps_integers():
    assert place(torch.tensor([1]), "cpu", torch.float16).dtype == torch.int64
