"""A person who labels by keys in a real browser, in a run of the demo: what fifty labels give.

    python tests/tppo/simulated_person.py --seed 1 --out runs/person-1 [more flags of tppo run]

He judges as the rule does, and calls 9 % of the words wrong.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import Browser, browser, chromium

from tppo.labels.rule import label_by_rule

WRONG = 0.09  # of the words
SECONDS = 2.0  # that he looks at an answer


def main(flags: list[str]) -> int:
    """Run, label and wait for the end; the exit code of the run."""
    out, seed = Path(_flag(flags, "--out")), int(_flag(flags, "--seed"))
    command = [sys.executable, "-m", "tppo", "run", *flags, "--label.labeller", "hand"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if address := re.search(r"http://127\S+", line):
            _label(address[0], out, random.Random(seed))
    return process.wait()


def _flag(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def _label(address: str, out: Path, rng: random.Random) -> None:
    targets = {row["id"]: row["targets"] for row in _rows(out / "data/train.jsonl")}
    answers = {row["id"]: row for row in _rows(out / "generate/answers.jsonl")}
    program = chromium()
    assert program is not None, "no chromium is installed"
    with tempfile.TemporaryDirectory() as folder, browser(program, Path(folder)) as page:
        page.open(address)
        page.wait("item && !busy")
        keys = 0
        while not page.run("document.getElementById('work').hidden"):
            answer = answers[page.run("item.id")]
            true = label_by_rule("", answer["text"], targets[answer["session"]], 0.6)
            for _, value in true.words:
                _press(page, str(value ^ (rng.random() < WRONG)))
            _press(page, "Enter")
            keys += len(true.words) + 1
            time.sleep(SECONDS)
            page.wait("!busy")
        figures = page.run("document.getElementById('figures').innerText")
        print(f"{keys} keys; {figures}", file=sys.stderr)
        _press(page, "Enter")
        page.wait("document.body.innerText.includes('can be closed')")


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _press(page: Browser, key: str) -> None:
    text, code = ("\r", key) if key == "Enter" else (key, f"Digit{key}")
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key=key, code=code, text=text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
