"""The closing figures of a study: what its outcomes say, with intervals.

A figure is of the seeds that all of its arms have, so that a study is of use before it is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tppo.stages.study.config import Arm, Noise, Part, StudyConfig
from tppo.stages.study.statistics import (
    Array,
    Interval,
    correlations,
    interval,
    means,
    ranks,
    ratio_at_level,
    reached,
    resampled,
    spearman,
)
from tppo.stages.study.work import Outcome
from tppo.store.jsonl import plain

LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of relevance
AT_KL = 3.0  # nats an answer, at which the arms' relevance is compared
BESIDE = ("words", "distinct_queries", "format", "kl", "length")  # means over the users


class Curve(NamedTuple):
    """A figure of an arm at increasing x: [x], with intervals; and the same resampled."""

    x: list[float]
    y: list[Interval]
    draws: Array  # [draws, x]

    @property
    def values(self) -> list[float]:
        """The figure itself at each x."""
        return [point.value for point in self.y]


Group = dict[tuple[str, float], dict[int, Outcome]]  # (arm, x) -> seed -> outcome


def _seeds(found: Mapping[Any, Mapping[int, Any]]) -> list[int]:
    """The seeds that all of them have."""
    each = [set(by_seed) for by_seed in found.values()]
    return sorted(set.intersection(*each)) if each else []


def _relevant(row: Mapping[str, Any]) -> Array:
    return np.array([float(value) for value in row["relevant"]])


def _resampled(
    blocks: Sequence[Array], statistic: Callable[[Array, Any], Array]
) -> tuple[Array, Array]:
    """The statistic of all seeds, [arms], and resampled, [draws, arms]."""
    whole = [statistic(block, np.arange(block.shape[-1])[None])[0] for block in blocks]
    return np.mean(whole, 0), resampled(blocks, statistic)


def over_answers(
    outcomes: Sequence[Outcome], queries: int, noise: Noise, steps: int
) -> dict[str, Any]:
    """Question A at one noise: correlation and relevance of each arm over labelled answers.

    Returns {"seeds", "arms": {arm: {"correlation": Curve, "relevance": Curve, "beside": [...]}}},
    without relevance where there are no steps of PPO.
    """
    found: Group = {}
    for outcome in outcomes:
        cell = outcome.cell
        if (cell.queries, cell.noise, cell.steps) == (queries, noise, steps):
            found.setdefault((cell.arm.name, cell.answers), {})[cell.seed] = outcome
    seeds = _seeds(found)
    order = {name: i for i, name in enumerate(dict.fromkeys(arm for arm, _ in found))}
    keys = sorted(found, key=lambda key: (order[key[0]], key[1]))
    if not seeds:
        return {"seeds": [], "arms": {}}
    last = {key: [found[key][seed].found for seed in seeds] for key in keys}
    rank = [
        np.stack([
            np.stack([ranks(last[key][k]["scores"]), ranks(last[key][k]["shares"])])
            for key in keys
        ])
        for k in range(len(seeds))
    ]  # fmt: skip
    figures = {"correlation": _resampled(rank, correlations)}
    if steps:
        relevance = [
            np.stack([_relevant(last[key][k]["curve"][-1]) for key in keys])
            for k in range(len(seeds))
        ]
        figures["relevance"] = _resampled(relevance, means)
    arms: dict[str, Any] = {}
    for name in dict.fromkeys(arm for arm, _ in keys):
        index = [i for i, key in enumerate(keys) if key[0] == name]
        x = [keys[i][1] for i in index]
        arms[name] = {
            figure: Curve(
                x, [interval(float(value[i]), draws[:, i]) for i in index], draws[:, index]
            )
            for figure, (value, draws) in figures.items()
        }
        arms[name]["beside"] = [_beside_answers(last[keys[i]]) for i in index]
        arms[name]["more"] = {
            figure: _more([float(value[i]) for i in index], draws[:, index])
            for figure, (value, draws) in figures.items()
        }
    return {"seeds": seeds, "arms": arms}


def _more(values: Sequence[float], draws: Array) -> list[Interval]:
    """What the most labelled answers add to each number of them, [answers]; draws [draws, answers].
    """
    return [
        interval(values[-1] - value, draws[:, -1] - draws[:, i]) for i, value in enumerate(values)
    ]


def _beside_answers(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What stands beside the figures of an arm at one number of answers, of its seeds."""
    by_seed = {"correlation_by_seed": [spearman(one["scores"], one["shares"]) for one in found]}
    if not all(one["curve"] for one in found):
        return by_seed
    last = [one["curve"][-1] for one in found]
    beside: dict[str, Any] = _beside(last)
    begin = [one["curve"][0] for one in found]
    first = _beside(begin) | {"relevance": float(np.mean([_relevant(row).mean() for row in begin]))}
    beside["distinct_share"] = beside["distinct_queries"] / max(first["distinct_queries"], 1e-9)
    by_seed["by_seed"] = [float(_relevant(row).mean()) for row in last]
    return {**beside, "sft": first, **by_seed}


