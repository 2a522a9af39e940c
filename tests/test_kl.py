"""`kl`: every estimator against its textbook form, its clamps, and both gradients."""

import itertools
import math

import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo_kernels._core.op import missing
from tppo_kernels._math.sequence import KL_ESTIMATORS
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


@pytest.fixture(params=[
    pytest.param(b, marks=pytest.mark.skipif(bool(missing(b)), reason=str(missing(b))))
    for b in ("cpp", "reference")])
def backend(request):
    with tk.use_backend(request.param):
        yield request.param


def sample(shape, dtype=torch.float32, seed=0, spread=1.0):
    """Log-probs and those of a reference policy."""
    g = torch.Generator().manual_seed(seed)
    ref = -3 * torch.rand(shape, generator=g)
    return (ref + spread * torch.randn(shape, generator=g)).to(dtype), ref.to(dtype)


def textbook(logprobs, ref, mask, estimator, clamp=None):
    """As verl writes it, with autograd's gradient, in the dtype of the inputs."""
    d = logprobs - ref
    if mask is not None:
        d = torch.where(mask, d, torch.zeros_like(d))
    d = d.clamp(-20, 20)
    value = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}[estimator[:3]
            if estimator == "abs" else estimator[:2]]
    if clamp is not None:
        value = value.clamp(-clamp, clamp)
    if estimator.endswith("+"):
        square = d * d / 2
        value = value.detach() + square - square.detach()
    return value if mask is None else torch.where(mask, value, torch.zeros_like(value))


