"""`token_logprobs`: the formula in plain loops, accuracy at every size, and its peers' bugs."""

import importlib
import itertools
import math
import mmap

import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tppo_kernels as tk
from tppo_kernels._core.op import missing
from tppo_kernels._math.linear import Scaling
from tppo_kernels.ops.token_logprobs import nbytes, reference
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    count_graphs,
    max_error,
    poisoned,
    sample_mask,
    strided,
)

needs_cpp = pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
INF = float("inf")


def textbook(row, target, temperature=1.0, softcap=None, scale=1.0, vocab=None):
    """(logprob, entropy) of one row of Python floats."""
    z = [scale * x for x in row[:vocab]]
    if softcap is not None:
        z = [softcap * math.tanh(x / softcap) for x in z]
    z = [x / temperature for x in z]
    top = max(z)
    lse = top + math.log(math.fsum(math.exp(x - top) for x in z))
    return z[target] - lse, lse - math.fsum(math.exp(x - lse) * x for x in z if x > -INF)


def dense(logits, targets, mask=None, *, temperature=1.0, softcap=None, logit_scale=1.0,
          valid_vocab=None):
    """The same as users write it, in the dtype of the logits, differentiable by torch."""
    z = logits[..., :valid_vocab] * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        temperature = temperature[..., None]
    log_p = (z / temperature).log_softmax(-1)
    if mask is not None:
        targets = torch.where(mask, targets, 0)
    logprobs = log_p.gather(-1, targets[..., None].long())[..., 0]
    terms = torch.where(log_p > -1e30, log_p.exp() * log_p.clamp(min=-1e30), 0)
    results = logprobs, -terms.sum(-1)
    return results if mask is None else tuple(torch.where(mask, x, 0) for x in results)


def sample(shape=(4, 9), V=33, dtype=torch.float32, seed=0, mask="interior"):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, V, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, V, shape, generator=g)
    rows = sample_mask(mask, 1, math.prod(shape), seed)
    return logits, targets, None if rows is None else rows.reshape(shape)


