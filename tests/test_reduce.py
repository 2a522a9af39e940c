"""`reduce`: every reduction against plain sums over sequences, its denominators, its gradient."""

import itertools
from math import inf

import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo_kernels._core.check import REDUCTIONS
from tppo_kernels._core.op import missing
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    count_graphs,
    pack,
    poisoned,
    sample_mask,
    strided,
)

ALL = "all"


@pytest.fixture(params=[
    pytest.param(b, marks=pytest.mark.skipif(bool(missing(b)), reason=str(missing(b))))
    for b in ("cpp", "reference")])
def backend(request):
    with tk.use_backend(request.param):
        yield request.param


def textbook(x, mask, reduction, num_sequences=None, num_tokens=None, norm_length=None):
    """Sequence after sequence, with the gradient of autograd."""
    rows = [row if mask is None else row[mask[b]] for b, row in enumerate(x)]
    lengths = [len(row) for row in rows]
    sums = [row.sum() for row in rows]
    live = len(rows) if num_sequences == ALL else sum(n > 0 for n in lengths)
    sequences = max(1, live if num_sequences in (None, ALL) else num_sequences)
    total = sum(sums, x.new_zeros(()))
    means = sum((s / max(1, n) for s, n in zip(sums, lengths, strict=True)), x.new_zeros(()))
    tokens = max(1, sum(lengths) if num_tokens is None else num_tokens)
    length = max(1, x.shape[1] if norm_length is None else norm_length)
    return {"token-mean": total / tokens, "token-sum": total,
            "seq-mean-token-sum": total / sequences, "seq-mean-token-mean": means / sequences,
            "seq-mean-token-sum-norm": total / (length * sequences)}[reduction] + 0 * x[:0].sum()


def run(function, x, mask=None, slope=1.5, **options):
    """(value, gradient of x)"""
    x = x.detach().requires_grad_()
    value = function(x, mask, **options)
    return value.detach(), torch.autograd.grad(value, x, torch.full_like(value, slope),
                                               materialize_grads=True)[0]


