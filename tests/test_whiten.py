"""`whiten`: the textbook, zero variance, and statistics over several processes."""

import itertools
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from _matrix import third
from _processes import two_processes
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo_kernels._core.op import missing
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    SEQUENTIAL_FLOOR,
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


def textbook(x, mask=None, unbiased=True, shift_mean=True, eps=1e-8):
    """Eager PyTorch in the dtype of x: what the peers write."""
    valid = x.flatten() if mask is None else x[mask]
    if valid.numel() < 2:
        mean, scale = valid.sum(), 0.0
    else:
        mean = valid.mean()
        scale = torch.rsqrt(valid.var(correction=int(unbiased)) + eps)
    y = (x - mean) * scale + (0.0 if shift_mean else mean)
    return y if mask is None else torch.where(mask, y, 0)


def test_by_hand(backend):
    x = torch.tensor([[1., 3., 100.], [5., 7., float("nan")]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    # mean 4, M2 = 9 + 1 + 1 + 9 = 20
    unbiased, biased = (20 / 3) ** -0.5, 5 ** -0.5
    d = torch.tensor([[-3., -1., 0.], [1., 3., 0.]])
    torch.testing.assert_close(tk.whiten(x, mask, eps=0.0), d * unbiased)
    torch.testing.assert_close(tk.whiten(x, mask, eps=0.0, unbiased=False), d * biased)
    torch.testing.assert_close(tk.whiten(x, mask, eps=0.0, shift_mean=False),
                               torch.where(mask, d * unbiased + 4, 0))
    torch.testing.assert_close(tk.whiten(x, mask, eps=torch.tensor(4.0), unbiased=False), d / 3)


SHAPES = [(1, 1), (7,), (3, 63), (64, 1), (65,), (2, 3, 5), (2, 1000), (0, 5), (3, 0), (0,)]
CASES = third(itertools.product(DTYPES, SHAPES, MASKS, (False, True), (False, True),
                                (0.0, 50.0)), seed=2)


def test_accuracy_over_dtypes_shapes_masks_strides(backend):
    """At most twice the error of eager PyTorch in fp32, plus 1e-5 of the largest value."""
    for case, (dtype, shape, kind, unbiased, shift_mean, mean) in enumerate(CASES):
        x = (mean + torch.randn(shape, generator=torch.Generator().manual_seed(case))).to(dtype)
        mask = sample_mask(kind, x.numel() // max(shape[-1], 1), shape[-1], case)
        mask = mask if mask is None else mask.reshape(shape)
        options = {"unbiased": unbiased, "shift_mean": shift_mean}
        exact = textbook(x.double(), mask, **options)
        eager = textbook(x.float(), mask, **options)
        if case % 2:
            x, mask = strided(x), mask if mask is None else strided(mask)
        actual = tk.whiten(x, mask, **options)
        assert actual.dtype == torch.float32
        assert_accurate(actual, exact, eager, floor=SEQUENTIAL_FLOOR, name=str(CASES[case]))


def test_fp64_is_exact():
    x, mask = torch.randn(5, 40, dtype=torch.float64) + 7, sample_mask("interior", 5, 40)
    actual = tk.whiten(x, mask)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, textbook(x, mask), rtol=1e-12, atol=1e-12)
    assert tk.explain(tk.whiten, x).backend == "reference"
    with tk.use_backend("cpp"), pytest.raises(tk.BackendError, match="fp64"):
        tk.whiten(x)


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
def test_threads_change_no_bit():
    """Blocks are merged in order, whatever thread had them; a thread has a million tokens."""
    n = (3 << 20) + 5001
    x, mask, results = torch.randn(n), torch.rand(n) < 0.5, []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(tk.whiten(x, mask))
    torch.set_num_threads(before)
    assert_same_bits(tuple(results[1:]), (results[0], results[0]))
    assert_accurate(results[0], textbook(x.double(), mask), textbook(x, mask),
                    floor=SEQUENTIAL_FLOOR)


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e19, 1e36])
def test_no_square_overflows_or_vanishes(size):
    """In fp32 the square of each would, and whitening would give 0 or NaN."""
    x, mask = torch.randn(3, 1700), torch.rand(3, 1700) < 0.7
    expected = tk.whiten(x, mask, eps=0.0)
    with tk.use_backend("cpp"):
        torch.testing.assert_close(tk.whiten(x * size, mask, eps=0.0), expected)
        torch.testing.assert_close(tk.whiten(x * size, eps=0.0), tk.whiten(x, eps=0.0))


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
@pytest.mark.parametrize("shape", [(4, 64), (64, 512), (512, 2048)])
def test_it_takes_no_longer_than_eager(shape):
    """The benchmark's own eager, on one thread: the least of interleaved rounds of each. Threads
    that were started for less than they cost once made the largest shape slower than it."""
    x, mask = 3 + torch.randn(shape), torch.rand(shape) < 0.75

    def eager():
        valid = mask.to(x.dtype)
        tokens = valid.sum()
        mean = (x * valid).sum() / tokens
        variance = ((x - mean).square() * valid).sum() / (tokens - 1)
        return (x - mean) * torch.rsqrt(variance + 1e-8) * valid

    torch.use_deterministic_algorithms(False)  # it fills every empty tensor
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {eager: [], tk.whiten: []}
    for _ in range(20):
        for function in times:
            start = time.thread_time()
            function() if function is eager else function(x, mask)
            times[function].append(time.thread_time() - start)
    torch.set_num_threads(threads)
    assert min(times[tk.whiten]) <= min(times[eager])


