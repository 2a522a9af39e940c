"""`linear_logprobs` against logits in fp64: numbers, gradients, compilation, errors."""

import itertools
import math

import pytest
import torch
from _linear_cases import (
    ROWS,
    SHAPED,
    assert_close,
    choose,
    distance,
    double,
    grads,
    inputs_of,
    sample,
    textbook,
)
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import tppo_kernels as tk
from tppo_kernels._core.record import flat
from tppo_kernels.ops.linear_logprobs import _chunked, _cpp
from tppo_kernels.ops.linear_logprobs.reference import (
    FrozenGradient,
    LinearLogprobsCall,
    LinearLogprobsGradient,
)
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_same_bits,
    count_graphs,
    pack,
    poisoned,
    sample_mask,
    strided,
)

_bwd = torch.ops.tppo_kernels.linear_logprobs_bwd.default
_frozen = torch.ops.tppo_kernels.linear_logprobs_frozen.default
_fwd = torch.ops.tppo_kernels.linear_logprobs_fwd.default

STEPS = {"chunked": _chunked.TORCH, "cpp": _cpp.STEPS}
BACKENDS = (*STEPS, "reference")


def test_by_hand():
    """Logits (0, ln 2, ln 5): p = (1, 2, 5) / 8."""
    hidden = torch.eye(1).requires_grad_()
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    logprobs, entropy = tk.linear_logprobs(hidden, weight, torch.tensor([1]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(2 / 8)]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(8) - 2 / 8 * math.log(2)
                                                      - 5 / 8 * math.log(5)]))
    logprobs.sum().backward()  # sum_v (1[t] - p) w
    expected = math.log(2) - (2 * math.log(2) + 5 * math.log(5)) / 8
    torch.testing.assert_close(hidden.grad, torch.tensor([[expected]]))


CASES = [(backend, dtype, memory, part, shaped, bias)
         for backend in BACKENDS for dtype in (torch.float64, *DTYPES)
         for memory in ("store", "recompute", 40_000) for part in ("both", "logprobs", "entropy")
         for shaped in (False, True) for bias in (False, True)
         if not (backend == "cpp" and dtype == torch.float64)]


@pytest.mark.parametrize("backend, dtype, memory, part, shaped, bias", third(CASES, 1))
def test_textbook(backend, dtype, memory, part, shaped, bias):
    """fp32 upcast of logits (trl#1980), entropy as the memory peak (verl#2828, trl#4013)."""
    hidden, weight, targets, b = sample(3, 43, dtype=dtype, seed=3)
    mask = sample_mask("interior", 3, 43)
    options = {"part": part, **(SHAPED if shaped else {})}
    more = {"bias": b} if bias else {}
    with tk.use_backend(backend):
        actual = grads(tk.linear_logprobs, hidden, weight, targets, mask, memory=memory, **more,
                       **options)
    exact = grads(textbook, *double(hidden, weight, targets), mask,
                  **{k: v.double() for k, v in more.items()}, **options)
    assert_close(actual, exact, dtype)
    assert not actual[2][~mask].any()
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [x.dtype for x in actual[2:]] == [dtype] * (2 + bias)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("spread", (0.15, 1.0, 6.0))
@pytest.mark.parametrize("part", ("logprobs", "entropy"))
@pytest.mark.parametrize("softcap", (None, 3.0))
def test_kept_exponentials_are_accurate(dtype, spread, part, softcap):
    """Nearly uniform rows and nearly certain ones; bf16's eight bits would fail the first."""
    hidden, weight, targets, _ = sample(2, 60, dtype=dtype, spread=spread, v=500)
    targets[0] = (hidden[0].float() @ weight.float().T).argmax(-1)
    actual = grads(tk.linear_logprobs, hidden, weight, targets, memory="store", part=part,
                   softcap=softcap)
    exact = grads(textbook, *double(hidden, weight, targets), part=part, softcap=softcap)
    assert_close(actual, exact, dtype, top=30)


