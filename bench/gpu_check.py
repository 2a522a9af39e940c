"""`make gpu-check`: everything that wants a GPU, in one command, in less than nine minutes.

In place, without network, with the Python that runs it: builds the extension for this GPU, runs
tests/gpu, a part of it again under compute-sanitizer, trains the demo small on the fastest backends
and again on the reference (the curves must agree within noise), and runs the benchmarks. Writes
bench/results/<gpu>.json, .md and .svg. Every part has a budget of seconds; one that fails or runs
out of it makes the exit status 1 (benchmarks go as far as the time does, and name the rest), one
that lacks a package or a tool is skipped, and says so.

--smoke goes through the parts on a CPU at tiny sizes, to try this file where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).parent.parent
TOTAL_S = 530
BENCHES = ("token_logprobs", "ppo_loss", "value_loss", "token_advantages", "gae", "token_head",
           "whiten", "prefix_attention", "linear_logprobs", "linear_ppo_loss", "step")
SMALL = {
    "sessions": {"train_users": 2000, "heldout_users": 96, "test_users": 96, "transfer_users": 16},
    "sft": {"max_steps": 300, "eval_every": 50, "decay_steps": 250},
    "generate": {"samples": 1000}, "reward_model": {"epochs": 1},
    "ppo": {"steps": 12, "checkpoint_every": 12, "eval_every": 6},
    "eval": {"temperatures": [1.0], "heat_users": 2},
}
TINY = {
    "sessions": {"train_users": 120, "heldout_users": 16, "test_users": 16, "transfer_users": 8},
    "scratch": {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 400},
    "sft": {"max_steps": 10, "eval_every": 5, "decay_steps": 10},
    "generate": {"samples": 48}, "reward_model": {"epochs": 1},
    "ppo": {"steps": 2, "batch_size": 8, "minibatch_size": 8, "checkpoint_every": 2,
            "eval_every": 2, "min_format": 0.0, "max_kl": 100.0},
    "eval": {"temperatures": [1.0], "heat_users": 1},
}


@dataclass
class Part:
    """What became of one part. state: ok, failed, or skipped."""

    name: str
    state: str = "ok"
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    def fail(self, why: str) -> None:
        """Marks the part failed, and why."""
        self.state = "failed"
        self.said.append(why)

    def skip(self, why: str) -> None:
        """Marks the part skipped, and why."""
        self.state = "skipped"
        self.said.append(why)


class Check:
    """The parts of one run, their clock, and the folder of what they leave."""

    def __init__(self, smoke: bool, out: Path, total_s: float):
        self.smoke, self.out = smoke, out
        self.end = time.monotonic() + total_s
        self.parts: list[Part] = []
        self.results: dict[str, Any] = {"rows": [], "steps": []}
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])}
        if smoke:
            self.env |= {"TPPO_GPU_SMOKE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def part(self, name: str, work: Callable[[Check, Part], None]) -> None:
        """Runs one part; what it raises is its failure, and the next part still runs."""
        part = Part(name)
        self.parts.append(part)
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            work(self, part)
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            part.fail(f"{type(error).__name__}: {error}")
        part.seconds = time.monotonic() - start
        print(f"   {part.state}, {part.seconds:.0f} s: {'; '.join(part.said)}", flush=True)

    def command(self, budget_s: float, *command: object, **env: str) -> tuple[int | None, str]:
        """(exit status, output) of a command; the status is None where its time was up."""
        left = min(budget_s, self.end - time.monotonic())
        if left <= 0:
            return None, "no time was left"
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env={**self.env, **env},
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)
        try:
            said, _ = process.communicate(timeout=left)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
            try:
                said, _ = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                said, _ = process.communicate()
            return None, f"{said}\nstopped after {left:.0f} s"


def lacks(*packages: str) -> str | None:
    """Which of the packages are not installed, as a reason; None where all are."""
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def tail(said: str, lines: int = 3) -> str:
    """The last lines of an output, on one."""
    return " | ".join(line.strip() for line in said.strip().splitlines()[-lines:])


def build(check: Check, part: Part) -> None:
    """The extension in place, for this GPU's architecture alone."""
    import torch

    if why := lacks("setuptools", "pybind11"):
        return part.skip(f"{why}: the compiled backends are left out")
    env = {}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        env["TPPO_CUDA_ARCHS"] = os.environ.get("TPPO_CUDA_ARCHS", f"{major}{minor}")
    status, said = check.command(150, sys.executable, "setup.py", "build_ext", "--inplace", **env)
    if status != 0:
        return part.fail(tail(said, 8))
    part.said += re.findall(r"tppo-kernels: (.*)", said)[:1]


def tests(check: Check, part: Part) -> None:
    """tests/gpu."""
    if why := lacks("pytest"):
        return part.skip(why)
    choice = ["-k", "test_sample or test_packed"] if check.smoke else []
    if not lacks("xdist") and not check.smoke:
        choice = ["-n", "8"]  # most of the time is Triton's compilation
    status, said = check.command(200, sys.executable, "-m", "pytest", "tests/gpu", "-p",
                                 "no:cacheprovider", "-rf", "--durations=3", *choice)
    failed = re.findall(r"^FAILED (.*)$", said, re.MULTILINE)
    part.said.append(tail(said, 1))
    if status != 0:
        part.fail("; ".join(failed[:20]) or tail(said, 8))
        (check.out / "tests.log").write_text(said)


