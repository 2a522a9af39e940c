"""`prefix_attention` on its backends: each (prompt, response) run apart is the truth."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tppo_kernels as tk
from tests._matrix import third
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


class Largest(TorchDispatchMode):
    """The largest tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("prompts, responses", [([256], [[16] * 16]), ([8], [[2] * 40 + [300]]),
                                                ([40] * 12, [[3, 9, 20]] * 12)])
def test_cost_follows_the_tokens(prompts, responses):
    """Nothing of L x L: the largest tensor is one of L x Hq x D, padding at most doubles it."""
    from tppo_kernels.ops.prefix_attention import _flash

    layout = tk.PrefixLayout.from_lengths(prompts, responses)
    q, k, v = batch(layout, batched=False)
    arguments = (q, k, v, layout.segment_lengths, layout.is_prompt, torch.tensor(0.3))
    with Largest() as largest:
        out, lse = _flash.fwd(*arguments)
        _flash.bwd(*arguments, torch.ones(out.shape), out, lse)
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
    narrow = tk.prefix_attention(q, k, v[..., :5], layout)
    torch.testing.assert_close(narrow, tk.prefix_attention(q, k, v, layout)[..., :5])


def test_opcheck():
    fwd = torch.ops.tppo_kernels.prefix_attention_fwd.default
    bwd = torch.ops.tppo_kernels.prefix_attention_bwd.default
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    for dtype, backend in zip((torch.bfloat16, torch.float32), BACKENDS, strict=True):
        q, k, v = batch(layout, dtype=dtype, batched=False)
        arguments = (q, k, v, layout.segment_lengths, layout.is_prompt, torch.tensor(0.3))
        with tk.use_backend(backend):
            torch.library.opcheck(fwd, arguments)
            out, lse = fwd(*arguments)
            torch.library.opcheck(bwd, (*arguments, torch.randn(out.shape), out, lse))


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
    "scale is str": dict(scale="auto"),
    "scale is nan": dict(scale=float("nan")),
    "scale is a tensor of shape": dict(scale=torch.ones(2)),
    "scale requires a gradient": dict(scale=torch.tensor(1.0, requires_grad=True)),
    "v is on meta, expected cpu as q": dict(v=torch.zeros(1, 2, 45, 8, device="meta")),
    "unexpected keyword": dict(window=3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    layout = tk.PrefixLayout.from_lengths(*RAGGED)
    assert layout.n_tokens == 45
    given = {**dict(zip("qkv", batch(layout), strict=True)), "layout": layout, **BAD[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        tk.prefix_attention(**given)