def test_by_hand(backend):
    """Three sequences of 1, 2 | 4 | nothing: token-mean 7/3, of sequences (1.5 + 4) / 2, ..."""
    x = torch.tensor([[1.0, 2, 9], [9, 9, 4], [9, 9, 9]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    expected = {"token-mean": (7 / 3, 7 / 3), "token-sum": (7, 7), "seq-mean-token-sum": (
        7 / 2, 7 / 3), "seq-mean-token-mean": (5.5 / 2, 5.5 / 3),
        "seq-mean-token-sum-norm": (7 / 6, 7 / 9)}
    share = {"token-mean": [[2, 2, 0], [0, 0, 2], [0] * 3], "token-sum": [[6, 6, 0], [0, 0, 6],
             [0] * 3], "seq-mean-token-sum": [[3, 3, 0], [0, 0, 3], [0] * 3],
             "seq-mean-token-mean": [[1.5, 1.5, 0], [0, 0, 3], [0] * 3],
             "seq-mean-token-sum-norm": [[1, 1, 0], [0, 0, 1], [0] * 3]}
    for reduction, values in expected.items():
        for num_sequences, value in zip((None, ALL), values, strict=True):
            actual = tk.reduce(x, mask, reduction=reduction, num_sequences=num_sequences)
            torch.testing.assert_close(actual, torch.tensor(float(value)))
        grad, = torch.autograd.grad(tk.reduce(x, mask, reduction=reduction), x)
        torch.testing.assert_close(6 * grad, torch.tensor(share[reduction]).float())


COUNTS = [{}, {"num_sequences": ALL}, {"num_tokens": 40, "num_sequences": 7, "norm_length": 11}]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_textbook_gradcheck_and_packed(reduction):
    for kind, counts in itertools.product(MASKS, COUNTS):
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        mask = sample_mask(kind, 3, 5, seed=4)
        options = {"reduction": reduction, **counts}
        actual = run(tk.reduce, x, mask, **options)
        torch.testing.assert_close(actual, run(textbook, x, mask, **options), rtol=1e-12,
                                   atol=1e-12)
        assert actual[0].dtype == torch.float64
        assert torch.autograd.gradcheck(lambda y, m=mask, o=options: tk.reduce(y, m, **o), (x,))
        flat = run(tk.reduce, x.flatten(), None if mask is None else mask.flatten(), **{
            "norm_length": 5, **options}, cu_seqlens=torch.tensor([0, 5, 10, 15]).int())
        torch.testing.assert_close((flat[0], flat[1].reshape(3, 5)), actual, rtol=1e-12,
                                   atol=1e-12)


CASES = third(itertools.product(DTYPES, (1, 7, 63, 64, 65, 1000), MASKS, (False, True)), seed=2)


def test_accuracy_over_dtypes_shapes_masks_strides(backend):
    for case, (dtype, tokens, kind, apart) in enumerate(CASES):
        x = torch.randn(3, tokens, generator=torch.Generator().manual_seed(case)).to(dtype)
        mask = sample_mask(kind, 3, tokens, case)
        if apart:
            x, mask = strided(x), mask if mask is None else strided(mask)
        for reduction in REDUCTIONS:
            options = {"reduction": reduction, **COUNTS[case % 3]}
            actual = run(tk.reduce, x, mask, **options)
            exact = run(textbook, x.double(), mask, **options)
            eager = run(textbook, x.float(), mask, **options)
            assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
            added = textbook(x.double().abs(), mask, **options)
            assert_accurate(actual[0], exact[0], eager[0], scale=added,
                            name=f"{CASES[case]} {options}")
            assert_accurate(actual[1], exact[1], eager[1].to(dtype), name=f"gradient {options}")
            assert_same_bits(run(tk.reduce, x, mask, **options), actual)
            if mask is not None:
                assert not actual[1][~mask].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_equals_padded_with_an_empty_sequence(backend, reduction):
    lengths = [13, 1, 0, 700]
    x, mask = torch.randn(4, 700), torch.arange(700) < torch.tensor(lengths)[:, None]
    for counts in COUNTS:
        options = {"norm_length": 700, "reduction": reduction, **counts}
        value, grad = run(tk.reduce, x, mask, **options)
        packed, cu = pack(x, lengths)
        got = run(tk.reduce, packed, cu_seqlens=cu, **options)
        torch.testing.assert_close(got, (value, pack(grad, lengths)[0]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up(backend, reduction):
    x, mask = torch.randn(8, 30), sample_mask("row", 8, 30)
    counts = {"num_tokens": int(mask.sum()), "num_sequences": torch.tensor(7), "norm_length": 30}
    whole = tk.reduce(x, mask, reduction=reduction, **counts)
    parts = [tk.reduce(x[b:b + 1], mask[b:b + 1], reduction=reduction, **counts) for b in range(8)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)
    assert int(mask.any(1).sum()) == 7
    torch.testing.assert_close(whole, tk.reduce(x, mask, reduction=reduction), rtol=1e-6, atol=1e-7)


def test_it_is_the_reduction_of_the_losses(backend):
    """One formula: `value_loss` at returns of 0 is the reduction of V^2 / 2."""
    values, mask = torch.randn(3, 40), sample_mask("row", 3, 40)
    for reduction, counts in itertools.product(REDUCTIONS, COUNTS):
        loss = tk.value_loss(values, 0 * values, mask, reduction=reduction, **counts).loss
        torch.testing.assert_close(tk.reduce(values.square() / 2, mask, reduction=reduction,
                                             **counts), loss)


@pytest.mark.parametrize("poison", POISONS)
def test_poison(backend, poison):
    for kind, reduction in itertools.product(("left", "interior", "row", "all-false"), REDUCTIONS):
        x, mask = torch.randn(6, 33), sample_mask(kind, 6, 33)
        clean, dirty = (run(tk.reduce, poisoned(x, mask, v), mask, reduction=reduction)
                        for v in (0.0, poison))
        assert_same_bits(dirty, clean)
        assert not clean[1][~mask].any()
        _, grad = run(tk.reduce, x, mask, slope=poison, reduction=reduction)
        assert not grad[~mask].any()


def test_nothing_is_zero_and_attached(backend):
    for shape, reduction in itertools.product(((0, 5), (3, 0), (2, 3)), REDUCTIONS):
        x = torch.randn(shape, requires_grad=True)
        value = tk.reduce(x, torch.zeros(shape, dtype=torch.bool), reduction=reduction)
        value.backward()
        assert float(value) == 0 and not x.grad.any() and x.grad.shape == shape
    x = torch.zeros(0, requires_grad=True)
    value = tk.reduce(x, cu_seqlens=torch.zeros(1, dtype=torch.int32))
    value.backward()
    assert float(value) == 0


def test_a_value_that_is_not_finite_shows(backend):
    x = torch.tensor([[1.0, inf], [float("nan"), 2.0]])
    assert tk.reduce(x[:1]).isinf() and tk.reduce(x).isnan()
    assert tk.reduce(torch.ones(1, 2), num_tokens=torch.tensor(float("nan"))).isnan()


def test_backward_keeps_no_value_of_x():
    """As torch.sum: what is reduced may be changed in place before backward."""
    x = torch.randn(2, 3, requires_grad=True)
    y = x * 2
    value = tk.reduce(y)
    y.zero_()
    value.backward()
    torch.testing.assert_close(x.grad, torch.full((2, 3), 2 / 6))


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
def test_threads_change_no_bit():
    x, mask = torch.randn(300, 2000), torch.rand(300, 2000) < 0.5
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append([run(tk.reduce, x, mask, reduction=r) for r in REDUCTIONS])
    torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert_same_bits(one, three)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(REDUCTIONS), st.floats(-3, 3))
def test_linear_in_x_and_blind_to_order_and_padding(seed, reduction, factor):
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(4, 6, generator=g, dtype=torch.float64), sample_mask("row", 4, 6, seed)
    options = {"reduction": reduction, "norm_length": 9}
    value = tk.reduce(x, mask, **options)
    torch.testing.assert_close(tk.reduce(factor * x, mask, **options), factor * value)
    order = torch.randperm(4, generator=g)
    torch.testing.assert_close(tk.reduce(x[order], mask[order], **options), value)
    padded = [torch.nn.functional.pad(t, (2, 1)) for t in (x, mask)]
    torch.testing.assert_close(tk.reduce(*padded, **options), value)


def test_opcheck():
    fwd, bwd = (getattr(torch.ops.tppo_kernels, f"reduce_{x}").default for x in ("fwd", "bwd"))
    x, mask, seven = torch.randn(3, 6), sample_mask("interior", 3, 6), torch.tensor(7.0)
    cu = torch.tensor([0, 6, 18], dtype=torch.int32)
    for reduction in REDUCTIONS:
        over = (seven, None, seven, reduction)
        torch.library.opcheck(fwd, (x, mask, *over, None))
        torch.library.opcheck(fwd, (x.flatten().double(), None, *over, cu))
        torch.library.opcheck(bwd, (seven, seven, mask, *over, None, torch.bfloat16))


def test_compiles_as_one_graph_and_exports():
    def call(x, mask, count):
        return tk.reduce(x * 2, mask, reduction="seq-mean-token-mean", num_sequences=count)

    args = (torch.randn(3, 6, requires_grad=True), sample_mask("interior", 3, 6), torch.tensor(5))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(compiled, call(*args))
    torch.testing.assert_close(*(torch.autograd.grad(y, args[0])[0]
                                 for y in (compiled, call(*args))))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    torch.testing.assert_close(torch.export.export(Module(), args).module()(*args), call(*args))


def test_fifty_batches_two_graphs():
    """"all" is a number that changes with the batch."""
    calls = [(torch.randn(2 + t, 3 + t), sample_mask("interior", 2 + t, 3 + t)) for t in range(50)]
    assert count_graphs(lambda x, mask: tk.reduce(
        x, mask, reduction="seq-mean-token-sum", num_sequences=ALL), calls) <= 2


@pytest.mark.parametrize("error, words, change", [
    (TypeError, "x is list", {"x": [1.0]}),
    (ValueError, r"x has shape \[3\], expected \[B, T\]", {"x": torch.zeros(3)}),
    (TypeError, r"mask has dtype float32.*mask\.bool\(\)", {"mask": torch.ones(2, 3)}),
    (ValueError, "reduction is 'mean', expected one of 'token-mean'", {"reduction": "mean"}),
    (ValueError, "num_sequences is 'each', expected a whole number", {"num_sequences": "each"}),
    (ValueError, "num_tokens is -1", {"num_tokens": -1}),
    (ValueError, "norm_length is None, expected a length", {
        "x": torch.zeros(3), "reduction": REDUCTIONS[-1],
        "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}),
    (ValueError, "cu_seqlens is .*end at N = 3", {
        "x": torch.zeros(3), "cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}),
])
def test_bad_input_names_the_argument(error, words, change):
    with pytest.raises(error, match=words):
        tk.reduce(**{"x": torch.zeros(2, 3)} | change)


def test_a_second_derivative_and_fp64_elsewhere_are_refused():
    x = torch.randn(2, 3, requires_grad=True)
    slope = torch.ones((), requires_grad=True)
    grad, = torch.autograd.grad(tk.reduce(x), x, slope, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    assert tk.explain(tk.reduce, x.double()).backend == "reference"


def test_the_bound_of_a_sum_that_cancels_is_of_what_it_adds_up():
    """1e4 and -1e4 and 1: plain float32 may be right to the bit, and one rounding is 1e-3."""
    exact, added = torch.tensor(1.0, dtype=torch.float64), torch.tensor(20_001.0)
    for off in (1e-3, -2e-3):
        assert_accurate(exact + off, exact, exact.float(), scale=added)
        with pytest.raises(AssertionError, match="result is off by .*, allowed 1.000e-06"):
            assert_accurate(exact + off, exact, exact.float())
    with pytest.raises(AssertionError, match="allowed 2.385e-03"):
        assert_accurate(exact + 2.5e-3, exact, exact.float(), scale=added)
