"""The figures that the operators are held to, as data, and the verdict over measured rows.

GPU goals are for an H200, each against the best peer side by side in one run. `measure` is a column
of a row, or "over NAME": how many times faster than the row of that name in the same case;
"over NAME, host included" compares calls from Python, "over its products" is the time divided by
that of the case's products at the matmul rate of the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
LINEAR = "16384 x 4096 x 128256 bfloat16"
WORDS = {"percent_of_copy": "of the copy bandwidth", "percent_of_matmul": "of the product's rate",
         "device_us": "time on the device"}
UNITS = {"percent_of_copy": " %", "percent_of_matmul": " %", "device_us": " us", "launches": ""}
LIGER_NOTE = ("Liger's Hopper kernel has no row: nvidia-cutlass-dsl is not installed. For this "
              "shape Liger publishes 788 TFLOP/s forward; its Triton path is the row "
              '"Liger (Triton)".')


@dataclass(frozen=True)
class Goal:
    """One figure of one implementation of one case."""

    op: str
    shape: str
    measure: str
    bound: float
    at_most: bool = False
    about: bool = False  # what is to be expected, and no verdict
    implementation: str = "op"
    device: str = "cuda"

    def text(self) -> str:
        """The goal in words."""
        sign = "about" if self.about else "<=" if self.at_most else ">="
        who = "" if self.implementation == "op" else f" ({self.implementation})"
        return (f"{self.op} {self.shape}{who}: {WORDS.get(self.measure, self.measure)} {sign} "
                f"{self.bound:g}{self.unit()}")

    def unit(self) -> str:
        """What stands behind a figure of it."""
        return "x" if self.measure.startswith("over ") else UNITS[self.measure]


def _cpu(op: str, shape: str, measure: str, bound: float, implementation: str = "op") -> Goal:
    return Goal(op, shape, measure, bound, implementation=implementation, device="cpu")


def _linear(shape: str, measure: str, bound: float, **more: Any) -> Goal:
    return Goal("linear_logprobs", f"{LINEAR} 100.0% valid{shape}", measure, bound, **more)


def _cpu_linear() -> list[Goal]:
    goals = []
    for share, bound in (("100.0%", 1.0), ("6.0%", 6.0), ("1.2%", 6.0)):
        shape = f"1024 x 512 x 16000 float32 {share} valid"
        goals += [_cpu(op, shape, "over eager", bound)
                  for op in ("linear_logprobs", "linear_ppo_loss")]
        goals.append(_cpu("linear_logprobs", shape, "over eager", 0.7, "recompute"))
    return goals


FULL = f"{LINEAR} 100.0% valid"
FROZEN_LOSS = f"{LINEAR}, frozen head 100.0% valid"
GOALS: tuple[Goal, ...] = (
    Goal("token_logprobs", "8192 x 151936 bfloat16 forward", "percent_of_copy", 85),
    Goal("token_logprobs", "8192 x 151936 bfloat16 forward+backward", "percent_of_copy", 80),
    _linear(", forward", "percent_of_matmul", 88),
    _linear("", "over its products", 1.12, at_most=True, implementation="8 GiB"),
    _linear("", "over verl", 1.9, implementation="8 GiB"),
    _linear("", "over verl triton", 1.9, implementation="8 GiB"),
    _linear(", sum of log-probs", "over Liger (Triton)", 1.25, implementation="8 GiB"),
    _linear(", frozen head", "over its products", 1.15, at_most=True),
    Goal("linear_ppo_loss", FULL, "over its products", 1.12, at_most=True, implementation="8 GiB"),
    Goal("linear_ppo_loss", FROZEN_LOSS, "over its products", 1.15, at_most=True),
    Goal("token_advantages", "512 x 2048", "device_us", 15, at_most=True),
    Goal("token_advantages", "512 x 2048", "over composed", 1000),
    Goal("token_advantages", "8192 x 4096", "percent_of_copy", 60),
    Goal("gae", "8192 x 4096", "percent_of_copy", 75),
    Goal("gae", "512 x 2048", "percent_of_copy", 60, about=True),  # a launch alone is 4 us
    Goal("ppo_loss", "64 x 512 forward+backward", "over eager, host included", 5),
    Goal("ppo_loss", "64 x 512 forward+backward", "over compiled, host included", 2),
    Goal("ppo_loss", "64 x 512 forward+backward", "launches", 2, at_most=True),
    Goal("token_head", "16384 x 4096 bfloat16, K 1, forward+backward", "percent_of_copy", 85),
    Goal("token_head", "16384 x 4096 float32, K 1, forward+backward", "percent_of_copy", 85),
    Goal("step", "1.5B P 2048, R 24, G 8, 8 prompts", "over dense", 5),
    Goal("step", "1.5B P 2048, R 24, G 8, 8 prompts", "over TRL 1.12", 5),
    _cpu("gae", "8 x 2048", "over loop", 50),
    _cpu("token_logprobs", "512 x 32000 float32 forward", "over eager", 6),
    *_cpu_linear(),
    _cpu("shared_prefix", "P 512, R 16, G 8 Llama 4 x 256 forward+backward", "over dense", 3.5),
    _cpu("step", "demo P 256, R 16, G 8, 4 prompts", "over dense", 3),
)


def of(op: str, shape: str, device: str) -> list[Goal]:
    """The goals of one case."""
    return [g for g in GOALS if (g.op, g.shape, g.device) == (op, shape, device)]


def named(goals: list[Goal]) -> set[str]:
    """The implementations that goals speak of."""
    return {g.implementation for g in goals} | {
        g.measure.removeprefix("over ").split(",")[0] for g in goals
        if g.measure.startswith("over ")}


def _value(goal: Goal, rows: dict[str, Row]) -> tuple[float | None, str]:
    """(the figure, why there is none)."""
    row = rows.get(goal.implementation)
    if row is None or row["median_us"] is None:
        return None, row["note"] if row else f"no row of {goal.implementation}"
    if goal.measure == "over its products":
        percent = row.get("percent_of_matmul")
        return (100 / percent, "") if percent else (None, "the case counts no products")
    if not goal.measure.startswith("over "):
        value = row.get(goal.measure)
        return (value, "") if value is not None else (None, f"{goal.measure} was not measured")
    name, _, host = goal.measure.removeprefix("over ").partition(", ")
    other, column = rows.get(name), "wall_us" if host else "median_us"
    if other is None or other[column] is None:
        return None, other["note"] if other else f"no row of {name}"
    return other[column] / row[column], ""


def _step_rows(steps: list[Row]) -> list[Row]:
    """Rows of whole updates in the form of an operator's."""
    rows = []
    for s in steps:
        case = {"op": "step", "device": s["device"], "note": "",
                "shape": f"{s['model']} P {s['prompt']}, R {s['response']}, G {s['group']}, "
                         f"{s['groups']} prompts"}
        name = "op" if s["prefix"] == "shared" else s["prefix"]
        rows.append({**case, "implementation": name, "median_us": 1e3 * s["update_ms"],
                     "wall_us": 1e3 * s["update_ms"]})
        if s.get("trl_ms") and name == "op":
            rows.append({**case, "implementation": "TRL 1.12", "median_us": 1e3 * s["trl_ms"],
                         "wall_us": 1e3 * s["trl_ms"]})
    return rows


def judge(results: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """A verdict on each goal of a device: reached, missed, or no figure and why."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in [*results.get("rows", []), *_step_rows(results.get("steps", []))]:
        if row["device"] == device:
            cases.setdefault((row["op"], row["shape"]), {})[row["implementation"]] = row
    verdicts = []
    for goal in GOALS:
        if goal.device != device:
            continue
        value, why = _value(goal, cases.get((goal.op, goal.shape), {}))
        met = value is not None and (value <= goal.bound if goal.at_most else value >= goal.bound)
        verdicts.append({"goal": goal.text(), "value": value, "unit": goal.unit(), "why": why,
                         "verdict": "no figure" if value is None else "measured" if goal.about
                         else "reached" if met else "missed"})
    return verdicts


def missed(rows: list[Row], device: str) -> list[str]:
    """What the rows of one case miss of its goals."""
    cases = {(r["op"], r["shape"]) for r in rows}
    here = {g.text() for op, shape in cases for g in of(op, shape, device)}
    return [f"{v['goal']}, measured {v['value']:.2f}" for v in judge({"rows": rows}, device)
            if v["goal"] in here and v["verdict"] == "missed"]
