"""The closing table, and what a reader should know before trusting it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tppo.console import print_rows
from tppo.evaluation.judge import RULE, first_figure, spoken
from tppo.labels.shares import difference_of

COLUMNS = {
    "distinct_queries": "distinct",
    "ndcg": "nDCG",
    "intent": "intent",
    "chrf": "chrF",
    "kl": "KL",
    "length": "length",
    "format": "format",
}  # figure -> header of the closing table, behind the judge's first figure
MIN_DISTINCT = 0.9  # of SFT's distinct queries: with fewer, a run repeats itself
LOW_AUC = 0.8
FEW_RELEVANT = 0.05  # share of relevant tokens below which a reward means little


def print_table(result: dict[str, Any], title: str) -> None:
    """Print the findings, a row for each policy or baseline, and the judge, in 80 columns."""
    console = Console()
    for finding in result["findings"]:
        console.print(finding, markup=False, highlight=False, style="bold")
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("answers by", no_wrap=True)
    shown, columns = rows_of(result), columns_of(result)
    figure = next(iter(columns))
    for header in columns.values():
        table.add_column(header, justify="right", no_wrap=True)
    print_rows(
        console,
        table,
        [(name, [_cell(row, key) for key in columns]) for name, row in shown.items()],
    )
    lines = [pair_line(pair, found) for pair, found in result.get("pairs", {}).items()]
    lines += reached_line(result, figure)
    for line in [*lines, judge_line(result["test"], figure)]:
        console.print(line, markup=False, highlight=False)


def is_row(value: Any) -> bool:
    """Whether an entry of `result.json` is a row of the table."""
    return isinstance(value, dict) and first_figure(value) is not None


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the table by their names."""
    return {name: row for name, row in result.items() if is_row(row)}


def columns_of(result: dict[str, Any]) -> dict[str, str]:
    """The figures that the table shows, each with its header; the judge's first one leads."""
    rows = rows_of(result).values()
    figure = next(map(first_figure, rows), None) or "relevance"
    columns = {figure: f"{figure} 95 %"}
    columns |= {k: v for k, v in COLUMNS.items() if any(k in row for row in rows)}
    if "intent" in columns:  # which says more, and both do not fit 80 columns
        columns.pop("chrf", None)
    return columns


def digits_of(key: str) -> int:
    """Digits behind the point that a figure is shown with."""
    return 1 if key in ("chrf", "length", "kl") else 2 if "queries" in key else 3


def pair_line(pair: str, found: dict[str, Any]) -> str:
    """Who wins how often, of the answers to the same sessions."""
    low, high = found["net_interval"]
    return (
        f"{pair}, session by session: wins {found['win']:.3f}, ties {found['tie']:.3f}, loses "
        f"{found['lose']:.3f}; wins less losses {found['net']:+.3f} ({low:+.3f} to {high:+.3f})"
    )


def reached_line(result: dict[str, Any], figure: str) -> list[str]:
    """After how many steps each training first saw a level on held-out answers, if one did."""
    known = {"tppo": result.get("training", {})} | {
        name: row["training"] for name, row in result.items() if is_row(row) and "training" in row
    }
    found = {name: training.get("reached") or {} for name, training in known.items()}
    levels = {level for steps in found.values() for level, at in steps.items() if at is not None}
    if not levels:
        return []
    shown = "; ".join(
        f"{name} {', '.join(str(steps.get(level) or 'never') for level in sorted(levels))}"
        for name, steps in found.items()
    )
    return [f"steps until held-out {figure} reached {', '.join(sorted(levels))}: {shown}"]


