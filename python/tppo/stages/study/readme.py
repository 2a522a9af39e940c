"""What the README says of studies and of the demo, written from the files in `docs/studies`.

Whether one thing is better than another is said as the intervals say it, so that a study with other
figures leaves other sentences.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tppo.errors import DataError
from tppo.stages.study.figures import AT_KL, LEVELS
from tppo.stages.study.summary import replace_between
from tppo.stages.study.tables import (
    MAX_KL,
    MIN_FORMAT,
    Point,
    number,
    share,
    within_limits,
)
from tppo.store.jsonl import read_object, write_json, write_text

WIDTH = 120  # columns of the README
DEMO = "demo.json"
LITTLE = 0.05  # of rank correlation
ROWS = {  # of result.json -> what the table of the demo calls them
    "repeat_last": "repeat the last query",
    "sft": "SFT, temperature 1",
    "sft_t0.2": "SFT, temperature .2",
    "sft_continued": "SFT, trained on for as many steps as PPO",
    "tppo": "**token-level PPO**, {steps} steps",
    "paid_at_end": "the same rewards, paid at the end (critic fitted)",
    "sentence_labels": "sentence labels, the same answers (critic fitted)",
    "tppo_transfer": "PPO, intents never seen in training (SFT {sft_transfer})",
}
COLUMNS = {"distinct_queries": 2, "ndcg": 2, "intent": 2, "kl": 1, "length": 1, "format": 2}
HEAD = ("answers by", "relevance, 95 %", "distinct queries", "nDCG", "intent", "KL", "length",
        "format", "steps to .8, .9")  # fmt: skip


def write_readme(studies: Path, readme: Path, runs: Sequence[Path] = ()) -> None:
    """Replace what stands between the marks `demo` and `evidence` of a README.

    studies: the folder of labels.json, credit.json and demo.json.  runs: folders of finished runs
    of the demo, one a seed, whose results demo.json holds from then on.
    Errors: DataError where a file or a mark is not there.
    """
    if runs:
        results = [_read(run / "result.json") for run in runs]
        by_seed = sorted(results, key=lambda result: result["test"]["seed"])
        write_json(studies / DEMO, {"results": by_seed})
    text = readme.read_text(encoding="utf-8")
    parts = {
        "demo": demo(_read(studies / DEMO)["results"]),
        "evidence": evidence(_read(studies / "labels.json"), _read(studies / "credit.json")),
    }
    for mark, body in parts.items():
        text = replace_between(text, mark, body, str(readme))
    write_text(readme, text)


def _read(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if found is None:
        raise DataError(f"{path}: no such file, expected the figures of a study or of the demo")
    return found


def demo(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of the first seed, and what the others give."""
    first, *others = results
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    names = {"steps": first["training"]["steps"],
             "sft_transfer": _plain(first.get("sft_transfer", {}).get("relevance"), 3)}  # fmt: skip
    for key, name in ROWS.items():
        if key in first:
            training = first["training"] if key == "tppo" else first[key].get("training")
            cells = [name.format(**names), *_cells(first[key], training, bold=key == "tppo")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_seeds(others)])


def _cells(row: Mapping[str, Any], training: Mapping[str, Any] | None, *, bold: bool) -> list[str]:
    low, high = row["relevance_interval"]
    shown = f"{_plain(row['relevance'], 3)} ({_plain(low, 3)}-{_plain(high, 3)})"
    cells = [f"**{shown}**" if bold else shown]
    # What is no answer of a policy has neither KL nor a form.
    kept = [name for name in COLUMNS if "kl" in row or name not in ("kl", "length", "format")]
    cells += [_plain(row[name], COLUMNS[name]) if name in kept else "" for name in COLUMNS]
    return [*cells, _reached(training or {})]


def _reached(training: Mapping[str, Any]) -> str:
    """The steps after which held-out answers were first seen at the two levels."""
    known = training.get("reached")
    steps = [] if known is None else [known.get(level) or "never" for level in ("0.8", "0.9")]
    return ", ".join(map(str, steps))


