"""`tppo study ser` and `tppo study pit`: the orderings of two papers on generated sessions.

ser   the seed model, each round, and the model of all labels: held-out accuracy, with labels of
      pairs and of words
pit   stage 0 alone, stage 1 alone and both, with as many steps of PPO each, paid per answer, per
      token, and by the true gap in place of the model's: relevance of test users' answers after
      0 .. k improvements

Each seed lies in a folder of its own, made by the stages themselves; what a seed has found is in
`outcomes.jsonl` before the next begins, and a study that was stopped goes on behind the last.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.evaluation.chart import Line, chart
from tppo.evaluation.page import page, table
from tppo.labels.queries import SEPARATOR
from tppo.labels.rule import label_by_rule, relevance_share
from tppo.methods.config import PITConfig, PPOConfig, RewardModelConfig, SERConfig, SFTConfig
from tppo.models.config import GenerateConfig
from tppo.progress import say
from tppo.rewards.function import FunctionReward
from tppo.sessions.config import SessionsConfig
from tppo.settings import Count, Seed, section
from tppo.stages.artifacts import SER_REPORT, SFT_MODEL
from tppo.stages.pit import judged_steps, session_better, session_training
from tppo.stages.pit_parts import gap_part, held_out, sft_part, stage_loop
from tppo.stages.run import Run
from tppo.store.jsonl import (
    SUM,
    append_line,
    is_as_written,
    parse_object,
    plain,
    read_json,
    whole_lines,
    write_json,
    write_text,
)

Row = Mapping[str, Any]  # arm, x, figures
PAID = {"answer": "per answer", "token": "per token", "rule": "by the rule"}  # the true gap
MATERIAL = ("data", "sft", "generate", "label", "map")


@section
class SystemStudy:
    """A study of one system."""

    system: Literal["ser", "pit"] = "ser"
    seeds: tuple[Seed, ...] = (0, 1, 2)
    steps: Count = 16
    """Of pit: PPO steps of each arm, those of its stages together."""
    settings: Config = field(default_factory=Config)


SEEDS = (0, 1, 2, 3, 4)
SMALL = Config(
    sessions=SessionsConfig(800, 48, 120, 1),
    sft=SFTConfig(max_steps=300, decay_steps=300),
    generate=GenerateConfig(samples=1600),
    reward_model=RewardModelConfig(repeated_share=0.0),
    ppo=PPOConfig(batch_size=16, minibatch_size=16),
    ser=SERConfig(pooling="mean", seed_share=0.08, heldout_share=0.5, tau_token=0.8, rounds=2),
    pit=PITConfig(scale=4.0),
)


def ser() -> SystemStudy:
    """Two answers to each of 800 histories, half of them held out; of the others 8 % of the labels,
    so few that more are worth it.

    A model of few labels is trained by small batches, or it would have made next to no step.
    """
    settings = replace(SMALL, reward_model=replace(SMALL.reward_model, batch_size=8))
    return SystemStudy("ser", seeds=SEEDS, settings=settings)


def pit() -> SystemStudy:
    """One answer to each of 400 histories, and the true next queries as the better one."""
    settings = replace(
        SMALL,
        sessions=replace(SMALL.sessions, train_users=400),
        generate=replace(SMALL.generate, samples=400),
        reward_model=replace(SMALL.reward_model, epochs=2),
        pit=replace(SMALL.pit, improve_steps=2),
    )
    return SystemStudy("pit", steps=12, settings=settings)


def seconds(system: Literal["ser", "pit"]) -> SystemStudy:
    """With a model that has learnt next to nothing: whether everything runs."""
    settings = replace(
        SMALL,
        sessions=SessionsConfig(60, 8, 8, 1),
        scratch=replace(
            Config().scratch, hidden_size=32, intermediate_size=32, layers=1, vocab_size=400
        ),
        sft=SFTConfig(max_steps=30, eval_every=30),
        generate=GenerateConfig(samples=120, max_new_tokens=16),
        reward_model=replace(SMALL.reward_model, epochs=1),
        ppo=PPOConfig(batch_size=4, minibatch_size=4, epochs=1, without_signal=True),
        ser=SERConfig(seed_share=0.5, rounds=1),
        pit=PITConfig(improve_steps=1),
    )
    return SystemStudy(system, seeds=(0,), steps=2, settings=settings)


SYSTEMS: dict[str, Callable[[], SystemStudy]] = {"ser": ser, "pit": pit}


def run_system(study: SystemStudy, out: Path) -> None:
    """Every seed that has no outcome yet; study.json and report.html behind each."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "outcomes.jsonl"
    mark = json.dumps(plain(replace(study, seeds=())), sort_keys=True)
    found = [row for row in _outcomes(path) if row["study"] == mark]
    for seed in study.seeds:
        if any(row["seed"] == seed for row in found):
            continue
        start = time.monotonic()
        rows = (ser_rows if study.system == "ser" else pit_rows)(study, out, seed)
        found.append({"seed": seed, "study": mark, "rows": plain(rows),
                      "seconds": round(time.monotonic() - start, 1)})  # fmt: skip
        append_line(path, found[-1])
        say(f"study {study.system}: seed {seed}, {found[-1]['seconds']:.0f} s")
        _write(study, out, found)
    for name, gain in _write(study, out, found).items():
        say(f"study {study.system}: {name}: {shown(gain)}")
    say(f"study: {out / 'study.json'}, {out / 'report.html'}")