def test_a_large_mean_costs_no_accuracy(backend):
    """Shift invariance: x + c gives what x gives, to the rounding of x + c itself."""
    for c in (1e3, 1e5, -3e6):
        x = torch.randn(4000) * 30 + c
        torch.testing.assert_close(tk.whiten(x).double(), textbook(x.double()), rtol=0, atol=4e-6)


@pytest.mark.parametrize("x, mean", [
    (torch.full((3, 7), 0.1), 0.1), (torch.full((3, 7), -4e8), -4e8), (torch.zeros(3, 7), 0.0),
    (torch.full((3, 7), 1.0) + 1e-7 * torch.rand(3, 7), 1.0), (torch.full((1, 1), 6.5), 6.5)])
def test_no_variance_gives_zero_or_the_mean(backend, x, mean):
    """A spread below rounding is not blown up by eps, and not by eps = 0 either."""
    for unbiased, eps in itertools.product((True, False), (1e-8, 0.0)):
        assert not tk.whiten(x, unbiased=unbiased, eps=eps).any()
        torch.testing.assert_close(tk.whiten(x, unbiased=unbiased, eps=eps, shift_mean=False),
                                   torch.full_like(x, mean), rtol=1e-6, atol=0)
    just_enough = torch.tensor([1.0, 1.0 + 1e-4])
    torch.testing.assert_close(tk.whiten(just_enough, eps=0.0), torch.tensor([-1., 1.]) / 2 ** 0.5,
                               rtol=1e-3, atol=0)


def test_fewer_than_two_tokens(backend):
    """No token gives zeros, one gives 0 or itself: n - 1 = 0 divides nothing."""
    x = torch.tensor([[float("nan"), 3.0, float("inf")]])
    one, none = torch.tensor([[False, True, False]]), torch.zeros(1, 3, dtype=torch.bool)
    assert_same_bits(tk.whiten(x, one), torch.zeros(1, 3))
    assert_same_bits(tk.whiten(x, one, shift_mean=False), torch.tensor([[0., 3., 0.]]))
    for shift_mean in (True, False):
        assert_same_bits(tk.whiten(x, none, shift_mean=shift_mean), torch.zeros(1, 3))
        assert tk.whiten(torch.zeros(0, 4), shift_mean=shift_mean).shape == (0, 4)


