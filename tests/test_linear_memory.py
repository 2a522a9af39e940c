"""What `linear_logprobs` keeps and multiplies, in which chunks, and how a GPU rounds products."""

import collections
import importlib
import itertools
import math
import types

import pytest
import torch
from _linear_cases import (
    LIMIT,
    ROWS,
    SHAPED,
    Largest,
    Planned,
    as_on_a_gpu,
    assert_close,
    choose,
    distance,
    double,
    grads,
    halves,
    inputs_of,
    sample,
    textbook,
)
from _matrix import third
from torch.utils.flop_counter import FlopCounterMode

import tppo_kernels as tk
from tppo_kernels._kernels import chunks as _linear
from tppo_kernels.ops.linear_logprobs import _chunked, _cpp, flops
from tppo_kernels.ops.linear_logprobs.reference import (
    FrozenGradient,
    LinearLogprobsCall,
    LinearLogprobsGradient,
)
from tppo_kernels.testing import DTYPES, sample_mask

STEPS = {"chunked": _chunked.TORCH, "cpp": _cpp.STEPS}
BACKENDS = (*STEPS, "reference")


N, D, V = 1500, 8, 700


def kernel(regime, backend, dtype=torch.float32, budget=1 << 30, wanted=(True, True, False)):
    """Forward and backward of the kernels themselves: what they do is visible to modes."""
    hidden, weight, targets, _ = sample(1, N, D, V, dtype=dtype)
    inputs = inputs_of(hidden[0], weight, targets[0], budget=budget)
    return forward_and_backward(inputs, regime, STEPS[backend], wanted)[0]


def forward_and_backward(inputs, regime, steps, wanted=(True, True, True)):
    """The results of the engine's forward, and those of its backward."""
    out, grads = _chunked.fwd(LinearLogprobsCall(inputs, regime), steps=steps), ()
    if regime == "frozen":
        grads = (_chunked.frozen(FrozenGradient(out[0], out[3], inputs.mask, inputs.rows,
                                                inputs.capacity, inputs.hidden.dtype)),)
    elif regime != "none":
        grads = _chunked.bwd(LinearLogprobsGradient(*out[:2], inputs, *out[2:], *wanted),
                             steps=steps)
    return out, grads