def gradients(function, logits, g_lp, g_ent, *args, **kwargs):
    """(results, gradient of sum(g_lp logprobs + g_ent entropy))."""
    leaf = logits.detach().requires_grad_()
    results = function(leaf, *args, **kwargs)
    total = sum((g * x).sum() for g, x in zip((g_lp, g_ent), results, strict=True) if g is not None)
    return tuple(x.detach() for x in results), torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    logits = torch.tensor([[1., 2., 5.]]).log()  # p = 1/8, 1/4, 5/8
    with tk.use_backend(backend):
        (logprobs, entropy), grad = gradients(tk.token_logprobs, logits, torch.tensor([2.]),
                                              torch.tensor([1.]), torch.tensor([1]))
    p = [0.125, 0.25, 0.625]
    h = -sum(x * math.log(x) for x in p)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25)]))
    torch.testing.assert_close(entropy, torch.tensor([h]))
    dz = [2 * ((i == 1) - x) - x * (math.log(x) + h) for i, x in enumerate(p)]
    torch.testing.assert_close(grad, torch.tensor([dz]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_textbook_loops(backend):
    for seed, (T, cap, scale, vocab) in enumerate([
            (1.0, None, 1.0, None), (0.7, None, 1.3, None), (1.5, 4.0, 1.0, None),
            (0.3, 30.0, -0.5, 11), (2.0, None, -2.0, 16), (1.0, 2.0, 0.0, None),
            (1.0, None, 0.0, 7)]):
        logits, targets, _ = sample((5,), 17, seed=seed)
        targets = targets % (vocab or 17)
        with tk.use_backend(backend):
            out = tk.token_logprobs(logits, targets, temperature=T, softcap=cap,
                                    logit_scale=scale, valid_vocab=vocab)
        exact = [textbook(row, t, T, cap, scale, vocab)
                 for row, t in zip(logits.tolist(), targets.tolist(), strict=True)]
        torch.testing.assert_close(torch.stack(out, 1), torch.tensor(exact), rtol=0, atol=4e-6)


def test_gradcheck():
    logits, targets, mask = sample((2, 3), 7, torch.float64)
    logits.requires_grad_()
    for kwargs in ({}, {"temperature": torch.rand(2, 3) + 0.5, "softcap": 3.0, "valid_vocab": 7},
                   {"temperature": 0.7, "logit_scale": 1.3, "mask": mask}):
        assert torch.autograd.gradcheck(
            lambda x, k=kwargs: tuple(tk.token_logprobs(x, targets, **k)), logits)


ROWS = {
    "ordinary": lambda x: 3 * x,
    "+-1e4": lambda x: torch.where(x > 0, 1e4, -1e4) + 3 * x,
    "all negative": lambda x: 3 * x - 1e4,
    "large": lambda x: 1e30 * x,
}


@pytest.mark.parametrize("V", (1, 7, 151_643, 151_936, 262_144))
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_line(backend, V):
    """|error of logprob| <= 1e-5 + 2.4e-7 max|z| of the row. SkyRL#2141: rows of negative logits
    against a maximum that starts at 0."""
    n = 2 if V > 1000 else 40
    for seed, (make, dtype) in enumerate(itertools.product(ROWS.values(), DTYPES)):
        g = torch.Generator().manual_seed(seed)
        x = make(torch.randn(n, V, generator=g))
        logits = (x.clamp(-6e4, 6e4) if dtype == torch.float16 else x).to(dtype)
        kwargs = [{}, {"temperature": 0.7}, {"temperature": 0.6, "logit_scale": 1.7},
                  {"softcap": 30.0, "temperature": 0.9}][seed % 4]
        targets = torch.randint(0, V, (n,), generator=g)
        z = logits.double() * kwargs.get("logit_scale", 1.0)
        z = (30 * torch.tanh(z / 30) if "softcap" in kwargs else z) / kwargs.get("temperature", 1.0)
        exact = dense(logits.double(), targets, **kwargs)
        with tk.use_backend(backend):
            out = tk.token_logprobs(logits, targets, **kwargs)
        allowed = 1e-5 + 2.4e-7 * z.abs().amax(-1)
        assert bool(((out.logprobs - exact[0]).abs() <= allowed).all()), (dtype, kwargs)
        assert_accurate(out.entropy, exact[1], dense(logits.float(), targets, **kwargs)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity(backend):
    V = 5000
    one = torch.full((3, V), -INF)
    one[:, 4321] = torch.tensor([7.0, -1e4, 0.0])
    targets = torch.tensor([4321, 4321, 17])
    g = torch.tensor([2.0, 3.0, 5.0])
    with tk.use_backend(backend):
        (logprobs, entropy), grad = gradients(tk.token_logprobs, one, g, g, targets)
        assert logprobs.tolist() == [0.0, 0.0, -INF] and entropy.tolist() == [0.0, 0.0, 0.0]
        assert not grad[:2].any()  # p = 1 at the target
        # the target is a dead column: p = 0 there, so that dz = g (1[target] - p)
        assert grad[2, 17] == 5.0 and grad[2, 4321] == -5.0 and grad[2].count_nonzero() == 2

        half = torch.tensor([[0.0, -INF, 0.0]])
        assert tk.token_logprobs(half, torch.tensor([0])).entropy.item() == pytest.approx(
            math.log(2))

        for hopeless in (-INF, INF, float("nan")):
            row = torch.randn(2, V)
            row[0] = hopeless if hopeless == -INF else row[0].index_fill(
                0, torch.tensor(4000), hopeless)
            (logprobs, entropy), grad = gradients(tk.token_logprobs, row, g[:2], g[:2],
                                                  targets[:2])
            assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [True, False]
            assert bool(grad[0].isnan().any()) and bool(grad[1].isfinite().all())


LEADING = [(), (1,), (7,), (65,), (2, 3), (2, 1, 3), (0,), (2, 0)]
VOCABULARIES = (1, 7, 63, 64, 65, 1000, 2049, 4500)
LAYOUTS = ("contiguous", "strided", "sliced", "transposed", "expanded", "offset")
CASES = third(itertools.product(DTYPES, LEADING, VOCABULARIES, LAYOUTS), seed=5)


def laid_out(x, layout):
    """The values of x (or of its first row everywhere) behind other strides."""
    if layout == "strided":
        return strided(x)
    if layout == "sliced" and x.dim() > 1:  # like full[:, P - 1:-1]
        wide = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1]), 9.0, dtype=x.dtype)
        wide[..., 2:2 + x.shape[-2], :] = x
        return wide[..., 2:2 + x.shape[-2], :]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    if layout == "offset":
        flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_over_dtypes_shapes_masks_strides(backend):
    for case, (dtype, shape, V, layout) in enumerate(CASES):
        if len(shape) > 0 and math.prod(shape) * V > 20_000 and case % 4:
            continue
        logits, targets, mask = sample(shape, V, dtype, case, MASKS[case % len(MASKS)])
        logits = laid_out(logits, layout)
        targets = (targets.int() if case % 2 else targets) % max(1, V - 2)
        kwargs = [{}, {"temperature": 0.7, "valid_vocab": max(1, V - 2)},
                  {"temperature": torch.rand(shape) + 0.5, "softcap": 5.0},
                  {"logit_scale": torch.tensor(-1.5)}][case % 4]
        g_lp, g_ent = torch.randn(2, *shape)
        exact, exact_grad = gradients(dense, logits.double(), g_lp, g_ent, targets, mask, **kwargs)
        eager, eager_grad = gradients(dense, logits.float(), g_lp, g_ent, targets, mask, **kwargs)
        with tk.use_backend(backend):
            actual, grad = gradients(tk.token_logprobs, logits, g_lp, g_ent, targets, mask,
                                     **kwargs)
        for a, x, e in zip(actual, exact, eager, strict=True):
            assert a.dtype == torch.float32 and a.shape == shape
            assert_accurate(a, x, e, name=f"result of {CASES[case]}")
        assert grad.dtype == dtype and grad.shape == logits.shape
        assert_accurate(grad, exact_grad, eager_grad.to(dtype), name=f"gradient of {CASES[case]}")
        if mask is not None:
            assert not grad[~mask].any() and not actual[0][~mask].any()
            assert not actual[1][~mask].any()
        assert not grad[..., kwargs.get("valid_vocab", V):].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", POISONS)