@pytest.mark.parametrize("poison", POISONS)
def test_poison(backend, poison):
    """verl#3805, ROLL#447: padding leaks into means."""
    for kind in ("left", "right", "interior", "row", "all-false"):
        x, mask = torch.randn(6, 33), sample_mask(kind, 6, 33)
        for options in ({}, {"shift_mean": False, "unbiased": False}):
            clean = tk.whiten(poisoned(x, mask, 0.0), mask, **options)
            assert_same_bits(tk.whiten(poisoned(x, mask, poison), mask, **options), clean)
            assert not clean[~mask].any()


def test_default_device_is_not_asked(backend):
    x, mask = torch.randn(6, 33), sample_mask("interior", 6, 33)
    expected = tk.whiten(x, mask)
    with torch.device("meta"):
        assert_same_bits(tk.whiten(x, mask), expected)


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
def test_any_byte_of_a_mask_that_is_not_0_is_true():
    """Bytes of another library seen as bool: 255 for a token would write far beyond a block."""
    x, mask = torch.randn(40, 300), torch.rand(40, 300) < 0.5
    as_bytes = (255 * mask.to(torch.uint8)).view(torch.bool)
    with tk.use_backend("cpp"):
        assert_same_bits(tk.whiten(x, as_bytes), tk.whiten(x, mask))


def test_twice_packed_permuted_detached(backend):
    x, mask = torch.randn(70, 50, requires_grad=True), sample_mask("interior", 70, 50)
    once = tk.whiten(x, mask)
    assert not once.requires_grad
    assert_same_bits(tk.whiten(x, mask), once)
    order, lengths = torch.randperm(70), [50] * 70
    torch.testing.assert_close(tk.whiten(x[order], mask[order]), once[order], rtol=0, atol=1e-6)
    packed = tk.whiten(pack(x, lengths)[0], pack(mask, lengths)[0])
    torch.testing.assert_close(packed, once.flatten(), rtol=0, atol=1e-6)
    with torch.inference_mode():
        assert_same_bits(tk.whiten(x, mask), once)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(tk.whiten(x, mask), once)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 60), st.floats(0.1, 100), st.floats(-50, 50))
def test_mean_zero_variance_one_and_affine_invariance(seed, n, scale, shift):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = tk.whiten(x, eps=0.0)
    assert abs(float(y.mean())) < 1e-9 and abs(float(y.var()) - 1) < 1e-9
    torch.testing.assert_close(tk.whiten(x * scale + shift, eps=0.0), y, rtol=0, atol=1e-8)


def test_opcheck():
    x, mask = torch.randn(3, 6), sample_mask("interior", 3, 6)
    stats = torch.ops.tppo_kernels.whiten_stats.default
    apply = torch.ops.tppo_kernels.whiten_fwd.default
    for inputs in ((x, mask), (x.bfloat16(), None), (x.double(), mask), (x[:0], None)):
        torch.library.opcheck(stats, inputs)
        torch.library.opcheck(apply, (*inputs, stats(*inputs), torch.tensor(1e-8), True, False))


def test_compiles_as_one_graph_and_exports():
    def call(x, mask, eps):
        return tk.whiten(x * 2, mask, eps=eps)

    args = (torch.randn(3, 6), sample_mask("interior", 3, 6), torch.tensor(1e-8))
    assert_same_bits(torch.compile(call, fullgraph=True)(*args), call(*args))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    assert_same_bits(torch.export.export(Module(), args).module()(*args), call(*args))


def test_fifty_lengths_and_scalars_two_graphs():
    """Liger#146, fla#533: a recompilation for every length or scalar."""
    calls = [(torch.randn(2, 2 + t), sample_mask("interior", 2, 2 + t), torch.tensor(t / 100))
             for t in range(50)]
    assert count_graphs(lambda x, mask, eps: tk.whiten(x, mask, eps=eps), calls) <= 2


