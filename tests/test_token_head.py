"""`token_head` against a plain linear layer in fp64, at its edges, and as a citizen of PyTorch."""

import importlib
import importlib.util
import itertools
import math
import time

import _emulated
import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import tppo_kernels as tk
from tppo_kernels._core.op import OPS, missing
from tppo_kernels.ops.token_head import reference
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

_bwd = torch.ops.tppo_kernels.token_head_bwd.default
_fwd = torch.ops.tppo_kernels.token_head_fwd.default

SIZES = (1, 7, 63, 64, 65, 1000)
NAMES = ("out", "dhidden", "dweight", "dbias")


def sample(batch, tokens, K=3, D=8, dtype=torch.float32, seed=0):
    """hidden [B, T, D], weight [K, D], bias [K], and a gradient of the result [B, T, K]."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, D), (K, D), (K,), (batch, tokens, K))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def run(hidden, weight, bias, grad, mask=None, head=tk.token_head):
    """(out [..., K], dhidden, dweight, dbias)."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    out = head(*leaves, mask)
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype).reshape(out.shape))
    return out.detach().reshape(*hidden.shape[:-1], weight.shape[0]), *grads


def eager(hidden, weight, bias, mask):
    """What a user would write without this operator, in the inputs' dtype."""
    out = F.linear(hidden, weight, bias)
    return out if mask is None else out.masked_fill(~mask[..., None], 0)


