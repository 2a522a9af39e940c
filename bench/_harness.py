"""How operators are timed: gate first, then interleaved medians, beside what the machine can do.

A `Case` is one operator at one shape: its inputs, the bytes it must move, and the contenders, all
functions of the inputs that return the same tuple of tensors. `run` holds every contender to the
accuracy policy of `tppo_kernels.testing` (a red gate: no number for the whole case), then runs them
in turn, round by round, so that whatever else the machine does falls on all of them alike.

Peers, what other projects offer, run beside them and decide nothing: one that rounds more than the
policy allows has its error in its row's note; one that raises, or whose results are another thing,
has a row without numbers that says so.

With a journal every step is written down before it is taken, so that a peer, or an operator, that
ends the process or spoils its CUDA context is known by name, and the next process leaves it out.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from _journal import CONTEXT_LOST, Journal
from _machine import copy_gb_s, machine, matmul_tflop_s, wait, wall_us
from _peers import said
from _timing import device_us, launches_of, peak_mb, timed, waits
from torch import Tensor

from tppo_kernels.testing import FLOOR, assert_accurate, max_error

Function = Callable[..., tuple[Tensor, ...]]
PEER_LIMIT = 0.05  # of a result's largest value: further off, a peer computes something else
CASE_S = 10.0  # a slow case gets fewer rounds than asked for, at least three
PEER_S, OURS_S = 45, 120  # in which a peer's call, all of ours, must end where there is a journal


class RedGate(AssertionError):
    """A contender computes something else: nobody gets a number."""


@dataclass(frozen=True)
class Case:
    """One operator at one shape. `make(seed)` draws the inputs where they are used, which is on
    `device`; `exact` and `eager` judge the rest.

    exact: run on the inputs in fp64. eager: plain PyTorch as users write it, in fp32.
    beats: the contender that "op" has to be faster than, at the sizes of a benchmark.
    nflop: of the products alone, in `dtype`; 0 where bytes are what counts.
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
    beats: str = ""
    nflop: int = 0
    dtype: torch.dtype = torch.float32
    notes: dict[str, str] = field(default_factory=dict)
    peers: dict[str, Function] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What is known of one contender or peer, None where it has no number.

    wall_us: one call from Python; device_us: on a GPU alone; errors: of each result, the largest
    against fp64; launches: of one call.
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
    tflop_s: float | None = None
    percent_of_matmul: float | None = None
    launches: int | None = None


@dataclass
class Verdict:
    """What a gate found: errors and notes of what gets a number, and why a peer gets none."""

    errors: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def as_double(x: Any) -> Any:
    """A floating tensor in fp64, without its graph; anything else as it is."""
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


class Attempts:
    """What one case, `unit`, tries, in a journal before it is tried, where there is a journal.

    A peer whose call ends the process (as no answer in `PEER_S` does) or leaves the CUDA context
    unusable is left out by the next process, which the parent of this one starts.
    """

    def __init__(self, unit: str, device: str, journal: Journal | None = None,
                 seconds: int = OURS_S, peer_seconds: int = PEER_S):
        self.unit, self.device, self.journal = unit, device, journal
        self.seconds, self.peer_seconds = seconds, peer_seconds
        self.refused: dict[str, str] = {}
        self._said: str | None = None

    def about(self, who: str) -> None:
        """The next calls are those of a peer, or of what is ours: ""."""
        if self.journal is None:
            return
        if who != self._said:
            self.journal.add("trying", unit=self.unit, who=who)
        self._said = who
        # unhandled, the alarm ends the process even inside a driver's call
        signal.alarm(self.peer_seconds if who else self.seconds)

    def end(self) -> None:
        """Nothing is tried any more."""
        if self.journal is not None:
            signal.alarm(0)

    def peer(self, who: str, call: Callable[[], Any]) -> Any:
        """What a peer's call gives; None where it raised, and why is in `refused`."""
        self.about(who)
        try:
            found = call()
            wait(self.device)
            return found
        except Exception as error:  # a stranger's code may raise anything
            self.refused[who] = f"no number: {said(error)}"
            self.leave_if_lost(who, error)
            return None
        finally:
            self.about("")

    def leave_if_lost(self, who: str, error: BaseException) -> None:
        """Ends the process where no call on the GPU can succeed any more."""
        if not context_lost(self.device):
            return
        why = f"it left the CUDA context unusable: {said(error)}"
        if self.journal is None:
            raise RuntimeError(f"{who or 'an operator'} of {self.unit}: {why}") from error
        self.journal.add("broken", unit=self.unit, who=who, why=why)
        os._exit(CONTEXT_LOST)


