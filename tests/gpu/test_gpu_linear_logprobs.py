"""The linear operators on a GPU: every regime against fp64, memory, rows, rows of a graph."""

import itertools

import pytest
import torch
from _gpu import DEVICE, on_a_gpu, pairs
from _linear_cases import ROWS, SHAPED, assert_close, choose, double, grads, sample, textbook
from _matrix import third

import tppo_kernels as tk
from tppo_kernels._kernels.chunks import auto_bytes
from tppo_kernels.testing import DTYPES, assert_same_bits, sample_mask

CASES = third(itertools.product(DTYPES, ("store", "recompute", 200_000, "frozen"), ROWS,
                                (False, True), (1, 7, 1003, 4096, 9001)), 3)


@pytest.fixture(autouse=True)
def forced(backend):
    with tk.use_backend(backend):
        yield backend


def there(*tensors):
    return [x.to(DEVICE) for x in tensors]


def on_device(hidden, weight, targets, mask, memory, **options):
    """`grads` of the operator on the device, its results on the CPU."""
    more = {"memory": memory} if memory != "frozen" else {
        "entropy_grad": False, "frozen": True, "part": "logprobs"}
    results = grads(tk.linear_logprobs, *there(hidden, weight, targets, mask), **more, **options)
    return [None if x is None else x.cpu() for x in results]


@pytest.mark.parametrize("op, backend", pairs(["linear_logprobs"]))
def test_every_regime_against_fp64(op, backend):
    for case, (dtype, memory, kind, shaped, v) in enumerate(CASES):
        hidden, weight, targets, _ = sample(3, 50, d=64, v=v, dtype=dtype, seed=case, spread=2.0)
        mask = sample_mask("row", 3, 50, case)
        options = SHAPED if shaped else {}
        chosen = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
                  for k, x in choose(kind, mask).items()}
        actual = on_device(hidden, weight, targets, mask, memory, **options, **chosen)
        more = {"frozen": True, "part": "logprobs"} if memory == "frozen" else {}
        exact = grads(textbook, *double(hidden, weight, targets), mask, **options, **more)
        assert_close(actual, exact, dtype)
        again = on_device(hidden, weight, targets, mask, memory, **options, **chosen)
        assert_same_bits(tuple(again[:3]), tuple(actual[:3]))


@pytest.mark.parametrize("op, backend", pairs(["linear_ppo_loss"]))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", ("token", "sequence"))
def test_the_loss_equals_the_two_operators(op, backend, dtype, ratio):
    hidden, weight, targets, _ = sample(3, 50, d=64, v=2003, dtype=dtype)
    mask = sample_mask("row", 3, 50)
    old = textbook(*double(hidden, weight, targets))[0].float() + 0.3 * torch.randn(3, 50)
    advantages = torch.randn(3, 50)
    terms = {"ratio": ratio, "dual_clip": 1.5, "entropy_coef": 0.1}

    def run(given, operator):
        leaves = [x.requires_grad_() for x in given[:2]]
        loss = operator(*given)
        return [x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))]

    def two_calls(h, w, targets, old, advantages, mask):
        logprobs, entropy = textbook(h, w, targets, mask)
        return tk.ppo_loss(logprobs, old, advantages, mask, entropy=entropy, **terms).loss

    given = hidden, weight, targets, old, advantages, mask
    actual = run(there(*given), lambda *x: tk.linear_ppo_loss(*x, **terms).loss)
    with tk.use_backend("reference"):
        exact = run(double(*given), two_calls)
    assert_close([*actual[:1] * 2, *actual[1:]], [*exact[:1] * 2, *exact[1:]], dtype)


@on_a_gpu
@pytest.mark.parametrize("op, backend", pairs(["linear_logprobs"]))
@pytest.mark.parametrize("memory", ("store", "recompute", 1 << 28))
def test_memory(op, backend, memory):
    """At most the budget, what is kept, dW in fp32, and the gradients."""
    n, v, d = 4096, 50_257, 512
    hidden, weight, targets = there(torch.randn(n, d).bfloat16(), torch.randn(v, d).bfloat16(),
                                    torch.randint(v, (n,)))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = tk.linear_logprobs(*leaves, targets, memory=memory)
    torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)
    peak = torch.cuda.max_memory_allocated() - before
    budget = auto_bytes(hidden.device) if isinstance(memory, str) else memory
    kept = 2 * n * v if memory == "store" else 0
    workspace = 64 << 20  # cuBLAS's own
    assert peak <= budget + kept + 6 * v * d + 8 * n * d + workspace


@on_a_gpu
@pytest.mark.parametrize("op, backend", pairs(["linear_logprobs"]))
@pytest.mark.parametrize("kind", ("rows", "capacity"))
def test_rows_under_capture(op, backend, kind):
    """The rows of another mask of as many tokens, in a graph that was captured before."""
    def mask_of(seed):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        return (order < 60).reshape(4, 50)

    hidden, weight, targets, _ = sample(4, 50, d=64, v=2003, dtype=torch.bfloat16)
    h, w, t, mask = there(hidden, weight, targets, mask_of(0))
    rows = tk.valid_rows(mask)
    chosen = {"rows": rows} if kind == "rows" else {"capacity": 60}

    def call():
        return tk.linear_logprobs(h, w, t, mask, **chosen)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        mask.copy_(mask_of(1))
        rows.copy_(tk.valid_rows(mask))
        graph.replay()
        assert_same_bits(tuple(out), tuple(call()))