SHAPES = third(itertools.product(DTYPES, (1, 7, 63, 64, 65, 1000), MASKS, (False, True)), seed=2)


def test_shapes_masks_strides():
    for case, (dtype, tokens, kind, contiguous) in enumerate(SHAPES):
        hidden, weight, targets, bias = sample(2, tokens, d=8, v=37, dtype=dtype, seed=case)
        mask = sample_mask(kind, 2, tokens, case)
        temperature = 0.5 + torch.rand(2, tokens)
        given = (hidden, weight, targets)
        exact = grads(textbook, *double(*given), mask, bias=bias.double(), valid_vocab=37,
                      temperature=temperature.double())
        if not contiguous:
            given = [strided(x) for x in given]
            mask, temperature = None if mask is None else strided(mask), strided(temperature)
        leaves = [x.detach().requires_grad_() for x in (given[0], given[1], bias)]
        out = tk.linear_logprobs(*leaves[:2], given[2], mask, bias=leaves[2], valid_vocab=37,
                                 temperature=temperature)
        g = torch.randn(2, 2, tokens, generator=torch.Generator().manual_seed(0))
        wide = torch.stack([g, g], -1)[..., 0]  # strided gradients (verl#6960)
        torch.autograd.backward(out, list(wide))
        assert_close((*(x.detach() for x in out), *(x.grad for x in leaves)), exact, dtype)


@pytest.mark.parametrize("shape", ((0, 5), (4, 0), (0,)))
def test_empty_input(shape):
    hidden, weight = torch.randn(*shape, 6, requires_grad=True), torch.randn(9, 6).requires_grad_()
    for options in ({"memory": "store"}, {"memory": "recompute"}, {"capacity": 3},
                    {"capacity": 3, "temperature": torch.ones(shape)}):
        out = tk.linear_logprobs(hidden, weight, torch.zeros(shape, dtype=torch.int64),
                                 torch.ones(shape, dtype=torch.bool), **options)
        grad = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), (hidden, weight))
        assert out.logprobs.shape == shape and grad[0].shape == hidden.shape
        assert not grad[1].any()


def test_no_token_is_valid():
    hidden, weight, targets, _ = sample(2, 5)
    out = grads(tk.linear_logprobs, hidden * float("nan"), weight, targets * 0 - 100,
                torch.zeros(2, 5, dtype=torch.bool))
    assert not any(x.any() for x in out)


def test_any_leading_shape():
    hidden, weight, targets, _ = sample(2, 6)
    expected = textbook(hidden, weight, targets)
    for shape in ((), (12,), (3, 4), (2, 3, 2)):
        n = math.prod(shape)
        h = hidden.reshape(12, -1)[:n].reshape(*shape, -1)
        out = tk.linear_logprobs(h, weight, targets.reshape(-1)[:n].reshape(shape))
        torch.testing.assert_close(out.logprobs, expected[0].reshape(-1)[:n].reshape(shape))


@pytest.mark.parametrize("z", (-1e4, 1e4))
def test_large_logits(z):
    """All-negative logits against a maximum that starts at 0 (SkyRL#2141)."""
    hidden, weight, targets, _ = sample(2, 9, v=64, spread=1.0)
    bias = torch.full((64,), z)
    for memory in ("store", "recompute"):
        actual = grads(tk.linear_logprobs, hidden, weight, targets, bias=bias, memory=memory)
        logits = (hidden @ weight.T + bias).double().requires_grad_()  # as they round in fp32
        exact, _ = textbook(logits, torch.eye(64).double(), targets)
        assert float((actual[0] - exact.detach()).abs().max()) <= 1e-4 + 2.4e-7 * 1e4