def run(function, x, mask=None, **options):
    """(value, gradient of logprobs, gradient of ref) under slopes from -1 to 1."""
    x = [t.detach().requires_grad_() for t in x]
    value = function(*x, mask, **options)
    slopes = torch.linspace(-1, 1, value.numel()).to(value.dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad(value, x, slopes)


def test_by_hand(backend):
    """p_ref / p = 2, 1/2, 1 and e^21: d = -log 2, log 2, 0 and -21, which is clamped to -20."""
    ref = torch.tensor([[math.log(0.5), math.log(0.25), -1.0, -1.0]])
    logprobs = torch.tensor([[math.log(0.25), math.log(0.5), -1.0, -22.0]], requires_grad=True)
    log2 = math.log(2)
    expected = {"k1": [-log2, log2, 0, -20], "k2": [log2 ** 2 / 2] * 2 + [0, 200],
                "k3": [1 - log2, log2 - 0.5, 0, math.exp(20) - 21], "abs": [log2, log2, 0, 20]}
    slopes = {"k1": [1, 1, 1, 0], "k2": [-log2, log2, 0, 0], "k3": [-1, 0.5, 0, 0],
              "abs": [-1, 1, 0, 0], "k1+": [-log2, log2, 0, 0], "k3+": [-log2, log2, 0, 0]}
    for estimator in KL_ESTIMATORS:
        value = tk.kl(logprobs, ref, estimator=estimator)
        torch.testing.assert_close(value, torch.tensor([expected[estimator.rstrip("+")]]).float())
        grad, = torch.autograd.grad(value.sum(), logprobs)
        torch.testing.assert_close(grad, torch.tensor([slopes[estimator]]).float())


def test_a_clamp_by_hand(backend):
    """k3 of d = -3, -1, 2 is 16.1, .718, 1.135; clamped at 10 and at 1, gradient 0 beyond."""
    ref = torch.zeros(3)
    logprobs = torch.tensor([-3.0, -1.0, 2.0], requires_grad=True)
    small, large = math.exp(1) - 2, math.exp(-2) + 1
    for clamp, values, alive in ((10.0, [10, small, large], [0, 1, 1]),
                                 (torch.tensor(1.0), [1, small, 1], [0, 1, 0])):
        value = tk.kl(logprobs, ref, estimator="k3", clamp=clamp)
        torch.testing.assert_close(value, torch.tensor(values).float())
        grad, = torch.autograd.grad(value.sum(), logprobs)
        exact = torch.tensor([1 - math.exp(3), 1 - math.exp(1), 1 - math.exp(-2)])
        torch.testing.assert_close(grad, exact * torch.tensor(alive))
        value = tk.kl(logprobs, ref, estimator="k3+", clamp=clamp)
        torch.testing.assert_close(value, torch.tensor(values).float())
        assert torch.autograd.grad(value.sum(), logprobs)[0].tolist() == [-3, -1, 2]
    value = tk.kl(logprobs, ref, clamp=1.5)
    assert value.tolist() == [-1.5, -1.0, 1.5]
    assert torch.autograd.grad(value.sum(), logprobs)[0].tolist() == [0, 1, 0]
    assert_same_bits(tk.kl(logprobs, ref, clamp=math.inf), tk.kl(logprobs, ref))


CASES = third(itertools.product(KL_ESTIMATORS, (None, 0.4, 10.0), MASKS), seed=4)


@pytest.mark.parametrize("estimator, clamp, kind", CASES)
def test_textbook_and_gradcheck(estimator, clamp, kind):
    x, mask = sample((3, 5), torch.float64, seed=3), sample_mask(kind, 3, 5, seed=4)
    actual = run(tk.kl, x, mask, estimator=estimator, clamp=clamp)
    expected = run(textbook, x, mask, estimator=estimator, clamp=clamp)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert actual[0].dtype == torch.float64
    torch.testing.assert_close(actual[2], -actual[1], rtol=0, atol=0)
    if not estimator.endswith("+"):  # whose gradient is not that of the value
        leaves = [t.requires_grad_() for t in x]
        assert torch.autograd.gradcheck(
            lambda *x: tk.kl(*x, mask, estimator=estimator, clamp=clamp), leaves)


SHAPES = [(), (1,), (7,), (3, 63), (64, 1), (65,), (2, 3, 5), (2, 1000), (0, 5), (3, 0), (0,)]
LAYOUTS = third(itertools.product(DTYPES, SHAPES, MASKS, (False, True)), seed=2)


def test_accuracy_over_dtypes_shapes_masks_strides(backend):
    """At most twice the error of eager PyTorch in fp32, plus 1e-6 of the largest value."""
    for case, (dtype, shape, kind, apart) in enumerate(LAYOUTS):
        x = sample(shape, dtype, seed=case, spread=(0.01, 1.0, 8.0)[case % 3])
        n = max(math.prod(shape), 1)
        width = shape[-1] if shape else 1
        mask = sample_mask(kind, n // max(width, 1), width, case)
        mask = None if mask is None or n == 0 else mask.reshape(shape)
        if apart:
            x, mask = [strided(t) for t in x], mask if mask is None else strided(mask)
        options = {"estimator": KL_ESTIMATORS[case % 6], "clamp": (None, 2.0)[case % 2]}
        actual = run(tk.kl, x, mask, **options)
        exact = run(textbook, [t.double() for t in x], mask, **options)
        eager = run(textbook, [t.float() for t in x], mask, **options)
        assert [t.dtype for t in actual] == [torch.float32, dtype, dtype]
        for name, a, e, p in zip(("value", "gradient", "of ref"), actual, exact, eager,
                                 strict=True):
            rounded = e.to(dtype).double() if name != "value" else e
            assert_accurate(a, rounded, p.to(a.dtype), name=f"{name} of {LAYOUTS[case]} {options}",
                            floor=1e-6 if a.dtype == torch.float32 else 1e-2)
        if mask is not None:
            assert not any(t[~mask].any() for t in actual)


@pytest.mark.parametrize("poison", POISONS)
def test_poison(backend, poison):
    mask = sample_mask("row", 4, 70, seed=2)
    for estimator in KL_ESTIMATORS:
        results = [run(tk.kl, [poisoned(t, mask, value) for t in sample((4, 70), seed=3)], mask,
                       estimator=estimator, clamp=5.0) for value in (0.0, poison)]
        assert_same_bits(results[1], results[0])
        leaf, ref = (t.detach().requires_grad_() for t in sample((4, 70), seed=3))
        slopes = poisoned(torch.ones(4, 70), mask, poison)
        grads = torch.autograd.grad(tk.kl(leaf, ref, mask, estimator=estimator), [leaf, ref],
                                    slopes)
        assert all(g.isfinite().all() and not g[~mask].any() for g in grads)


def test_nan_and_infinity_at_valid_tokens_show(backend):
    logprobs = torch.tensor([float("nan"), float("-inf"), -1.0, 1.0], requires_grad=True)
    for estimator, clamp in itertools.product(KL_ESTIMATORS, (None, 3.0)):
        value = tk.kl(logprobs, torch.tensor([-1.0, -1.0, -1.0, float("-inf")]),
                      estimator=estimator, clamp=clamp)
        assert value.isnan().tolist() == [True, False, False, False]
        grad, = torch.autograd.grad(value.sum(), logprobs)
        assert grad.isnan().tolist() == [estimator != "k1", False, False, False]


def test_twice_packed_and_one_dimension_more(backend):
    x, mask, lengths = sample((4, 70)), torch.arange(70) < torch.tensor([[13], [1], [0], [70]]), [
        13, 1, 0, 70]
    once = run(tk.kl, x, mask, estimator="k3")
    assert_same_bits(run(tk.kl, x, mask, estimator="k3"), once)
    packed = tk.kl(*(pack(t, lengths)[0] for t in x), estimator="k3")
    torch.testing.assert_close(packed, pack(once[0], lengths)[0], rtol=0, atol=0)
    wide = tk.kl(*(t[None] for t in x), mask[None], estimator="k3")
    torch.testing.assert_close(wide[0], once[0], rtol=0, atol=0)


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
def test_threads_change_no_bit():
    x, mask = sample((300_000,)), torch.rand(300_000) < 0.5
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(tk.kl, x, mask, estimator="k3", clamp=1.0))
    torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs"])
def test_one_gradient_alone(backend, name):
    x = dict(zip(("logprobs", "ref_logprobs"), sample((3, 5)), strict=True))
    both = dict(zip(x, run(tk.kl, x.values(), estimator="k2")[1:], strict=True))
    x[name].requires_grad_()
    value = tk.kl(**x, estimator="k2")
    value.backward(torch.linspace(-1, 1, 15).reshape(3, 5))
    assert_same_bits(x[name].grad, both[name])


def test_it_is_the_kl_of_the_loss(backend):
    """One formula: the metric of `ppo_loss`, the reward's term of `token_advantages`."""
    (logprobs, ref), mask = sample((3, 40)), sample_mask("interior", 3, 40)
    for estimator in KL_ESTIMATORS:
        value = tk.kl(logprobs, ref, mask, estimator=estimator)
        loss = tk.ppo_loss(logprobs, logprobs, 0 * ref, mask, ref_logprobs=ref, kl_coef=0.3,
                           kl_estimator=estimator)
        torch.testing.assert_close(0.3 * tk.reduce(value, mask), loss.loss)
        with tk.use_backend("reference"):
            shaped = tk.token_advantages(0 * ref, 0 * ref, mask, logprobs=logprobs,
                                         ref_logprobs=ref, kl_coef=0.3, kl_estimator=estimator)
        torch.testing.assert_close(shaped.rewards, -0.3 * value)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(KL_ESTIMATORS))
