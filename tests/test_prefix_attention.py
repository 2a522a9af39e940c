"""`prefix_attention` on its backends: each (prompt, response) run apart is the truth."""

import functools
import importlib
import inspect
import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from _linear_cases import Largest
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tests._matrix import third
from tppo_kernels import __main__
from tppo_kernels._core.op import missing
from tppo_kernels._core.record import flat
from tppo_kernels._kernels import varlen as _varlen
from tppo_kernels._math.layout import PrefixAttentionCall, PrefixAttentionGradient
from tppo_kernels.ops import prefix_attention as op
from tppo_kernels.testing import DTYPES, assert_accurate, assert_same_bits, count_graphs, strided

BACKENDS = ("reference", "flash")
RAGGED = ([5, 1, 3], [[4, 1, 7], [2], [19, 3]])


def batch(layout, heads=4, kv_heads=2, dim=8, dtype=torch.float32, seed=0, batched=True):
    """Random q, k, v, as a model's projections lay them out: token by token."""
    g = torch.Generator().manual_seed(seed)
    made = (torch.randn(layout.n_tokens, h, dim, generator=g, dtype=torch.float64).to(dtype)
            .transpose(0, 1) for h in (heads, kv_heads, kv_heads))
    return tuple(x[None] if batched else x for x in made)


def spans(layout):
    """(tokens of the prompt, tokens of the response) of every response."""
    start = 0
    for prompt, responses in zip(layout.prompt_lengths, layout.response_lengths, strict=True):
        first = range(start, start + prompt)
        start += prompt
        for length in responses:
            yield first, range(start, start + length)
            start += length