def test_vocabulary_tail_stays_out():
    """Padding columns in the logsumexp (verl#2656); NaN in them reaches nothing."""
    hidden, weight, targets, bias = sample(2, 9, v=40)
    targets = targets % 33
    padded = torch.cat([weight[:33], torch.full((7, 24), float("nan"))])
    tail = torch.cat([bias[:33], torch.full((7,), float("inf"))])
    for memory in ("store", "recompute"):
        actual = grads(tk.linear_logprobs, hidden, padded, targets, bias=tail, memory=memory,
                       valid_vocab=33)
        expected = grads(tk.linear_logprobs, hidden, weight[:33], targets, bias=bias[:33],
                         memory=memory)
        torch.testing.assert_close(actual[:3], expected[:3])
        torch.testing.assert_close(actual[3][:33], expected[3])
        assert not actual[3][33:].any() and not actual[4][33:].any()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("memory", ("store", "recompute"))
@pytest.mark.parametrize("frozen", (False, True))
def test_the_ways_to_choose_rows_agree(kind, memory, frozen):
    hidden, weight, targets, bias = sample(3, 30)
    mask = sample_mask("row", 3, 30)
    options = {"memory": memory, "frozen": frozen, "entropy_grad": not frozen,
               "part": "logprobs" if frozen else "both", "bias": None if frozen else bias}
    actual = grads(tk.linear_logprobs, hidden, weight, targets, mask, **choose(kind, mask),
                   **options)
    plain = grads(tk.linear_logprobs, hidden, weight, targets, mask, **options)
    for a, b in zip(actual, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", ("store", "recompute"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_over_capacity_is_nan_everywhere(memory, backend):
    hidden, weight, targets, bias = sample(1, 10)
    mask = torch.tensor([[True] * 6 + [False] * 2 + [True] * 2])
    with tk.use_backend(backend):
        out = grads(tk.linear_logprobs, hidden, weight, targets, mask, bias=bias, capacity=6,
                    memory=memory)
    for x in out[:2]:
        assert x[0, :6].isfinite().all() and not x[0, 6:8].any() and x[0, 8:].isnan().all()
    assert out[2][0, :6].isfinite().all() and out[2][0, 8:].isnan().all()
    assert out[3].isnan().all() and out[4].isnan().all()
    enough = tk.linear_logprobs(hidden, weight, targets, mask, capacity=8)
    assert enough.logprobs.isfinite().all()
    with tk.use_backend(backend):  # no slots are made that no row can take
        most = tk.linear_logprobs(hidden, weight, targets, mask, capacity=2**62, memory=memory)
    torch.testing.assert_close(most, enough)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_poison(poison, kind, backend):
    """lm_head on prompt positions (OpenRLHF#467, SkyRL#2144): masked rows are not even read."""
    hidden, weight, targets, bias = sample(4, 33)
    for shape in ("left", "right", "interior", "row", "all-false"):
        mask = sample_mask(shape, 4, 33)
        temperature = 0.5 + torch.rand(4, 33)
        results = []
        for value in (0.0, poison):
            for leaf in (h := poisoned(hidden, mask, value), w := weight.clone()):
                leaf.requires_grad_()
            bad = targets if value == 0.0 else torch.where(mask, targets, -100)
            with tk.use_backend(backend):
                out = tk.linear_logprobs(h, w, bad, mask, bias=bias, **choose(kind, mask),
                                         temperature=poisoned(temperature, mask, value or 1.0))
                g = [poisoned(torch.ones(4, 33), mask, value) for _ in out]
                results.append((*(x.detach() for x in out), *torch.autograd.grad(out, (h, w), g)))
        assert_same_bits(results[1], results[0])
        assert not results[0][2][~mask].any()


def test_twice_packed_permuted():
    hidden, weight, targets, _ = sample(5, 20)
    lengths = [20, 3, 11, 1, 7]
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    once = grads(tk.linear_logprobs, hidden, weight, targets, mask)
    assert_same_bits(grads(tk.linear_logprobs, hidden, weight, targets, mask), once)
    packed = tk.linear_logprobs(pack(hidden, lengths)[0], weight, pack(targets, lengths)[0])
    torch.testing.assert_close(packed.logprobs, once[0][mask], rtol=0, atol=2e-6)
    order = torch.randperm(5)
    moved = tk.linear_logprobs(hidden[order], weight, targets[order], mask[order])
    torch.testing.assert_close(moved.logprobs, once[0][order], rtol=0, atol=2e-6)
    other = grads(tk.linear_logprobs, hidden, weight, targets, mask, memory=9000)
    for a, b in zip(other, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(-30, 30))
def test_shift_invariance(seed, n, shift):
    hidden, weight, targets, bias = double(*sample(1, n, d=5, v=11, seed=seed))
    a = tk.linear_logprobs(hidden, weight, targets, bias=bias)
    b = tk.linear_logprobs(hidden, weight, targets, bias=bias + shift)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert bool((a.logprobs <= 0).all()) and bool((a.entropy >= -1e-9).all())


@pytest.mark.parametrize("memory", ("store", "recompute"))
@pytest.mark.parametrize("softcap", (None, 2.0))
@pytest.mark.parametrize("backend", ("chunked", "reference"))
def test_gradcheck(memory, softcap, backend):
    hidden, weight, targets, bias = double(*sample(2, 4, d=3, v=7))
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])

    def call(h, w, b):
        return tk.linear_logprobs(h, w, targets, mask, bias=b, memory=memory, softcap=softcap,
                                  temperature=0.8)

    with tk.use_backend(backend):
        assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (hidden, weight, bias)])
        assert torch.autograd.gradcheck(
            lambda h: tk.linear_logprobs(h, weight.detach(), targets, mask, entropy_grad=False,
                                         softcap=softcap)[0], [hidden])


