"""How operators are timed: gate first, then interleaved medians beside the copy bandwidth.

A `Case` is one operator at one shape: its inputs, the bytes it must move, and the contenders, all
functions of the inputs that return the same tuple of tensors. `run` holds every contender to the
accuracy policy of `tppo_kernels.testing` (a red gate: no number for the whole case), then runs them
in turn, round by round, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tppo_kernels.testing import FLOOR, assert_accurate

Function = Callable[..., tuple[Tensor, ...]]


class RedGate(AssertionError):
    """A contender computes something else: nobody gets a number."""


@dataclass(frozen=True)
class Case:
    """One operator at one shape. `make(seed)` gives the inputs; `exact` and `eager` judge the rest.

    exact: run on the inputs in fp64. eager: plain PyTorch as users write it, in fp32.
    """

    op: str
    shape: str
    nbytes: int
    make: Callable[[int], tuple[Any, ...]]
    exact: Function
    eager: Function
    contenders: dict[str, Function]
    floor: float = FLOOR
    grad: bool = False
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What is known of one contender. wall_us: one call from Python; device_us: on a GPU alone."""

    op: str
    shape: str
    implementation: str
    device: str
    median_us: float
    wall_us: float
    device_us: float | None
    gb_s: float
    percent_of_copy: float
    peak_mb: float
    speed_up: dict[str, float]  # of "op" over each other contender
    rounds: int
    note: str = ""


def as_double(x: Any) -> Any:
    """A floating tensor in fp64, without its graph; anything else as it is."""
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def gate(case: Case, device: str, inputs: tuple[Any, ...] | None = None) -> None:
    """Raises `RedGate` naming the contender whose results leave the accuracy policy."""
    inputs = place(case.make(0), device) if inputs is None else inputs
    with _grad(case):
        exact = case.exact(*(as_double(x) for x in inputs))
        eager = case.eager(*inputs)
        for name, function in case.contenders.items():
            results = function(*inputs)
            for i, (a, x, e) in enumerate(zip(results, exact, eager, strict=True)):
                try:
                    assert_accurate(a.detach(), x.detach(), e.detach().to(a.dtype),
                                    floor=case.floor, name=f"result {i}")
                except AssertionError as error:
                    raise RedGate(f"red gate, no number: {name} of {case.op} {case.shape}: "
                                  f"{error}") from None


def run(case: Case, device: str = "cpu", *, rounds: int = 15,
        round_robin: Callable[[Callable[[], None], int], None] | None = None) -> list[Row]:
    """The rows of a case, or `RedGate`.

    `round_robin(one_round, rounds)` may take over the loop (pytest-benchmark does).
    """
    given = place(case.make(0), device)
    gate(case, device, given)
    copies = 1 if device == "cpu" else min(64, int(2e8 // max(1, case.nbytes)) + 2)  # L2-cold
    inputs = [given, *(place(given, device) for _ in range(copies - 1))]
    walls: dict[str, list[float]] = {name: [] for name in case.contenders}
    count = 0

    def one_round() -> None:
        nonlocal count
        count += 1
        for name, function in case.contenders.items():
            walls[name].append(wall_us(function, inputs[count % copies], device))

    with _grad(case):
        for function in case.contenders.values():
            function(*inputs[0])  # warm-up, compilation
        if round_robin is None:
            for _ in range(rounds):
                one_round()
        else:
            round_robin(one_round, rounds)
        on_device = {name: device_us(f, inputs) if device != "cpu" else None
                     for name, f in case.contenders.items()}
        peaks = {name: peak_mb(f, inputs[0], device) for name, f in case.contenders.items()}
    return _rows(case, device, walls, on_device, peaks)


def _rows(case: Case, device: str, walls: dict[str, list[float]],
          on_device: dict[str, float | None], peaks: dict[str, float]) -> list[Row]:
    copy = copy_gb_s(device)
    median = {name: on_device[name] or statistics.median(us) for name, us in walls.items()}
    rows = []
    for name, us in median.items():
        gb_s = case.nbytes / us / 1e3
        over = {other: round(slower / us, 2) for other, slower in median.items() if other != name}
        rows.append(Row(case.op, case.shape, name, device, round(us, 2),
                        round(statistics.median(walls[name]), 2), on_device[name], round(gb_s, 3),
                        round(100 * gb_s / copy, 1), round(peaks[name], 2), over,
                        len(walls[name]), case.notes.get(name, "")))
    return rows


def _grad(case: Case) -> Any:
    return nullcontext() if case.grad else torch.no_grad()


def place(inputs: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The inputs copied to a device; a leaf that wants its gradient stays one."""
    return tuple(x.detach().to(device, copy=True).requires_grad_(x.requires_grad)
                 if isinstance(x, Tensor) else x for x in inputs)


def wall_us(function: Function, inputs: tuple[Any, ...], device: str) -> float:
    """One call from Python, waited for."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*inputs)
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def device_us(function: Function, inputs: list[tuple[Any, ...]], replays: int = 20) -> float:
    """A call in a replayed CUDA graph that goes through all copies of the inputs, so that the L2
    cache is cold and the host is out of the way. Slow functions go through fewer, fewer times."""
    slow = wall_us(function, inputs[0], "cuda") / 1e6
    inputs = inputs[:max(2, int(0.2 / slow))]
    replays = max(3, min(replays, int(0.5 / slow / len(inputs))))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for given in inputs[:3]:
            function(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            function(*given)
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(inputs))
    return statistics.median(times)


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


_copies: dict[str, float] = {}


def copy_gb_s(device: str, nbytes: int = 1 << 28) -> float:
    """The bandwidth of a large copy in this process, read and written bytes counted; once."""
    if device not in _copies:
        nbytes = nbytes if device == "cpu" else 8 * nbytes
        source = torch.ones(nbytes // 4, device=device)
        target = torch.empty_like(source)

        def copy() -> tuple[Tensor]:
            return (target.copy_(source),)

        best = (min(wall_us(copy, (), device) for _ in range(10)) if device == "cpu"
                else device_us(copy, [()]))
        _copies[device] = 2 * nbytes / best / 1e3
    return _copies[device]


def machine(device: str) -> dict[str, Any]:
    """The description that every file of results carries."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines()
                 if x.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "isa": torch.backends.cpu.get_cpu_capability(), "gpu": gpu,
            "system": platform.platform(), "python": platform.python_version(),
            "torch": torch.__version__, "load_average": [round(x, 2) for x in os.getloadavg()],
            "copy_gb_s": round(copy_gb_s(device), 2),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = ("operator", "shape", "implementation", "median us", "GB/s", "% of copy", "peak MB",
            "speed-up over")
    body = [(r.op, r.shape, r.implementation, f"{r.median_us:,.0f}", f"{r.gb_s:.2f}",
             f"{r.percent_of_copy:.0f}", f"{r.peak_mb:.1f}",
             "  ".join(f"{k} {v:.1f}x" for k, v in r.speed_up.items())
             if r.implementation == "op" else r.note) for r in rows]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
                     for line in [head, *body])


def as_json(rows: list[Row], device: str, steps: list[Any] | None = None) -> dict[str, Any]:
    """What `--bench-json` writes; steps: rows of whole PPO steps."""
    kinds = {"rows": rows, "steps": steps or []}
    return {"machine": machine(device),
            **{name: [asdict(r) for r in found] for name, found in kinds.items() if found}}
