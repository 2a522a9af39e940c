"""`pytest bench`: options, the loop of pytest-benchmark around the harness, table and results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import _goals
import pytest
import torch
from _harness import Attempts, Case, Row, as_json, no_number, run, table, without_the_broken
from _journal import Journal
from _peers import REASONS, said
from _rollouts import RolloutRow, rollout_table
from _steps import StepRow, step_table

ROWS = pytest.StashKey[list[Row]]()
STEPS = pytest.StashKey[list[StepRow]]()
ROLLOUTS = pytest.StashKey[list[RolloutRow]]()
BASELINES = {"op", "eager", "loop", "composed", "dense"}  # measured whatever a goal names


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tppo benchmarks")
    group.addoption("--bench-json", metavar="FILE", help="write rows and machine to FILE")
    group.addoption("--bench-smoke", action="store_true", help="tiny shapes, nothing compiled")
    group.addoption("--bench-grid", action="store_true", help="a whole step: every P, R and G")
    group.addoption("--bench-rounds", type=int, default=15, help="rounds of a case (default 15)")
    group.addoption("--bench-goals", action="store_true",
                    help="only cases that have a goal on this device, and what it is measured by")
    group.addoption("--bench-journal", metavar="FILE", type=Path,
                    help="write each row to FILE as it is measured, and measure no row again that "
                    "stands there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[STEPS], config.stash[ROLLOUTS] = [], [], []


@pytest.fixture(scope="session")
def device() -> str:
    """A GPU where torch can use one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether only the machinery is tried."""
    return request.config.getoption("--bench-smoke")


@pytest.fixture(scope="session")
def goals_only(request: pytest.FixtureRequest, smoke: bool) -> bool:
    """Whether a case without a goal is left out; at tiny sizes none has one."""
    return request.config.getoption("--bench-goals") and not smoke


@pytest.fixture(scope="session")
def journal(request: pytest.FixtureRequest) -> Journal | None:
    """Where rows go as they are measured."""
    path = request.config.getoption("--bench-journal")
    return Journal(path) if path else None


@pytest.fixture
def shape_of(device, smoke) -> Callable[[dict[str, list], int, tuple], tuple]:
    """The shape at an index of this device's, or the small one; skips where there are fewer."""
    def chosen(shapes: dict[str, list], index: int, small: tuple) -> tuple:
        given = [small] if smoke else shapes[device]
        if index >= len(given):
            pytest.skip("fewer shapes on this device")
        return given[index]

    return chosen


def of_its_goals(case: Case, device: str) -> Case:
    """The case with what its goals are measured by, and no more; skips where it has none."""
    goals = _goals.of(case.op, case.shape, device)
    if not goals:
        pytest.skip("no goal on this device")
    wanted = BASELINES | _goals.named(goals)
    return replace(case, **{
        kind: {name: f for name, f in getattr(case, kind).items() if name in wanted}
        for kind in ("contenders", "peers")})


def not_yet_measured(case: Case, device: str, journal: Journal) -> tuple[Case, list[Row]]:
    """The case without what the journal has rows of, but for the operator, which the rest is
    compared with; and rows for peers that ended a process. Skips where nothing is left."""
    before = {r["implementation"]: r for r in journal.of("row", op=case.op, shape=case.shape)}
    ours = before.get("op")
    if ours and ours["median_us"] is None:
        pytest.fail(f"in an earlier process: {ours['note']}")
    died = journal.of("broken", unit=f"{case.op} {case.shape}", who="")
    if died:
        row = no_number(case, device, "op", f"no number: {died[-1]['why']}")
        journal.add("row", **asdict(row))
        pytest.fail(row.note)
    case, broken = without_the_broken(case, journal)
    left = {kind: {name: f for name, f in getattr(case, kind).items() if name not in before}
            for kind in ("contenders", "peers")}
    refused = [no_number(case, device, name, why) for name, why in broken.items()
               if name not in before]
    if not (left["contenders"] or left["peers"] or refused):
        pytest.skip("measured before")
    left["contenders"] = {"op": case.contenders["op"], **left["contenders"]}
    return replace(case, **left), refused


@pytest.fixture
def measure(request, benchmark, device, smoke, goals_only, journal):
    """Runs a case within pytest-benchmark; one of its rounds is one call of every contender.

    On a CPU goals are held; on a GPU the report says which are reached."""
    def keep(rows: list[Row]) -> None:
        request.config.stash[ROWS] += rows
        for row in rows if journal else ():
            journal.add("row", **asdict(row))

    def measured(case: Case) -> dict[str, Row]:
        if goals_only:
            case = of_its_goals(case, device)
        if journal:
            case, refused = not_yet_measured(case, device, journal)
            keep(refused)
        attempts = Attempts(f"{case.op} {case.shape}", device, journal)
        try:
            rows = run(case, device, rounds=request.config.getoption("--bench-rounds"),
                       round_robin=lambda once, n: benchmark.pedantic(once, rounds=n, iterations=1),
                       journal=journal)
        except Exception as error:
            attempts.leave_if_lost("", error)
            keep([no_number(case, device, "op", f"no number: {said(error)}")])
            raise
        finally:
            attempts.end()
        keep(rows)
        if journal:
            journal.add("unit", part="benchmarks", unit=f"{case.op} {case.shape}", state="ok",
                        said="")
        benchmark.extra_info["rows"] = [row.__dict__ for row in rows]
        by_name = {row.implementation: row for row in rows}
        if not smoke:
            hold(case, by_name, device)
        return by_name

    return measured


def hold(case: Case, rows: dict[str, Row], device: str) -> None:
    """Fails where the operator is slower than what it must beat, or misses a goal on a CPU."""
    slower = rows["op"].speed_up.get(case.beats, 2.0)
    assert slower > 1, f"{case.op} {case.shape}: {slower:.2f} times as fast as {case.beats}"
    if device == "cpu":
        missed = _goals.missed([asdict(row) for row in rows.values()], device)
        assert not missed, "; ".join(missed)


@pytest.fixture
def steps(request, journal) -> Callable[[list[StepRow]], None]:
    """Keeps the rows of a whole PPO step."""
    def keep(rows: list[StepRow]) -> None:
        request.config.stash[STEPS] += rows
        for row in rows if journal else ():
            journal.add("step", **asdict(row))

    return keep


@pytest.fixture
def rollouts(request, journal) -> Callable[[list[RolloutRow]], None]:
    """Keeps the rows of engines that sample."""
    def keep(rows: list[RolloutRow]) -> None:
        request.config.stash[ROLLOUTS] += rows
        for row in rows if journal else ():
            journal.add("rollout", **asdict(row))

    return keep


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows, steps, rollouts = (config.stash[key] for key in (ROWS, STEPS, ROLLOUTS))
    if rows:
        terminalreporter.section("operators")
        terminalreporter.write_line(table(rows))
        for name, why in REASONS.items():
            terminalreporter.write_line(f"no row: {name}: {why}")
    if steps:
        terminalreporter.section("a PPO step: a prompt shared by its answers, or dense")
        terminalreporter.write_line(step_table(steps))
    if rollouts:
        terminalreporter.section("answers, by engine")
        terminalreporter.write_line(rollout_table(rollouts))
    target = config.getoption("--bench-json")
    if target and (rows or steps or rollouts):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        found = as_json(rows, device, steps=steps, rollouts=rollouts)
        Path(target).write_text(json.dumps(found, indent=1) + "\n")
        terminalreporter.write_line(f"written to {target}")