@pytest.mark.parametrize("memory", ("store", "recompute"))
def test_one_argument_in_fp64_makes_all_of_it_so(memory):
    for which in range(3):
        given = sample(2, 5)
        hidden, weight, targets, bias = (
            x.double() if i == which else x for i, x in zip((0, 1, 3, 2), given, strict=True))
        temperature = torch.tensor(1.3) if which else 0.5 + torch.rand(2, 5)
        options = {"temperature": temperature, "softcap": 4.0, "logit_scale": torch.tensor(0.7)}
        actual = grads(tk.linear_logprobs, hidden, weight, targets, bias=bias, memory=memory,
                       **options)
        exact = grads(textbook, *double(hidden, weight, targets), bias=bias.double(), **options)
        for a, e, x in zip(actual, exact, (hidden.double(), hidden.double(), hidden, weight, bias),
                           strict=True):
            assert a.dtype == x.dtype
            assert distance(a, e) < (1e-12 if a.dtype == torch.float64 else 1e-7)


def test_gradients_that_are_wanted_and_those_that_are_not():
    """Lost requires_grad in a fused function (verl#6913, Liger#968)."""
    hidden, weight, targets, bias = sample(2, 5)
    given = dict(zip(("hidden", "weight", "bias"), (hidden, weight, bias), strict=True))
    exact = grads(textbook, *double(hidden, weight, targets), bias=bias.double())
    for learns in itertools.product((False, True), repeat=3):
        leaves = {k: x.clone().requires_grad_(on) for (k, x), on in zip(given.items(), learns,
                                                                      strict=True)}
        out = tk.linear_logprobs(targets=targets, **leaves)
        assert out.logprobs.requires_grad == out.entropy.requires_grad == any(learns)
        if any(learns):
            g = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
            torch.autograd.backward(out, list(g))
        for x, on, e in zip(leaves.values(), learns, exact[2:], strict=True):
            assert (x.grad is not None) == on
            assert not on or distance(x.grad, e) < 1e-5
    detached = tk.linear_logprobs(leaves["hidden"], leaves["weight"], targets, entropy_grad=False)
    assert detached.logprobs.requires_grad and not detached.entropy.requires_grad
    only_hidden = tk.linear_logprobs(leaves["hidden"], weight, targets, entropy_grad=False)
    assert only_hidden.logprobs.requires_grad and not only_hidden.entropy.requires_grad


