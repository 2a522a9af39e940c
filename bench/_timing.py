"""One call, measured: by the host's clock, between events, in a replayed graph, in memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from _machine import between_events_us, wait, wall_us
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


SLOW_US = 5e3  # on a GPU: as long as this, a call hides what the host does


def timed(function: Function, inputs: tuple[Any, ...], device: str, last_us: float
          ) -> tuple[float, float | None]:
    """One call from Python, waited for: (its time by the host's clock, between two events).

    Events only where the last call was slow: they would add to a fast one.
    """
    if device == "cpu" or last_us <= SLOW_US:
        return wall_us(function, inputs, device), None
    between = [0.0]

    def call() -> None:
        between[0] = between_events_us(lambda: function(*inputs))

    return wall_us(call, (), device), between[0]


def waits(function: Function, inputs: tuple[Any, ...]) -> bool:
    """Whether a call waits for the device (a count of valid rows read, say): no graph holds it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*inputs)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def device_us(function: Function, inputs: list[tuple[Any, ...]], replays: int = 20,
              captured: bool = True) -> float:
    """A call in a replayed CUDA graph that goes through all copies of the inputs, so that the L2
    cache is cold and the host is out of the way. Slow functions go through fewer, fewer times.
    Not captured: the same calls from Python, between the same events."""
    slow = wall_us(function, inputs[0], "cuda") / 1e6
    inputs = inputs[:max(2, int(0.2 / slow))]
    replays = max(3, min(replays, int(0.5 / slow / len(inputs))))

    def through_all() -> None:
        for given in inputs:
            function(*given)

    once = graph_of(through_all) if captured else through_all
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        once()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(inputs))
    return statistics.median(times)


def graph_of(call: Callable[[], None]) -> Callable[[], None]:
    """The call captured in a CUDA graph, as a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a capture cannot free what earlier calls left cached
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_mb(function: Function, inputs: tuple[Any, ...], device: str) -> float:
    """The most memory that a call holds beyond its inputs, in 1e6 bytes."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*inputs)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        kept = function(*inputs)
    del kept
    held = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def launches_of(function: Callable[..., Any], inputs: tuple[Any, ...], device: str) -> int | None:
    """How many kernels, copies and fills one call launches, counted by the profiler; None on a CPU
    and where the profiler sees none."""
    if device == "cpu":
        return None
    activity = torch.profiler.ProfilerActivity.CUDA
    wait(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        function(*inputs)
        wait(device)
    on_device = torch.autograd.DeviceType.CUDA
    return sum(e.device_type == on_device for e in profile.events() or ()) or None
