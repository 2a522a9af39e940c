"""The benchmarks run, count and write what they say, and give a wrong result no number."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tppo_kernels as tk

pytest.importorskip("pytest_benchmark")

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", False)
    module = importlib.import_module("_harness")
    monkeypatch.setitem(module._copies, "cpu", 10.0)
    return module


@pytest.fixture
def gae_case(harness):
    return importlib.import_module("bench_gae").case(3, 17, smoke=True)


def test_a_wrong_implementation_gets_no_number(harness, gae_case):
    timed = []

    def wrong(rewards, values, mask):
        advantages, returns = gae_case.contenders["op"](rewards, values, mask)
        return advantages + 1e-3 * mask, returns

    def never(once, rounds):
        timed.append(rounds)

    case = dataclasses.replace(gae_case, contenders={**gae_case.contenders, "wrong": wrong})
    with pytest.raises(harness.RedGate, match="no number: wrong of gae 3 x 17: result 0 is off"):
        harness.run(case, round_robin=never)
    assert not timed


def test_the_gradient_is_behind_the_gate_too(harness):
    module = importlib.import_module("bench_token_logprobs")
    case = module.case(4, 50, torch.float32, True, smoke=True)
    harness.gate(case, "cpu")

    def no_entropy_gradient(logits, targets):
        logprobs, entropy = tk.token_logprobs(logits, targets)
        return logprobs, entropy.detach() + 0 * logits.sum()

    case = dataclasses.replace(case, contenders={
        "op": module.with_backward(no_entropy_gradient)})
    with pytest.raises(harness.RedGate, match="result 2 is off"):
        harness.gate(case, "cpu")


def test_rounds_are_interleaved_and_rows_follow_from_them(harness, gae_case, monkeypatch):
    order = []
    clock = {"op": 10.0, "loop": 50.0}

    def timed(function, inputs, device):
        name = next(n for n, f in gae_case.contenders.items() if f is function)
        order.append(name)
        return clock[name]

    monkeypatch.setattr(harness, "wall_us", timed)
    op, loop = harness.run(gae_case, rounds=3)
    assert order == ["op", "loop"] * 3
    assert op.median_us == 10.0 and op.rounds == 3 and op.speed_up == {"loop": 5.0}
    assert op.gb_s == pytest.approx(17 * 3 * 17 / 10 / 1e3, abs=1e-3)  # 17 B a token
    assert op.percent_of_copy == pytest.approx(100 * op.gb_s / 10.0, abs=1.0)


def test_peak_memory_is_the_most_held_at_once(harness):
    def holds(n, _):
        big = torch.empty(1_000_000)
        del big
        return (torch.empty(n),)

    assert harness.peak_mb(holds, (10, 0), "cpu") == pytest.approx(4.0, abs=0.1)
    assert harness.peak_mb(holds, (2_000_000, 0), "cpu") == pytest.approx(8.0, abs=0.1)


def test_pytest_bench_writes_rows_and_machine(tmp_path):
    target = tmp_path / "results" / "cpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(BENCH), "--bench-smoke", "--bench-rounds", "2",
         "--bench-json", str(target), "-p", "no:cacheprovider"],
        cwd=BENCH.parent, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(target.read_text())
    assert {"cpu", "threads", "torch", "copy_gb_s", "load_average"} <= set(written["machine"])
    assert {(r["op"], r["implementation"]) for r in written["rows"]} >= {
        ("gae", "op"), ("gae", "loop"), ("token_logprobs", "op"), ("token_logprobs", "eager")}
    assert all(r["median_us"] > 0 and r["gb_s"] >= 0 for r in written["rows"])
    assert "token_logprobs" in done.stdout and "speed-up over" in done.stdout