def _seeds(others: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row of what PPO gives at other seeds."""
    if not others:
        return []
    rows = [result["tppo"] for result in others]
    name = _listed([str(result["test"]["seed"]) for result in others])
    figures = [", ".join(_plain(row[key], digits) for row in rows)
               for key, digits in {"relevance": 3, **COLUMNS}.items()]  # fmt: skip
    reached = "; ".join(_reached(result["training"]) for result in others)
    cells = [f"PPO, seed{'s' * (len(others) > 1)} {name}", *figures, reached]
    return ["| " + " | ".join(cells) + " |"]


def evidence(labels: Mapping[str, Any], credit: Mapping[str, Any]) -> str:
    """What the studies of labels and of credit say, in three points."""
    figures = labels["figures"]
    setting = next(found for found in credit["figures"]["credit"]
                   if found["question"] == "credit" and found["seeds"])  # fmt: skip
    points = [
        f"**Labels by word save labelled answers.** {_labels(figures)}",
        f"**Rewards at tokens, the same reward model.** {_credit(setting)}",
        f"**At the end, and per nat.** {_plateau(figures, setting)}",
    ]
    return "\n".join(
        textwrap.fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ",
                      break_on_hyphens=False) for text in points
    )  # fmt: skip


def _labels(figures: Mapping[str, Any]) -> str:
    found = []
    for figure, after, text in (
        ("correlation", False, "{} of {} labelled as a whole are enough to rank answers as well, "
         "{} with the paper's labelling errors"),
        ("relevance", True, "{} of {} for PPO's relevance, {} with errors"),
    ):  # fmt: skip
        clean, noisy = (_setting(figures, noise, after)["needed"][figure] for noise in (0, 1))
        pairs = [(row, wrong) for row, wrong in zip(clean, noisy, strict=True)
                 if None not in (*row["ratio"], *wrong["ratio"])]  # fmt: skip
        row, wrong = pairs[-1]
        found.append(text.format(_at_most(row), _count(row["sentences"]), _at_most(wrong)))
    price = [figures["label_cost"]["templates"][name]["price"] for name in ("words", "sentence")]
    return (f"{'; '.join(found)}. {_enough(figures)}; one costs {price[0] / price[1]:.1f} times as "
            "much as a label of the whole.")  # fmt: skip


def _enough(figures: Mapping[str, Any]) -> str:
    """The fewest labels by word to which the most add no relevance that is sure, and surely less
    than `LITTLE` to the rank correlation, wrong labels or none.
    """
    arms = [_setting(figures, noisy, True)["arms"]["words"] for noisy in (0, 1)]
    answers = [_count(n) for n in arms[0]["answers"]]
    enough = [
        all(arm["more"]["relevance"][i][1] <= 0 <= arm["more"]["relevance"][i][2]
            and arm["more"]["correlation"][i][2] < LITTLE for arm in arms)
        for i in range(len(answers))
    ]  # fmt: skip
    return f"{answers[enough.index(True)]} by word do what {answers[-1]} do"


def _setting(figures: Mapping[str, Any], noisy: int, after: bool) -> Mapping[str, Any]:
    """The setting with or without label noise, after PPO or before."""
    return next(found for found in figures["labels"]
                if bool(found["steps"]) == after and found["seeds"]
                and bool(found["noise"]["words"]) == bool(noisy))  # fmt: skip


def _at_most(row: Mapping[str, Any]) -> str:
    bound = row["ratio"][0] <= row["smallest"] * (1 + 1e-9)
    return f"{'at most ' * bound}{share(row['ratio'])}"


def _credit(setting: Mapping[str, Any]) -> str:
    arms, ratios = setting["arms"], setting["ratios"]
    token, end, fitted = (arms[name] for name in ("token", "end", "end, critic fitted"))
    ends = {str(at): [arm["reached"][str(at)][2] for arm in (token, end, fitted)] for at in LEVELS}
    level = [at for at, highest in ends.items() if None not in highest][-1]
    fit = setting["critic_fits"]["end, critic fitted"]["answers"]
    plain, with_fit = (ratios[name][level] for name in ("end", "end, critic fitted"))
    return (
        f"To relevance {_plain(float(level), 1)}, {share(plain)} of the answers that their total, "
        f"paid at the end, takes{_unless_sure(plain)}; {share(with_fit)} with its critic fitted on "
        f"{_count(fit)} old answers{_unless_sure(with_fit)}."
    )


def _unless_sure(ratio: Point) -> str:
    """What has to be said of a ratio whose interval holds 1."""
    _, low, high = ratio
    return ", which may be none less" if low is None or high is None or low <= 1 <= high else ""


def _plateau(figures: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    clean = _setting(figures, 0, True)
    arms = [clean["arms"][name] for name in ("words", "sentences")]
    three = [setting["arms"][name] for name in ("token", "end", "end, critic fitted")]
    last = [arm["relevance"][-1] for arm in arms]
    at_kl, at_end = ([arm["at_kl"] for arm in three], [arm["relevance"][-1] for arm in three])
    most, sampled = (_count(arm["answers"][-1]) for arm in (arms[0], three[0]))
    return (
        f"{most} labels by word or as a whole end at relevance {_values(last)}; rewards at tokens, "
        f"at the end, and there with the critic fitted at {_values(at_end)} after {sampled} "
        f"answers, and are at {_values(at_kl)} at KL {AT_KL:g}. {_beside(arms, three)}"
    )


def _beside(labels: Sequence[Mapping[str, Any]], credit: Sequence[Mapping[str, Any]]) -> str:
    """Whether all that is quoted keeps the form, stays near SFT and repeats itself no more."""
    ends = [beside for arm in labels for beside in arm["beside"]]
    for arm in credit:
        first, last = arm["rows"][0], arm["rows"][-1]
        left = last["distinct_queries"] / max(first["distinct_queries"], 1e-9)
        ends.append(last | {"distinct_share": left})
    if all(map(within_limits, ends)):
        return f"All have format {number(MIN_FORMAT)} or more and KL {MAX_KL:g} or less."
    worst, furthest = min(end["format"] for end in ends), max(end["kl"] for end in ends)
    return f"Format is {number(worst)} at worst, KL {furthest:.1f} at most."


def _told_apart(points: Sequence[Point]) -> str:
    """Whether the intervals of all overlap."""
    if any(end is None for point in points for end in point):
        return ""
    lows, highs = ([point[i] or 0.0 for point in points] for i in (1, 2))
    return " (not told apart)" if max(lows) <= min(highs) else ""


def _values(points: Sequence[Point]) -> str:
    return f"{_listed([number(point[0]) for point in points])}{_told_apart(points)}"


def _listed(texts: Sequence[str]) -> str:
    *head, last = texts
    return f"{', '.join(head)} and {last}" if head else last


def _count(n: float) -> str:
    return f"{n:,.0f}"


def _plain(value: float | None, digits: int) -> str:
    """`.793`, `15.0`, `0`; empty where there is none."""
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return "0" if not float(text) else text.replace("0.", ".", 1) if text[0] == "0" else text