def apart(q, k, v, layout, scale=None):
    """Each (prompt, response) alone, query by query; a prompt's own results by its first one."""
    repeat = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = {}
    for prompt, response in spans(layout):
        tokens = [*prompt, *response]
        for at, token in enumerate(tokens):
            if token in rows:
                continue
            seen, heads = tokens[:at + 1], []
            for h in range(q.shape[1]):
                scores = scale * (k[0, h // repeat, seen] @ q[0, h, token])
                p = (scores - scores.max()).exp()
                heads.append((p / p.sum()) @ v[0, h // repeat, seen])
            rows[token] = torch.stack(heads)
    return torch.stack([rows[t] for t in range(layout.n_tokens)], 1)[None]


def run(function, inputs, layout, grad, **kwargs):
    """(result, gradients) for a given gradient of the result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, layout, **kwargs)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Scores of 0 and ln 3: a prompt of one token, responses of two and of one."""
    layout = tk.PrefixLayout.from_lengths([1], [[2, 1]])
    q = torch.ones(1, 1, 4, 1)
    k = torch.tensor([0., math.log(3), 0., math.log(3)]).view(1, 1, 4, 1)
    v = torch.tensor([1., 2., 10., 100.]).view(1, 1, 4, 1)
    with tk.use_backend(backend):
        out = tk.prefix_attention(q, k, v, layout, scale=1.0)
        halved = tk.prefix_attention(2 * q, k, v, layout, scale=torch.tensor(0.5))
    expected = [1., (1 + 3 * 2) / 4, (1 + 3 * 2 + 10) / 5, (1 + 3 * 100) / 4]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected))
    torch.testing.assert_close(halved, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_textbook(backend):
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    inputs = batch(layout, dtype=torch.float64)
    grad = torch.randn(1, 4, layout.n_tokens, 8, dtype=torch.float64)
    for scale in (None, 0.7):
        exact = run(apart, inputs, layout, grad, scale=scale)
        dtype = torch.float64 if backend == "reference" else torch.float32
        with tk.use_backend(backend):
            actual = run(tk.prefix_attention, [x.to(dtype) for x in inputs], layout, grad,
                         scale=scale)
        tolerance = 1e-12 if backend == "reference" else 3e-6
        for a, e in zip(actual, exact, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("which", "token", "reaches"), [
    ("q", 5, [5]), ("k", 2, [2, 3, 4, 5, 6, 7, 8]), ("k", 4, [4, 5]), ("v", 3, [3, 4, 5, 6, 7, 8]),
    ("v", 6, [6, 7, 8]),
])  # fmt: skip
def test_what_is_not_finite_reaches_those_that_see_it_and_no_other(backend, which, token, reaches):
    """torch's kernel for a CPU makes 0 of such a query, passes over such a key, and lets such a
    value reach earlier tokens, as 0 NaN is NaN.
    """
    layout = tk.PrefixLayout.from_lengths([4, 2], [[2, 3], [1]])
    inputs, place = batch(layout), "qkv".index(which)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
    with tk.use_backend(backend):
        sound = run(tk.prefix_attention, inputs, layout, grad)
        for value in (math.nan, math.inf):
            spoilt = [x.clone() for x in inputs]
            spoilt[place][0, 1, token, 3] = value
            out, dq, *_ = run(tk.prefix_attention, spoilt, layout, grad)
            heads = [1] if which == "q" else [2, 3]  # that read head 1 of k and v
            lost = torch.zeros(out.shape[:3], dtype=torch.bool)
            lost[0, torch.tensor(heads)[:, None], torch.tensor(reaches)] = True
            for found, before in ((out, sound[0]), (dq, sound[1])):
                assert torch.equal(found.isnan(), lost[..., None].expand_as(found))
                assert torch.equal(found[~lost], before[~lost])


def test_gradcheck():
    layout = tk.PrefixLayout.from_lengths([2, 1], [[1, 2], [1]])
    inputs = [x.requires_grad_() for x in batch(layout, 4, 2, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: tk.prefix_attention(q, k, v, layout), inputs)


LAYOUTS = {1: ([1] * 8, [[1]] * 8), 7: ([7, 2], [[7, 1, 3], [7]]), 63: ([63], [[63, 1]]),
           64: ([64, 3], [[64], [17, 5]]), 65: ([65], [[65, 3]]), 1000: ([1000], [[20, 33, 7]])}
CASES = third(itertools.product(DTYPES, LAYOUTS, ((4, 4), (6, 2), (3, 1)),
                                ("plain", "strided", "contiguous")), seed=2)


@pytest.mark.parametrize("dtype, size, heads, memory", CASES)
def test_accuracy(dtype, size, heads, memory):
    """Error against fp64 at most twice that of PyTorch's own attention in the inputs' dtype."""
    layout = tk.PrefixLayout.from_lengths(*LAYOUTS[size])
    inputs = batch(layout, *heads, 16, dtype, seed=size)
    grad = torch.randn(1, heads[0], layout.n_tokens, 16).to(dtype)

    def eager(q, k, v, layout):
        seen = op.reference.visible(layout.segment_lengths, layout.is_prompt, layout.n_tokens)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen,
                                                                enable_gqa=True)

    exact = run(tk.prefix_attention, [x.double() for x in inputs], layout, grad.double())
    judge = run(eager, inputs, layout, grad)
    given = {"plain": lambda x: x, "strided": strided, "contiguous": torch.Tensor.contiguous}
    for backend in BACKENDS:
        with tk.use_backend(backend):
            actual = run(tk.prefix_attention, [given[memory](x) for x in inputs], layout,
                         given[memory](grad))
        for name, a, e, j in zip(("out", "dq", "dk", "dv"), actual, exact, judge, strict=True):
            assert a.dtype == dtype
            assert_accurate(a, e, j, name=f"{name} on {backend}")


def lengths(max_groups=3, longest=40):
    one = st.integers(1, longest)
    group = st.tuples(one, st.lists(one, min_size=1, max_size=5))
    return st.lists(group, min_size=1, max_size=max_groups)


@settings(deadline=None, max_examples=15)
@given(lengths(), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.integers(0, 99))
def test_random_layouts(groups, heads, seed):
    """Backends agree; a response alone with its prompt, of any order, gets the same result."""
    layout = tk.PrefixLayout.from_lengths([p for p, _ in groups], [r for _, r in groups])
    q, k, v = batch(layout, *heads, seed=seed)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed))
    actual = run(tk.prefix_attention, (q, k, v), layout, grad)
    with tk.use_backend("reference"):
        exact = run(tk.prefix_attention, [x.double() for x in (q, k, v)], layout, grad.double())
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    for prompt, response in spans(layout):
        tokens = [*prompt, *response]
        alone = tk.PrefixLayout.from_lengths([len(prompt)], [[len(response)]])
        one = tk.prefix_attention(*(x[:, :, tokens] for x in (q, k, v)), alone)
        torch.testing.assert_close(one, actual[0][:, :, tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_response_is_plain_causal_attention(backend):
    layout = tk.PrefixLayout.from_lengths([37], [[21]])
    inputs, grad = batch(layout, 4, 4, 16), torch.randn(1, 4, 58, 16)

    def causal(q, k, v, layout):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with tk.use_backend(backend):
        actual = run(tk.prefix_attention, inputs, layout, grad)
    for a, e in zip(actual, run(causal, inputs, layout, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_responses_and_groups_permutes_the_results(backend):
    prompts, responses = [6, 3], [[4, 18, 2], [9, 1]]
    layout = tk.PrefixLayout.from_lengths(prompts, responses)
    other = tk.PrefixLayout.from_lengths([3, 6], [[1, 9], [2, 4, 18]])
    parts = torch.arange(layout.n_tokens).split([6, 4, 18, 2, 3, 9, 1])
    order = torch.cat([parts[i] for i in (4, 6, 5, 0, 3, 1, 2)])
    inputs, grad = batch(layout), torch.randn(1, 4, layout.n_tokens, 8)
    with tk.use_backend(backend):
        before = run(tk.prefix_attention, inputs, layout, grad)
        after = run(tk.prefix_attention, [x[:, :, order] for x in inputs], other,
                    grad[:, :, order])
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b[:, :, order], rtol=1e-5, atol=1e-6)


def test_responses_do_not_see_each_other():
    """A NaN in one response reaches neither another one, nor a prompt, nor another group; a further
    response changes nothing for those that are there."""
    layout = tk.PrefixLayout.from_lengths([6, 3], [[4, 18, 2], [9, 1]])
    q, k, v = batch(layout)
    clean = tk.prefix_attention(q, k, v, layout)
    for x in (q, k, v):
        x[:, :, 10:28] = float("nan")  # the second response
    dirty = tk.prefix_attention(q, k, v, layout)
    others = torch.ones(layout.n_tokens, dtype=torch.bool)
    others[10:28] = False
    assert_same_bits(dirty[:, :, others], clean[:, :, others])
    assert dirty[:, :, ~others].isnan().all()
    fewer = tk.PrefixLayout.from_lengths([6, 3], [[4, 2], [9, 1]])
    assert_same_bits(tk.prefix_attention(*(x[:, :, others] for x in (q, k, v)), fewer),
                     clean[:, :, others])


def test_grouped_heads_equal_repeated_ones():
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    q, k, v = batch(layout, 6, 2)
    wide = [x.repeat_interleave(3, 1) for x in (k, v)]
    grad = torch.randn(q.shape)
    out, dq, dk, dv = run(tk.prefix_attention, (q, k, v), layout, grad)
    wide_out, wide_dq, *wide_grads = run(tk.prefix_attention, (q, *wide), layout, grad)
    torch.testing.assert_close((out, dq), (wide_out, wide_dq), rtol=1e-5, atol=1e-6)
    for a, e in zip((dk, dv), wide_grads, strict=True):
        torch.testing.assert_close(a, e.unflatten(1, (2, 3)).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits(backend):
    layout = tk.PrefixLayout.from_lengths([30] * 3, [[5, 17, 40]] * 3)
    inputs, grad = batch(layout), torch.randn(1, 4, layout.n_tokens, 8)
    with tk.use_backend(backend):
        assert_same_bits(run(tk.prefix_attention, inputs, layout, grad),
                         run(tk.prefix_attention, inputs, layout, grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_form(backend):
    """verl#6960: strided gradients read as contiguous; verl#6913, Liger#968: lost gradients."""
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    inputs = [x.requires_grad_() for x in batch(layout)]
    with tk.use_backend(backend):
        out = tk.prefix_attention(*inputs, layout)
        dense = torch.autograd.grad(out, inputs, torch.ones(out.shape), retain_graph=True)
        expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        assert_same_bits(expanded, dense)
        mark = torch.zeros(out.shape)
        mark[:, 1, ::2] = 3
        sliced = torch.autograd.grad((3 * out[:, 1, ::2]).sum(), inputs, retain_graph=True)
        assert_same_bits(sliced, torch.autograd.grad(out, inputs, mark))
        for i in range(3):
            leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
            tk.prefix_attention(*leaves, layout).sum().backward()
            assert_same_bits(leaves[i].grad, dense[i])
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert_same_bits(tk.prefix_attention(*inputs, layout).clone(), out.detach())
    assert not tk.prefix_attention(*(x.detach() for x in inputs), layout).requires_grad


def test_autocast_does_not_lower_it():
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    inputs, grad = batch(layout), torch.randn(1, 4, layout.n_tokens, 8)
    for backend in BACKENDS:
        with tk.use_backend(backend):
            plain = run(tk.prefix_attention, inputs, layout, grad)
            with torch.autocast("cpu", torch.bfloat16):
                assert_same_bits(run(tk.prefix_attention, inputs, layout, grad), plain)
    q, k, v = inputs  # as a model under autocast gives them: v has seen no rotary embedding
    assert tk.prefix_attention(q, k, v.bfloat16(), layout).dtype == torch.float32


def test_without_a_batch_dimension():
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    flat = batch(layout, batched=False)
    out = tk.prefix_attention(*flat, layout)
    assert_same_bits(out[None], tk.prefix_attention(*(x[None] for x in flat), layout))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    """No group at all: an empty result that is attached."""
    layout = tk.PrefixLayout.from_lengths([], [])
    inputs = [x.requires_grad_() for x in batch(layout)]
    with tk.use_backend(backend):
        out = tk.prefix_attention(*inputs, layout)
        assert out.shape == (1, 4, 0, 8) and out.requires_grad
        out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize("prompts, responses", [([256], [[16] * 16]), ([8], [[2] * 40 + [300]]),
                                                ([40] * 12, [[3, 9, 20]] * 12)])
def test_cost_follows_the_tokens(prompts, responses):
    """Nothing of L x L: the largest tensor is one of L x Hq x D, padding at most doubles it."""
    from tppo_kernels.ops.prefix_attention import _flash

    layout = tk.PrefixLayout.from_lengths(prompts, responses)
    q, k, v = batch(layout, batched=False)
    call = PrefixAttentionCall(q, k, v, op.plan(layout), torch.tensor(0.3))
    with Largest() as largest:
        out, lse = _flash.fwd(call)
        _flash.bwd(PrefixAttentionGradient(call, torch.ones(out.shape), out, lse))
    assert q.numel() <= largest.numel <= 2 * q.numel() < layout.n_tokens ** 2


def test_explain_and_refusals():
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    q, k, v = batch(layout)
    assert tk.explain(tk.prefix_attention, q, k, v, layout).backend == "flash"
    for inputs, reason in (((q.double(), k, v), "fp64"), ((q, k, v[..., :5]), "5 values a head")):
        said = tk.explain("prefix_attention", *inputs, layout)
        assert said.backend == "reference" and reason in said.refused["flash"]
        with tk.use_backend("flash"), pytest.raises(tk.BackendError, match=reason):
            tk.prefix_attention(*inputs, layout)
    for scale in (0.0, -0.3):  # NaN in torch's kernels
        said = tk.explain("prefix_attention", q, k, v, layout, scale=scale)
        assert "expected above 0" in said.refused["flash"]
        torch.testing.assert_close(tk.prefix_attention(q, k, v, layout, scale=scale),
                                   tk.prefix_attention(q * scale, k, v, layout, scale=1.0))
    narrow = tk.prefix_attention(q, k, v[..., :5], layout)
    torch.testing.assert_close(narrow, tk.prefix_attention(q, k, v, layout)[..., :5])


def test_opcheck():
    fwd = torch.ops.tppo_kernels.prefix_attention_fwd.default
    bwd = torch.ops.tppo_kernels.prefix_attention_bwd.default
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    for dtype, backend in zip((torch.bfloat16, torch.float32), BACKENDS, strict=True):
        q, k, v = batch(layout, dtype=dtype, batched=False)
        call = PrefixAttentionCall(q, k, v, op.plan(layout), torch.tensor(0.3))
        with tk.use_backend(backend):
            torch.library.opcheck(fwd, flat(call))
            out, lse = fwd(*flat(call))
            torch.library.opcheck(bwd, (*flat(call), torch.randn(out.shape), out, lse))


def test_compiles_as_one_graph_and_exports():
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    inputs, grad = batch(layout), torch.randn(1, 4, layout.n_tokens, 8)

    def call(q, k, v, layout):
        return tk.prefix_attention(q * 2, k, v, layout)

    torch._dynamo.reset()
    for options in ({"backend": "aot_eager"}, {}):  # by default Inductor: see conftest.py
        compiled = torch.compile(call, fullgraph=True, **options)
        for a, e in zip(run(compiled, inputs, layout, grad), run(call, inputs, layout, grad),
                        strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return call(q, k, v, layout)

    program = torch.export.export(Module(), inputs)
    assert_same_bits(program.module()(*inputs), call(*inputs, layout))


@pytest.mark.parametrize("of_torch", ("device", "dtype"))
def test_defaults_of_torch_change_nothing(of_torch):
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))

    def run():
        layout = tk.PrefixLayout.from_lengths([4, 2], [[3, 1], [2]])
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = tk.prefix_attention(*leaves, layout)
        states = layout.response_states(out[0, 0])
        return out.detach(), states.detach(), *torch.autograd.grad(
            out.square().sum() + states.sum(), leaves)

    expected = run()
    try:
        if of_torch == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        actual = run()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert_same_bits(actual, expected)


def test_fifty_layouts_two_graphs():
    """Liger#146, fla#533: a recompilation for every length."""
    calls = []
    for i in range(50):
        layout = tk.PrefixLayout.from_lengths([2 + i, 3], [[2] * (2 + i % 5), [3 + i, 2]])
        calls.append((*batch(layout), layout))
    assert count_graphs(tk.prefix_attention, calls) <= 2


BAD = {
    "layout is dict": dict(layout={}),
    "q is list": dict(q=[1.0]),
    "q has dtype int64": dict(q=torch.zeros(1, 4, 41, 8, dtype=torch.int64)),
    r"q has shape \[2, 4, 45, 8\], expected \[1, Hq, L, D\]": dict(q=torch.zeros(2, 4, 45, 8)),
    r"q has L = 44, expected the 45 tokens": {n: torch.zeros(1, 2, 44, 8) for n in "qkv"},
    r"k has shape \[1, 2, 45, 7\]": dict(k=torch.zeros(1, 2, 45, 7)),
    r"v has shape \[1, 4, 45, 8\], expected .* as q, k": dict(v=torch.zeros(1, 4, 45, 8)),
    r"q has 4 heads, expected a multiple of the 3": dict(k=torch.zeros(1, 3, 45, 8),
                                                         v=torch.zeros(1, 3, 45, 8)),
    r"q has shape \[1, 0, 45, 8\], expected one or more": dict(q=torch.zeros(1, 0, 45, 8)),
    r"q has shape \[2, 45, 0\], expected one or more": dict.fromkeys("qkv", torch.zeros(2, 45, 0)),
    "scale is str": dict(scale="auto"),
    "scale is nan": dict(scale=float("nan")),
    "scale is a tensor of shape": dict(scale=torch.ones(2)),
    "scale requires a gradient": dict(scale=torch.tensor(1.0, requires_grad=True)),
    "v is on meta, expected cpu as q": dict(v=torch.zeros(1, 2, 45, 8, device="meta")),
    "unknown keyword window, expected one of q, k": dict(window=3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    assert layout.n_tokens == 45
    given = {**dict(zip("qkv", batch(layout), strict=True)), "layout": layout, **BAD[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        tk.prefix_attention(**given)


def sequences(call):
    """(queries, keys) of every sequence of a call, held to what its kernels demand."""
    queries, keys = call.cu_queries.tolist(), call.cu_keys.tolist()
    for cu, longest in ((call.cu_queries, call.longest_query), (call.cu_keys, call.longest_key)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0
        assert 0 < cu.diff().min() and cu.diff().max() <= longest
    return [(slice(*q), slice(*k)) for q, k in zip(itertools.pairwise(queries),
                                                   itertools.pairwise(keys), strict=True)]


def scores(q, k, queries, keys, call, scale):
    """Scaled scores of one sequence in fp32 or fp64, k repeated for the heads of q."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = k[keys].repeat_interleave(q.shape[1] // k.shape[1], 1).to(dtype)
    s = scale * torch.einsum("qhd,khd->hqk", q[queries].to(dtype), wide)
    if call.causal:
        assert s.shape[1] == s.shape[2]
        s.masked_fill_(torch.ones(s.shape[1:], dtype=torch.bool).triu(1), -math.inf)
    return s


def part_forward(q, k, v, call, scale):
    """What the kernels of a GPU give: out in the dtype of q and the logsumexp of every query."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1::-1], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys in sequences(call):
        s = scores(q, k, queries, keys, call, scale)
        lse[:, queries] = s.logsumexp(-1)
        wide = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1).to(s)
        out[queries] = torch.einsum("hqk,khd->qhd", s.softmax(-1), wide).to(out.dtype)
    return out, lse


def part_backward(grad, q, k, v, out, lse, call, scale):
    """Likewise: p from the given logsumexp; gradients of the heads of k in the dtype of q."""
    assert grad.shape == q.shape == out.shape and lse.shape == q.shape[1::-1]
    groups = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for queries, keys in sequences(call):
        p = (scores(q, k, queries, keys, call, scale) - lse[:, queries, None]).exp()
        wide = [x[keys].repeat_interleave(groups, 1).to(p) for x in (k, v)]
        d_out, o = grad[queries].to(p), out[queries].to(p)
        dp = torch.einsum("qhd,khd->hqk", d_out, wide[1])
        ds = scale * p * (dp - (d_out * o).sum(-1).t()[..., None])
        dq[queries] = torch.einsum("hqk,khd->qhd", ds, wide[0]).to(dq.dtype)
        for total, x in ((dk, torch.einsum("hqk,qhd->khd", ds, q[queries].to(p))),
                         (dv, torch.einsum("hqk,qhd->khd", p, d_out))):
            total[keys] = x.unflatten(1, (-1, groups)).sum(2).to(total.dtype)
    return dq, dk, dv


PARTS = [_varlen.Kernels(part_forward, part_backward, lambda q, groups, apart=apart: apart)
         for apart in (False, True)]


def run_raw(forward, backward, inputs, layout, grad, scale=0.3):
    """(out, dq, dk, dv, logsumexp) of a raw forward and backward."""
    call = PrefixAttentionCall(*inputs, op.plan(layout), torch.tensor(scale, dtype=torch.float64))
    out, lse = forward(call)
    return out, *backward(PrefixAttentionGradient(call, grad, out, lse)), lse


@settings(deadline=None, max_examples=30)
@given(lengths(longest=12), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.integers(0, 99))
def test_two_calls_of_variable_length_merge_exactly(groups, heads, seed):
    """The scheme of the GPU in fp64: its plan, merge and backward, with parts in plain PyTorch."""
    layout = tk.PrefixLayout.from_lengths([p for p, _ in groups], [r for _, r in groups])
    inputs = batch(layout, *heads, dtype=torch.float64, seed=seed, batched=False)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    exact = run_raw(op.reference.fwd, op.reference.bwd, inputs, layout, grad)
    for kernels in PARTS:
        actual = run_raw(functools.partial(_varlen.fwd, kernels),
                         functools.partial(_varlen.bwd, kernels), inputs, layout, grad)
        for a, e in zip(actual, exact, strict=True):
            assert a.dim() == 2 or a.transpose(0, 1).is_contiguous()
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


class Emulated:
    """Kernels of a GPU in plain PyTorch: held to their schema, their demands and their shapes."""

    def __init__(self, name, compute):
        self.real, self.compute = getattr(torch.ops.aten, name).default, compute

    def default(self, *args, **kwargs):
        schema = [a.name for a in self.real._schema.arguments]
        named = dict(zip(schema, args, strict=False)) | kwargs
        assert len(args) + len(kwargs) == len(named) and set(named) <= set(schema)
        for name in ("query", "key", "value"):
            x = named[name]
            assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
            assert not any(s * x.element_size() % 16 for s in x.stride()[:-1])
        result = self.compute(**named)
        if "grad_out" in schema[0]:  # the meta of _efficient_attention_backward forgets `out`
            return result
        meta = self.real(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args),
                         **kwargs)
        for a, m in zip(result, meta, strict=False):
            assert a.shape == m.shape and a.dtype == m.dtype
        return *result, *meta[len(result):]


def foreign(parameters):
    """Gives a stand-in the signature of a foreign function, and it its arguments by name."""
    def decorate(stand_in):
        signature = inspect.signature(eval(f"lambda {parameters}: None"))

        def function(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return stand_in(SimpleNamespace(**bound.arguments))

        function.__signature__ = signature
        return function
    return decorate


def flash_call(cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal):
    assert max_q > 1 and dropout_p == 0.0  # of 1 it regroups the heads and their logsumexp
    return _varlen.Call(cum_seq_q, cum_seq_k, max_q, max_k, is_causal)


def flash_forward(query, key, value, return_debug_mask, scale, **call):
    assert query.dtype == key.dtype == value.dtype and query.dtype.itemsize == 2
    return part_forward(query, key, value, flash_call(**call), scale)


@foreign("grad_out, query, key, value, out, logsumexp, rng_state, unused, scale, cum_seq_q, "
         "cum_seq_k, max_q, max_k, dropout_p, is_causal")
def flash_backward(given):
    assert torch.are_deterministic_algorithms_enabled() and given.logsumexp.is_contiguous()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert given.out.dtype == given.grad_out.dtype == given.query.dtype
    call = flash_call(given.cum_seq_q, given.cum_seq_k, given.max_q, given.max_k,
                      given.dropout_p, given.is_causal)
    return part_backward(given.grad_out, given.query, given.key, given.value, given.out,
                         given.logsumexp, call, given.scale)


def efficient_call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                   custom_mask_type, bias):
    assert bias is None and dropout_p == 0.0
    return _varlen.Call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                        custom_mask_type == 1)  # from the top left


def efficient_forward(query, key, value, compute_log_sumexp, scale, **call):
    assert query.shape[2] == key.shape[2] and query.dtype == key.dtype == torch.float32
    call = efficient_call(**call)
    assert call.longest_query <= query.shape[1] and call.longest_key <= key.shape[1]
    out, lse = part_forward(query[0], key[0], value[0], call, scale)
    padded = torch.full((len(call.cu_queries) - 1, query.shape[2],
                         -(-call.longest_query // 32) * 32), math.inf)
    for i, (queries, _) in enumerate(sequences(call)):
        padded[i, :, :queries.stop - queries.start] = lse[:, queries]
    return out[None], padded


@foreign("grad_out_, query, key, value, out, logsumexp, philox_seed, philox_offset, "
         "bias_requires_grad, scale, num_splits_key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
         "max_seqlen_k, dropout_p, custom_mask_type, bias")
def efficient_backward(given):
    assert given.num_splits_key == 1  # more of them add to dq as they come
    call = efficient_call(given.cu_seqlens_q, given.cu_seqlens_k, given.max_seqlen_q,
                          given.max_seqlen_k, given.dropout_p, given.custom_mask_type, given.bias)
    lse = torch.empty(given.query.shape[2], given.query.shape[1])
    for i, (queries, _) in enumerate(sequences(call)):
        own = given.logsumexp[i, :, :queries.stop - queries.start]
        lse[:, queries] = own
        assert own.isfinite().all() and given.logsumexp[i, :, own.shape[1]:].isposinf().all()
    tensors = (x[0] for x in (given.grad_out_, given.query, given.key, given.value, given.out))
    return *(g[None] for g in part_backward(*tensors, lse, call, given.scale)), torch.empty(0)


@foreign("q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, "
         "softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, "
         "alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, "
         "seqused_k=None, zero_tensors=False")
def package_forward(given):
    """flash-attn 2.7 and 2.8."""
    call = flash_call(given.cu_seqlens_q, given.cu_seqlens_k, given.max_seqlen_q,
                      given.max_seqlen_k, given.dropout_p, given.causal)
    return *part_forward(given.q, given.k, given.v, call, given.softmax_scale), None, None


def fill(given, call):
    """Writes the gradients where the caller wants them."""
    grads = part_backward(given.dout, given.q, given.k, given.v, given.out, given.softmax_lse, call,
                          given.softmax_scale)
    for total, x in zip((given.dq, given.dk, given.dv), grads, strict=True):
        total.copy_(x)


@foreign("dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
         "max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, "
         "softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False")
def package_backward(given):
    assert given.deterministic and given.softcap == 0.0
    assert given.window_size_left == given.window_size_right == -1
    fill(given, flash_call(given.cu_seqlens_q, given.cu_seqlens_k, given.max_seqlen_q,
                           given.max_seqlen_k, given.dropout_p, given.causal))


@foreign("q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
         "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, "
         "max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, "
         "leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, "
         "k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, "
         "window_size_right=-1")
def hopper_forward(given):
    """The beginning of FlashAttention-3's signature, as its source has it."""
    call = _varlen.Call(given.cu_seqlens_q, given.cu_seqlens_k, given.max_seqlen_q,
                        given.max_seqlen_k, given.causal)
    return (*part_forward(given.q, given.k, given.v, call, given.softmax_scale), torch.empty(0),
            torch.empty(0))


@foreign("dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
         "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
         "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
         "softcap=0.0, deterministic=False, sm_margin=0")
def hopper_backward(given):
    assert given.deterministic and given.sequed_q is given.sequed_k is None
    assert given.softmax_lse.is_contiguous()
    fill(given, _varlen.Call(given.cu_seqlens_q, given.cu_seqlens_k, given.max_seqlen_q,
                             given.max_seqlen_k, given.is_causal))
    return torch.empty(0)


HOPPER = SimpleNamespace(_flash_attn_forward=hopper_forward, _flash_attn_backward=hopper_backward)


@pytest.fixture(params=[("flash", 132), ("flash", 8), ("flash_attn", 132), ("efficient", 132),
                        ("flash_attn_3", 132)])
def on_gpu(request, monkeypatch):
    """A GPU backend with its kernels emulated: (forward, backward, a dtype it takes)."""
    name, processors = request.param
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(multi_processor_count=processors))
    module = importlib.import_module(f"tppo_kernels.ops.prefix_attention._{name}")
    kernels = {"_flash_attention_forward": flash_forward,
               "_flash_attention_backward": flash_backward,
               "_efficient_attention_forward": efficient_forward,
               "_efficient_attention_backward": efficient_backward}
    monkeypatch.setattr(module, "_aten", SimpleNamespace(
        **{name: Emulated(name, compute) for name, compute in kernels.items()}), raising=False)
    package = SimpleNamespace(_flash_attn_varlen_forward=package_forward,
                              _flash_attn_varlen_backward=package_backward)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_interface=package))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", HOPPER)
    if name == "flash":  # its own functions go by the device of q
        return (functools.partial(_varlen.fwd, module.KERNELS),
                functools.partial(_varlen.bwd, module.KERNELS), torch.bfloat16)
    return (module.fwd, module.bwd,
            torch.float32 if name == "efficient" else torch.float16)


@pytest.mark.parametrize("prompts, responses", [RAGGED, ([1] * 4, [[1]] * 4), ([70], [[40, 1]])])
@pytest.mark.parametrize("heads", ((4, 4), (6, 2)))
def test_gpu_backends_call_their_kernels_as_they_want_it(on_gpu, prompts, responses, heads):
    """By emulated kernels: arguments against the real schemas, and results against fp64."""
    forward, backward, dtype = on_gpu
    layout = tk.PrefixLayout.from_lengths(prompts, responses)
    inputs = batch(layout, *heads, 16, dtype, batched=False)
    grad = torch.randn(inputs[0].shape).to(dtype)
    exact = run_raw(op.reference.fwd, op.reference.bwd, [x.double() for x in inputs], layout,
                    grad.double())
    seen = op.reference.visible(layout.segment_lengths, layout.is_prompt, layout.n_tokens)

    def eager(q, k, v, _):
        return torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, enable_gqa=True, scale=0.3)[0]

    judge = run(eager, inputs, layout, grad)
    for form in (lambda x: x, strided, torch.Tensor.contiguous, misaligned):
        actual = run_raw(forward, backward, [form(x) for x in inputs], layout, form(grad))
        for name, a, e, j in zip(("out", "dq", "dk", "dv"), actual, exact, judge, strict=False):
            assert a.dtype == dtype and a.transpose(0, 1).is_contiguous()
            assert_accurate(a, e, j, name=name)
        torch.testing.assert_close(actual[4].double(), exact[4], rtol=1e-5, atol=1e-5)
    assert torch.is_deterministic_algorithms_warn_only_enabled()  # as it was: see conftest.py


@pytest.mark.parametrize("before", ((False, False), (True, False), (True, True)))
def test_the_flag_of_determinism_is_as_it_was(before):
    from tppo_kernels.ops.prefix_attention._flash import _deterministic

    def flags():
        return (torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled())

    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    with pytest.raises(ZeroDivisionError), _deterministic():
        assert flags() == (True, False)
        assert torch.utils.deterministic.fill_uninitialized_memory == before[0]
        1 / 0  # noqa: B018
    assert flags() == before and torch.utils.deterministic.fill_uninitialized_memory


def misaligned(x):
    """The same values at an address that no vector load can read."""
    wide = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return wide.copy_(x)


def test_gpu_backends_take_mixed_dtypes_and_no_tokens(on_gpu):
    forward, backward, dtype = on_gpu
    empty = tk.PrefixLayout.from_lengths([], [])
    q, k, v = batch(empty, dim=16, dtype=dtype, batched=False)
    out, dq, dk, dv, lse = run_raw(forward, backward, (q, k, v), empty, q)
    assert out.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape
    assert lse.shape == (4, 0)
    if dtype == torch.float32:  # as a model under autocast gives them
        layout = tk.PrefixLayout.from_lengths(*RAGGED)
        q, k, v = batch(layout, dim=16, batched=False)
        out, *grads, _ = run_raw(forward, backward, (q, k, v.bfloat16()), layout, q)
        assert [x.dtype for x in (out, *grads)] == [torch.float32] * 3 + [torch.bfloat16]


def test_gpu_backends_refuse_with_the_reason():
    from tppo_kernels.ops.prefix_attention import _efficient, _flash, _flash_attn

    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    q, k, v = batch(layout, dim=16, dtype=torch.bfloat16, batched=False)

    def reason(module=_flash_attn, q=q, k=k, v=v, segments=layout.cu_segments, scale=1.0):
        return module.supports(PrefixAttentionCall(
            q, k, v, op.plan(layout)._replace(cu_segments=segments), torch.as_tensor(scale)))

    assert reason() is None and reason(_efficient, v=v.float()) is None
    assert "q, k, v are bfloat16, bfloat16, float32, expected all" in reason(v=v.float())
    assert "float32, float32, float32" in reason(q=q.float(), k=k.float(), v=v.float())
    assert "fp64" in reason(_efficient, q=q.double())
    assert "v has 8 values a head, expected 16" in reason(v=v[..., :8])
    assert "q has 12 values a head" in reason(_efficient, *(x[..., :12] for x in (q, k, v)))
    assert "q has 264 values" in reason(q=q.repeat(1, 1, 17)[..., :264],
                                        v=v.repeat(1, 1, 17)[..., :264])
    assert "scale is -1, expected above 0" in reason(scale=-1.0)
    assert "layout has 70000 segments" in reason(segments=torch.arange(70001))
    on_device = SimpleNamespace(is_cuda=True)
    assert "scale is on the GPU" in _varlen.refusal(
        PrefixAttentionCall(q, k, v, op.plan(layout), on_device))
    if not torch.backends.cuda.is_flash_attention_available():
        assert "built without flash" in _flash._gpu_refusal(torch.device("cuda"))
    order = op._op.order["cuda"]
    assert order == ("flash_attn_3", "flash", "flash_attn", "efficient", "reference")
    assert missing("flash_attn") is None or "tppo-kernels[flash-attn]" in missing("flash_attn")


def test_flash_attention_3_refuses_with_the_reason(monkeypatch, caplog):
    from tppo_kernels.ops.prefix_attention import _flash_attn_3

    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    q, k, v = batch(layout, dim=16, dtype=torch.bfloat16, batched=False)

    def reason(q=q, k=k, v=v):
        return _flash_attn_3.supports(
            PrefixAttentionCall(q, k, v, op.plan(layout), torch.as_tensor(1.0)))

    monkeypatch.setitem(sys.modules, "flash_attn_interface", HOPPER)
    assert reason() is None and "expected all bf16 or all fp16" in reason(v=v.float())
    assert "200 values a head, expected up to 192" in reason(
        *(x.repeat(1, 1, 13)[..., :200] for x in (q, k, v)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert _flash_attn_3._gpu_refusal(torch.device("cuda", 7)) == "the GPU is sm_80, expected sm_90"

    def old(q, k, v, k_new, v_new, qv, out, cu_seqlens_q):
        raise AssertionError

    monkeypatch.setitem(sys.modules, "flash_attn_interface",
                        SimpleNamespace(_flash_attn_forward=old))
    assert "build a newer one" in reason()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert "build flash_attn_interface from" in missing.__wrapped__("flash_attn_3")
    with caplog.at_level("WARNING", "tppo_kernels"):  # that few have it is no news
        call = PrefixAttentionCall(q, k, v, op.plan(layout), torch.tensor(1.0))
        with pytest.raises(AttributeError):  # the next, PyTorch's own: CPU tensors have no GPU
            op._op.choose("cuda", call, "fwd", None)
            raise AttributeError
    assert "flash_attn_3" not in caplog.text


def test_a_backend_that_takes_no_fp32_fails_no_self_test(monkeypatch):
    monkeypatch.setattr(__main__, "_op", SimpleNamespace(
        OPS={"prefix_attention": op._op}, missing=missing))
    assert {(t["backend"], t["state"], t["why"]) for t in __main__.self_test()} == {
        ("flash", "ok", None), ("reference", "ok", None)}
    made = op.sample_inputs

    def narrow():
        q, k, v, layout = made()[0]
        return (q, k, v[..., :5], layout), {}

    monkeypatch.setattr(op, "sample_inputs", narrow)
    flash, reference = __main__.self_test()
    assert flash["state"] == "not run" and flash["why"].startswith("BackendError")
    assert reference["state"] == "ok"


@settings(deadline=None, max_examples=15)
@given(lengths(longest=20), st.randoms(use_true_random=False))
def test_permutations_and_further_responses(groups, random):
    """In any order the same results; without one response the others keep theirs, dq included."""
    layout = tk.PrefixLayout.from_lengths([p for p, _ in groups], [r for _, r in groups])
    inputs, grad = batch(layout), torch.randn(1, 4, layout.n_tokens, 8)
    before = run(tk.prefix_attention, inputs, layout, grad)
    parts = torch.arange(layout.n_tokens).split(layout.segment_lengths.tolist())
    parts = iter(parts)
    tokens = [(next(parts), [next(parts) for _ in responses]) for _, responses in groups]

    def rearranged(tokens):
        other = tk.PrefixLayout.from_lengths([len(p) for p, _ in tokens],
                                             [[len(r) for r in group] for _, group in tokens])
        order = torch.cat([torch.cat([p, *group]) for p, group in tokens])
        moved = run(tk.prefix_attention, [x[:, :, order] for x in inputs], other, grad[:, :, order])
        return moved, [x[:, :, order] for x in before]

    shuffled = [(p, random.sample(group, len(group))) for p, group in tokens]
    for a, b in zip(*rearranged(random.sample(shuffled, len(shuffled))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    prompt, group = max(tokens, key=lambda t: len(t[1]))
    if len(group) > 1:
        group.pop(random.randrange(len(group)))
        for a, b in list(zip(*rearranged(tokens), strict=True))[:2]:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
