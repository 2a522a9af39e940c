"""How operators are timed: gate first, then interleaved medians beside the copy bandwidth.

A `Case` is one operator at one shape: its inputs, the bytes it must move, and the contenders, all
functions of the inputs that return the same tuple of tensors. `run` holds every contender to the
accuracy policy of `tppo_kernels.testing` (a red gate: no number for the whole case), then runs them
in turn, round by round, so that whatever else the machine does falls on all of them alike.

Peers, what other projects offer, run beside them and decide nothing: one that rounds more than the
policy allows has its error in its row's note; one that raises, or whose results are another thing,
has a row without numbers that says so.
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
from _peers import said, versions
from torch import Tensor

from tppo_kernels.testing import FLOOR, assert_accurate, max_error

Function = Callable[..., tuple[Tensor, ...]]
PEER_LIMIT = 0.05  # of a result's largest value: further off, a peer computes something else
CASE_S = 10.0  # a slow case gets fewer rounds than asked for, at least three


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
    peers: dict[str, Function] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What is known of one contender or peer, None where it has no number.

    wall_us: one call from Python; device_us: on a GPU alone; errors: of each result, the largest
    against fp64.
    """

    op: str
    shape: str
    implementation: str
    device: str
    median_us: float | None
    wall_us: float | None
    device_us: float | None
    gb_s: float | None
    percent_of_copy: float | None
    peak_mb: float | None
    speed_up: dict[str, float]  # of "op" over each other contender
    rounds: int
    note: str = ""
    errors: list[float] = field(default_factory=list)


@dataclass
class Verdict:
    """What a gate found: errors and notes of what gets a number, and why a peer gets none."""

    errors: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def as_double(x: Any) -> Any:
    """A floating tensor in fp64, without its graph; anything else as it is."""
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def gate(case: Case, device: str, inputs: tuple[Any, ...] | None = None) -> Verdict:
    """Raises `RedGate` naming the contender whose results leave the accuracy policy."""
    inputs = place(case.make(0), device) if inputs is None else inputs
    verdict = Verdict(notes=dict(case.notes))
    with _grad(case):
        exact = [x.detach() for x in case.exact(*(as_double(x) for x in inputs))]
        eager = [x.detach() for x in case.eager(*inputs)]
        for name, function in case.contenders.items():
            results = [x.detach() for x in function(*inputs)]
            cast = [e.to(a.dtype) for a, e in zip(results, eager, strict=True)]
            if off := shortfalls(results, exact, cast, case.floor):
                raise RedGate(f"red gate, no number: {name} of {case.op} {case.shape}: {off[0]}")
            verdict.errors[name] = errors(results, exact)
        for name, function in case.peers.items():
            try:
                results = [x.detach() for x in function(*inputs)]
                off = shortfalls(results, exact, eager, case.floor, PEER_LIMIT)
            except Exception as error:  # a stranger's code may raise anything
                verdict.refused[name] = f"no number: {said(error)}"
                continue
            verdict.errors[name] = errors(results, exact)
            verdict.notes[name] = f"less exact: {'; '.join(off)}" if off else ""
    return verdict


def errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest of each result, to two digits."""
    return [float(f"{max_error(a, x):.1e}") for a, x in zip(results, exact, strict=True)]


def shortfalls(results: list[Tensor], exact: list[Tensor], eager: list[Tensor], floor: float,
               limit: float | None = None) -> list[str]:
    """What is outside the policy; raises what is further off than `limit` times the largest."""
    off = []
    for i, (a, x, e) in enumerate(zip(results, exact, eager, strict=True)):
        try:
            assert_accurate(a, x, e, floor=floor, name=f"result {i}")
        except AssertionError as error:
            if limit is not None and (a.shape != x.shape
                                      or not max_error(a, x) <= limit * float(x.abs().max())):
                raise
            off.append(str(error))
    return off


def run(case: Case, device: str = "cpu", *, rounds: int = 15,
        round_robin: Callable[[Callable[[], None], int], None] | None = None) -> list[Row]:
    """The rows of a case, or `RedGate`.

    `round_robin(one_round, rounds)` may take over the loop (pytest-benchmark does).
    """
    given = place(case.make(0), device)
    verdict = gate(case, device, given)
    functions = {**case.contenders,
                 **{name: f for name, f in case.peers.items() if name in verdict.errors}}
    copies = 1 if device == "cpu" else min(64, int(2e8 // max(1, case.nbytes)) + 2)  # L2-cold
    inputs = [given, *(place(given, device) for _ in range(copies - 1))]
    walls: dict[str, list[float]] = {name: [] for name in functions}
    count = 0

    def one_round() -> None:
        nonlocal count
        count += 1
        for name, function in functions.items():
            walls[name].append(wall_us(function, inputs[count % copies], device))

    with _grad(case):
        for _ in range(2):  # warm-up, compilation; then for how long a round takes
            start = time.perf_counter()
            for function in functions.values():
                function(*given)
        rounds = min(rounds, max(3, int(CASE_S / (time.perf_counter() - start))))
        if round_robin is None:
            for _ in range(rounds):
                one_round()
        else:
            round_robin(one_round, rounds)
        on_device: dict[str, float | None] = dict.fromkeys(functions)
        if device != "cpu":
            for name, function in functions.items():
                captured = name in case.contenders or not waits(function, given)
                on_device[name] = device_us(function, inputs, captured=captured)
                if not captured:
                    verdict.notes[name] += " no graph: it waits for the device"
        peaks = {name: peak_mb(f, given, device) for name, f in functions.items()}
    return [*_rows(case, device, walls, on_device, peaks, verdict),
            *(Row(case.op, case.shape, name, device, None, None, None, None, None, None, {}, 0, why)
              for name, why in verdict.refused.items())]


def _rows(case: Case, device: str, walls: dict[str, list[float]],
          on_device: dict[str, float | None], peaks: dict[str, float],
          verdict: Verdict) -> list[Row]:
    copy = copy_gb_s(device)
    median = {name: on_device[name] or statistics.median(us) for name, us in walls.items()}
    rows = []
    for name, us in median.items():
        gb_s = case.nbytes / us / 1e3
        over = {other: round(slower / us, 2) for other, slower in median.items() if other != name}
        rows.append(Row(case.op, case.shape, name, device, round(us, 2),
                        round(statistics.median(walls[name]), 2), on_device[name], round(gb_s, 3),
                        round(100 * gb_s / copy, 1), round(peaks[name], 2), over,
                        len(walls[name]), verdict.notes.get(name, "").strip(),
                        verdict.errors[name]))
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
            "peers": versions(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def number(x: float | None, form: str) -> str:
    """A cell of a table."""
    return "-" if x is None else format(x, form)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = ("operator", "shape", "implementation", "median us", "GB/s", "% of copy", "peak MB",
            "errors", "speed-up over")
    body = [(r.op, r.shape, r.implementation, number(r.median_us, ",.0f"), number(r.gb_s, ".2f"),
             number(r.percent_of_copy, ".0f"), number(r.peak_mb, ".1f"),
             " ".join(f"{x:.0e}" for x in r.errors),
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
