"""A shared prefix by the kernels of a GPU: accuracy, bits, graphs, and no host reads."""

import functools
import random

import pytest
import torch
from _gpu import DEVICE, on_a_gpu, pairs

import tppo_kernels as tk
from tppo_kernels.ops.prefix_attention import reference
from tppo_kernels.testing import DTYPES, assert_accurate, assert_same_bits, strided

LAYOUTS = {"one token": ([1], [[1]]), "ragged": ([5, 1, 300], [[4, 1, 7], [2], [19, 130]]),
           "one group": ([300], [[20, 33, 7, 64]]), "many groups": ([10] * 24, [[3, 9]] * 24)}


def some_cases(count=18):
    """Every value of every choice, in combinations of a seed."""
    choices = (DTYPES, tuple(LAYOUTS), (64, 96, 128, 256), ((4, 4), (6, 2), (3, 1)),
               ("dense", "strided"))
    rng = random.Random(0)
    columns = [rng.sample([c[i % len(c)] for i in range(count)], count) for c in choices]
    return list(zip(*columns, strict=True))


CASES = some_cases()


def batch(layout, heads, kv_heads, dim, dtype, seed=0):
    """q, k, v and the gradient of the result, token by token as a model's projections lie."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(layout.n_tokens, h, dim, generator=g).to(dtype).transpose(0, 1)
            for h in (heads, kv_heads, kv_heads, heads)]


def run(function, inputs, layout):
    """(result, dq, dk, dv)"""
    *leaves, grad = (x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves, layout)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def masked(q, k, v, layout):
    """PyTorch's attention with the explicit mask."""
    seen = reference.visible(layout.segment_lengths, layout.is_prompt, layout.n_tokens)
    return torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=seen.to(q.device), enable_gqa=True)[0]


@functools.cache
def in_fp64(case):
    """The inputs of a case, and the results of the reference on them in fp64."""
    dtype, name, dim, heads, _ = CASES[case]
    layout = tk.PrefixLayout.from_lengths(*LAYOUTS[name])
    inputs = batch(layout, *heads, dim, dtype)
    with tk.use_backend("reference"):
        return inputs, layout, run(tk.prefix_attention, [x.double() for x in inputs], layout)


@pytest.fixture
def forced(backend):
    with tk.use_backend(backend):
        yield backend


def runs(forced, dtype):
    """Whether the backend takes this dtype here: flash kernels of a GPU take 16 bits alone."""
    return not (DEVICE == "cuda" and dtype == torch.float32 and forced.startswith("flash"))


@pytest.mark.parametrize("op, backend", pairs(["prefix_attention"]))
def test_accuracy_over_layouts_heads_and_dtypes(op, backend, forced):
    for case, (dtype, *_, memory) in enumerate(CASES):
        if not runs(forced, dtype):
            continue
        inputs, layout, exact = in_fp64(case)
        there = [x.to(DEVICE) for x in inputs]
        judge = run(masked, there, layout)
        if memory == "strided":
            there = [strided(x).to(DEVICE) for x in inputs]
        actual = run(tk.prefix_attention, there, layout)
        for what, a, e, j in zip(("out", "dq", "dk", "dv"), actual, exact, judge, strict=True):
            assert a.dtype == dtype
            assert_accurate(a.cpu(), e, j.cpu(), name=f"{what} of {CASES[case]}")


@pytest.mark.parametrize("op, backend", pairs(["prefix_attention"]))
@pytest.mark.parametrize("name", LAYOUTS)
def test_twice_the_same_bits(op, backend, name, forced):
    layout = tk.PrefixLayout.from_lengths(*LAYOUTS[name])
    inputs = [x.to(DEVICE) for x in batch(layout, 6, 2, 128, torch.bfloat16)]
    was = torch.is_deterministic_algorithms_warn_only_enabled()
    first = run(tk.prefix_attention, inputs, layout)
    for _ in range(5):
        assert_same_bits(run(tk.prefix_attention, inputs, layout), first)
    assert torch.is_deterministic_algorithms_warn_only_enabled() == was


@pytest.mark.parametrize("op, backend", pairs(["prefix_attention"]))
def test_a_response_that_is_nan_stays_alone(op, backend, forced):
    if backend == "reference":
        pytest.skip("it multiplies what is not seen by zero")
    layout = tk.PrefixLayout.from_lengths([6, 300], [[4, 18, 2], [9, 140]])
    inputs = [x.to(DEVICE) for x in batch(layout, 6, 2, 64, torch.bfloat16)]
    clean = tk.prefix_attention(*inputs[:3], layout)
    for x in inputs[:3]:
        x[:, 10:28] = float("nan")  # the second response
    dirty = tk.prefix_attention(*inputs[:3], layout)
    assert dirty[:, 10:28].isnan().all()
    for rows in (slice(0, 10), slice(28, None)):
        assert_same_bits(dirty[:, rows], clean[:, rows])


@on_a_gpu
@pytest.mark.parametrize("op, backend", pairs(["prefix_attention"]))
@pytest.mark.parametrize("name", ("ragged", "many groups"))
def test_captured_without_host_reads(op, backend, name, forced):
    layout = tk.PrefixLayout.from_lengths(*LAYOUTS[name]).to(DEVICE)
    static, fresh = ([x.to(DEVICE) for x in batch(layout, 6, 2, 64, torch.bfloat16, seed)]
                     for seed in range(2))
    expected = run(tk.prefix_attention, fresh, layout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(tk.prefix_attention, static, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(tk.prefix_attention, static, layout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(tk.prefix_attention, static, layout)
    for old, new in zip(static, fresh, strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(results, expected)


@on_a_gpu
def test_the_first_choice_by_dtype():
    layout = tk.PrefixLayout.from_lengths(*LAYOUTS["ragged"])
    q, k, v, _ = (x.to(DEVICE) for x in batch(layout, 6, 2, 64, torch.bfloat16))
    assert tk.explain(tk.prefix_attention, q, k, v, layout).backend == "flash"
    said = tk.explain(tk.prefix_attention, q.float(), k.float(), v.float(), layout)
    assert said.backend == "efficient" and "float32" in said.refused["flash"]
    mixed = tk.prefix_attention(q.float(), k.float(), v, layout)  # as under autocast
    assert mixed.dtype == torch.float32
