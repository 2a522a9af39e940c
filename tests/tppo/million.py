"""A generated log of a million sessions through inspect, data, label and map: rate and memory.

`python tests/tppo/million.py --sessions 1000000 --out DIR` runs each stage as its own process on
answers that are made without a model.  For each it prints sessions per second of processor time in
every tenth of the way (another load on the machine moves them less than wall time) and the peak
resident memory, of which torch and transformers take their part ("idle") before anything is read.
It fails where the last tenth is slower than 0.8 of the first, or the memory is out of bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

STAGE = """
import sys, atexit, re
def peak():
    kib = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    print(f"peak {int(kib) / 1024:.0f} MiB", file=sys.stderr)
atexit.register(peak)
import tppo.progress
tppo.progress.INTERVAL_S = float(sys.argv.pop(1))
if sys.argv[1] == "idle":
    import torch, transformers
    import tppo.stages.label, tppo.stages.reward_model, tppo.stages.sft
elif sys.argv[1] == "prepare":
    sys.path.insert(0, sys.argv[2])
    import million
    million.prepare(*sys.argv[3:])
else:
    from tppo.cli import main
    main(sys.argv[1:])
"""
SLOWEST = 0.8  # of the first tenth's rate
MOST_BYTES = 256  # a session, for the hashes of what was seen; as objects it takes thousands
MOST_MIB = 96  # beyond the idle peak and the hashes


def write_log(path: Path, sessions: int) -> None:
    """A log of generated sessions, each of another user."""
    from tppo.sessions.config import SessionsConfig
    from tppo.sessions.session import write_sessions
    from tppo.sessions.synthetic import generated_splits

    for name, _, rows in generated_splits(SessionsConfig(train_users=sessions), 0):
        if name == "train":
            write_sessions(path, rows)


def prepare(out: str) -> None:
    """A tokenizer, and for each training session the true answer of the session before it."""
    from itertools import islice

    from tppo.labels.queries import SEPARATOR
    from tppo.models.tokenizer import train_tokenizer
    from tppo.progress import track
    from tppo.sessions.prompts import encode_answer
    from tppo.sessions.session import iter_sessions
    from tppo.store.jsonl import write_jsonl
    from tppo.store.run_folder import RunFolder

    root = Path(out)
    train = root / "data" / "train.jsonl"
    texts = (SEPARATOR.join(s.targets) for s in islice(iter_sessions(train), 2_000))
    tokenizer = train_tokenizer(texts, 1024)
    folder = RunFolder(root)
    with folder.stage("sft") as work:
        tokenizer.save_pretrained(work / "model")

    def rows():
        before = ("nothing",)
        for session in track(iter_sessions(train), "answers"):
            ids = encode_answer(tokenizer, before)
            yield {
                "id": f"{session.id}#0", "session": session.id, "prompt_ids": ids[:1],
                "response_ids": ids, "finish": "eos", "text": SEPARATOR.join(before),
            }  # fmt: skip
            before = session.targets

    with folder.stage("generate") as work:
        write_jsonl(work / "answers.jsonl", rows())


def measure(name: str, arguments: list[str], interval_s: float) -> dict[str, object]:
    """Run one stage; its seconds, its peak memory, its rates from the lines it prints."""
    start = time.monotonic()
    command = [sys.executable, "-c", STAGE, str(interval_s), *arguments]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    marks, peak = [], 0
    for line in process.stderr:
        print(f"  {line.rstrip()}", flush=True)
        if found := re.match(rf"{name}[^/]*? (\d+) [\d.e+]+/s", line):
            marks.append((int(found[1]), _processor_seconds(process.pid)))
        if found := re.match(r"peak (\d+) MiB", line):
            peak = int(found[1])
    if process.wait() != 0:
        sys.exit(f"{name} failed with status {process.returncode}")
    seconds = round(time.monotonic() - start, 1)
    count = marks[-1][0] if marks else 0
    return {"stage": name, "seconds": seconds, "sessions": count, "peak_mib": peak,
            "per_cpu_second": tenths(marks)}  # fmt: skip


def tenths(marks: list[tuple[int, float]]) -> list[int]:
    """Rate in each tenth between the first and the last of (count, seconds), interpolated."""
    if len(marks) < 2 or marks[0][0] == marks[-1][0]:
        return []
    first, last = marks[0][0], marks[-1][0]
    edges = [first + (last - first) * i / 10 for i in range(11)]
    times = [_at(marks, edge) for edge in edges]
    step = (last - first) / 10
    return [round(step / max(b - a, 1e-9)) for a, b in zip(times, times[1:], strict=False)]


def _at(marks: list[tuple[int, float]], count: float) -> float:
    """Seconds when that many were done."""
    for (a, start), (b, end) in zip(marks, marks[1:], strict=False):
        if count <= b and b > a:
            return start + (end - start) * (count - a) / (b - a)
    return marks[-1][1]


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def faults(results: list[dict], slowest: float = SLOWEST) -> list[str]:
    """What does not hold: a rate that falls, memory that grows with more than the hashes."""
    idle = next((result["peak_mib"] for result in results if result["stage"] == "idle"), None)
    found = []
    for result in results:
        name, rates = result["stage"], result["per_cpu_second"]
        if rates and rates[-1] < slowest * rates[0]:
            found.append(f"{name}: {rates[0]}/s in the first tenth, {rates[-1]}/s in the last")
        most = MOST_MIB + MOST_BYTES * result["sessions"] / 2**20
        if idle is not None and result["peak_mib"] > idle + most:
            found.append(f"{name}: peak {result['peak_mib']} MiB, expected {idle} + {most:.0f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("runs/million"))
    parser.add_argument("--stages", nargs="*", help="some of them, in order; by default all")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two lines")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log, run = options.out / "log.jsonl", str(options.out / "run")
    if not log.exists():
        write_log(log, options.sessions)
    here = str(Path(__file__).parent)
    stages = {
        "idle": ["idle"],
        "inspect": ["data", "inspect", str(log), "--examples", "0"],
        "data": ["data", "--data", str(log), "--out", run],
        "answers": ["prepare", here, run],
        "label": ["label", "--out", run],
        "map": ["map", "--out", run],
    }
    names = options.stages or stages
    results = [measure(name, stages[name], options.interval) for name in names]
    for result in results:
        print(json.dumps(result))
    if found := faults(results):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
