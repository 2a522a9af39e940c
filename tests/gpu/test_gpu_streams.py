"""Graphs, streams, threads, launches, host synchronisation, and more than 2**31 elements."""

import threading

import pytest
import torch
from _gpu import DEVICE, GRIDS, inputs, on_a_gpu, pairs, placed, run, sample

import tppo_kernels as tk
from tppo_kernels._core.op import OPS
from tppo_kernels.testing import assert_same_bits

HOST_SIDE = {"place_rewards"}  # by nature
READS_ROWS = {"linear_logprobs", "linear_ppo_loss"}  # n_valid, once, in eager mode
LAUNCHES = {"ppo_loss": 2, "token_logprobs": 2}  # forward and backward together
pytestmark = on_a_gpu


@pytest.fixture
def forced(backend):
    with tk.use_backend(backend):
        yield backend


def given(op, seed=0):
    return inputs(op, 5, 65, seed=seed) if op in GRIDS else sample(op)


def tensors(given):
    args, kwargs = given
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]


def or_skip(op, call):
    try:
        return call()
    except tk.BackendError as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("op, backend", pairs(sorted(OPS.keys() - HOST_SIDE)))
def test_captured_and_replayed_on_new_values(op, backend, forced):
    static, fresh = placed(given(op)), placed(given(op, seed=1))
    expected = or_skip(op, lambda: run(op, fresh))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(op, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(op, static)
    with torch.no_grad():
        for old, new in zip(tensors(static), tensors(fresh), strict=True):
            old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for name, value in results.items():
        if op in READS_ROWS:  # all rows run under capture: another order of the same sums
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
        else:
            assert_same_bits(value, expected[name], name)


@pytest.mark.parametrize("op, backend", pairs(GRIDS))
def test_runs_on_the_current_stream(op, backend, forced):
    """Inputs that arrive late on a stream: a launch on another one would read what was before."""
    static, late = placed(given(op)), placed(given(op, seed=1))
    expected = run(op, late)
    run(op, static)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for old, new in zip(tensors(static), tensors(late), strict=True):
                old.copy_(new)
        results = run(op, static)
    torch.cuda.synchronize()
    for name, value in results.items():
        assert_same_bits(value, expected[name], name)


@pytest.mark.parametrize("op, backend", pairs(GRIDS))
def test_reads_nothing_on_the_host(op, backend, forced):
    static = placed(given(op))
    run(op, static)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, static)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op, backend", pairs(GRIDS))
def test_two_threads(op, backend, forced):
    calls = [placed(given(op, seed)) for seed in range(2)]
    expected = [run(op, call) for call in calls]
    torch.cuda.synchronize()
    failures = []

    def work(which):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    for name, value in run(op, calls[which]).items():
                        assert_same_bits(value, expected[which][name], name)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("op, backend", [p for p in pairs(LAUNCHES) if p.values[1] != "reference"])
def test_launches(op, backend, forced):
    """Forward and backward of one call, counted by the profiler."""
    torch.use_deterministic_algorithms(False)  # it fills every empty tensor, by a launch
    args, kwargs = placed(inputs(op, 64, 512))
    slope = torch.ones((), device=DEVICE)

    def step():
        loss = getattr(tk, op)(*args, **kwargs)[0]
        torch.autograd.grad(loss, args[0], slope.expand(loss.shape))

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(names) <= LAUNCHES[op], names


@pytest.mark.parametrize("op, backend", pairs(["token_logprobs"]))
def test_more_than_2_to_the_31_logits(op, backend, forced):
    """mamba#1015: int32 offsets."""
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("the reference makes fp32 copies; the others want 20 GB free")
    rows, columns = 2**31 // 151_936 + 300, 151_936
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_()
    targets = torch.randint(0, columns, (rows,), device=DEVICE)
    whole = tk.token_logprobs(logits, targets)
    tail = tk.token_logprobs(logits[-200:].clone(), targets[-200:])
    torch.testing.assert_close(whole.logprobs[-200:], tail.logprobs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(whole.entropy[-200:], tail.entropy, rtol=1e-6, atol=1e-5)
