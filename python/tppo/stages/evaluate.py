"""The closing table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tppo.evaluation.compare import PAIR, compare, personal_gap
from tppo.evaluation.judge import SESSION, judge_answers, written
from tppo.evaluation.metrics import (
    Evaluated,
    evaluate_policy,
    repeat_last_query,
    text_figures,
)
from tppo.evaluation.table import findings, gain_of, print_table
from tppo.methods.sft import Examples, continue_sft
from tppo.models.recompute import recompute_layers
from tppo.progress import say
from tppo.sessions.prompts import encode_answer, prompt_text
from tppo.sessions.session import Session
from tppo.stages.artifacts import (
    BASELINES,
    POLICY,
    RESULT,
    TEST_ANSWERS,
    TRAINING,
    TRANSFER_SESSIONS,
)
from tppo.stages.models import adapted, sft_origin
from tppo.stages.run import Run
from tppo.store.checkpoint import Checkpoints
from tppo.store.jsonl import read_json, write_json, write_jsonl
from tppo.store.run_folder import KEPT


def evaluate(run: Run) -> None:
    """Every row of the closing table on the test users, and `result.json` in the run folder."""
    with run.stage("eval", resume=True) as out:
        result, found = rows(run, out / KEPT)
        write_json(out / RESULT.name, result)
        write_jsonl(out / TEST_ANSWERS.name, side_by_side(run.sessions("test"), found))
    write_json(run.beside(RESULT.name), result)
    print_table(result, f"{result['test']['users']} held-out users, seed {run.seed}")


def side_by_side(
    sessions: Sequence[Session], found: Mapping[str, Evaluated]
) -> Iterator[dict[str, Any]]:
    """A row a session: its prompt, its true next queries, and by the name of each model its answer,
    in `figures` the judge's figures of it, in `ids` its tokens.
    """
    for i, session in enumerate(sessions):
        given = {"id": session.id, "prompt": prompt_text(session), "targets": [*session.targets]}
        given |= {name: model.answers.texts[i] for name, model in found.items()}
        figures = {name: {figure: values[i] for figure, values in model.each.items()}
                   for name, model in found.items()}  # fmt: skip
        ids = {name: model.answers.response_ids[i] for name, model in found.items()}
        yield given | {"figures": figures, "ids": ids}


def rows(run: Run, kept: Path) -> tuple[dict[str, Any], dict[str, Evaluated]]:
    """Repeat the last query, SFT at each temperature, SFT continued, TPPO, baselines if they were
    trained; then unseen intents.

    Also what was found of each model on the test sessions, by the name of its row.
    kept: folder of the checkpoints, of which each row of answers has its own.
    """
    found: dict[str, Evaluated] = {}
    ref = run.sft_model()
    judged = partial(_judge, run, kept, ref)
    test = run.sessions("test")
    threshold = run.config.label.sentence_threshold
    repeats = [repeat_last_query(session) for session in test]
    prompts = [prompt_text(session) for session in test]
    repeated = written(repeats, prompts, {SESSION: test}, run.tokenizer)
    result: dict[str, Any] = {
        "repeat_last": judge_answers(run.judge, repeated) | text_figures(test, repeats)
    }
    for temperature in run.config.eval.temperatures:
        name = "sft" if temperature == 1.0 else f"sft_t{temperature:g}"
        result[name], found[name] = judged(name, ref, test, temperature)
    tppo = run.load_policy(POLICY, over=ref if run.config.lora.on else None)
    training = read_json(run.path(TRAINING))
    steps = training["optimizer_steps"]
    if run.config.eval.continued:
        model, seconds = _continued(run, ref, steps, kept / "continued")
        figures, found["sft_continued"] = judged("sft_continued", model, test)
        result["sft_continued"] = figures | {"seconds": seconds, "optimizer_steps": steps}
    figures, found["tppo"] = judged("tppo", tppo, test)
    result["tppo"] = figures | {"seconds": training["seconds"], "optimizer_steps": steps}
    for name, (policy, report) in BASELINES.items():
        if run.path(policy).exists() and _of_these_settings(run, name):
            model = run.load_policy(policy, over=ref if run.config.lora.on else None)
            figures, found[name] = judged(name, model, test)
            result[name] = figures | {"training": read_json(run.path(report))}
    if run.path(TRANSFER_SESSIONS).exists():
        transfer = run.sessions("transfer")
        for name, model in (("sft_transfer", ref), ("tppo_transfer", tppo)):
            result[name], _ = judged(name, model, transfer)
    if "sft" in found:
        for name in ("sft", "tppo"):
            result[name] |= personal_gap(run.judge, found[name].answers, run.seed)
        result["gain"] = gain_of(result)
        result["pairs"] = {PAIR: compare(run.judge, found["tppo"].answers, found["sft"].answers)}
    result["test"] = {
        "users": len({session.user for session in test}),
        "sessions": len(test),
        "true_length": _mean_length(run, test),
        "seed": run.seed,
        "judge": run.judge.name,
        "labeller": training["labeller"],
        "threshold": threshold,
    }
    result["training"] = training
    result["findings"] = findings(result)
    return result, found


def _of_these_settings(run: Run, name: str) -> bool:
    """Whether a baseline was trained as PPO was; says so where it was not."""
    same = run.done("baselines")
    if not same:
        say(f"WARNING: {name} was trained with other files or settings, and is left out of the "
            f"table; `tppo baselines --out {run.out}` trains it anew")  # fmt: skip
    return same


def _judge(
    run: Run,
    kept: Path,
    ref: Any,
    name: str,
    model: Any,
    sessions: Sequence[Session],
    temperature: float = 1.0,
) -> tuple[dict[str, Any], Evaluated]:
    """The figures of a model's answers, and what was found of them."""
    found = evaluate_policy(
        model,
        ref,
        run.questions(sessions, model),
        run.judge,
        run.sampling(temperature=temperature, seed=run.seed),
        tokenizer=run.tokenizer,
        sampler=run.config.sampler,
        keeper=Checkpoints(kept / name, f"eval, {name}", "batch"),
    )
    texts = found.answers.texts
    return found.figures | text_figures(sessions, texts) | {"example": texts[0]}, found


def _continued(run: Run, ref: Any, steps: int, kept: Path) -> tuple[Any, float]:
    """SFT trained on for as many optimiser steps as PPO took, and the seconds that they took.

    With LoRA an adapter over `ref` is trained, as PPO does.
    """
    lora, sessions = run.config.lora, run.sessions("train")
    model = adapted(ref, lora, run.seed, sft_origin(run)) if lora.on else run.sft_model()
    if run.config.model.gradient_checkpointing:
        recompute_layers(model)
    answers = [encode_answer(run.tokenizer, s.targets)[: run.max_new_tokens] for s in sessions]
    seconds = continue_sft(
        model,
        Examples(run.prompts(sessions, model), answers),
        run.config.sft,
        pad_id=run.tokenizer.pad_token_id,
        steps=steps,
        seed=run.seed + 1,
        prefix=run.config.prefix,
        keeper=Checkpoints(kept, "eval, SFT continued"),
    )
    return model, seconds


def _mean_length(run: Run, sessions: Sequence[Session]) -> float:
    lengths = [len(encode_answer(run.tokenizer, session.targets)) for session in sessions]
    return sum(lengths) / len(lengths)
