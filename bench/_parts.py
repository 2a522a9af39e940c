"""The parts of gpu-check: what each runs, in what time, and what makes it a failure.

In the order in which they count: what is claimed, then what supports it. Each part is one or more
processes; what those find they write to the journal themselves.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import _goals

if TYPE_CHECKING:
    from gpu_check import Check, Ended, Part

GOAL_BENCHES = ("token_logprobs", "linear_logprobs", "linear_ppo_loss", "token_advantages", "gae",
                "ppo_loss", "token_head")
OTHER_BENCHES = ("entropy", "kl", "prefix_attention", "reduce", "value_loss", "whiten")
STEP = "step"  # a process of its own: it wants another release of TRL
ROLLOUT = "rollout"  # a part of its own: engines start slowly
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
            "eval_every": 2, "min_format": 0.0, "max_kl": 100.0, "without_signal": True},
    "eval": {"temperatures": [1.0], "heat_users": 1},
}


@dataclass(frozen=True)
class Spec:
    """A part: its work, its share of the time on a GPU and of `--smoke`, in seconds, and whether
    it may be skipped without a word in the exit status."""

    work: Callable[[Check, Part], None]
    budget_s: float
    smoke_s: float
    required: bool = True

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return self.work.__name__.replace("_", "-")


def lacks(check: Check, *packages: str) -> str | None:
    """Which of the packages are neither installed nor among the wheels; None where all are."""
    absent = [p for p in packages if importlib.util.find_spec(p) is None
              and not any((place / p).exists() or (place / f"{p}.py").exists()
                          for place in check.places)]
    return f"not installed: {', '.join(absent)}" if absent else None


def tail(said: str, lines: int = 3) -> str:
    """The last lines of an output, on one."""
    return " | ".join(line.strip() for line in said.strip().splitlines()[-lines:])


def judge(part: Part, ended: Ended, failures: str = "") -> bool:
    """Marks a part by how a command of it ended; whether that was well."""
    if ended.status == 0:
        return True
    if ended.status is None:
        part.time_out(f"{failures or 'no failure before'}; {tail(ended.said, 1)}")
    else:
        part.fail(failures or f"exit status {ended.status}: {tail(ended.said, 8)}")
    return False


def failed_tests(said: str) -> str:
    """What pytest names as failed."""
    return "; ".join(re.findall(r"^(?:FAILED|ERROR) (.*)$", said, re.MULTILINE)[:20])


def machine(check: Check, part: Part) -> None:
    """The card, its driver, the bandwidth of a copy and the rate of a product."""
    judge(part, check.command(part, sys.executable, "bench/_machine.py", check.journal.path))
    if found := check.results().get("machine"):
        part.said.append(f"{found['gpu'] or found['cpu']}, copy {found['copy_gb_s']:,.0f} GB/s, "
                         f"{found['matmul_dtype']} product {found['matmul_tflop_s']:,.3g} TFLOP/s")


def build(check: Check, part: Part) -> None:
    """The extension in place, for this GPU's architecture alone; on a CPU beside it, to no end."""
    if why := lacks(check, "setuptools", "pybind11"):
        return part.skip(f"{why}: the compiled backends are left out")
    env, where = {}, ["--inplace"]
    capability = check.results().get("machine", {}).get("capability")
    if capability:
        env["TPPO_CUDA_ARCHS"] = os.environ.get("TPPO_CUDA_ARCHS", "".join(map(str, capability)))
    if check.smoke:
        env["TPPO_BUILD_CUDA"] = "0"
        where = [f"--build-lib={check.work}/lib", f"--build-temp={check.work}/build"]
    ended = check.command(part, sys.executable, "setup.py", "build_ext", *where, **env)
    judge(part, ended)
    part.said += re.findall(r"tppo-kernels: (.*)", ended.said)[:1]


def first_touch(check: Check, part: Part) -> None:
    """Small checks that stand alone: see `_first_touch`."""
    shares = 2 if check.smoke else 8
    groups = [*(f"ops/{i}/{shares}" for i in range(shares)), "products", "launches", "runtime"]
    with ThreadPoolExecutor(2 if check.smoke else 8) as pool:
        ended = list(pool.map(lambda group: check.worker(
            part, sys.executable, "bench/_first_touch.py", check.journal.path, group), groups))
    units = check.results()["first_touch"]
    states = {s: [u for u in units if u["state"] == s] for s in ("ok", "failed", "skipped")}
    part.said.append(", ".join(f"{len(found)} {s}" for s, found in states.items()))
    for unit in states["failed"]:
        part.fail(f"{unit['unit']}: {unit['said']}")
    for group, one in zip(groups, ended, strict=True):
        if one.status is None:
            part.time_out(f"{group} did not end")
        elif one.status != 0 and not states["failed"]:
            part.fail(f"{group}: exit status {one.status}: {tail(one.said)}")


def bench_command(check: Check, names: tuple[str, ...], *options: str) -> list[object]:
    """The benchmarks of these operators, each row written as it is measured."""
    size = ["--bench-smoke", "--bench-rounds=2"] if check.smoke else ["--bench-rounds=5"]
    return [sys.executable, "-m", "pytest", *(f"bench/bench_{n}.py" for n in names), "-rf", "-p",
            "no:cacheprovider", f"--bench-journal={check.journal.path}", *size, *options]


def goals(check: Check, part: Part) -> None:
    """The rows that DESIGN's goals speak of, the whole step last."""
    if why := lacks(check, "pytest", "pytest_benchmark"):
        return part.skip(why)
    ended = check.worker(part, *bench_command(check, GOAL_BENCHES, "--bench-goals"),
                         share=0.7)
    judge(part, ended, failed_tests(ended.said))
    step(check, part, "--bench-goals")
    said = report_of_goals(check)
    if said:
        part.said.append(said)