def test_poison(backend, poison):
    """OpenRLHF#1314, NeMo-RL#4120, prime-rl#2085: a masked slot that is NaN in backward only."""
    for kind in ("left", "right", "interior", "row", "all-false"):
        logits, targets, _ = sample((4, 9), 70)
        targets = targets % 61
        mask = sample_mask(kind, 4, 9)

        def run(fill, target, logits=logits, targets=targets, mask=mask):
            wide = poisoned(logits, mask, fill)
            wide[..., 61:] = fill
            temperature = poisoned(torch.linspace(0.5, 1.5, 36).reshape(4, 9), mask, fill)
            g_lp, g_ent = (poisoned(x, mask, fill) for x in torch.linspace(
                -2, 2, 72).reshape(2, 4, 9))
            leaf = wide.requires_grad_()
            out = tk.token_logprobs(leaf, torch.where(mask, targets, target), mask,
                                    temperature=temperature, valid_vocab=61)
            return *out, torch.autograd.grad(tuple(out), leaf, (g_lp, g_ent))[0]

        with tk.use_backend(backend):
            assert_same_bits(run(poison, -100), run(0.0, 0))
            *results, grad = run(poison, 10**9)
        assert not any(x[~mask].any() for x in results)
        assert not grad[~mask].any() and not grad[..., 61:].any()