def judge_line(test: dict[str, Any], figure: str) -> str:
    """Who judged, and whether that is independent of the training labels."""
    labeller, judge = test["labeller"], test["judge"]
    labellers = [labeller] if isinstance(labeller, str) else labeller
    others = [name for name in labellers if name != judge]
    trained = f"not by {spoken(others)}, which labelled"
    if judge in labellers:
        trained = f"which also labelled{f', with {spoken(others)},' if others else ''}"
    judged = (
        f"{figure}: judged by {spoken(judge)} ({trained} the reward model's data), here and where "
        "PPO's best step is kept"
    )
    if judge != RULE:
        return f"{judged}; with its 95 % interval"
    return (
        f"{judged}: at least {test['threshold']:.0%} of an answer's words stand in the "
        "true next queries, a repeated query counts as nothing; with Wilson's 95 % interval"
    )


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if key == first_figure(row):
        low, high = (_bound(bound) for bound in row[f"{key}_interval"])
        return f"{value:.3f} {low}-{high}"
    return f"{value:.{digits_of(key)}f}"


def _bound(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def findings(result: dict[str, Any]) -> list[str]:
    """Sentences for a reader who would not see it in the figures: PPO that did not help, and why;
    answers that repeat themselves.  None where SFT was not sampled at temperature 1.
    """
    if "sft" not in result:
        return []
    found, sft, tppo = [], result["sft"], result["tppo"]
    figure, gain, (low, _) = gain_of(result).values()
    figures = f"{figure} {tppo[figure]:.3f} against {sft[figure]:.3f} of SFT"
    if gain < 0:
        found.append(f"PPO made the answers worse ({figures}). {_cause(result)}")
    elif low <= 0:
        found.append(f"PPO did not help beyond chance ({figures}). {_cause(result)}")
    distinct = [row.get("distinct_queries", 0.0) for row in (tppo, sft)]
    share = distinct[0] / distinct[1] if distinct[1] else 1.0
    if share < MIN_DISTINCT:
        found.append(
            f"Answers of PPO repeat themselves: {distinct[0]:.2f} distinct queries an "
            f"answer against {distinct[1]:.2f} of SFT ({share:.0%}). Smaller "
            "--ppo.steps or a larger --ppo.kl-coef keeps more of SFT's variety"
        )
    return found


def gain_of(result: dict[str, Any]) -> dict[str, Any]:
    """What TPPO's answers have more than SFT's of the judge's first `figure`: the `difference` and
    its 95 % `interval`, of two samples that are independent.
    """
    figure = first_figure(result["tppo"]) or "relevance"
    gain, low, high = difference_of(
        *((row[figure], *row[f"{figure}_interval"]) for row in (result["tppo"], result["sft"]))
    )
    return {"figure": figure, "difference": gain, "interval": [low, high]}


def _cause(result: dict[str, Any]) -> str:
    """The likely cause that PPO did not help, the first that the figures of training show."""
    training = result["training"]
    auc, share = training["auc"], training["relevant_share"]
    first, last = training["first_reward"], training["last_reward"]
    if result["tppo"]["kl"] == 0:
        return "Likely cause: the policy did not move from SFT. Raise --ppo.lr or --ppo.steps"
    if not training["qualified"]:
        return (
            "Likely cause: no step kept the format and stayed near SFT, so the last weights were "
            "taken. Lower --ppo.lr or raise --ppo.kl-coef"
        )
    if share < FEW_RELEVANT:
        return (
            f"Likely cause: only {share:.1%} of the labelled tokens are relevant, which leaves "
            "little to be rewarded. Label more answers (--generate.samples), or train SFT on more "
            "sessions"
        )
    if auc is None or auc < LOW_AUC:
        shown = "unknown" if auc is None else f"{auc:.2f}"
        return (
            "Likely cause: the reward model hardly tells relevant from irrelevant words (AUC "
            f"{shown}, {training['sessions']} labelled sessions). Label more answers "
            "(--generate.samples) or train it longer (--reward-model.epochs)"
        )
    if last > first:
        return (
            f"Likely cause: the reward rose from {first:.2f} to {last:.2f} an answer without "
            "relevance: PPO found what the reward model rates too high. Label more answers or "
            "raise --ppo.kl-coef"
        )
    return (
        f"Likely cause: the reward did not rise ({first:.2f} to {last:.2f} an answer). Raise "
        "--ppo.steps or --ppo.lr"
    )