def test_k3_is_not_negative_and_k1_is_odd(seed, estimator):
    x, ref = sample((50,), torch.float64, seed=seed)
    value, back = (tk.kl(*pair, estimator=estimator) for pair in ((x, ref), (ref, x)))
    if estimator.startswith("k1"):
        torch.testing.assert_close(back, -value)
    else:
        assert (value >= 0).all()
    assert not tk.kl(x, x, estimator=estimator).any()


def test_opcheck():
    fwd, bwd = torch.ops.tppo_kernels.kl_fwd.default, torch.ops.tppo_kernels.kl_bwd.default
    (x, ref), mask = sample((3, 6)), sample_mask("interior", 3, 6)
    for given_ in ((x, ref, mask, None, "k3"), (x.bfloat16(), ref, None, torch.tensor(2.0), "k1"),
                   (x.double(), ref.double(), mask, torch.tensor(1.0), "abs"),
                   (x[:0], ref[:0], None, None, "k2")):
        torch.library.opcheck(fwd, given_)
        torch.library.opcheck(bwd, (torch.ones_like(given_[0]), *given_))


def test_compiles_as_one_graph_and_exports():
    def call(x, ref, mask, clamp):
        return tk.kl(x * 2, ref, mask, estimator="k3", clamp=clamp)

    args = (*sample((3, 6)), sample_mask("interior", 3, 6), torch.tensor(1.0))
    args[0].requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(compiled, call(*args))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), args[0])[0]
                                 for y in (compiled, call(*args))))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    exported = torch.export.export(Module(), args).module()(*args)
    torch.testing.assert_close(exported, call(*args))


def test_fifty_lengths_and_clamps_two_graphs():
    calls = [(*sample((2, 2 + t)), torch.tensor(0.1 + t)) for t in range(50)]
    assert count_graphs(lambda x, ref, clamp: tk.kl(x, ref, estimator="k3", clamp=clamp),
                        calls) <= 2


@pytest.mark.parametrize("error, words, change", [
    (TypeError, "logprobs is list", {"logprobs": [1.0]}),
    (ValueError, r"ref_logprobs has shape \[4\].*\[3\] as logprobs", {
        "ref_logprobs": torch.zeros(4)}),
    (TypeError, r"mask has dtype float32.*mask\.bool\(\)", {"mask": torch.ones(3)}),
    (ValueError, "estimator is 'k4', expected one of 'k1', 'k2', 'k3'", {"estimator": "k4"}),
    (ValueError, "clamp is 0.0, expected a number > 0", {"clamp": 0.0}),
    (ValueError, "clamp holds -1", {"clamp": torch.tensor(-1.0)}),
    (TypeError, "cu_seqlens", {"cu_seqlens": None}),
])
def test_bad_input_names_the_argument(error, words, change):
    good = {"logprobs": torch.zeros(3), "ref_logprobs": torch.zeros(3)}
    with pytest.raises(error, match=words):
        tk.kl(**good | change)


def test_a_second_derivative_and_fp64_elsewhere_are_refused():
    x, ref = (t.requires_grad_() for t in sample((3,)))
    grad, = torch.autograd.grad(tk.kl(x, ref, estimator="k3").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    assert tk.explain(tk.kl, x.double(), ref.double()).backend == "reference"