def step(check: Check, part: Part, *options: str) -> None:
    """The benchmark of whole updates, beside the last TRL that has them."""
    if why := lacks(check, "transformers"):
        return part.fail(f"no whole step: {why}")
    ended = check.worker(part, *bench_command(check, (STEP,), *options), apart=True)
    judge(part, ended, failed_tests(ended.said))


def report_of_goals(check: Check) -> str:
    """How many goals are reached, and which are not."""
    device = "cpu" if check.smoke else "cuda"
    found = _goals.judge(check.results(), device)
    by = {v: [g["goal"] for g in found if g["verdict"] == v]
          for v in ("reached", "missed", "no figure")}
    text = ", ".join(f"{len(by[v])} {v}" for v in by)
    return f"goals: {text}" + (f"; missed: {' / '.join(by['missed'])}" if by["missed"] else "")


def tests(check: Check, part: Part) -> None:
    """tests/gpu."""
    if why := lacks(check, "pytest"):
        return part.skip(why)
    choice = ["-k", "test_sample and (gae or whiten)"] if check.smoke else []
    if not lacks(check, "xdist") and not check.smoke:
        choice = ["-n", "8"]  # most of the time is Triton's compilation
    ended = check.command(part, sys.executable, "-m", "pytest", "tests/gpu", "-p",
                          "no:cacheprovider", "-rfE", "--durations=3", *choice)
    if judge(part, ended, failed_tests(ended.said)):
        part.said.append(tail(ended.said, 1))


def kernels(check: Check, part: Part) -> None:
    """Instructions of the hot kernels, by ncu."""
    ended = check.command(part, sys.executable, "bench/_hot_kernels.py", check.journal.path)
    if ended.status == 3:
        return part.skip(f"ncu does not answer: {tail(ended.said)}")
    if judge(part, ended):
        part.said.append(tail(ended.said, 1))


def benchmarks(check: Check, part: Part) -> None:
    """What the goals left, as far as time goes."""
    if why := lacks(check, "pytest", "pytest_benchmark"):
        return part.skip(why)
    ended = check.worker(part, *bench_command(check, (*OTHER_BENCHES, *GOAL_BENCHES)), share=0.6)
    if judge(part, ended, failed_tests(ended.said)):
        step(check, part)
    found = check.results()
    part.said.append(f"{len(found['rows'])} rows, {len(found['steps'])} steps")


def rollouts(check: Check, part: Part) -> None:
    """Tokens a second of each engine that samples answers."""
    if why := lacks(check, "pytest", "transformers"):
        return part.skip(why)
    ended = check.worker(part, *bench_command(check, (ROLLOUT,)))
    judge(part, ended, failed_tests(ended.said))
    for row in check.results()["rollouts"]:
        what = row["note"] if row["tokens_s"] is None else f"{row['tokens_s']:,.0f} tokens/s"
        part.said.append(f"{row['engine']}, {row['response']}: {what}")


def learning(check: Check, part: Part) -> None:
    """`tppo run` on the fastest backends and on the reference, both at once: their curves agree."""
    if why := lacks(check, "transformers", "tokenizers", "safetensors", "tyro", "rich", "pydantic",
                    "ruamel", "icu4py", "sacrebleu"):
        return part.skip(f"{why}: the trainer cannot run")
    config = check.work / "learning.yaml"  # JSON is YAML
    config.write_text(json.dumps(TINY if check.smoke else SMALL))

    def run(name: str) -> Ended:
        shutil.rmtree(check.work / f"run-{name}", ignore_errors=True)
        env = {"TPPO_BACKEND": "reference"} if name == "reference" else {}
        return check.command(part, sys.executable, "-m", "tppo", "run", "--out",
                             check.work / f"run-{name}", "--config", config,
                             "--device", "cpu" if check.smoke else "cuda", **env)

    names = ("fastest", "reference")
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run, names))
    if not all([judge(part, one) for one in ended]):
        return
    curves = {}
    for name in names:
        lines = (check.work / f"run-{name}/train/metrics.jsonl").read_text().splitlines()
        curves[name] = [json.loads(line)["objective/scores"] for line in lines]
        part.said.append(f"{name}: scores {curves[name][0]:.3f} to {curves[name][-1]:.3f}")
    if why := disagreement(*curves.values()):
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


def sanitizer(check: Check, part: Part) -> None:
    """The compiled kernels under memcheck and racecheck, by a bare script."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or check.smoke:
        return part.skip("a CPU" if check.smoke else "compute-sanitizer is not on the PATH")
    for kind, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        ended = check.command(
            part, tool, f"--tool={kind}", "--error-exitcode=9", "--print-limit=20", sys.executable,
            "bench/_sanitized.py", share=share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if "Device not supported" in ended.said:
            return part.skip("compute-sanitizer refuses this machine: Device not supported")
        if judge(part, ended):
            part.said.append(f"{kind}: {tail(ended.said, 1)}")


PARTS = (
    Spec(machine, 20, 12), Spec(build, 45, 40), Spec(first_touch, 60, 25), Spec(goals, 215, 32),
    Spec(tests, 55, 15), Spec(kernels, 20, 6, required=False), Spec(benchmarks, 20, 14),
    Spec(learning, 60, 23), Spec(rollouts, 45, 10, required=False),
    Spec(sanitizer, 20, 1, required=False))
