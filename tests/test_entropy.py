"""`entropy`: the textbook, `token_logprobs` bit for bit, gradients, extremes."""

import itertools
import math

import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
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


@pytest.fixture(params=[
    pytest.param(b, marks=pytest.mark.skipif(bool(missing(b)), reason=str(missing(b))))
    for b in ("cpp", "reference")])
def backend(request):
    with tk.use_backend(request.param):
        yield request.param


def textbook(logits, mask=None, temperature=1.0, softcap=None, logit_scale=1.0, valid_vocab=None):
    """-sum p log p by torch's softmax, in the dtype of the logits."""
    x = logits if mask is None else torch.where(mask[..., None], logits, 0)
    z = x * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    t = temperature[..., None] if isinstance(temperature, torch.Tensor) and temperature.dim() else (
        temperature)
    log_p = torch.log_softmax((z / t)[..., :valid_vocab], -1)
    p = log_p.exp()
    entropy = -(p * torch.where(p == 0, 0, log_p)).sum(-1)
    return entropy if mask is None else torch.where(mask, entropy, 0)


def run(function, logits, mask=None, **options):
    """(entropy, gradient of the logits) under slopes from -1 to 1."""
    leaf = logits.detach().requires_grad_()
    entropy = function(leaf, mask, **options)
    slopes = torch.linspace(-1, 1, max(entropy.numel(), 1)).to(entropy.dtype)
    slopes = slopes[:entropy.numel()].reshape(entropy.shape)
    return entropy.detach(), torch.autograd.grad(entropy, leaf, slopes)[0]


def test_by_hand(backend):
    """p = (1/2, 1/4, 1/4): 1.5 log 2; uniform over four: log 4; certain: 0; masked: 0."""
    inf = float("inf")
    logits = torch.tensor([[math.log(2), 0, 0, -inf], [7.0] * 4, [0, -inf, -inf, -inf],
                           [float("nan")] * 4], requires_grad=True)
    entropy = tk.entropy(logits, torch.tensor([1, 1, 1, 0]))
    log2 = math.log(2)
    torch.testing.assert_close(entropy, torch.tensor([1.5 * log2, 2 * log2, 0, 0]))
    grad, = torch.autograd.grad(entropy.sum(), logits)
    # -p (log p + H): -(1/2) (-log 2 + 1.5 log 2), -(1/4) (-2 log 2 + 1.5 log 2)
    torch.testing.assert_close(grad[0], torch.tensor([-log2 / 4, log2 / 8, log2 / 8, 0]))
    torch.testing.assert_close(grad[1:], torch.zeros(3, 4), rtol=0, atol=1e-7)


OPTIONS = [{}, {"temperature": 0.7, "softcap": 3.0}, {"logit_scale": -2.0, "valid_vocab": 5},
           {"logit_scale": 0.5, "temperature": 1.7, "softcap": 5.0, "valid_vocab": 6}]


@pytest.mark.parametrize("options", OPTIONS)
def test_textbook_and_gradcheck(options):
    for kind in MASKS:
        x, mask = 3 * torch.randn(3, 5, 7, dtype=torch.float64), sample_mask(kind, 3, 5, seed=4)
        actual = run(tk.entropy, x, mask, **options)
        torch.testing.assert_close(actual, run(textbook, x, mask, **options), rtol=1e-11,
                                   atol=1e-12)
        assert actual[0].dtype == torch.float64
    leaf = x[:, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: tk.entropy(y, **options), (leaf,))


SHAPES = [(1,), (7,), (3, 21), (65,), (2, 3, 5), (), (0, 5)]
CASES = third(itertools.product(DTYPES, SHAPES, (2, 63, 64, 65, 1000, 2100), (False, True)), seed=3)


def test_accuracy_over_dtypes_shapes_strides(backend):
    for case, (dtype, shape, V, apart) in enumerate(CASES):
        g = torch.Generator().manual_seed(case)
        x = (3 * torch.randn(*shape, V, generator=g)).to(dtype)
        mask = sample_mask("interior", *shape, case) if len(shape) == 2 else None
        options = dict(OPTIONS[case % 3])
        options["valid_vocab"] = V - 1 if case % 3 == 2 else None
        if case % 4 == 0 and shape:
            options["temperature"] = 0.5 + torch.rand(shape, generator=g)
        x = strided(x) if apart else x
        actual = run(tk.entropy, x, mask, **options)
        exact = run(textbook, x.double(), mask, **options)
        eager = run(textbook, x.float(), mask, **options)
        assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
        assert_accurate(actual[0], exact[0], eager[0], name=f"{CASES[case]} {options}")
        rounded = exact[1].to(dtype).double()
        floor = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
        assert_accurate(actual[1], rounded, eager[1].to(dtype), floor=floor,
                        name=f"gradient of {CASES[case]} {options}")
        if mask is not None:
            assert not actual[0][~mask].any() and not actual[1][~mask].any()


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_entropy_of_token_logprobs(backend, options):
    """Bit for bit, gradients too: one kernel computes both."""
    x, mask = (4 * torch.randn(4, 9, 300)).bfloat16(), sample_mask("row", 4, 9)

    def with_targets(x, mask, **options):
        return tk.token_logprobs(x, torch.zeros(4, 9, dtype=torch.int32), mask, **options).entropy

    for logits in (x, x.float()):
        actual, expected = (run(f, logits, mask, **options) for f in (tk.entropy, with_targets))
        assert torch.equal(actual[0], expected[0])
        # that kernel writes the column of the target, 0 here, by another rounding
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-2, atol=1e-6)
        assert torch.equal(actual[1][..., 1:], expected[1][..., 1:])


