"""`pytest bench`: options, the loop of pytest-benchmark around the harness, table and results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _harness import Case, Row, as_json, run, table
from _peers import REASONS
from _steps import StepRow, step_table

ROWS = pytest.StashKey[list[Row]]()
STEPS = pytest.StashKey[list[StepRow]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tppo benchmarks")
    group.addoption("--bench-json", metavar="FILE", help="write rows and machine to FILE")
    group.addoption("--bench-smoke", action="store_true", help="tiny shapes, nothing compiled")
    group.addoption("--bench-grid", action="store_true", help="a whole step: every P, R and G")
    group.addoption("--bench-rounds", type=int, default=15, help="rounds of a case (default 15)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[STEPS] = [], []


@pytest.fixture(scope="session")
def device() -> str:
    """A GPU where torch can use one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether only the machinery is tried."""
    return request.config.getoption("--bench-smoke")


@pytest.fixture
def shape_of(device, smoke) -> Callable[[dict[str, list], int, tuple], tuple]:
    """The shape at an index of this device's, or the small one; skips where there are fewer."""
    def chosen(shapes: dict[str, list], index: int, small: tuple) -> tuple:
        given = [small] if smoke else shapes[device]
        if index >= len(given):
            pytest.skip("fewer shapes on this device")
        return given[index]

    return chosen


@pytest.fixture
def measure(request, benchmark, device):
    """Runs a case within pytest-benchmark; one of its rounds is one call of every contender."""
    def measured(case: Case) -> dict[str, Row]:
        rows = run(case, device, rounds=request.config.getoption("--bench-rounds"),
                   round_robin=lambda once, n: benchmark.pedantic(once, rounds=n, iterations=1))
        benchmark.extra_info["rows"] = [row.__dict__ for row in rows]
        request.config.stash[ROWS] += rows
        return {row.implementation: row for row in rows}

    return measured


@pytest.fixture
def steps(request) -> list[StepRow]:
    """Where the rows of a whole PPO step go."""
    return request.config.stash[STEPS]


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows, steps = config.stash[ROWS], config.stash[STEPS]
    if rows:
        terminalreporter.section("operators")
        terminalreporter.write_line(table(rows))
        for name, why in REASONS.items():
            terminalreporter.write_line(f"no row: {name}: {why}")
    if steps:
        terminalreporter.section("a PPO step: a prompt shared by its answers, or dense")
        terminalreporter.write_line(step_table(steps))
    target = config.getoption("--bench-json")
    if target and (rows or steps):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(as_json(rows, device, steps), indent=1) + "\n")
        terminalreporter.write_line(f"written to {target}")