def sanitizer(check: Check, part: Part) -> None:
    """The samples of the operators under memcheck and racecheck."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or check.smoke:
        return part.skip("compute-sanitizer is not on the PATH" if tool is None else "a CPU")
    for kind in ("memcheck", "racecheck"):
        status, said = check.command(
            45, tool, f"--tool={kind}", "--error-exitcode=9", sys.executable, "-m", "pytest",
            "tests/gpu/test_gpu_backends.py", "-p", "no:cacheprovider", "-k",
            "test_sample and (gae or advantages or ppo_loss or value_loss or token_head or whiten)"
            " and not linear and not reference", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if "Device not supported" in said:
            return part.skip("compute-sanitizer refuses this machine: Device not supported")
        part.said.append(f"{kind}: {tail(said, 1)}")
        if status != 0:
            part.fail(f"{kind} exit status {status}")
            (check.out / f"{kind}.log").write_text(said)


def learning(check: Check, part: Part) -> None:
    """`tppo run` on the fastest backends and on the reference: curves agree, times side by side."""
    if why := lacks("transformers", "tokenizers", "safetensors", "tyro", "rich", "pydantic",
                    "ruamel", "sacrebleu"):
        return part.skip(f"{why}: the trainer cannot run")

    config = check.out / "learning.yaml"
    config.write_text(json.dumps(TINY if check.smoke else SMALL))
    curves: dict[str, list[float]] = {}
    for name in ("fastest", "reference"):
        folder = check.out / f"run-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        env = {"TPPO_BACKEND": "reference"} if name == "reference" else {}
        status, said = check.command(
            90, sys.executable, "-m", "tppo", "run", "--out", folder, "--config", config,
            "--device", "cpu" if check.smoke else "cuda", **env)
        if status != 0:
            return part.fail(f"{name}: {tail(said, 6)}")
        lines = (folder / "train/metrics.jsonl").read_text().splitlines()
        curves[name] = [json.loads(line)["objective/scores"] for line in lines]
        seconds = json.loads((folder / "train/report.json").read_text())["seconds"]
        part.said.append(f"{name}: PPO {seconds:.1f} s, scores {curves[name][0]:.3f} to "
                         f"{curves[name][-1]:.3f}")
    if why := disagreement(curves["fastest"], curves["reference"]):
        part.fail(why)


def disagreement(a: list[float], b: list[float]) -> str | None:
    """Why two curves are not the same within noise; None where they are.

    Their second halves' means, held to three standard errors of the difference.
    """
    if not all(map(math.isfinite, a + b)) or len(a) != len(b):
        return f"curves of {len(a)} and {len(b)} steps, some not finite"
    a, b = a[len(a) // 2:], b[len(b) // 2:]
    gap = statistics.mean(a) - statistics.mean(b)
    noise = math.hypot(*(statistics.pstdev(x) / math.sqrt(len(x)) for x in (a, b)))
    if abs(gap) <= 3 * noise + 0.05:
        return None
    return f"scores differ by {gap:+.3f}, noise {noise:.3f}"


def benchmarks(check: Check, part: Part) -> None:
    """Each file of benchmarks as far as time goes; rows are merged."""
    if why := lacks("pytest", "pytest_benchmark"):
        return part.skip(why)
    names = [n for n in BENCHES if (ROOT / f"bench/bench_{n}.py").exists()]
    size = ["--bench-rounds=2", "--bench-smoke"] if check.smoke else ["--bench-rounds=5"]
    for name in names[:2] if check.smoke else names:
        target = check.out / f"{name}.json"
        status, said = check.command(
            75, sys.executable, "-m", "pytest", f"bench/bench_{name}.py", "-p", "no:cacheprovider",
            f"--bench-json={target}", *size)
        if target.exists():
            found = json.loads(target.read_text())
            check.results["machine"] = found["machine"]
            for kind in ("rows", "steps"):
                check.results[kind] += found.get(kind, [])
        if status is None:
            part.said.append(f"{name}: cut short, or not begun: no time was left")
        elif status != 0:
            part.fail(f"{name}: {tail(said, 4)}")
    part.said.append(f"{len(check.results['rows'])} rows, {len(check.results['steps'])} steps")


def finish(check: Check, target: Path) -> int:
    """Writes results and report; the exit status."""
    check.results["checks"] = [asdict(part) for part in check.parts]
    if "machine" in check.results:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(check.results, indent=1) + "\n")
        print(f"written: {target}, {report.write(target)}")
    for part in check.parts:
        print(f"{part.state:8s} {part.name} ({part.seconds:.0f} s)")
    return int(any(part.state == "failed" for part in check.parts))


def main() -> int:
    """Runs every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-check",
                        help="folder for logs and run folders")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not options.smoke:
        print("gpu-check: torch sees no GPU here; --smoke tries the machinery on a CPU")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.smoke, options.out.resolve(), TOTAL_S)
    name = "smoke" if options.smoke else torch.cuda.get_device_name().lower().replace(" ", "-")
    target = check.out / "smoke.json" if options.smoke else ROOT / f"bench/results/{name}.json"
    if not options.smoke:
        check.part("build", build)
    for work in (tests, sanitizer, learning, benchmarks):
        check.part(work.__name__, work)
    return finish(check, target)


if __name__ == "__main__":
    sys.exit(main())