@pytest.mark.parametrize("error, words, args, kwargs", [
    (TypeError, "x is list", ([1.0],), {}),
    (TypeError, "x has dtype int64, expected float32", (torch.arange(3),), {}),
    (ValueError, r"mask has shape \[2\].*\[3\] as x", (torch.zeros(3), torch.ones(2).bool()), {}),
    (TypeError, "mask has dtype float32, expected bool", (torch.zeros(3), torch.ones(3)), {}),
    (ValueError, "unbiased is 1, expected one of True, False", (torch.zeros(3),), {"unbiased": 1}),
    (ValueError, "shift_mean is 'no'", (torch.zeros(3),), {"shift_mean": "no"}),
    (ValueError, "eps is -1.0, expected a number >= 0", (torch.zeros(3),), {"eps": -1.0}),
    (ValueError, "eps holds -1", (torch.zeros(3),), {"eps": torch.tensor(-1.0)}),
    (TypeError, "eps is str", (torch.zeros(3),), {"eps": "x"}),
    (TypeError, "group is str 'world', expected a torch.distributed.ProcessGroup",
     (torch.zeros(3),), {"group": "world"}),
    (TypeError, "cu_seqlens", (torch.zeros(3),), {"cu_seqlens": None}),
])
def test_bad_input_names_the_argument(error, words, args, kwargs):
    with pytest.raises(error, match=words):
        tk.whiten(*args, **kwargs)


PARTS = {"both": ([5, 9], [7, 3]), "an empty rank": ([6, 6], [0, 0]), "no token": ([0], [0]),
         "one token each": ([1], [1])}


def inputs_of(rank, lengths):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(rank)) * (1 + 3 * rank) + 5 * rank
    x, mask = x[:len(lengths)], torch.arange(9) < torch.tensor(lengths)[:, None]
    return torch.where(mask, x, float("nan")), mask


def worker(rank, meeting, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2,
                            timeout=timedelta(seconds=150))
    results = {}
    for name, lengths in PARTS.items():
        x, mask = inputs_of(rank, lengths[rank])
        results[name] = tk.whiten(x, mask, group=dist.group.WORLD).tolist()
        again = tk.whiten(x, mask, group=dist.group.WORLD).tolist()
        kept = tk.whiten(x, mask, group=dist.group.WORLD, shift_mean=False, unbiased=False)
        advantages = tk.token_advantages(x, torch.zeros_like(x), mask, gamma=0.0, lam=0.0,
                                         group=dist.group.WORLD).advantages
        results[name] = (results[name], again, kept.tolist(), advantages.tolist())
    x, mask = inputs_of(rank, PARTS["both"][rank])
    compiled = torch.compile(lambda x, m: tk.whiten(x, m, group=dist.group.WORLD), fullgraph=True,
                             backend="aot_eager")
    results["compiled"] = compiled(x, mask).tolist()
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes():
    """What two real processes over gloo get."""
    return two_processes(worker)


@pytest.mark.parametrize("name", PARTS)
def test_group_equals_one_process(processes, name):
    """slime#2235, miles#3229: whitening over the wrong group, deadlock on an empty rank."""
    parts = [inputs_of(rank, PARTS[name][rank]) for rank in range(2)]
    whole = [torch.cat(x) for x in zip(*parts, strict=True)]
    cut = len(parts[0][0])
    expected = tk.whiten(*whole)
    kept = tk.whiten(*whole, shift_mean=False, unbiased=False)
    for rank, rows in enumerate((slice(None, cut), slice(cut, None))):
        first, again, mean_kept, advantages = processes[rank][name]
        assert first == again
        torch.testing.assert_close(torch.tensor(first), expected[rows], rtol=0, atol=2e-6)
        torch.testing.assert_close(torch.tensor(mean_kept), kept[rows], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(torch.tensor(advantages), expected[rows], rtol=0, atol=2e-6)


def test_group_compiles(processes):
    for rank in range(2):
        torch.testing.assert_close(torch.tensor(processes[rank]["compiled"]),
                                   torch.tensor(processes[rank]["both"][0]), rtol=0, atol=1e-6)
