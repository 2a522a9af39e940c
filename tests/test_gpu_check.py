"""`make gpu-check` where there is no GPU: its clock, its verdicts, its report, and a dry run."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_check")


@pytest.fixture
def check(gpu_check, tmp_path):
    return gpu_check.Check(True, tmp_path, 60)


def test_a_part_that_fails_decides_the_exit_status_and_the_next_still_runs(
        gpu_check, check, tmp_path):
    ran = []

    def breaks(_, part):
        raise OSError("no such folder")

    check.part("breaks", breaks)
    check.part("skips", lambda _, part: part.skip("not installed: tyro"))
    check.part("works", lambda _, part: ran.append(part))
    assert [p.state for p in check.parts] == ["failed", "skipped", "ok"] and ran
    assert "no such folder" in check.parts[0].said[0]
    assert gpu_check.finish(check, tmp_path / "results.json") == 1
    check.parts = check.parts[1:]
    assert gpu_check.finish(check, tmp_path / "results.json") == 0


def test_a_command_is_ended_with_its_children_when_its_time_is_up(check):
    start = time.monotonic()
    status, said = check.command(1.0, "bash", "-c", "echo begun; sleep 60 & sleep 60")
    assert status is None and "begun" in said and "stopped after 1 s" in said
    assert time.monotonic() - start < 20
    check.end = time.monotonic() - 1
    assert check.command(30, "true") == (None, "no time was left")


def test_curves_agree_within_noise_or_not(gpu_check):
    a = [0.0, 0.2, 0.4, 0.6, 0.5, 0.7, 0.6, 0.65]
    assert gpu_check.disagreement(a, [x + 0.03 for x in a]) is None
    assert "scores differ by -0.900" in gpu_check.disagreement(a, [x + 0.9 for x in a])
    assert "not finite" in gpu_check.disagreement(a, [*a[1:], float("nan")])
    assert "8 and 7 steps" in gpu_check.disagreement(a, a[1:])


def test_a_package_that_is_absent_is_named(gpu_check):
    assert gpu_check.lacks("json", "no_such_package_x") == "not installed: no_such_package_x"
    assert gpu_check.lacks("json") is None


def test_every_benchmark_is_in_the_order_of_parts(gpu_check):
    present = {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")}
    assert present <= set(gpu_check.BENCHES)


def test_the_report_of_the_stored_results(gpu_check, tmp_path):
    source = tmp_path / "cpu.json"
    source.write_text((ROOT / "bench/results/cpu.json").read_text())
    text = gpu_check.report.write(source).read_text()
    rows = json.loads(source.read_text())["rows"]
    assert text.count("\n| ") >= len(rows) and "cpu.svg" in text
    drawn = (tmp_path / "cpu.svg").read_text()
    assert drawn.count("<circle") == sum(r["implementation"] == "op" and r["gb_s"] > 0
                                         for r in rows)


def test_a_row_without_numbers_has_its_reason_in_the_report(gpu_check):
    stored = json.loads((ROOT / "bench/results/cpu.json").read_text())
    numbers = dict.fromkeys(("median_us", "wall_us", "device_us", "gb_s", "percent_of_copy",
                             "peak_mb"))
    refused = {"op": "gae", "shape": "8 x 2048", "implementation": "peer", "device": "cpu",
               **numbers, "speed_up": {}, "rounds": 0, "note": "no number: TypeError: x | y",
               "errors": []}
    stored["machine"]["peers"] = {"trl": "1.16.0", "verl": "not installed"}
    text = gpu_check.report.markdown({**stored, "rows": [*stored["rows"], refused]}, None)
    assert "| peer | - | - | - | - | - | - |  | no number: TypeError: x / y |" in text
    assert "Peers: trl 1.16.0, verl not installed." in text


@pytest.mark.skipif(os.environ.get("TPPO_TEST_FULL") != "1", reason="a minute: make test-full")
def test_the_dry_run(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "bench/gpu_check.py", "--smoke", "--out",
                           tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "smoke.json").read_text())
    states = {part["name"]: part["state"] for part in written["checks"]}
    assert states == {"tests": "ok", "sanitizer": "skipped", "learning": "ok", "benchmarks": "ok"}
    assert written["rows"]


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "bench/gpu_check.py", "--out", tmp_path],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and "torch sees no GPU here" in done.stdout