def test_vocabulary_tail_is_outside():
    """verl#2656: padding columns of the head inside the logsumexp."""
    logits, targets, mask = sample(V=64)
    targets = targets % 50
    padded = logits.clone()
    padded[..., 50:] = 100.0
    assert_same_bits(tk.token_logprobs(padded, targets, mask, valid_vocab=50),
                     tk.token_logprobs(logits[..., :50], targets, mask))
    with pytest.raises(ValueError, match=r"targets holds 50, expected values in \[0, 49\]"):
        tk.token_logprobs(padded, targets.fill_(50), mask, valid_vocab=50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_permuted_and_threads(backend):
    logits, targets, mask = sample((300,), 1500)
    g_lp, g_ent = torch.randn(2, 300)
    order = torch.randperm(300)
    threads = torch.get_num_threads()
    with tk.use_backend(backend):
        once = gradients(tk.token_logprobs, logits, g_lp, g_ent, targets, mask)
        assert_same_bits(gradients(tk.token_logprobs, logits, g_lp, g_ent, targets, mask), once)
        permuted = gradients(tk.token_logprobs, logits[order], g_lp[order], g_ent[order],
                             targets[order], mask[order])
        try:
            torch.set_num_threads(2 if threads == 1 else 1)
            other = gradients(tk.token_logprobs, logits, g_lp, g_ent, targets, mask)
        finally:
            torch.set_num_threads(threads)
    for a, e in zip((*permuted[0], permuted[1]), (*once[0], once[1]), strict=True):
        torch.testing.assert_close(a, e[order], rtol=0, atol=2e-6)
    if backend == "cpp":
        assert_same_bits(other, once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_result_alone_has_its_gradient(backend):
    """verl#6913, Liger#968: a requested gradient that is lost."""
    logits, targets, mask = sample((3, 4), 11)
    g = torch.randn(3, 4)
    for g_lp, g_ent in ((g, None), (None, g), (g, 2 * g)):
        exact = gradients(dense, logits.double(), g_lp, g_ent, targets, mask)[1]
        with tk.use_backend(backend):
            out, grad = gradients(tk.token_logprobs, logits, g_lp, g_ent, targets, mask)
        assert_accurate(grad, exact, gradients(dense, logits, g_lp, g_ent, targets, mask)[1])
    leaf = logits.clone().requires_grad_()
    out = tk.token_logprobs(leaf, targets)
    assert out.logprobs.requires_grad and out.entropy.requires_grad
    assert not tk.token_logprobs(logits, targets).logprobs.requires_grad
    with torch.no_grad():
        assert not tk.token_logprobs(leaf, targets).entropy.requires_grad
    with torch.inference_mode():
        assert_same_bits(tk.token_logprobs(logits, targets),
                         type(out)(*(x.detach() for x in out)))
    empty = tk.token_logprobs(leaf[:0], targets[:0])
    empty.logprobs.sum().backward()
    assert not leaf.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_gradients(backend):
    """verl#6960: gradients that arrive expanded or strided, read as if contiguous."""
    logits, targets, _ = sample((4, 6), 13)
    leaf = logits.requires_grad_()
    with tk.use_backend(backend):
        out = tk.token_logprobs(leaf, targets)
    weights = torch.randn(6, 4).t()
    for make in (lambda lp, h: lp.sum() + h.mean(), lambda lp, h: (lp.t() @ h).trace(),
                 lambda lp, h: (lp * weights)[:, ::2].sum() - h[1:, 3].sum(),
                 lambda lp, h: lp[2].clamp(min=-3).sum() * 3):
        with tk.use_backend(backend):
            actual = torch.autograd.grad(make(*out), leaf, retain_graph=True)[0]
        expected = torch.autograd.grad(make(*dense(leaf, targets)), leaf)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    first = torch.autograd.grad(out.logprobs.square().sum(), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@needs_cpp
def test_memory_of_half_precision():
    """trl#1980: an fp32 copy of the logits; verl#2828, trl#4013: entropy as the memory peak.

    Nor is there a copy of the usual slice full[:, P - 1:-1]."""
    logits, targets, mask = sample((8, 8), 5000, torch.bfloat16)
    leaf = laid_out(logits, "sliced").requires_grad_()
    assert not leaf.is_contiguous()

    def allocated(function):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                    profile_memory=True) as profile:
            result = function()
        return result, sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())

    out, forward = allocated(lambda: tk.token_logprobs(leaf, targets, mask))
    assert forward < leaf.nbytes / 10
    _, backward = allocated(lambda: (out.logprobs + out.entropy).sum().backward())
    assert backward < 1.1 * leaf.nbytes


def test_many_rows():
    """Liger#1294: a launch grid that ends at 65,535 rows."""
    logits, targets, _ = sample((70_000,), 3)
    (logprobs, _), grad = gradients(tk.token_logprobs, logits, torch.ones(70_000), None, targets)
    torch.testing.assert_close(logprobs, dense(logits, targets)[0], rtol=0, atol=1e-5)
    assert grad[-1].any()


@needs_cpp
def test_more_than_2_to_31_elements():
    """mamba#1015: 32-bit offsets. The pages of rows that are masked are never touched."""
    V, N = 151_936, 2**31 // 151_936 + 3
    memory = mmap.mmap(-1, 2 * N * V)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).view(N, V)
    logits[-1, 7] = 100.0
    mask = torch.zeros(N, dtype=torch.bool)
    mask[[0, -1]] = True
    out = tk.token_logprobs(logits, torch.full((N,), 7), mask)
    assert out.logprobs[0].item() == pytest.approx(-math.log(V), abs=1e-5)
    assert out.logprobs[-1].item() == 0.0 and not out.logprobs[1:-1].any()
    del logits


