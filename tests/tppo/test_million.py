"""A small form of `million.py`: a log three times as long takes no more memory and no slower."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from million import faults, tenths

PROGRAM = """
import json, re, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import million
import tppo.sessions.split, tppo.stages.label
from tppo.cli import main

tppo.sessions.split.SMALL = 500  # a log up to this size is held in memory
for sessions in (2_000, 6_000):
    root = Path(sys.argv[2]) / str(sessions)
    root.mkdir()
    million.write_log(root / "log.jsonl", sessions)
    run, rates = str(root / "run"), {}
    commands = {
        "inspect": lambda: main(["data", "inspect", str(root / "log.jsonl"), "--examples", "0"]),
        "data": lambda: main(["data", "--data", str(root / "log.jsonl"), "--out", run]),
        "answers": lambda: million.prepare(run),
        "label": lambda: main(["label", "--out", run]),
        "map": lambda: main(["map", "--out", run]),
    }
    for name, command in commands.items():
        start = time.process_time()
        command()
        rates[name] = round(sessions / (time.process_time() - start))
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
    print(json.dumps({"sessions": sessions, "peak_mib": peak, "rates": rates}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_longer_log_takes_no_more_memory_and_keeps_the_rate(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, long = [json.loads(line) for line in done.stdout.splitlines() if line[:2] == '{"']
    print(short, long, sep="\n")
    lines = (tmp_path / "6000/run/map/categories.jsonl").read_text().splitlines()
    assert len(lines) == sum(1 for _ in open(tmp_path / "6000/run/data/train.jsonl"))
    # 4,000 further sessions as objects, with their answers and labels, take more than 30 MiB.
    assert long["peak_mib"] - short["peak_mib"] < 10
    # A step whose cost grows with what came before would halve the rate, and more.
    assert all(long["rates"][name] > 0.6 * rate for name, rate in short["rates"].items())


def test_what_the_measure_of_a_million_calls_a_fault():
    steady = [(n, 0.01 * n) for n in range(0, 1001, 50)]
    assert tenths(steady) == [100] * 10
    slowing = [(n, 0.01 * n + 1e-5 * n * n) for n in range(0, 1001, 50)]
    rates = tenths(slowing)
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.5 * rates[0]
    assert tenths([]) == tenths([(5, 1.0)]) == []
    idle = {"stage": "idle", "sessions": 0, "peak_mib": 400, "per_cpu_second": []}
    data = {"stage": "data", "sessions": 10**6, "peak_mib": 600, "per_cpu_second": tenths(steady)}
    assert faults([idle, data]) == []
    assert faults([idle, {**data, "peak_mib": 800}]) == [
        "data: peak 800 MiB, expected 400 + 340"
    ]  # fmt: skip
    assert faults([idle, {**data, "per_cpu_second": rates}])[0].startswith("data: 91/s in the ")