def test_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [9.0, 9.0], [3.0, -1.0]]], requires_grad=True)
    weight = torch.tensor([[2.0, 1.0]], requires_grad=True)
    bias = torch.tensor([0.5], requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    out = tk.token_head(hidden, weight, bias, mask)
    assert out.tolist() == [[4.5, 0.0, 5.5]]
    (out * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert hidden.grad.tolist() == [[[2.0, 1.0], [0.0, 0.0], [200.0, 100.0]]]
    assert weight.grad.tolist() == [[301.0, -98.0]] and bias.grad.tolist() == [101.0]


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("kind", ["none", "interior", "row"])
def test_textbook(K, kind):
    """Token by token and term by term in Python floats."""
    hidden, weight, bias, grad = sample(3, 4, K, dtype=torch.float64)
    mask = sample_mask(kind, 3, 4)
    out, dhidden, dweight, dbias = (torch.zeros_like(x) for x in (grad, hidden, weight, bias))
    for b in range(3):
        for t in range(4):
            for k in range(K):
                if mask is not None and not mask[b, t]:
                    continue
                out[b, t, k] = bias[k]
                dbias[k] += grad[b, t, k]
                for d in range(8):
                    out[b, t, k] += float(hidden[b, t, d]) * float(weight[k, d])
                    dhidden[b, t, d] += float(grad[b, t, k]) * float(weight[k, d])
                    dweight[k, d] += float(grad[b, t, k]) * float(hidden[b, t, d])
    for actual, expected in zip(run(hidden, weight, bias, grad, mask),
                                (out, dhidden, dweight, dbias), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("K", [1, 3])
def test_gradcheck(K):
    hidden, weight, bias, _ = (x.requires_grad_() for x in sample(2, 3, K, 4, torch.float64))
    mask = sample_mask("interior", 2, 3)
    assert torch.autograd.gradcheck(lambda *x: tk.token_head(*x, mask), (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w: tk.token_head(h, w), (hidden, weight))


@pytest.mark.parametrize("dtype, tokens, kind, layout, K", third(
    [(d, t, k, s, n) for d in DTYPES for t in SIZES for k in MASKS
     for s in ("contiguous", "strided") for n in (1, 3)]))
def test_accuracy(dtype, tokens, kind, layout, K):
    """Against fp64 from the same inputs, judged by F.linear in their own dtype."""
    x, mask = sample(4, tokens, K, 33, dtype, seed=tokens), sample_mask(kind, 4, tokens)
    actual = run(*(map(strided, x) if layout == "strided" else x), mask)
    exact = run(*(v.double() for v in x), mask, head=eager)
    added = run(*(v.double().abs() for v in x), mask, head=eager)
    for name, a, e, p, scale in zip(NAMES, actual, exact, run(*x, mask, head=eager), added,
                                    strict=True):
        assert_accurate(a, e, p, scale=scale, name=name)
        assert a.dtype == (torch.float32 if name == "out" else dtype)
    if mask is not None:
        assert not actual[0][~mask].any() and not actual[1][~mask].any()


def test_real_shape():
    """D of a 1.5B trunk in bf16: products and sums in fp32, not in bf16."""
    x = sample(2, 300, 1, 1536, torch.bfloat16)
    out, _, dweight, _ = run(*x)
    exact = run(*(v.double() for v in x), head=eager)
    assert_accurate(out, exact[0], run(*(v.float() for v in x), head=eager)[0])
    assert_accurate(dweight, exact[2], exact[2].bfloat16())


def test_dtypes_of_hidden_and_head_may_differ():
    """A head kept in fp32 on a bf16 trunk: nothing is rounded to bf16 on the way."""
    hidden, weight, bias, grad = sample(3, 9)
    hidden = hidden.bfloat16()
    out, dhidden, dweight, dbias = run(hidden, weight, bias, grad)
    exact = run(hidden.double(), weight.double(), bias.double(), grad, head=eager)
    plain = run(hidden.float(), weight, bias, grad, head=eager)
    for a, e, p in ((out, exact[0], plain[0]), (dweight, exact[2], plain[2]),
                    (dbias, exact[3], plain[3]), (dhidden, exact[1], plain[1].bfloat16())):
        assert_accurate(a, e, p)
    assert [x.dtype for x in (out, dhidden, dweight, dbias)] == [
        torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert tk.token_head(hidden, weight.double()).dtype == torch.float64
    assert tk.token_head(hidden, weight, bias.double()).dtype == torch.float64


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("K", [1, 3])
def test_poison(poison, K):
    """0 * NaN of a masked row would reach dweight: verl#3805, OpenRLHF#1314, NeMo-RL#4120."""
    for kind in ("left", "right", "interior", "row", "all-false"):
        hidden, weight, bias, grad = sample(4, 9, K)
        mask = sample_mask(kind, 4, 9, seed=2)
        clean = run(poisoned(hidden, mask, 0.0), weight, bias, poisoned(grad, mask, 0.0), mask)
        dirty = run(poisoned(hidden, mask, poison), weight, bias, poisoned(grad, mask, poison),
                    mask)
        assert_same_bits(dirty, clean)
        assert not dirty[0][~mask].any() and not dirty[1][~mask].any()


@pytest.mark.parametrize("poison", POISONS)
def test_without_compaction_as_on_a_gpu(poison, monkeypatch):
    """Where counting rows would be a host read, masked rows are selected to 0 instead."""
    hidden, weight, bias, grad = sample(4, 9)
    mask = sample_mask("interior", 4, 9)
    expected = run(hidden, weight, bias, grad, mask)
    monkeypatch.setattr(reference, "_compacts", lambda x: False)
    clean = run(poisoned(hidden, mask, 0.0), weight, bias, poisoned(grad, mask, 0.0), mask)
    dirty = run(poisoned(hidden, mask, poison), weight, bias, poisoned(grad, mask, poison), mask)
    assert_same_bits(dirty, clean)
    assert not dirty[0][~mask].any() and not dirty[1][~mask].any()
    for actual, wanted in zip(clean, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    with FakeTensorMode() as fake:  # a read of values raises
        hidden, weight, bias, grad, mask = map(fake.from_tensor, (hidden, weight, bias, grad, mask))
        head = reference.TokenHeadCall(hidden, weight, bias, mask)
        assert reference.fwd(head).shape == (4, 9, 3)
        grads = reference.bwd(reference.TokenHeadGradient(grad, head, True, True, True))
        assert [x.shape for x in grads] == [(4, 9, 8), (3, 8), (3,)]


@pytest.mark.parametrize("shape", [(0, 8), (0, 5, 8), (3, 0, 8), (2, 3, 0), (8,), (2, 2, 3, 8)])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_leading_sizes_and_empty(shape, K, masked):
    """Zero, attached, no NaN; requires_grad was lost in fused functions: verl#6913, Liger#968."""
    hidden = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(K, shape[-1], requires_grad=True), torch.ones(K, requires_grad=True)
    mask = torch.zeros(shape[:-1], dtype=torch.bool) if masked else None
    out = tk.token_head(hidden, weight, bias, mask)
    expected = eager(hidden, weight, bias, mask)
    torch.testing.assert_close(out, expected.squeeze(-1) if K == 1 else expected)
    assert out.shape == (shape[:-1] if K == 1 else (*shape[:-1], K)) and out.requires_grad
    grads = torch.autograd.grad(out.sum(), (hidden, weight, bias))
    for g, e in zip(grads, torch.autograd.grad(expected.sum(), (hidden, weight, bias)),
                    strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("wanted", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_only_what_is_asked_for_gets_a_gradient(wanted):
    """Each of the three alone, a frozen head, a frozen trunk: none is dropped, none is extra."""
    hidden, weight, bias, grad = sample(3, 4)
    full = run(hidden, weight, bias, grad)[1:]
    for x, want in zip((hidden, weight, bias), wanted, strict=True):
        x.requires_grad_(bool(want))
    out = tk.token_head(hidden, weight, bias)
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(grad)
    for x, want, expected in zip((hidden, weight, bias), wanted, full, strict=True):
        assert (x.grad is not None) == bool(want)
        assert not want or torch.equal(x.grad, expected)
    raw = _bwd(grad, hidden.detach(), weight.detach(), bias.detach(), None, *map(bool, wanted))
    assert [x.numel() > 0 for x in raw] == list(map(bool, wanted))


def test_no_gradient_wanted_no_gradient_kept():
    hidden, weight, bias, _ = sample(3, 4)
    weight.requires_grad_()
    expected = tk.token_head(hidden, weight, bias).detach()
    with torch.no_grad():
        assert not tk.token_head(hidden, weight, bias).requires_grad
    with torch.inference_mode():
        assert torch.equal(tk.token_head(hidden, weight, bias), expected)
        mask = torch.ones(3, 4, dtype=torch.bool)  # a rollout's mask, used in training
    tk.token_head(hidden, weight, bias, mask).sum().backward()
    assert weight.grad.any()


def test_autocast_does_not_lower_it():
    """fp32 upcast costs are for the trunk (trl#1980); the head is fp32 also inside autocast."""
    hidden, weight, bias, grad = sample(3, 40, 3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(hidden, weight, bias, grad)
    assert_same_bits(inside, run(hidden, weight, bias, grad))


def test_scaled_strided_sliced_and_repeated_backward():
    """Strided gradients were read as contiguous: verl#6960."""
    hidden, weight, bias, grad = sample(4, 6)
    expected = run(hidden, weight, bias, grad)[1:]
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    out = tk.token_head(*leaves)
    for factor in (3.0, 1.0):
        out.transpose(0, 2).backward(factor * grad.transpose(0, 2).contiguous(), retain_graph=True)
    for x, e in zip(leaves, expected, strict=True):
        torch.testing.assert_close(x.grad, 4 * e)
    part = torch.autograd.grad(2 * out[1:3, ::2, 1].sum(), leaves)  # expanded, sliced, scaled
    sliced = torch.zeros_like(grad)
    sliced[1:3, ::2, 1] = 2
    for g, e in zip(part, run(hidden, weight, bias, sliced)[1:], strict=True):
        torch.testing.assert_close(g, e)


def test_inputs_are_left_alone_and_second_derivatives_refused():
    hidden, weight, bias, _ = (x.requires_grad_() for x in sample(2, 3))
    before = [x.detach().clone() for x in (hidden, weight, bias)]
    out = tk.token_head(hidden, weight, bias)
    g, = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    assert_same_bits(tuple(x.detach() for x in (hidden, weight, bias)), tuple(before))
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()
    out = tk.token_head(hidden, weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_run_twice_and_layouts():
    hidden, weight, bias, grad = sample(5, 13)
    lengths = [13, 1, 0, 7, 12]
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    padded = run(hidden, weight, bias, grad, mask)
    assert_same_bits(run(hidden, weight, bias, grad, mask), padded)
    packed = run(pack(hidden, lengths)[0], weight, bias, pack(grad, lengths)[0])
    expected = (*(pack(x, lengths)[0] for x in padded[:2]), *padded[2:])
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = run(hidden[order], weight, bias, grad[order], mask[order])
    for actual, wanted in ((packed, expected),
                           (shuffled, (padded[0][order], padded[1][order], *padded[2:]))):
        for a, w in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 999))
def test_linear_in_hidden_and_blind_to_padding(batch, tokens, K, seed):
    hidden, weight, bias, _ = sample(batch, tokens, K, dtype=torch.float64, seed=seed)
    mask = sample_mask("interior", batch, tokens, seed)
    out = tk.token_head(hidden, weight, bias, mask)
    doubled = tk.token_head(2 * hidden, weight, 2 * bias, mask)
    torch.testing.assert_close(doubled, 2 * out)
    wider = tk.token_head(F.pad(hidden, (0, 0, 3, 2), value=math.nan), weight, bias,
                          F.pad(mask, (3, 2)))
    torch.testing.assert_close(wider[:, 3:3 + tokens], out)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(masked, dtype):
    hidden, weight, bias, grad = sample(2, 5, dtype=dtype)
    mask = sample_mask("interior", 2, 5) if masked else None
    for b in (bias, None):
        torch.library.opcheck(_fwd, (hidden, weight, b, mask))
        for flags in ((True, True, True), (False, True, False)):
            torch.library.opcheck(_bwd, (grad.float(), hidden, weight, b, mask, *flags))


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_compile_equals_eager(K, masked):
    x, mask = sample(3, 7, K), sample_mask("interior", 3, 7) if masked else None
    torch._dynamo.reset()
    head = torch.compile(tk.token_head, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(*x, mask, head=head), run(*x, mask), strict=True):
        torch.testing.assert_close(a, e)


def test_fifty_lengths_make_at_most_two_graphs():
    """Liger#146, fla#533: recompilation for every length."""
    weight = torch.randn(3, 8, requires_grad=True)

    def step(hidden, mask):
        return tk.token_head(hidden, weight, None, mask).square().sum()

    calls = [(torch.randn(n % 5 + 2, n, 8), torch.ones(n % 5 + 2, n, dtype=torch.bool))
             for n in range(2, 52)]
    assert count_graphs(step, calls) <= 2


def test_export_and_functional_call():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.score = torch.nn.Linear(8, 1)

        def forward(self, hidden, mask):
            return tk.token_head(hidden, self.score.weight, self.score.bias, mask)

    head, (hidden, *_), mask = Head(), sample(2, 6), sample_mask("interior", 2, 6)
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},) * 2
    program = torch.export.export(head, (hidden, mask), dynamic_shapes=shapes)
    other, valid = sample(4, 11)[0], sample_mask("left", 4, 11)
    torch.testing.assert_close(program.module()(other, valid), head(other, valid))
    weights = {k: torch.zeros_like(v) for k, v in head.state_dict().items()}
    assert not torch.func.functional_call(head, weights, (hidden, mask)).any()


def test_a_masked_row_has_no_gradient_even_from_a_weight_that_is_not_finite():
    hidden, weight, bias, grad = sample(2, 5)
    weight[0, 1] = math.nan
    mask = sample_mask("interior", 2, 5)
    assert not run(hidden, weight, bias, grad, mask)[1][~mask].any()


def test_cost_on_cpu_follows_the_valid_rows():
    """A head on prompt positions is wasted (OpenRLHF#467, SkyRL#2144): 1 of 64 rows is valid."""
    hidden, weight, bias, _ = sample(64, 256, 3, 256)
    hidden.requires_grad_()
    few = torch.zeros(64, 256, dtype=torch.bool)
    few[:, ::64] = True

    torch.use_deterministic_algorithms(False)  # it fills every empty tensor
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {few: [], None: []}
    try:
        for _ in range(30):
            for mask, seconds in times.items():
                start = time.process_time()
                tk.token_head(hidden, weight, bias, mask)
                seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times[few]) < 0.5 * min(times[None])


@pytest.fixture
def emulated(monkeypatch):
    """The CUDA kernels' own source on the CPU, thread by thread, through their host code."""
    if missing("cpp") or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs the compiled part, a C++ compiler and pybind11")
    backend = importlib.import_module("tppo_kernels.ops.token_head._cuda")
    monkeypatch.setattr(backend, "_C", _emulated.extension("token_head"))
    monkeypatch.setattr("tppo_kernels._core.op.missing", lambda backend: None)

    def call(*arguments, **kwargs):
        with monkeypatch.context() as inner:
            inner.setitem(OPS["token_head"].order, "cpu", ("cuda",))
            return run(*arguments, **kwargs)

    return backend, call


EMULATED = third(itertools.product(DTYPES, (False, True), ((1, 1), (2, 17), (3, 50), (1, 130)),
                                   (8, 264, 1032, 2056), (1, 3), (0, 1)), seed=2)[::2]


def test_cuda_kernels_emulated(emulated, monkeypatch):
    """Against fp64: dtypes, an fp32 head on a half trunk, masks, sliced batches, few parts."""
    backend, cuda = emulated
    for case, (dtype, wide, (batch, tokens), D, K, slices) in enumerate(EMULATED):
        if batch * tokens * D > 60_000 and case % 4:
            continue
        monkeypatch.setattr(backend, "PROGRAMS", (2, 16, 1024)[case % 3])
        x, mask = sample(batch, tokens, K, D, dtype, case), sample_mask(
            MASKS[case % len(MASKS)], batch, tokens, case)
        if wide:
            x[1:] = [v.float() for v in x[1:]]
        exact = run(*(v.double() for v in x), mask, head=eager)
        plain = run(*(v.float() for v in x), mask, head=eager)
        added = run(*(v.double().abs() for v in x), mask, head=eager)
        if slices:  # as full[:, P - 1:-1]
            x[0] = F.pad(x[0], (0, 0, 2, 3), value=math.nan)[:, 2:2 + tokens]
        actual = cuda(*x, mask)
        for name, a, e, p, scale in zip(NAMES, actual, exact, plain, added, strict=True):
            assert_accurate(a, e, p.to(a.dtype), scale=scale, name=f"{name} {EMULATED[case]}")
        if mask is not None:
            assert not actual[0][~mask].any() and not actual[1][~mask].any()


def test_cuda_kernels_emulated_poisoned_and_in_part(emulated):
    backend, cuda = emulated
    hidden, weight, bias, grad = sample(3, 21, 3, 72)
    mask = sample_mask("interior", 3, 21)
    clean = cuda(poisoned(hidden, mask, 0.0), weight, bias, poisoned(grad, mask, 0.0), mask)
    for poison in POISONS:
        dirty = cuda(poisoned(hidden, mask, poison), weight, bias, poisoned(grad, mask, poison),
                     mask)
        assert_same_bits(dirty, clean)
    weight[0, 3], weight[1, 5] = math.inf, math.nan
    assert not cuda(hidden, weight, bias, grad, mask)[1][~mask].any()
    weight = torch.ones_like(weight)
    full = cuda(hidden, weight, bias, grad)[1:]
    for wanted in itertools.product((False, True), repeat=3):
        head = reference.TokenHeadCall(hidden, weight, bias, None)
        raw = backend.bwd(reference.TokenHeadGradient(grad, head, *wanted))
        assert [x.numel() > 0 for x in raw] == list(wanted)
        assert all(not want or torch.equal(x, f)
                   for x, f, want in zip(raw, full, wanted, strict=True))


def test_what_the_cuda_kernels_refuse(emulated):
    backend, _ = emulated
    hidden, weight, bias, grad = sample(2, 5, 3, 8)
    head = reference.TokenHeadCall(hidden, weight, bias, None)

    def reason(hidden=hidden, weight=weight, bias=None):
        return backend.supports(head._replace(hidden=hidden, weight=weight, bias=bias))

    assert backend.supports(head) is None
    assert backend.supports(reference.TokenHeadGradient(grad, head, True, True, True)) is None
    assert "16 bytes" in reason(*(x[..., :7] for x in (hidden, weight)))
    assert "16 bytes" in reason(F.pad(hidden, (1, 0))[..., 1:])
    assert "2 outputs" in reason(weight=weight[:2])
    assert "float16" in reason(hidden.bfloat16(), weight.half())
    assert "fp64" in reason(bias=bias.double())
    assert reason(hidden.transpose(0, 1)) is None


GOOD = {"hidden": torch.zeros(2, 3, 8), "weight": torch.zeros(3, 8), "bias": torch.zeros(3),
        "mask": torch.ones(2, 3, dtype=torch.bool)}


@pytest.mark.parametrize("name, value, error, words", [
    ("hidden", [1.0], TypeError, ["list", "a tensor"]),
    ("hidden", torch.zeros(()), ValueError, ["[]", "[..., D]"]),
    ("hidden", torch.zeros(2, 3, 8).long(), TypeError, ["int64", "float32"]),
    ("weight", torch.zeros(3, 7), ValueError, ["[3, 7]", "[K, 8]", "hidden"]),
    ("weight", torch.zeros(8), ValueError, ["[8]", "[K, D]"]),
    ("weight", None, TypeError, ["None", "a tensor"]),
    ("weight", torch.zeros(3, 8, device="meta"), ValueError, ["meta", "cpu"]),
    ("bias", torch.zeros(1), ValueError, ["[1]", "[3]", "weight"]),
    ("bias", torch.zeros(3).int(), TypeError, ["int32"]),
    ("mask", torch.ones(2, 3), TypeError, ["float32", "bool"]),
    ("mask", torch.ones(3, dtype=torch.bool), ValueError, ["[3]", "2, 3", "hidden"]),
    ("mask", torch.ones(2, 3, 1, dtype=torch.bool), ValueError, ["[2, 3, 1]", "2, 3"]),
])
def test_bad_input(name, value, error, words):
    with pytest.raises(error) as caught:
        tk.token_head(**{**GOOD, name: value})
    assert all(word in str(caught.value) for word in ("token_head", name, *words)), caught.value


def test_unknown_keyword():
    with pytest.raises(TypeError, match="temperature"):
        tk.token_head(**GOOD, temperature=1.0)