@pytest.mark.parametrize("backend", STEPS)
@pytest.mark.parametrize("regime", ("none", "recompute", "frozen", "store"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_tensor_of_n_times_v(backend, regime, dtype):
    """Nothing larger than a chunk but what "store" keeps: 16 bits a logit for 16-bit inputs."""
    with Largest() as seen:
        out = kernel(regime, backend, dtype)
    if regime == "store":
        assert out[3].numel() == N * V and out[3].element_size() == torch.finfo(dtype).bits // 8
        assert seen.numel == N * V
    else:
        assert seen.numel <= _linear.CPU_ROWS * V < N * V / 2
    if regime == "recompute":
        assert out[3].numel() == 0
        with Largest() as seen:
            kernel(regime, backend, dtype, budget=100_000)
        assert seen.numel <= 100_000 / 4


@pytest.mark.parametrize("regime, wanted", (("store", (True, True, False)),
                                            ("recompute", (True, True, False)),
                                            ("frozen", (True, False, False))))
def test_flops_of_the_regimes(regime, wanted):
    """6NVD, 8NVD and 4NVD of products, forward and backward together."""
    with FlopCounterMode(display=False) as counted:
        kernel(regime, "cpp", wanted=wanted)
    assert counted.get_total_flops() == flops(N, V, D, regime=regime)


REAL = 16_384, 151_936, 4096


def real_inputs(n, v, d, dtype=torch.bfloat16):
    """(hidden, weight, targets), without memory."""
    hidden, weight = (torch.empty(size, d, device="meta", dtype=dtype) for size in (n, v))
    return hidden, weight, torch.empty(n, device="meta", dtype=torch.int64)


@pytest.mark.parametrize("budget, dtype", ((1 << 30, torch.bfloat16), (8 << 30, torch.bfloat16),
                                           (1 << 30, torch.float16)))
@pytest.mark.parametrize("regime, times", (("none", 2), ("store", 6), ("recompute", 8),
                                           ("frozen", 4)))
@pytest.mark.parametrize("chosen", (False, True), ids=("all rows", "mask and rows"))
def test_products_and_memory_of_a_gpu_at_real_size(monkeypatch, regime, times, budget, dtype,
                                                   chosen):
    """No factor is cast up; at most the budget, dW, what is kept and what is returned."""
    pytest.importorskip("triton")
    steps = as_on_a_gpu(monkeypatch)
    n, v, d = REAL
    hidden, weight, targets = real_inputs(n, v, d, dtype)
    mask = torch.empty(n, device="meta", dtype=torch.bool) if chosen else None
    rows = torch.empty(n, device="meta", dtype=torch.int64) if chosen else None
    given = inputs_of(hidden, weight, targets, mask, rows=rows, budget=budget)
    with Planned() as plan:
        inputs = [x.detach() for x in (hidden, weight, targets)]
        before = plan.nbytes
        _, grads = forward_and_backward(given, regime, steps, (True, True, False))
        kept = {"store": 2 * n * v, "frozen": 4 * n * d}.get(regime, 0)
        returned = 4 * v * d * (regime in ("store", "recompute"))
        returned += sum(g.numel() * g.element_size() for g in grads)
    assert inputs and plan.flops == flops(n, v, d, regime=regime, backward=times > 2)
    assert plan.flops == times * n * v * d
    assert plan.factors == {dtype}
    assert plan.peak - before <= budget + kept + returned + 0.02 * budget


@pytest.mark.parametrize("dtype, head_dtype", (*((x, x) for x in DTYPES),
                                               (torch.bfloat16, torch.float32)))
@pytest.mark.parametrize("regime", ("none", "store", "recompute", "frozen"))
@pytest.mark.parametrize("by_triton", (True, False))
def test_scalars_on_a_cpu_and_tensors_on_a_gpu(monkeypatch, dtype, head_dtype, regime, by_triton):
    """Every argument, and nothing but 0-d tensors crosses from the CPU."""
    pytest.importorskip("triton")
    on_triton = as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(_linear, "takes_halves", lambda h, w: h.dtype == w.dtype != torch.float32)
    n, v, d = 60, 5001, 16
    hidden, _, targets = real_inputs(n, v, d, dtype)
    _, weight, _ = real_inputs(n, v, d, head_dtype)
    mask, rows = targets > 0, targets[:20]
    for chosen, capacity in ((None, None), (rows, None), (None, 30)):
        for heat in (torch.tensor(0.7), torch.empty(n, device="meta")):
            inputs = inputs_of(hidden, weight, targets, mask, weight[:, 0], rows=chosen,
                               temperature=heat, softcap=torch.tensor(30.0),
                               logit_scale=torch.tensor(0.5), valid_vocab=v - 1, capacity=capacity,
                               budget=10 ** 6)
            with Planned():  # it stands in for addmm
                forward_and_backward(inputs, regime, on_triton if by_triton else _chunked.TORCH)


def test_chunks_of_a_gpu():
    """6 bytes a logit: 1,395 rows of 128,256 in 1 GiB; the same in every process of a group."""
    def rows(logits, gradient, columns=None, budget=1 << 30, v=128_256, aligned=True):
        problem = _linear.Problem(inputs_of(*real_inputs(16_384, v, 8), budget=budget), aligned)
        problem.products.factors = torch.bfloat16
        problem.shard = problem.shard._replace(columns=v if columns is None else columns)
        x, dx = problem.buffers(logits, gradient)
        nbytes = sum(t.untyped_storage().nbytes() for t in {id(t): t for t in (x, dx)}.values())
        assert nbytes <= budget
        assert not aligned or all(t.stride(0) % 8 == 0 for t in (x, dx) if t.dim() == 2)
        return problem.chunk_rows

    assert rows(True, True) == math.ceil(16_384 / math.ceil(16_384 / 1395))
    assert rows(True, True, budget=8 << 30) >= 2450  # where fp32 dW costs at most 10 %
    assert rows(False, True) >= 2 * rows(True, False)
    assert rows(True, True, columns=3) == rows(True, True)
    assert rows(True, True, v=151_643) == rows(True, True, v=151_648)


@pytest.mark.parametrize("gigabytes, chunks", ((141, 2), (80, 3), (24, 9), (8, 12)))
def test_the_chunk_of_a_gpu_follows_its_memory(monkeypatch, gigabytes, chunks):
    """Not what is free of it, so that a call repeats bit by bit; 16,384 rows of 128,256."""
    card = types.SimpleNamespace(total_memory=gigabytes * 10 ** 9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    budget = _linear.auto_bytes(torch.device("cuda", 0))
    assert 1 << 30 <= budget <= max(1 << 30, min(8 << 30, gigabytes * 10 ** 9 // 16))
    problem = _linear.Problem(inputs_of(*real_inputs(16_384, 128_256, 8), budget=budget), True)
    problem.products.factors = torch.bfloat16
    problem.buffers(True, True)
    assert math.ceil(16_384 / problem.chunk_rows) == chunks
    assert _linear.auto_bytes(torch.device("cpu")) == 1 << 30


ROUNDED = third(itertools.product((torch.bfloat16, torch.float16), (0.15, 1.0, 6.0),
                                  ("store", "recompute", 100_000, "frozen"),
                                  ("logprobs", "entropy"), (None, 3.0)), 5)


@pytest.mark.parametrize("dtype, spread, memory, part, softcap", ROUNDED)
def test_the_roundings_of_a_gpu(dtype, spread, memory, part, softcap):
    """Gradients by logits in the inputs' dtype, products of them in fp32: as on a GPU."""
    hidden, weight, targets, _ = sample(2, 60, d=48, v=700, dtype=dtype, spread=spread)
    targets[0] = (hidden[0].float() @ weight.float().T).argmax(-1)
    frozen = memory == "frozen"
    options = {"part": "logprobs" if frozen else part, "softcap": softcap, "frozen": frozen}
    more = {"entropy_grad": False} if frozen else {"memory": memory}
    with halves(), tk.use_backend("chunked"):
        actual = grads(tk.linear_logprobs, hidden, weight, targets, **options, **more)
    assert_close(actual, grads(textbook, *double(hidden, weight, targets), **options), dtype,
                 top=30)


FEW = third(itertools.product((1, 2, 3, 8), (64, 8192), (0.15, 1.0, 3.0, 6.0),
                              ("store", "recompute", "frozen"), ("logprobs", "entropy", "both")), 6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_few_rows_on_a_gpu(dtype):
    """No number of other rows makes up for the rounding of a gradient by logits."""
    for seed, (rows, d, spread, memory, part) in enumerate(FEW):
        if dtype == torch.float16 and part == "entropy" and spread < 1:
            continue  # subnormal numbers: the rounding of the result alone passes 3e-3
        hidden, weight, targets, _ = sample(1, rows, d, 100, dtype, seed, spread)
        if spread > 1:
            targets = (hidden.float() @ weight.float().T).argmax(-1)
        frozen = memory == "frozen"
        options = {"part": "logprobs" if frozen else part, "frozen": frozen}
        more = {"entropy_grad": False} if frozen else {"memory": memory}
        with halves(), tk.use_backend("chunked"):
            actual = grads(tk.linear_logprobs, hidden, weight, targets, **options, **more)
        assert_close(actual, grads(textbook, *double(hidden, weight, targets), **options), dtype,
                     top=30)


@pytest.mark.parametrize("memory", ("store", "recompute", 60_000))
@pytest.mark.parametrize("spread", (0.15, 4.0))
def test_rows_of_one_slope_on_a_gpu(memory, spread):
    """1/255 in bf16 is wrong by 3.9e-3, and so were all rows of this mean."""
    hidden, weight, targets, _ = sample(1, 255, 64, 500, torch.bfloat16, spread=spread)
    results = []
    for function, inputs, options in ((tk.linear_logprobs, (hidden, weight), {"memory": memory}),
                                      (textbook, double(hidden, weight), {})):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with halves(), tk.use_backend("chunked"):
            mean = function(*leaves, targets, **options)[0].mean()
            results.append(torch.autograd.grad(mean, leaves))
    for a, e in zip(*results, strict=True):
        assert distance(a, e) <= 2.4e-3


@pytest.mark.parametrize("budget", (1, 10 ** 6, 1 << 30))
@pytest.mark.parametrize("regime", ("store", "recompute", "frozen"))
def test_products_and_memory_of_few_rows_on_a_gpu(monkeypatch, regime, budget):
    """Their gradients by logits are two numbers, in the budget; one row is always computed."""
    pytest.importorskip("triton")
    steps = as_on_a_gpu(monkeypatch)
    n, v, d = _linear.FEW_ROWS, 151_643, 64
    hidden, weight, targets = real_inputs(n, v, d)
    with Planned() as plan:
        inputs = [x.detach() for x in (hidden, weight, targets)]
        given = plan.nbytes
        out, _ = forward_and_backward(inputs_of(hidden, weight, targets, budget=budget), regime,
                                      steps, (True, True, False))
        kept = sum(x.numel() * x.element_size() for x in out)
    returned = 0 if regime == "frozen" else 6 * v * d
    assert inputs and plan.factors == {torch.bfloat16}
    assert plan.peak - given <= max(budget, 8 * (v + 8)) + kept + returned + 10 ** 6


def regime_of(monkeypatch, *args, **kwargs):
    """The regime that the public function asks of the raw op."""
    import tppo_kernels.ops.linear_logprobs as module
    seen, own = [], module._fwd
    monkeypatch.setattr(module, "_fwd", lambda call: seen.append(call.regime) or own(call))
    tk.linear_logprobs(*args, **kwargs)
    return seen[-1]


def test_which_regime_a_call_takes(monkeypatch):
    hidden, weight, targets, _ = sample(1, 100, v=1000)
    trained = weight.clone().requires_grad_()
    kept = 100 * 1000 * 4
    for memory, regime in (("auto", "store"), ("store", "store"), ("recompute", "recompute"),
                           (kept - 1, "recompute"), (2 * kept, "store")):
        assert regime_of(monkeypatch, hidden, trained, targets, memory=memory) == regime
    h = hidden.requires_grad_()
    assert regime_of(monkeypatch, h, weight, targets, entropy_grad=False) == "frozen"
    assert regime_of(monkeypatch, h, weight, targets) == "store"
    assert regime_of(monkeypatch, h, trained, targets, entropy_grad=False) == "store"
    with torch.no_grad():
        assert regime_of(monkeypatch, h, trained, targets) == "none"


def test_backward_keeps_what_the_regime_says():
    hidden, weight, targets, _ = sample(1, 50, d=8, v=999, dtype=torch.bfloat16)
    mask = torch.arange(50)[None] < 20
    for memory, entropy_grad, trains, most in (("store", True, True, 20 * 999 * 2),
                                               ("recompute", True, True, 0),
                                               ("auto", False, False, 20 * 8 * 4)):
        saved = []
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            tk.linear_logprobs(h, w, targets, mask, memory=memory, entropy_grad=entropy_grad)
        given = {x.data_ptr() for x in (h, w, targets, mask)}
        nbytes = sum(x.numel() * x.element_size() for x in saved if x.data_ptr() not in given)
        assert most <= nbytes <= most + 20 * 5 * 8 + 8


@pytest.mark.parametrize("regime", ("store", "recompute", "frozen"))
@pytest.mark.parametrize("kind", (*ROWS, "all"))
@pytest.mark.parametrize("shaped", (False, True))
def test_what_one_backend_keeps_another_reads(regime, kind, shaped):
    """A forward under `use_backend` and a backward behind it, in every pair of backends."""
    hidden, weight, targets, bias = sample(3, 9, dtype=torch.bfloat16)
    mask = sample_mask("row", 3, 9)
    options = {"memory": "store" if regime == "frozen" else regime, **(SHAPED if shaped else {}),
               "bias": bias, "mask": None if kind == "all" else mask,
               **({} if kind == "all" else choose(kind, mask))}
    if regime == "frozen":
        options["entropy_grad"] = False
    exact = None
    for one, other in itertools.product(BACKENDS, BACKENDS):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(
            regime != "frozen")]
        with tk.use_backend(one):
            out = tk.linear_logprobs(*leaves, targets, **options)
        with tk.use_backend(other):
            total = out.logprobs.square().sum() + (0 if regime == "frozen" else out.entropy.sum())
            results = torch.autograd.grad(total, leaves[:1] if regime == "frozen" else leaves)
        exact = exact or results
        for a, e in zip(results, exact, strict=True):
            assert distance(a, e) <= LIMIT[torch.bfloat16], (one, other)


ENGINE = ("chunks.Problem", "chunks.Gradients", "products.Products", "selection.Selection")


def test_the_reference_runs_nothing_of_the_engine(monkeypatch):
    """A bug of the engine's chunks, products or choice of rows is not in the reference too."""
    made = []
    for name in ENGINE:
        module, kind = name.split(".")
        cls = getattr(importlib.import_module(f"tppo_kernels._kernels.{module}"), kind)
        init = cls.__init__
        monkeypatch.setattr(cls, "__init__", lambda self, *a, _name=name, _init=init, **k: (
            made.append(_name), _init(self, *a, **k))[1])

    def run(backend):
        made.clear()
        hidden, weight, targets, bias = sample(2, 6)
        mask = sample_mask("interior", 2, 6)
        with tk.use_backend(backend):
            for more in ({}, {"memory": "recompute"}, {"capacity": 3}, {"frozen": True}):
                frozen = more.pop("frozen", False)
                grads(tk.linear_logprobs, hidden, weight, targets, mask, bias=None if frozen
                      else bias, frozen=frozen, entropy_grad=not frozen,
                      part="logprobs" if frozen else "both", **more)
            h = hidden.requires_grad_()
            for ratio in ("token", "sequence"):
                tk.linear_ppo_loss(h, weight, targets, hidden[..., 0].detach(),
                                   hidden[..., 1].detach(), mask, ratio=ratio).loss.backward()
        return collections.Counter(made)

    assert run("reference") == {}
    for backend in STEPS:
        assert set(run(backend)) == set(ENGINE)