def test_bad_targets_are_never_plausible():
    """Without the check of values (a GPU), a bad target gives NaN for its row, and only there."""
    logits, _, _ = sample((5,), 9)
    targets = torch.tensor([3, 9, -1, 2**40, 8])
    one = torch.tensor(1.0)
    call = reference.TokenLogprobsCall(logits, targets, None, Scaling(one, None, one), None)
    kernels = [reference]
    if not missing("cpp"):
        from tppo_kernels.ops.token_logprobs import _cpp
        kernels.append(_cpp)
    for kernel in kernels:
        logprobs, *kept = kernel.fwd(call)
        grad = kernel.bwd(reference.TokenLogprobsGradient(torch.ones(5), None, call, *kept))
        for x in (logprobs, kept[0], grad.sum(-1)):
            assert x.isnan().tolist() == [False, True, True, True, False]


def test_peers_functions():
    """Drop-in for TRL's selective_log_softmax and entropy_from_logits, on [B, T, V]."""
    logits, targets, _ = sample((2, 5), 40)
    out = tk.token_logprobs(logits, targets)
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(out.logprobs, log_p.gather(-1, targets[..., None])[..., 0])
    torch.testing.assert_close(out.entropy, -(log_p.exp() * log_p).sum(-1))
    assert nbytes(logits) == 10 * (40 * 4 + 24) and nbytes(logits, backward=True) == 10 * (
        3 * 40 * 4 + 24 + 28)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(-50, 50), st.floats(0.2, 3))
