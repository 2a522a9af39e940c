"""PIT (`tppo.methods.pit`): `tppo pit` in a run of stages and on a file of preferences, and
`tppo.pit` in a script.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from tppo import stopping
from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.evaluation.judge import first_figure, judge_answers
from tppo.labels.queries import answer_text
from tppo.methods.config import PITConfig, PPOConfig, RewardModelConfig, SFTConfig
from tppo.methods.pit import GapReader
from tppo.models.adapters import (
    need_peft,
)
from tppo.models.config import AdapterConfig, GenerateConfig, ModelConfig, Prefix
from tppo.models.hub import locate
from tppo.models.load import load_from, resolve_device
from tppo.models.rollout import Sampling
from tppo.models.tokenizer import load_tokenizer
from tppo.progress import say
from tppo.rewards import Answers
from tppo.rewards.sentence_model import SentenceModel
from tppo.sessions.prompts import encode_prompt, prompt_text
from tppo.sessions.session import Session
from tppo.stages.artifacts import ANSWERS, IMPROVED, PIT_GAP, PIT_POLICY, PIT_REPORT, SFT_MODEL
from tppo.stages.given import check_model, check_place, check_sections, checked_seed
from tppo.stages.lengths import positions_of
from tppo.stages.pit_parts import Better, Training, encoder, train_pit
from tppo.stages.preferences import answer_ids, read_preferences
from tppo.stages.prompts import encode_given
from tppo.stages.run import Run
from tppo.store.jsonl import plain, read_json, write_json, write_jsonl
from tppo.store.run_folder import RunFolder

STAGE = "pit"
LONGEST = 256  # tokens of an answer by default


# On a file of preferences.


class PITResult(NamedTuple):
    """What `tppo.pit` gives."""

    report: dict[str, Any]
    model: Path
    """Folder of the policy."""
    training: Training

    def improve(
        self, prompts: Sequence[Any], first: Sequence[str] | None = None, *, steps: int = 3,
        temperature: float | None = None, seed: int = 0,
    ) -> list[list[str]]:  # fmt: skip
        """y_0, y_1, .. of each prompt, the answers of a step in one list.

        first: y_0; by default the answers of the model that PIT started from.
        """
        training = self.training
        warm = training.generate.temperature if temperature is None else temperature
        sampling = Sampling(training.cap, warm, seed)
        if first is None:
            base = training.improver(training.policy(training.base))
            first = base.texts(base.step(prompts, [""] * len(prompts), sampling))
        policy = training.improver(training.policy(self.model))
        later = policy.steps(prompts, first, steps, replace(sampling, seed=seed + 1))
        return [list(first), *map(policy.texts, later)]


def pit(
    model: str | Path,
    pairs: Any,
    *,
    config: PITConfig | None = None,
    sft: SFTConfig | None = None,
    gap: RewardModelConfig | None = None,
    ppo: PPOConfig | None = None,
    generate: GenerateConfig | None = None,
    loading: ModelConfig | None = None,
    lora: AdapterConfig | None = None,
    skip_bad: bool = False,
    out: str | Path = "runs/pit",
    seed: int = 0,
    device: str = "auto",
    prefix: Prefix = "shared",
) -> PITResult:
    """Train a policy that betters answers, from pairs of a better and a worse one.

        result = tppo.pit("path/or/hub-id", "pairs.jsonl")
        y0, y1, y2, y3 = result.improve(["a prompt"], steps=3)

    model: what `--model` takes.  pairs: as `tppo.ser` takes them, all of them labelled.
    sft, gap, ppo: settings of the three trainings; `ppo.steps` is not used, the stages have their
        own in `config`.  generate: `max_new_tokens` (0: as the longest answer of the pairs, at most
        256), `temperature` and `batch_size`.
    out: folder that gets `pit/model`, `pit/gap`, `pit/report.json` and the metrics of both stages.

    A script that was killed goes on in the part, and in PPO behind the checkpoint, where it was.
    Errors: DataError naming the argument, or file and line.
    """
    check_model(model)
    check_sections(config=(config, PITConfig), sft=(sft, SFTConfig), gap=(gap, RewardModelConfig),
                   ppo=(ppo, PPOConfig), generate=(generate, GenerateConfig),
                   loading=(loading, ModelConfig), lora=(lora, AdapterConfig))  # fmt: skip
    check_place(device, prefix)
    loading, lora = loading or ModelConfig(), lora or AdapterConfig()
    if lora.on:
        need_peft()
    given = Config(sft=sft or SFTConfig(), reward_model=gap or RewardModelConfig(),
                   ppo=ppo or PPOConfig(), generate=generate or GenerateConfig(),
                   pit=config or PITConfig(), lora=lora)  # fmt: skip
    filled = fill_defaults(given, pretrained=True)
    passes = None if ppo is None else ppo.max_passes  # by default as many as the steps take
    of_ppo = replace(filled.ppo, max_passes=passes)
    items = _better(pairs, skip_bad)
    path = locate(model, loading.revision, flag="model", pickles=loading.allow_pickle)
    tokenizer = load_tokenizer(path)
    longest = max(len(answer_ids(tokenizer, y)) for pair in items for y in pair[1:])
    positions = positions_of(load_from(AutoConfig, path))
    cap = filled.generate.max_new_tokens or min(longest, LONGEST)
    room = positions - max(cap, longest)
    if room < 1:
        raise DataError(f"pairs: the longest answer has {longest} tokens, expected less than the "
                        f"{positions} positions of the model")  # fmt: skip
    read = partial(encode_given, tokenizer, place="pairs")
    training = Training(
        path, tokenizer, resolve_device(device), encoder(tokenizer, room, read), cap,
        checked_seed(seed), prefix, filled.pit, filled.sft, filled.reward_model, of_ppo,
        filled.generate, loading, lora,
    )  # fmt: skip
    identity = training.settings() | {
        "pairs": hashlib.sha256(json.dumps(plain(items)).encode()).hexdigest()
    }
    folder, final = RunFolder(out), Path(out) / STAGE
    if folder.done(STAGE, [path], identity, seed):
        say(f"{final}: finished before, nothing is trained again")
    else:
        with stopping.listening(), folder.lock(), folder.stage(
            STAGE, [path], identity, seed, resume=True
        ) as work:
            train_pit(work, training, items)
    return PITResult(read_json(final / PIT_REPORT.name), final / PIT_POLICY.name, training)


def _better(pairs: Any, skip_bad: bool) -> list[Better]:
    """The pairs of a file, all of which have to be labelled."""
    given = read_preferences(pairs, "pairs", skip_bad=skip_bad)
    for pair in given:
        if not pair.labelled:
            raise DataError(f"{pair.place}: had 'answers', expected 'chosen' and 'rejected'")
    return [Better(pair.prompt, *pair.answers) for pair in given]


# In a run of stages.


def session_training(run: Run) -> Training:
    """The settings of a run; pairs are the true next queries and what SFT has written instead."""
    config, cap = run.config, run.max_new_tokens
    room = positions_of(load_from(AutoConfig, run.path(SFT_MODEL))) - cap
    read = partial(encode_prompt, run.tokenizer)
    return Training(
        run.path(SFT_MODEL), run.tokenizer, run.device, encoder(run.tokenizer, room, read), cap,
        run.seed, config.prefix, config.pit, config.sft, config.reward_model, config.ppo,
        config.generate, config.model, config.lora,
    )  # fmt: skip


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
    reader = GapReader(SentenceModel.load(gap, run.device, training.loading.dtype),
                       run.tokenizer.pad_token_id, training.prefix,
                       training.gap.max_tokens)  # fmt: skip
    prompts, before = questions.prompts, [""] * len(questions)
    ids = first.step(prompts, before, training.sampling())
    later = improver.steps(prompts, first.texts(ids), training.pit.improve_steps,
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


def pit_on_files(
    pairs: Path | None, model: Path | None, settings: Config, **options: Any
) -> None:
    """What `tppo pit --pairs` does: `pit` with the settings of a run.

    Errors: DataError naming what is not given.
    """
    for name, value, expected in (
        ("--pairs", pairs, "a JSONL file of pairs"), ("--model", model, "the model to train"),
    ):  # fmt: skip
        if value is None:
            raise DataError(f"{name} was not given, expected {expected}")
    assert model is not None
    pit(model, pairs, config=settings.pit, sft=settings.sft, gap=settings.reward_model,
        ppo=settings.ppo, generate=settings.generate, loading=settings.model, lora=settings.lora,
        prefix=settings.prefix, **options)  # fmt: skip