def context_lost(device: str) -> bool:
    """Whether every call of the CUDA runtime fails from now on: it does after an illegal access."""
    try:
        wait(device)
        wait(device)
    except RuntimeError:
        return True
    return False


def without_the_broken(case: Case, journal: Journal) -> tuple[Case, dict[str, str]]:
    """The case without peers that ended a process before, and why each is missing."""
    broken = {r["who"]: f"no number: {r['why']}"
              for r in journal.of("broken", unit=f"{case.op} {case.shape}") if r["who"]}
    peers = {name: f for name, f in case.peers.items() if name not in broken}
    return replace(case, peers=peers), broken


def gate(case: Case, device: str, inputs: tuple[Any, ...] | None = None,
         attempts: Attempts | None = None) -> Verdict:
    """Raises `RedGate` naming the contender whose results leave the accuracy policy."""
    inputs = case.make(0) if inputs is None else inputs
    attempts = attempts or Attempts(f"{case.op} {case.shape}", device)
    verdict = Verdict(notes=dict(case.notes), refused=attempts.refused)
    attempts.about("")
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
            def judged(function: Function = function) -> tuple[list[float], list[str]]:
                results = [x.detach() for x in function(*inputs)]
                off = shortfalls(results, exact, eager, case.floor, PEER_LIMIT)
                return errors(results, exact), off

            if (found := attempts.peer(name, judged)) is not None:
                verdict.errors[name], off = found
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
        round_robin: Callable[[Callable[[], None], int], None] | None = None,
        journal: Journal | None = None) -> list[Row]:
    """The rows of a case, or `RedGate`.

    `round_robin(one_round, rounds)` may take over the loop (pytest-benchmark does).
    """
    attempts = Attempts(f"{case.op} {case.shape}", device, journal)
    attempts.about("")
    given = case.make(0)
    verdict = gate(case, device, given, attempts)
    copies = 1 if device == "cpu" else min(64, int(2e8 // max(1, case.nbytes)) + 2)  # L2-cold
    inputs = [given, *(copy_of(given) for _ in range(copies - 1))]
    measured = Measured({**case.contenders, **{
        name: f for name, f in case.peers.items() if name in verdict.errors}}, attempts, case.peers)
    with _grad(case):
        for _ in range(2):  # warm-up, compilation; then for how long a round takes
            start = time.perf_counter()
            measured.each(lambda name, function: measured.warm_up(name, function, given, device))
        rounds = min(rounds, max(3, int(CASE_S / (time.perf_counter() - start))))
        (round_robin or repeat)(lambda: measured.round(inputs, device), rounds)
        if device != "cpu":
            measured.alone_on_the_device(inputs, verdict)
        measured.each(lambda name, function: measured.peaks.__setitem__(
            name, peak_mb(function, given, device)))
        measured.each(lambda name, function: measured.launches.__setitem__(
            name, launches_of(function, given, device)))
    return [*_rows(case, device, measured, verdict),
            *(no_number(case, device, name, why) for name, why in verdict.refused.items())]


def repeat(call: Callable[[], None], times: int) -> None:
    """The call, so many times."""
    for _ in range(times):
        call()


def no_number(case: Case, device: str, name: str, why: str) -> Row:
    """The row of what has no number, and why."""
    return Row(case.op, case.shape, name, device, None, None, None, None, None, None, {}, 0, why)


class Measured:
    """The functions of a case that get numbers, and their times so far."""

    def __init__(self, functions: dict[str, Function], attempts: Attempts, peers: Iterable[str]):
        self.functions, self.attempts, self.peers = functions, attempts, set(peers)
        self.last_us = dict.fromkeys(functions, 0.0)
        self.walls: dict[str, list[float]] = {name: [] for name in functions}
        self.between: dict[str, list[float]] = {name: [] for name in functions}
        self.on_device: dict[str, float | None] = dict.fromkeys(functions)
        self.peaks: dict[str, float] = {}
        self.launches: dict[str, int | None] = {}
        self.count = 0

    def each(self, call: Callable[[str, Function], Any]) -> None:
        """Calls it with every function; a peer that raises is refused and left out from there."""
        for name, function in list(self.functions.items()):
            if name not in self.peers:
                call(name, function)
                continue
            self.attempts.peer(name, lambda: call(name, function))  # noqa: B023
            if name in self.attempts.refused:
                del self.functions[name]

    def warm_up(self, name: str, function: Function, given: tuple[Any, ...], device: str) -> None:
        """One call that counts for nothing but how slow it is."""
        self.last_us[name] = wall_us(function, given, device)

    def round(self, inputs: list[tuple[Any, ...]], device: str) -> None:
        """One call of each, on the next copy of the inputs."""
        self.count += 1

        def once(name: str, function: Function) -> None:
            wall, between = timed(function, inputs[self.count % len(inputs)], device,
                                  self.last_us[name])
            self.walls[name].append(wall)
            if between is not None:
                self.between[name].append(between)

        self.each(once)

    def alone_on_the_device(self, inputs: list[tuple[Any, ...]], verdict: Verdict) -> None:
        """A slow call's time is that between events, which its launches fill; a fast one's is that
        of a graph, where the host is out of the way."""
        def once(name: str, function: Function) -> None:
            if self.between[name]:
                self.on_device[name] = statistics.median(self.between[name])
                return
            why = "it waits for the device" if waits(function, inputs[0]) else ""
            try:
                self.on_device[name] = device_us(function, inputs, captured=not why)
            except RuntimeError as error:  # of the capture: the calls themselves ran before
                self.attempts.leave_if_lost(name if name in self.peers else "", error)
                why = said(error)
                self.on_device[name] = device_us(function, inputs, captured=False)
            if why:
                verdict.notes[name] = f"{verdict.notes.get(name, '')} no graph: {why}"

        self.each(once)


def _rows(case: Case, device: str, measured: Measured, verdict: Verdict) -> list[Row]:
    copy = copy_gb_s(device)
    rate = matmul_tflop_s(device, case.dtype) if case.nflop else 0.0
    median = {name: measured.on_device[name] or statistics.median(measured.walls[name])
              for name in measured.functions}
    rows = []
    for name, us in median.items():
        gb_s = case.nbytes / us / 1e3
        over = {other: round(slower / us, 2) for other, slower in median.items() if other != name}
        tflop_s = case.nflop / us / 1e6
        rows.append(Row(case.op, case.shape, name, device, round(us, 2),
                        round(statistics.median(measured.walls[name]), 2),
                        measured.on_device[name], round(gb_s, 3), round(100 * gb_s / copy, 1),
                        round(measured.peaks[name], 2), over, len(measured.walls[name]),
                        verdict.notes.get(name, "").strip(), verdict.errors[name],
                        round(tflop_s, 3) if rate else None,
                        round(100 * tflop_s / rate, 1) if rate else None,
                        measured.launches[name]))
    return rows


def _grad(case: Case) -> Any:
    return nullcontext() if case.grad else torch.no_grad()


def copy_of(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs elsewhere in memory; a leaf that wants its gradient stays one."""
    return tuple(x.detach().clone().requires_grad_(x.requires_grad)
                 if isinstance(x, Tensor) else x for x in inputs)


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


def as_json(rows: list[Row], device: str, **others: list[Any]) -> dict[str, Any]:
    """What `--bench-json` writes; others: rows of whole PPO steps, and of rollouts."""
    kinds = {"rows": rows, **others}
    return {"machine": machine(device),
            **{name: [asdict(r) for r in found] for name, found in kinds.items() if found}}