def _outcomes(path: Path) -> list[dict[str, Any]]:
    """The outcomes of earlier processes; a last line that a kill has cut is taken off the file.

    Errors: DataError naming the line that has changed since it was written.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(whole_lines(path)[0], 1):
        values = parse_object(path, number, line)
        if not is_as_written(line) or not {"study", "seed", "rows"} <= values.keys():
            raise DataError(f"{path}: line {number}: not an outcome, or it has changed since it "
                            "was written; without the line its seed is trained again")  # fmt: skip
        values.pop(SUM, None)
        found.append(values)
    return found


def _write(
    study: SystemStudy, out: Path, found: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float | None]]:
    """study.json and report.html of the seeds that are done; the orderings."""
    chosen = [row for row in found if row["seed"] in study.seeds]
    points, gains = summed_up(chosen), compared(study.system, chosen)
    write_json(out / "study.json", {"study": plain(study), "points": points, "gains": gains,
                                    "outcomes": chosen})  # fmt: skip
    write_text(out / "report.html", report(study.system, points, gains))
    return gains


def _run(study: SystemStudy, out: Path, seed: int, **changes: Any) -> Run:
    config = fill_defaults(replace(study.settings, **changes), pretrained=False)
    run = Run(out=out / "material" / f"seed-{seed}", config=config, seed=seed)
    for name in MATERIAL:
        if not run.done(name):
            run.perform(name)
    return run


def ser_rows(study: SystemStudy, out: Path, seed: int) -> list[Row]:
    """Held-out accuracy (words: AUC too) of every round, and of models with true labels."""
    rows = list[Row]()
    for labels in ("pairs", "words"):
        run = _run(study, out, seed, ser=replace(study.settings.ser, labels=labels))
        run.perform("ser")
        report = read_json(run.out / SER_REPORT.path)
        for row in report["rounds"]:
            figures = {name: row.get(name) for name in ("accuracy", "auc", "kept", "kept_accuracy")}
            rows.append({"arm": labels, "x": row["round"], **figures})
        seed_alone, last = len(report["rounds"]) == 1, report["rounds"][-1]
        same = last if seed_alone else report["true_labels"] or report["all_labels"]
        others = {"last round": last, "true labels of the same": same,
                  "all labels": report["all_labels"]}  # fmt: skip
        rows += [{"arm": f"{labels}: {name}", "x": 0, "accuracy": found["accuracy"],
                  "auc": found.get("auc")} for name, found in others.items()]  # fmt: skip
    return rows


def pit_rows(study: SystemStudy, out: Path, seed: int) -> list[Row]:
    """Relevance of test users' answers after each improvement, of every arm.

    The arms of a seed share SFT, and those of a reward the gap model.
    """
    rows, n, run = list[Row](), study.steps, _run(study, out, seed)
    for reward in PAID:
        model: Literal["answer", "token"] = "token" if reward == "token" else "answer"
        paid = replace(run.config, pit=replace(run.config.pit, reward=model))
        training = replace(session_training(run), config=paid)
        train, heldout = held_out(training, session_better(run))
        parts = run.out / f"pit-{reward}"
        shutil.rmtree(parts, ignore_errors=True)  # of a process that was stopped
        for name, make in (("sft", sft_part), ("gap", gap_part)):
            (parts / name).mkdir(parents=True)
            if reward == "rule" or name == "sft" and reward == "token":
                shutil.copytree(run.out / "pit-answer" / name, parts / name, dirs_exist_ok=True)
            else:
                make(parts / name, training, train, heldout)
        arms = {"SFT alone": (0, 0), "stage 0": (n, 0), "stage 1": (0, n),
                "both": (n // 2, n - n // 2)}  # fmt: skip
        instead = None  # of the gap model's reward
        if reward == "rule":
            del arms["SFT alone"]
            instead = FunctionReward(true_gap({p.prompt: p.better for p in train}, paid.pit.scale))
        for arm, stages in arms.items():
            policy = parts / SFT_MODEL.path
            for stage, steps in zip(("stage-0", "stage-1"), stages, strict=True):
                if steps:
                    folder = parts / f"{arm}-{stage}"
                    folder.mkdir()
                    stage_loop(folder, parts, training, train, policy, stage, steps,
                               instead).run_all()  # fmt: skip
                    policy = folder / "model"
            found, _ = judged_steps(run, run.sessions("test"), policy, parts / "gap/model")
            for row in found:
                names = ("relevance", "words", "format", "distinct_queries", "gap", "length")
                rows.append({"arm": f"{arm}, paid {PAID[reward]}", "x": row["step"],
                             **{name: row[name] for name in names}})  # fmt: skip
    return rows


def true_gap(truth: Mapping[Any, str], scale: float) -> Callable[..., list[float]]:
    """A reward that no gap model can be wrong about: scale (s(y) - s(y_ref)), s being the share of
    an answer's words that the rule calls relevant.

    truth: the true next queries of each prompt, one a line.
    """
    def share(prompt: Any, text: str) -> float:
        label = label_by_rule("", text, truth[prompt].split(SEPARATOR), 1.0)
        return relevance_share([value for _, value in label.words])

    def gap(prompts: Any, completions: Any, reference: Any) -> list[float]:
        return [scale * (share(prompt, text) - share(prompt, before))
                for prompt, text, before in zip(prompts, completions, reference, strict=True)]

    return gap


def summed_up(outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each arm and x the mean of each figure over the seeds, with its standard error."""
    by_point: dict[tuple[str, float], list[Row]] = {}
    for outcome in outcomes:
        for row in outcome["rows"]:
            by_point.setdefault((row["arm"], row["x"]), []).append(row)
    points = []
    for (arm, x), rows in by_point.items():
        figures = {}
        for name in rows[0]:
            values = [row[name] for row in rows if row.get(name) is not None]
            if name not in ("arm", "x") and values:
                figures[name] = mean_and_error(values)
        points.append({"arm": arm, "x": x, "seeds": len(rows), "figures": figures})
    return points


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error over the seeds; None with one alone."""
    n = len(values)
    return fmean(values), stdev(values) / math.sqrt(n) if n > 1 else None


def compared(
    system: str, outcomes: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float | None]]:
    """The orderings of the paper as paired differences over the seeds."""
    found = [{(row["arm"], row["x"]): row for row in outcome["rows"]} for outcome in outcomes]
    if system == "ser":
        pairs = {f"{labels}: {text}": ((f"{labels}: last round", 0), other, figure)
                 for labels, figure in (("pairs", "accuracy"), ("words", "auc"))
                 for text, other in (
                     ("last round less seed", (labels, 0)),
                     ("last round less true labels of the same",
                      (f"{labels}: true labels of the same", 0)),
                     ("last round less all labels", (f"{labels}: all labels", 0)))}  # fmt: skip
    else:
        pairs = {f"paid {how}: both less {arm}, one improvement":
                 ((f"both, paid {how}", 1), (f"{arm}, paid {how}", 1), "relevance")
                 for how in PAID.values() for arm in ("stage 0", "stage 1")}  # fmt: skip
        pairs |= {f"{arm}, paid {how}: one improvement less none":
                  ((f"{arm}, paid {how}", 1), (f"{arm}, paid {how}", 0), "relevance")
                  for how in PAID.values()
                  for arm in ("SFT alone", "stage 0", "stage 1", "both")
                  if (how, arm) != (PAID["rule"], "SFT alone")}  # fmt: skip
    return {name: mean_and_error([by[one][figure] - by[other][figure] for by in found])
            for name, (one, other, figure) in pairs.items()}  # fmt: skip


def shown(point: Sequence[float | None]) -> str:
    """A mean with its standard error."""
    mean, error = point
    return f"{mean:.3f}" + ("" if error is None else f" +- {error:.3f}")


def report(system: str, points: Sequence[Mapping[str, Any]], gains: Mapping[str, Any]) -> str:
    """The page: a chart a figure, a table of all points, and the orderings."""
    names = list(dict.fromkeys(name for point in points for name in point["figures"]))
    x_name = "round" if system == "ser" else "improvements"
    charts = []
    for name in names[:2]:
        by_arm: dict[str, list[tuple[float, float, float]]] = {}
        for point in points:
            if name in point["figures"]:
                mean, error = point["figures"][name]
                by_arm.setdefault(point["arm"], []).append((point["x"], mean, 2 * (error or 0.0)))
        lines = [Line(arm, [x for x, _, _ in at], [y for _, y, _ in at],
                      [y - e for _, y, e in at], [y + e for _, y, e in at])
                 for arm, at in by_arm.items()]  # fmt: skip
        charts.append(chart(lines, x_name, f"{name}, with 2 standard errors"))
    rows = [[escape(point["arm"]), f"{point['x']}", *(
        shown(point["figures"][name]) if name in point["figures"] else "" for name in names
    )] for point in points]  # fmt: skip
    orderings = [[escape(name), shown(gain)] for name, gain in gains.items()]
    title = f"The study of {system.upper()}"
    body = f"""<h1>{title}</h1>
<p>Means over seeds with their standard errors; every outcome is in study.json.</p>
<div class="charts">{"".join(charts)}</div>
<h2>Every point</h2>{table(["arm", x_name, *names], rows, "points")}
<h2>Orderings, paired by seed</h2>{table(["difference", "mean"], orderings, "orderings")}"""
    return page(title, "", body)
