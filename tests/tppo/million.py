"""A generated log of a million sessions through inspect, data, label and map: rate and memory.

`python tests/tppo/million.py --sessions 1000000 --out DIR` runs each stage as its own process on
answers that are made without a model.  It prints, for each, sessions per second of processor time
in the first and in the last third (another load on the machine does not move them), and the peak
resident memory, of which torch and transformers take their part ("idle") before anything is read.
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
if sys.argv[1] == "idle":
    import torch, transformers
    import tppo.stages
elif sys.argv[1] == "prepare":
    sys.path.insert(0, sys.argv[2])
    import million
    million.prepare(*sys.argv[3:])
else:
    from tppo.cli import main
    main(sys.argv[1:])
"""


def write_log(path: Path, sessions: int) -> None:
    """A log of generated sessions, each of another user."""
    from tppo.config import SessionsConfig
    from tppo.sessions import write_sessions
    from tppo.synthetic import generated_splits

    for name, _, rows in generated_splits(SessionsConfig(train_users=sessions), 0):
        if name == "train":
            write_sessions(path, rows)


def prepare(out: str) -> None:
    """A tokenizer, and for each training session the true answer of the session before it."""
    from itertools import islice

    from tppo.jsonl import write_jsonl
    from tppo.progress import track
    from tppo.prompts import SEPARATOR, encode_answer
    from tppo.sessions import iter_sessions
    from tppo.tokenizer import train_tokenizer

    root = Path(out)
    train = root / "data" / "train.jsonl"
    texts = (SEPARATOR.join(s.targets) for s in islice(iter_sessions(train), 2_000))
    tokenizer = train_tokenizer(texts, 1024)
    tokenizer.save_pretrained(root / "sft" / "model")

    def rows():
        before = ("nothing",)
        for session in track(iter_sessions(train), "answers"):
            ids = encode_answer(tokenizer, before)
            yield {
                "id": f"{session.id}#0", "session": session.id, "prompt_ids": ids[:1],
                "response_ids": ids, "finish": "eos", "text": SEPARATOR.join(before),
            }  # fmt: skip
            before = session.targets

    (root / "generate").mkdir(parents=True, exist_ok=True)
    write_jsonl(root / "generate" / "answers.jsonl", rows())


def measure(name: str, arguments: list[str]) -> dict[str, object]:
    """Run one stage; its seconds, its peak memory, its rates from the lines it prints."""
    start = time.monotonic()
    command = [sys.executable, "-c", STAGE, *arguments]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    marks, peak = [], None
    for line in process.stderr:
        print(f"  {line.rstrip()}", flush=True)
        if found := re.match(rf"{name}[^/]*? (\d+) [\d.e+]+/s", line):
            marks.append((_processor_seconds(process.pid), int(found[1])))
        if found := re.match(r"peak (\d+) MiB", line):
            peak = int(found[1])
    if process.wait() != 0:
        sys.exit(f"{name} failed with status {process.returncode}")
    third = len(marks) // 3
    rates = [
        round((part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0]))
        for part in (marks[: third + 1], marks[-third - 1 :])
        if len(part) > 1
    ]
    seconds = round(time.monotonic() - start, 1)
    return {"stage": name, "seconds": seconds, "peak_mib": peak, "per_cpu_second": rates}


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("runs/million"))
    parser.add_argument("--stages", nargs="*", help="some of them, in order; by default all")
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
    results = [measure(name, stages[name]) for name in options.stages or stages]
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
