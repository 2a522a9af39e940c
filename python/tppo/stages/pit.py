"""PIT (`tppo.methods.pit`) in a run of stages: the true next queries are better than generated
ones, and the answers to test users are bettered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tppo.errors import DataError
from tppo.evaluation.judge import first_figure, judge_answers
from tppo.labels.queries import answer_text
from tppo.models.load import load_from
from tppo.progress import say
from tppo.rewards import Answers
from tppo.rewards.sentence_model import SentenceModel
from tppo.sessions.prompts import encode_prompt, prompt_text
from tppo.sessions.session import Session
from tppo.stages.artifacts import ANSWERS, IMPROVED, PIT_GAP, PIT_POLICY, SFT_MODEL
from tppo.stages.lengths import positions_of
from tppo.stages.pit_parts import STAGE, Better, Training, encoder, train_pit
from tppo.stages.run import Run
from tppo.store.jsonl import write_json, write_jsonl


def session_training(run: Run) -> Training:
    """The settings of a run; pairs are the true next queries and what SFT has written instead."""
    cap = run.max_new_tokens
    room = positions_of(load_from(AutoConfig, run.path(SFT_MODEL))) - cap
    read = partial(encode_prompt, run.tokenizer)
    return Training(run.path(SFT_MODEL), run.tokenizer, run.device, encoder(room, read), cap,
                    run.seed, run.config)  # fmt: skip


def session_better(run: Run) -> list[Better]:
    """A pair a generated answer: the true next queries are better than it; equal ones are none."""
    sessions = {session.id: session for session in run.sessions("train")}
    pairs = []
    for answer in run.iter_answers():
        session = sessions[answer.session]
        better = answer_text(session.targets)
        if answer.text.strip() and answer.text != better:
            pairs.append(Better(prompt_text(session), better, answer.text))
    if len(pairs) < 2:
        raise DataError(f"{run.path(ANSWERS)}: {len(pairs)} answers differ from the true ones, "
                        "expected at least 2")  # fmt: skip
    return pairs


def pit_stage(run: Run) -> None:
    """PIT from the SFT model of a run."""
    with run.stage(STAGE, resume=True) as out:
        train_pit(out, session_training(run), session_better(run))


def improve_stage(run: Run) -> None:
    """Answers of the SFT model to test users, and `pit.improve_steps` times a better one."""
    with run.stage("improve") as out:
        sessions = run.sessions("test")
        rows, answers = judged_steps(run, sessions, run.path(PIT_POLICY), run.path(PIT_GAP))
        write_json(out / IMPROVED.name, rows)
        write_jsonl(out / "answers.jsonl", (
            {"session": session.id, "answers": texts}
            for session, *texts in zip(sessions, *answers, strict=True)
        ))  # fmt: skip


def judged_steps(
    run: Run, sessions: Sequence[Session], policy: Path, gap: Path
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """A row of figures a step, from 0, and the step's answers, one a session.

    The figures are the judge's, the mean gap over the answers before, and the length.
    """
    training, judge = session_training(run), run.judge
    questions = run.questions(sessions, run.sft_model())
    first, improver = (training.improver(training.policy(path))
                       for path in (training.base, policy))  # fmt: skip
    reader = training.gap_reader(SentenceModel.load(gap, run.device, run.config.model.dtype))
    prompts, before = questions.prompts, [""] * len(questions)
    ids = first.step(prompts, before, training.sampling())
    later = improver.steps(prompts, first.texts(ids), run.config.pit.improve_steps,
                           replace(training.sampling(), seed=run.seed + 1))  # fmt: skip
    rows, answers = list[dict[str, Any]](), list[list[str]]()
    for step, found in enumerate([ids, *later]):
        given = Answers(prompts, found, questions.columns, run.tokenizer, improver.eos_ids,
                        range(len(questions)))  # fmt: skip
        row = {"step": step, **judge_answers(judge, given)}
        row["length"] = sum(map(len, found)) / len(found)
        asked = [training.encode(x, y) for x, y in zip(prompts, before, strict=True)]
        row["gap"] = reader.gaps(asked, found).mean().item() if step else None
        rows.append(row)
        answers.append(list(given.texts))
        before = answers[-1]
        figure = first_figure(row)
        say(f"improve: step {step}, {figure} {row[str(figure)]:.3f}, length {row['length']:.1f}"
            + (f", gap {row['gap']:.2f}" if step else ""))  # fmt: skip
    return rows, answers