@pytest.mark.parametrize("poison", POISONS)
def test_poison(backend, poison):
    x, mask = torch.randn(4, 9, 70), sample_mask("row", 4, 9, seed=2)
    rows = 0.5 + torch.rand(4, 9)
    for temperature in (0.7, rows):
        results = []
        for value in (1.0, poison):
            t = temperature if temperature is not rows else poisoned(rows, mask, value)
            results.append(run(tk.entropy, poisoned(x, mask, value), mask, temperature=t))
        assert_same_bits(results[1], results[0])
    leaf = x.requires_grad_()
    grad, = torch.autograd.grad(tk.entropy(leaf, mask), leaf, poisoned(torch.ones(4, 9), mask,
                                                                       poison))
    assert grad.isfinite().all() and not grad[~mask].any()


def test_extremes(backend):
    """Rows of +-1e4 and of -inf but one; no column left, NaN and +inf show."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1e4, -1e4, 1e4], [-inf, 2.0, -inf], [-inf] * 3, [nan, 0.0, 1.0],
                      [inf, 0.0, 0.0]])
    entropy, grad = run(tk.entropy, x)
    torch.testing.assert_close(entropy[:2], torch.tensor([math.log(2), 0]))
    assert entropy[2:].isnan().all() and grad[:2].isfinite().all()
    for bad in (x[2:3], x[3:4], x[4:5]):
        assert run(tk.entropy, bad)[1].isnan().any()


def test_twice_and_packed(backend):
    x, lengths = torch.randn(4, 30, 50), [13, 1, 0, 30]
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    once = run(tk.entropy, x, mask)
    assert_same_bits(run(tk.entropy, x, mask), once)
    packed = tk.entropy(pack(x, lengths)[0])
    torch.testing.assert_close(packed, pack(once[0], lengths)[0], rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(-40, 40))
def test_bounds_shift_and_order(seed, v, shift):
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(5, v, generator=g, dtype=torch.float64)
    entropy = tk.entropy(x)
    assert ((entropy >= -1e-12) & (entropy <= math.log(v) + 1e-12)).all()
    torch.testing.assert_close(tk.entropy(x + shift), entropy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tk.entropy(x[:, torch.randperm(v, generator=g)]), entropy)


def test_opcheck():
    fwd, bwd = (getattr(torch.ops.tppo_kernels, f"entropy_{x}").default for x in ("fwd", "bwd"))
    x, mask = torch.randn(3, 6, 9), sample_mask("interior", 3, 6)
    one, cap = torch.tensor(1.0), torch.tensor(5.0)
    for given_ in ((x, mask, one, None, one, None), (x.bfloat16(), None, one, cap, one, 7),
                   (x.double(), mask, torch.rand(3, 6) + 0.5, None, one, None)):
        torch.library.opcheck(fwd, given_)
        _, entropy, top, log_sum = fwd(*given_)
        torch.library.opcheck(bwd, (torch.ones_like(entropy), *given_, entropy, top, log_sum))


def test_compiles_as_one_graph_and_exports():
    def call(x, mask, temperature):
        return tk.entropy(x * 2, mask, temperature=temperature)

    args = (torch.randn(3, 6, 9, requires_grad=True), sample_mask("interior", 3, 6),
            torch.tensor(0.7))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(compiled, call(*args))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), args[0])[0]
                                 for y in (compiled, call(*args))))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    torch.testing.assert_close(torch.export.export(Module(), args).module()(*args), call(*args))


def test_fifty_lengths_and_temperatures_two_graphs():
    calls = [(torch.randn(2, 2 + t, 9), torch.tensor(0.5 + t / 50)) for t in range(50)]
    assert count_graphs(lambda x, t: tk.entropy(x, temperature=t), calls) <= 2


@pytest.mark.parametrize("error, words, change", [
    (TypeError, "entropy: logits is list", {"logits": [1.0]}),
    (ValueError, "entropy: logits has shape .*at least one column", {"logits": torch.zeros(3, 0)}),
    (TypeError, r"entropy: mask has dtype float32.*mask\.bool\(\)", {"mask": torch.ones(2)}),
    (ValueError, r"entropy: mask has shape \[3\]", {"mask": torch.ones(3).bool()}),
    (ValueError, "entropy: temperature is 0.0, expected a number > 0", {"temperature": 0.0}),
    (ValueError, "entropy: temperature holds 0", {"temperature": torch.tensor([0.0, 1.0])}),
    (ValueError, "entropy: valid_vocab is 5, expected a number >= 1 and <= 4", {"valid_vocab": 5}),
    (TypeError, "entropy: unknown keyword targets", {"targets": None}),
])
def test_bad_input_names_the_argument(error, words, change):
    with pytest.raises(error, match=words):
        tk.entropy(**{"logits": torch.zeros(2, 4)} | change)


def test_a_second_derivative_and_fp64_elsewhere_are_refused():
    x = torch.randn(2, 3, requires_grad=True)
    grad, = torch.autograd.grad(tk.entropy(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    assert tk.explain(tk.entropy, x.double()).backend == "reference"