def test_properties(seed, V, shift, temperature):
    """A shift of the logits changes nothing; probabilities sum to 1; 0 <= entropy <= log V."""
    logits, _, _ = sample((V,), V, seed=seed)
    logits = logits[:1].expand(V, V)
    every = torch.arange(V)
    out = tk.token_logprobs(logits, every, temperature=temperature)
    shifted = tk.token_logprobs(logits + shift, every, temperature=temperature)
    for a, e in zip(shifted, out, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-4)
    assert float(out.logprobs.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert -1e-6 <= float(out.entropy[0]) <= math.log(V) + 1e-6
    scaled = tk.token_logprobs(logits, every, temperature=torch.full((V,), temperature,
                                                          dtype=torch.float64))
    for a, e in zip(scaled, out, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-6)


def test_autocast_and_functional_call():
    head = torch.nn.Linear(8, 20)
    hidden, targets = torch.randn(6, 8), torch.randint(0, 20, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(hidden)
        out = tk.token_logprobs(logits, targets)
    assert logits.dtype == torch.bfloat16 and out.logprobs.dtype == torch.float32
    out.logprobs.sum().backward()
    assert head.weight.grad.any()

    class Model(torch.nn.Module):
        def forward(self, x):
            return tk.token_logprobs(head(x), targets).logprobs

    model = Model()
    model.head = head
    weights = {"head.weight": torch.zeros(20, 8), "head.bias": torch.zeros(20)}
    torch.testing.assert_close(torch.func.functional_call(model, weights, (hidden,)),
                               torch.full((6,), -math.log(20)))


def test_fp64_goes_to_the_reference():
    logits, targets, mask = sample(dtype=torch.float64)
    assert tk.token_logprobs(logits, targets, mask).entropy.dtype == torch.float64
    assert tk.explain(tk.token_logprobs, logits, targets).backend == "reference"
    if not missing("cpp"):
        assert tk.explain(tk.token_logprobs, logits.float(), targets).backend == "cpp"
        with tk.use_backend("cpp"), pytest.raises(tk.BackendError, match="fp64"):
            tk.token_logprobs(logits, targets)


@pytest.mark.parametrize("case", range(3))
def test_opcheck(case):
    logits, targets, mask = sample((3, 4), 12)
    one = torch.tensor(1.0)
    arguments = [(logits, targets, mask, one, None, one, None),
                 (logits.bfloat16().transpose(0, 1), targets.int().t(), None,
                  torch.rand(4, 3) + 0.5, torch.tensor(9.0), one, None),
                 (laid_out(logits, "transposed"), targets % 9, mask, one, None, one, 9)][case]
    torch.library.opcheck(torch.ops.tppo_kernels.token_logprobs_fwd.default, arguments)
    _, entropy, top, log_sum = torch.ops.tppo_kernels.token_logprobs_fwd(*arguments)
    g = torch.randn(targets.t().shape if case == 1 else targets.shape)
    torch.library.opcheck(torch.ops.tppo_kernels.token_logprobs_bwd.default,
                          (None if case == 2 else g, None if case == 0 else g, *arguments,
                           entropy, top, log_sum))


def test_compiles_as_one_graph_and_exports():
    logits, targets, mask = sample()
    temperature = torch.tensor(0.8)

    def call(x, targets, mask, temperature):
        return tk.token_logprobs(x, targets, mask, temperature=temperature, softcap=20.0,
                                 valid_vocab=33)

    g_lp, g_ent = torch.randn(2, *targets.shape)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager = gradients(call, logits, g_lp, g_ent, targets, mask, temperature)
    assert_same_bits(gradients(compiled, logits, g_lp, g_ent, targets, mask, temperature), eager)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    program = torch.export.export(Module(), (logits, targets, mask, temperature))
    assert_same_bits(tuple(program.module()(logits, targets, mask, temperature)), eager[0])


@pytest.mark.parametrize("differentiable", (False, True))
def test_fifty_lengths_and_temperatures_two_graphs(differentiable):
    """Liger#146, fla#533: a recompilation for every length or temperature."""
    calls = []
    for t in range(50):
        logits, targets, mask = sample((3, 2 + t), 11)
        calls.append((logits.requires_grad_(differentiable), targets, mask,
                      torch.tensor(0.5 + t / 100)))
    assert count_graphs(lambda x, t, m, temperature: tuple(tk.token_logprobs(
        x, t, m, temperature=temperature)), calls) <= 2


X, IDS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("error, words, args, kwargs", [
    (TypeError, "logits is list .*expected a tensor", ([[1.0]], IDS), {}),
    (TypeError, "logits has dtype int64, expected float32", (X.long(), IDS), {}),
    (ValueError, r"logits has shape \[\], expected \[..., V\]", (X[0, 0, 0], IDS[0, 0]), {}),
    (ValueError, r"logits has shape \[2, 3, 0\], expected at least one column", (X[..., :0], IDS),
     {}),
    (ValueError, r"targets has shape \[2, 4\].*\[2, 3\] as logits", (X, torch.zeros(2, 4).long()),
     {}),
    (ValueError, r"targets has shape \[3\]", (X, IDS[0]), {}),
    (TypeError, "targets has dtype float32, expected int64, int32", (X, IDS.float()), {}),
    (ValueError, r"targets holds 5, expected values in \[0, 4\]", (X, IDS + 5), {}),
    (ValueError, r"targets holds -100", (X, IDS - 100), {}),
    (TypeError, "mask has dtype float32, expected bool", (X, IDS, IDS.float()), {}),
    (ValueError, r"mask has shape \[2, 1\].*\[2, 3\] as logits", (X, IDS, IDS[:, :1].bool()), {}),
    (ValueError, "temperature is 0.0, expected a number > 0", (X, IDS), {"temperature": 0.0}),
    (ValueError, "temperature is nan", (X, IDS), {"temperature": float("nan")}),
    (ValueError, r"temperature holds -1, expected values in \(0", (X, IDS),
     {"temperature": torch.tensor(-1.0)}),
    (ValueError, r"temperature holds 0", (X, IDS), {"temperature": torch.zeros(2, 3)}),
    (ValueError, r"temperature has shape \[2, 1\].*\[2, 3\] as logits", (X, IDS),
     {"temperature": torch.ones(2, 1)}),
    (ValueError, r"temperature has shape \[1\]", (X, IDS), {"temperature": torch.ones(1)}),
    (TypeError, "temperature is str", (X, IDS), {"temperature": "1"}),
    (ValueError, "softcap is -1.0, expected a number > 0", (X, IDS), {"softcap": -1.0}),
    (ValueError, r"softcap holds 0", (X, IDS), {"softcap": torch.tensor(0.0)}),
    (ValueError, r"softcap is a tensor of shape \[2\]", (X, IDS), {"softcap": torch.ones(2)}),
    (ValueError, "logit_scale requires a gradient", (X, IDS),
     {"logit_scale": torch.tensor(1.0, requires_grad=True)}),
    (ValueError, "valid_vocab is 6, expected a number >= 1 and <= 5", (X, IDS),
     {"valid_vocab": 6}),
    (ValueError, "valid_vocab is 0", (X, IDS), {"valid_vocab": 0}),
    (TypeError, "valid_vocab is float 3.0, expected a whole number", (X, IDS),
     {"valid_vocab": 3.0}),
    (TypeError, "temp", (X, IDS), {"temp": 0.9}),
    (ValueError, "targets is on meta, expected cpu as logits", (X, IDS.to("meta")), {}),
])
def test_bad_input_names_the_argument(error, words, args, kwargs):
    with pytest.raises(error, match=words):
        tk.token_logprobs(*args, **kwargs)


def test_masked_rows_are_not_checked():
    mask = torch.tensor([[True, False, True]] * 2)
    out = tk.token_logprobs(X, torch.where(mask, IDS, -100), mask,
                            temperature=torch.where(mask, 1.0, 0.0))
    assert max_error(out.logprobs[mask], torch.full((4,), -math.log(5))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("results", [(True, False), (False, True), (True, True)])
def test_a_gradient_in_the_place_of_the_logits_has_the_same_bits(dtype, rows, results, monkeypatch):
    module = importlib.import_module("tppo_kernels.ops.token_logprobs")
    monkeypatch.setattr(module, "IN_PLACE_BYTES", rows * 70 * dtype.itemsize)
    given = (3 * torch.randn(2, 5, 70)).to(dtype).requires_grad_()
    targets, mask = torch.randint(0, 60, (2, 5)), torch.rand(2, 5) < 0.7
    how = {"temperature": torch.rand(2, 5) + 0.5, "softcap": 20.0, "valid_vocab": 65}
    grads = []
    for inplace in (False, True):
        logits = given * 1
        held = logits.detach()
        out = tk.token_logprobs(logits, targets, mask, inplace_backward=inplace, **how)
        loss = sum(x.square().sum() for x, used in zip(out, results, strict=True) if used)
        grads.append(torch.autograd.grad(loss, logits)[0])
        assert (grads[-1].data_ptr() == held.data_ptr()) == inplace
    assert torch.equal(*grads) and grads[0].abs().max() > 0.01
    assert not grads[1][~mask].any() and not grads[1][..., 65:].any()


def test_a_gradient_in_place_makes_no_second_tensor_of_that_size(monkeypatch):
    """Of 200 rows 10 at a time are held beside the logits."""
    module = importlib.import_module("tppo_kernels.ops.token_logprobs")
    monkeypatch.setattr(module, "IN_PLACE_BYTES", 10 * 50 * 4)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._overloadpacket is torch.ops.tppo_kernels.token_logprobs_bwd:
                sizes.append(out.numel())
            return out

    logits = torch.randn(200, 50, requires_grad=True) * 1
    out = tk.token_logprobs(logits, torch.zeros(200).long(), inplace_backward=True)
    with Sizes():
        out.logprobs.sum().backward()
    assert sizes == [500] * 20


def test_logits_that_are_lost_to_their_gradient_are_not_read_again():
    leaf = torch.randn(4, 9, requires_grad=True)
    targets = torch.zeros(4).long()
    logits = leaf * 1
    out = tk.token_logprobs(logits, targets, inplace_backward=True)
    out.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprobs.sum().backward()
    logits = leaf * 1
    other, out = logits.square(), tk.token_logprobs(logits, targets, inplace_backward=True)
    out.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def test_logits_whose_place_no_gradient_can_take_are_refused():
    leaf, targets = torch.randn(4, 9, requires_grad=True), torch.zeros(4).long()
    with pytest.raises(ValueError, match="inplace_backward is True and logits is a leaf"):
        tk.token_logprobs(leaf, targets, inplace_backward=True)
    with pytest.raises(ValueError, match=r"strides \[18, 2\], expected contiguous"):
        tk.token_logprobs((leaf.repeat(1, 2) * 1)[:, ::2], targets, inplace_backward=True)
    with torch.no_grad():
        tk.token_logprobs(leaf, targets, inplace_backward=True)
    compiled = torch.compile(lambda x: tk.token_logprobs(x * 1, targets, inplace_backward=True),
                             backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="inplace_backward is True under torch.compile"):
        compiled(leaf)