def test_half_of_the_results_and_a_second_backward():
    hidden, weight, targets, _ = sample(2, 5)
    h = hidden.requires_grad_()
    out = tk.linear_logprobs(h, weight, targets)
    one = torch.autograd.grad(out.logprobs[0, 2:4].sum() * 3, h, retain_graph=True)[0]
    two = torch.autograd.grad(out.logprobs[0, 2:4].sum() * 3, h, retain_graph=True)[0]
    assert_same_bits(one, two)
    expected = torch.autograd.grad(textbook(h, weight, targets)[0][0, 2:4].sum() * 3, h)[0]
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)
    entropy = torch.autograd.grad(out.entropy.sum(), h)[0]  # expanded gradient
    torch.testing.assert_close(entropy, torch.autograd.grad(textbook(h, weight, targets)[1].sum(),
                                                            h)[0], rtol=1e-4, atol=1e-6)
    again = tk.linear_logprobs(h, weight, targets)
    (g,) = torch.autograd.grad(again.logprobs.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()
    for memory in ("store", "recompute"):  # a constant gradient comes in
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.functional.hessian(lambda h, memory=memory: tk.linear_logprobs(
                h, weight, targets, memory=memory).logprobs.sum(), hidden.detach())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no jvp"):
        tk.linear_logprobs(forward_ad.make_dual(hidden.detach(), hidden.detach()), weight, targets)


@pytest.mark.parametrize("v, d", ((1, 64), (7, 8192), (32_000, 64), (128_256, 64), (151_643, 64),
                                  (151_936, 64), (262_144, 64), (1000, 8192)))
def test_real_vocabularies(v, d):
    hidden, weight, targets, _ = sample(1, 3, d=d, v=v, dtype=torch.bfloat16, spread=2.0)
    targets[0, 0] = v - 1
    for memory in ("store", "recompute"):
        actual = grads(tk.linear_logprobs, hidden, weight, targets, memory=memory)
        assert_close(actual, grads(textbook, *double(hidden, weight, targets)), torch.bfloat16)


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_without_gradients(context):
    hidden, weight, targets, _ = sample(2, 5)
    with context():
        out = tk.linear_logprobs(hidden, weight.requires_grad_(), targets)
    assert not out.logprobs.requires_grad
    torch.testing.assert_close(tuple(out), tuple(x.detach() for x in textbook(
        hidden, weight, targets)))


@pytest.mark.parametrize("options", ({}, {"memory": "recompute"},
                                     {"entropy_grad": False, "frozen": True, "part": "logprobs"}))
def test_a_rollout_of_inference_mode_is_trained_on(options):
    hidden, weight, targets, _ = sample(2, 5)
    mask = sample_mask("interior", 2, 5)
    expected = grads(tk.linear_logprobs, hidden, weight, targets, mask, **options)
    with torch.inference_mode():
        targets, mask, rows = targets.clone(), mask.clone(), tk.valid_rows(mask)
    actual = grads(tk.linear_logprobs, hidden, weight, targets, mask, rows=rows, **options)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


def test_autocast_changes_nothing():
    hidden, weight, targets, _ = sample(2, 5)
    expected = grads(tk.linear_logprobs, hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(grads(tk.linear_logprobs, hidden, weight, targets), expected)


def raw_inputs(mask=None, rows=None, capacity=None, dtype=torch.float32, softcap=None):
    hidden, weight, targets, bias = sample(2, 6, d=4, v=9, dtype=dtype)
    return inputs_of(hidden, weight, targets % 8, mask, bias, rows=rows, softcap=softcap,
                     valid_vocab=8, capacity=capacity, budget=5000)


def test_opcheck():
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    g = torch.randn(2, 6)
    capped = raw_inputs(mask, softcap=torch.tensor(2.0))
    cases = [("cpp", raw_inputs(), "none"), ("cpp", raw_inputs(mask), "store"),
             ("cpp", raw_inputs(mask, tk.valid_rows(mask)), "store"),
             ("cpp", raw_inputs(mask, capacity=10), "recompute"),
             ("cpp", raw_inputs(dtype=torch.bfloat16), "store"), ("cpp", capped, "frozen"),
             ("reference", raw_inputs(mask), "store"), ("reference", capped, "store"),
             ("reference", capped, "frozen"), ("chunked", capped, "frozen")]
    for backend, inputs, regime in cases:
        with tk.use_backend(backend):
            call = flat(LinearLogprobsCall(inputs, regime))
            torch.library.opcheck(_fwd, call)
            out = _fwd(*call)
            if regime == "frozen":
                torch.library.opcheck(_frozen, flat(FrozenGradient(
                    g, out[3], mask, inputs.rows, inputs.capacity, torch.float32)))
            elif regime != "none":
                torch.library.opcheck(_bwd, flat(LinearLogprobsGradient(
                    g, g, inputs, *out[2:], True, True, True)))
    inputs = capped
    torch.library.opcheck(_bwd, flat(LinearLogprobsGradient(
        g, None, inputs._replace(scaling=raw_inputs().scaling), out[2], g[:0, 0], False, False,
        True)))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("memory", ("store", "recompute"))
def test_compiles_whole_and_equals_eager(kind, memory):
    hidden, weight, targets, bias = sample(2, 9)
    mask = sample_mask("interior", 2, 9)
    chosen = choose(kind, mask)

    def call(h, w, targets, mask, bias, temperature):
        return tk.linear_logprobs(h * 2, w, targets, mask, bias=bias, temperature=temperature,
                                  memory=memory, **chosen)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = function(*leaves[:2], targets, mask, leaves[2], torch.tensor(0.7))
        (out.logprobs.sum() + 0.3 * out.entropy.square().sum()).backward()
        return (*(x.detach() for x in out), *(x.grad for x in leaves))

    torch._dynamo.reset()
    compiled = run(torch.compile(call, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, run(call), rtol=1e-4, atol=1e-5)


def test_a_frozen_head_compiles():
    hidden, weight, targets, _ = sample(2, 9)
    mask = sample_mask("interior", 2, 9)

    def call(h, mask, rows):
        return tk.linear_logprobs(h * 2, weight, targets, mask, entropy_grad=False, rows=rows)[0]

    for rows in (None, tk.valid_rows(mask)):
        h = hidden.clone().requires_grad_()
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(h, mask, rows)
        torch.testing.assert_close(torch.autograd.grad(compiled.sum(), h),
                                   torch.autograd.grad(call(h, mask, rows).sum(), h))


def test_fifty_lengths_and_temperatures_make_at_most_two_graphs():
    """Liger#146, fla#533: recompilation for every length or temperature."""
    calls = []
    for length in range(2, 52):
        hidden, weight, targets, _ = sample(2, length)
        mask = torch.rand(2, length) < 0.7
        mask[0, :2] = True
        rows = tk.valid_rows(mask)
        calls.append((hidden.requires_grad_(), weight.requires_grad_(), targets, mask, rows,
                      torch.tensor(0.5 + length / 99)))

    def call(h, w, targets, mask, rows, temperature):
        return tk.linear_logprobs(h, w, targets, mask, rows=rows, temperature=temperature)

    assert count_graphs(call, calls) <= 2
    assert count_graphs(lambda h, w, t, m, _, x: tk.linear_logprobs(h, w, t, m, temperature=x),
                        calls) <= 2


def test_export():
    hidden, weight, targets, _ = sample(2, 9)
    mask = sample_mask("interior", 2, 9)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

        def forward(self, h, targets, mask):
            return tk.linear_logprobs(h, self.weight, targets, mask, temperature=0.7)

    args = (hidden, targets, mask)
    out = torch.export.export(Module(), args).module()(*args)
    torch.testing.assert_close(tuple(out), tuple(Module()(*args)))
    swapped = torch.func.functional_call(Module(), {"weight": -weight}, args)
    torch.testing.assert_close(tuple(swapped), tuple(tk.linear_logprobs(
        hidden, -weight, targets, mask, temperature=0.7)))


H, W, T = torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.int64)
ALL = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize("error, words, kwargs", [
    (TypeError, "hidden is list", {"hidden": [1.0]}),
    (TypeError, "hidden has dtype int64, expected float32", {"hidden": T}),
    (ValueError, r"targets has shape \[2, 2\].*\[2, 3\] as hidden", {"targets": T[:, :2]}),
    (TypeError, "targets has dtype float32", {"targets": H[..., 0]}),
    (ValueError, r"weight has shape \[9, 5\].*\[V, 4\]", {"weight": torch.zeros(9, 5)}),
    (ValueError, r"weight has shape \[0, 4\], expected at least one row", {"weight": W[:0]}),
    (ValueError, r"bias has shape \[8\].*\[9\]", {"bias": torch.zeros(8)}),
    (TypeError, "mask has dtype float32, expected bool", {"mask": T.float()}),
    (ValueError, r"targets holds 9, expected values in \[0, 8\]; the first stands at 1, 2", {
        "targets": torch.tensor([[0, 9, 1], [2, -100, 9]]),
        "mask": torch.tensor([[1, 0, 1], [1, 0, 1]])}),
    (ValueError, "targets holds -1", {"targets": T - 1}),
    (ValueError, r"targets holds 5, expected values in \[0, 4\]", {"targets": T + 5,
                                                                   "valid_vocab": 5}),
    (ValueError, "valid_vocab is 10", {"valid_vocab": 10}),
    (TypeError, "valid_vocab is float", {"valid_vocab": 2.0}),
    (ValueError, "temperature is 0.0, expected a number > 0", {"temperature": 0.0}),
    (ValueError, "temperature holds -1", {"temperature": -torch.ones(2, 3)}),
    (ValueError, r"temperature has shape \[3\]", {"temperature": torch.ones(3)}),
    (ValueError, "softcap is -2.0", {"softcap": -2.0}),
    (ValueError, "softcap requires a gradient", {"softcap": torch.ones((), requires_grad=True)}),
    (TypeError, "logit_scale is str", {"logit_scale": "x"}),
    (ValueError, "memory is 'all', expected one of 'auto', 'store', 'recompute'",
     {"memory": "all"}),
    (ValueError, "memory is 9223372036854775808, expected", {"memory": 2**63}),
    (ValueError, "memory is 0, expected a number >= 1", {"memory": 0}),
    (TypeError, "memory is bool True", {"memory": True}),
    (ValueError, "memory is 1.5", {"memory": 1.5}),
    (ValueError, "entropy_grad is 1", {"entropy_grad": 1}),
    (TypeError, "rows has dtype bool", {"rows": ALL.reshape(-1)}),
    (ValueError, "rows holds 6", {"rows": torch.tensor([6])}),
    (ValueError, "rows is not ascending", {"rows": torch.tensor([1, 1])}),
    (ValueError, "rows names 2 rows, expected the 6 True", {"mask": ALL,
                                                           "rows": torch.tensor([1, 2])}),
    (ValueError, "capacity is 3 and rows is given", {"capacity": 3, "rows": torch.tensor([1])}),
    (ValueError, "capacity is -1", {"capacity": -1}),
    (TypeError, "group is str", {"group": "world"}),
    (TypeError, "unknown keyword softmax_cap, did you mean softcap", {"softmax_cap": 1.0}),
])
def test_bad_input_names_the_argument(error, words, kwargs):
    with pytest.raises(error, match=words):
        tk.linear_logprobs(**{"hidden": H, "weight": W, "targets": T, **kwargs})


def test_valid_rows():
    mask = torch.tensor([[True, False], [False, True]])
    assert tk.valid_rows(mask).tolist() == [0, 3] and tk.valid_rows(mask).dtype == torch.int64
    assert tk.valid_rows(mask[:0]).tolist() == []
    with pytest.raises(TypeError, match="mask has dtype"):
        tk.valid_rows(torch.ones(2))