def _beside(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [name for name in (*BESIDE, "explained_variance") if all(name in row for row in rows)]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def labels_needed(words: Curve, sentences: Curve) -> list[dict[str, Any]]:
    """For each number of answers labelled as a whole: how many labelled by word do the same.

    `ratio` is the answers labelled by word over those labelled as a whole, at the level that the
    curve of the latter has; it is at most that where `words` begin above the level already.
    """
    rows = []
    for at, level in zip(sentences.x, sentences.values, strict=True):
        ratio = ratio_at_level((words.x, words.values), (sentences.x, sentences.values), at)
        draws = np.array([
            ratio_at_level((words.x, a), (sentences.x, b), at)
            for a, b in zip(words.draws, sentences.draws, strict=True)
        ])  # fmt: skip
        rows.append({
            "sentences": at, "level": level, "ratio": interval(ratio, draws),
            "smallest": words.x[0] / at,
        })  # fmt: skip
    return rows


def added(chosen: Curve, first: Curve) -> list[dict[str, Any]]:
    """For each number of labelled answers that both have: what `chosen` has more than `first`, and
    how many of `first` have as much.
    """
    rows = []
    for i, n in enumerate(chosen.x):
        if n not in first.x:
            continue
        k = first.x.index(n)
        more = chosen.values[i] - first.values[k]
        like = reached(chosen.values[i], first.x, first.values, log=True)
        pairs = zip(first.draws, chosen.draws[:, i], strict=True)
        draws = np.array([reached(b, first.x, a.tolist(), log=True) for a, b in pairs])
        rows.append({
            "answers": n, "more": interval(more, chosen.draws[:, i] - first.draws[:, k]),
            "like": interval(like, draws), "smallest": first.x[0],
        })  # fmt: skip
    return rows


def over_steps(outcomes: Sequence[Outcome], queries: int, arms: Sequence[Arm]) -> dict[str, Any]:
    """Question B: the curves of arms with one reward model over the answers that were sampled.

    Returns {"seeds", "arms": {arm: {"relevance": Curve over sampled answers, "rows": [...],
    "reached": {level: Interval of answers}}}, "ratios": {arm: {level: Interval}}, "gains": {arm:
    Interval at the last x}, "critic_fits": {arm: mean figures}}, ratios and gains against the first
    arm.
    """
    names = [arm.name for arm in arms if arm.method == "ppo"]
    found: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        if outcome.cell.arm.name in names and outcome.cell.queries == queries:
            found.setdefault(outcome.cell.arm.name, {})[outcome.cell.seed] = outcome
    seeds, keys = _seeds(found), [name for name in names if name in found]
    if not seeds:
        return {"seeds": [], "arms": {}, "ratios": {}, "gains": {}, "critic_fits": {}}
    curves = {name: [found[name][seed].found["curve"] for seed in seeds] for name in keys}
    x = [float(row["answers"]) for row in curves[keys[0]][0]]
    blocks = [
        np.concatenate([np.stack([_relevant(row) for row in curves[name][k]]) for name in keys])
        for k in range(len(seeds))
    ]
    value, draws = _resampled(blocks, means)
    result: dict[str, Any] = {"seeds": seeds, "arms": {}}
    spans = {name: slice(i * len(x), (i + 1) * len(x)) for i, name in enumerate(keys)}
    reached_in = {
        name: {level: [reached(level, x, y.tolist()) for y in draws[:, span]]
               for level in LEVELS}
        for name, span in spans.items()
    }  # fmt: skip
    for name, span in spans.items():
        rows = [_beside([curve[i] for curve in curves[name]]) for i in range(len(x))]
        points = [interval(float(v), d) for v, d in zip(value[span], draws[:, span].T, strict=True)]
        result["arms"][name] = {
            "relevance": Curve(x, points, draws[:, span]),
            "rows": rows,
            "at_kl": _at_kl(x, [row["kl"] for row in rows], value[span], draws[:, span]),
            "reached": {
                level: interval(reached(level, x, value[span].tolist()), np.array(known))
                for level, known in reached_in[name].items()
            },
        }
    result["ratios"] = _ratios(result["arms"], reached_in)
    ends, first = {name: span.stop - 1 for name, span in spans.items()}, spans[keys[0]].stop - 1
    result["gains"] = {
        name: interval(float(value[end] - value[first]), draws[:, end] - draws[:, first])
        for name, end in ends.items() if end != first
    }  # fmt: skip
    fits = {name: [found[name][seed].found["critic_fit"] for seed in seeds] for name in keys}
    result["critic_fits"] = {name: _means(rows) for name, rows in fits.items() if rows[0]}
    return result


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def without_ppo(outcomes: Sequence[Outcome], queries: int, arms: Sequence[Arm]) -> dict[str, Any]:
    """{arm: {"seeds", "relevance": Interval, "beside"}} of the arms that are not PPO."""
    result: dict[str, Any] = {}
    for arm in arms:
        rows = {o.cell.seed: o.found["curve"][-1] for o in outcomes
                if o.cell.arm == arm and o.cell.queries == queries}  # fmt: skip
        if arm.method == "ppo" or not rows:
            continue
        value, draws = _resampled([_relevant(row)[None] for row in rows.values()], means)
        result[arm.name] = {
            "seeds": sorted(rows), "relevance": interval(float(value[0]), draws[:, 0]),
            "beside": _beside([*rows.values()]),
        }  # fmt: skip
    return result


def _at_kl(x: Sequence[float], kl: Sequence[float], value: Array, draws: Array) -> Interval:
    """The relevance where the mean KL, made nondecreasing, first is `AT_KL`; NaN where never."""
    at = reached(AT_KL, x, kl)
    if not math.isfinite(at):
        return Interval(math.nan, math.nan, math.nan)
    there = np.array([np.interp(at, x, draw) for draw in draws])
    return interval(float(np.interp(at, x, value)), there)


def _ratios(
    arms: Mapping[str, Any], reached_in: Mapping[str, Mapping[float, Sequence[float]]]
) -> dict[str, dict[float, Interval]]:
    """Answers of the first arm to a level over those of each other arm, paired.

    reached_in: of each arm and level the answers to it, resampled.
    """
    first, *others = arms
    found: dict[str, dict[float, Interval]] = {}
    for name in others:
        found[name] = {}
        for level in LEVELS:
            pairs = zip(reached_in[first][level], reached_in[name][level], strict=True)
            whole = (arms[arm]["reached"][level].value for arm in (first, name))
            found[name][level] = interval(_ratio(*whole), np.array([_ratio(*p) for p in pairs]))
    return found


def _ratio(a: float, b: float) -> float:
    """a / b; NaN where a was not reached, or where both curves begin above the level, at 0."""
    if not math.isfinite(a) or a == b == 0:
        return math.nan
    return a / b if b else math.inf


def all_figures(study: StudyConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The closing figures, as JSON holds them: an interval is [figure, low, high], and what was
    not reached is null.
    """
    of_question: dict[str, list[Part]] = {}
    for part in study.parts:
        of_question.setdefault(part.question, []).append(part)
    by_cell = {outcome.cell: outcome for outcome in outcomes}

    def chosen(question: str) -> list[Outcome]:
        parts = of_question.get(question, [])
        cells = dict.fromkeys(cell for part in parts for cell in part.cells())
        return [by_cell[cell] for cell in cells if cell in by_cell]

    over_labels = {question: chosen(question) for question in ("labels", "choice")}
    over_time = {question: chosen(question) for question in ("credit", "settings", "guides")}
    return {
        question: [
            _labels(found, *setting, chosen=question == "choice")
            for setting in dict.fromkeys((o.cell.queries, o.cell.noise, o.cell.steps)
                                         for o in found)
        ] for question, found in over_labels.items()
    } | {
        "credit": [
            {"question": question} | _credit(found, queries, size)
            for question, found in over_time.items()
            for queries, size in dict.fromkeys((o.cell.queries, o.cell.step_answers) for o in found)
        ],
    }


def _labels(
    outcomes: Sequence[Outcome], queries: int, noise: Noise, steps: int, *, chosen: bool
) -> dict[str, Any]:
    """The figures of one setting; where arms differ in which answers are labelled, what each has
    more than the first.
    """
    found = over_answers(outcomes, queries, noise, steps)
    result: dict[str, Any] = {"queries": queries, "noise": plain(noise), "steps": steps,
                              "seeds": found["seeds"], "arms": {}, "needed": {}}  # fmt: skip
    known = [name for name in ("correlation", "relevance") if steps or name == "correlation"]
    for name, arm in found["arms"].items():
        result["arms"][name] = {
            "answers": arm["correlation"].x, "beside": arm["beside"],
            "more": arm["more"], **{name: arm[name].y for name in known},
        }  # fmt: skip
    if chosen:
        first, *others = found["arms"].values() if found["arms"] else [{}]
        result["added"] = {
            name: {figure: added(other[figure], first[figure]) for figure in known}
            for name, other in zip([*found["arms"]][1:], others, strict=True)
        }
        return plain(result)
    kinds = {o.cell.arm.labels: o.cell.arm.name for o in reversed(outcomes)}
    if {"words", "sentences"} <= kinds.keys() and kinds["words"] in found["arms"]:
        words, sentences = (found["arms"].get(kinds[kind]) for kind in ("words", "sentences"))
        if words and sentences:
            result["needed"] = {
                figure: labels_needed(words[figure], sentences[figure])
                for figure in known
            }
    return plain(result)


def _credit(outcomes: Sequence[Outcome], queries: int, size: int) -> dict[str, Any]:
    """The arms with so many queries an answer and answers a step."""
    sizes = {o.cell.step_answers for o in outcomes if o.cell.queries == queries}
    outcomes = [o for o in outcomes if (o.cell.queries, o.cell.step_answers) == (queries, size)]
    arms = list(dict.fromkeys(outcome.cell.arm for outcome in outcomes))
    found = over_steps(outcomes, queries, arms)
    result: dict[str, Any] = {
        "queries": queries, "step_answers": size if len(sizes) > 1 else None, "arms": {},
        "others": without_ppo(outcomes, queries, arms),
        **{name: found[name] for name in ("seeds", "ratios", "gains", "critic_fits")},
    }  # fmt: skip
    for name, arm in found["arms"].items():
        result["arms"][name] = {
            "answers": arm["relevance"].x, "relevance": arm["relevance"].y,
            "rows": arm["rows"], "reached": arm["reached"], "at_kl": arm["at_kl"],
        }  # fmt: skip
    return plain(result)
