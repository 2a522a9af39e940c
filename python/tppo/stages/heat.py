"""The heat stage: answers of SFT and TPPO to the same test users, token by token.

It scores the answers of the closing table: of the users whose answers TPPO improved most, of those
whose answers it made worse, and of some that are drawn at random.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from tppo.errors import DataError
from tppo.evaluation.heat import HeatRow, print_heat
from tppo.methods.ppo import PPO
from tppo.models.policy import load_trained
from tppo.models.rollout import RolloutBatch
from tppo.models.tokenizer import token_offsets
from tppo.sessions.session import Session
from tppo.stages.artifacts import CRITIC, HEAT_ROWS, POLICY, SFT_MODEL, TEST_ANSWERS
from tppo.stages.ppo import new_trainer, questions_of
from tppo.stages.run import Run
from tppo.store.jsonl import plain, read_jsonl, write_jsonl

PRINTED = 4  # answers in the terminal


def heat(run: Run) -> None:
    """Rewards, values and advantages of the tokens of some answers of the closing table."""
    with run.stage("heat") as out:
        rows = [line.values for line in read_jsonl(run.path(TEST_ANSWERS))]
        sft = next(name for name in rows[0]["ids"] if name.startswith("sft"))
        chosen = choose(rows, run.config.eval.heat_users, run.seed, sft)
        sessions = {session.id: session for session in run.sessions("test")}
        asked = [sessions[row["id"]] for row, _ in chosen]
        found = [
            _scored(run, new_trainer(run, start=model), name, asked, [row for row, _ in chosen])
            for name, model in ((sft, SFT_MODEL), ("tppo", POLICY))
        ]
        shown = [row for pair in zip(*found, strict=True) for row in pair]
        why = [reason for _, reason in chosen for _ in found]
        lines = ({"chosen": reason, **plain(row)} for reason, row in zip(why, shown, strict=True))
        write_jsonl(out / HEAT_ROWS.name, lines)
    print_heat(shown[:PRINTED])


def choose(
    rows: Sequence[Mapping[str, Any]], n: int, seed: int, sft: str = "sft"
) -> list[tuple[Mapping[str, Any], str]]:
    """At most n of the closing table's answers, each with why: a third the "best", where TPPO has
    gained most over SFT by the judge's figures in their order, a third the "worst", the others
    "random".  Within each of these they stand by their ids, 2 before 10.
    """

    def gain(row: Mapping[str, Any]) -> list[float]:
        before, after = row["figures"][sft], row["figures"]["tppo"]
        return [after[name] - before[name] for name in after]

    n = min(n, len(rows))
    best = -(-n // 3)
    worst = -(-(n - best) // 2)
    by_gain = sorted(rows, key=gain, reverse=True)  # stable: equal ones stay in their order
    last = len(by_gain) - worst
    middle = random.Random(f"{seed}/heat").sample(by_gain[best:last], n - best - worst)
    groups = (("best", by_gain[:best]), ("worst", by_gain[last:]), ("random", middle))
    return [(row, why) for why, group in groups
            for row in sorted(group, key=lambda row: natural(row["id"]))]  # fmt: skip


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by, under which the numbers in names count as numbers: u2 before u10."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"([0-9]*)([^0-9]*)", name)]


@torch.no_grad()
def _scored(
    run: Run,
    trainer: PPO,
    name: str,
    sessions: Sequence[Session],
    rows: Sequence[Mapping[str, Any]],
) -> list[HeatRow]:
    """The answers by this name, scored as in training: where an advantage compares the answers to
    a prompt, as many others are sampled beside each.
    """
    _load_critic(run, trainer)
    size = run.config.ppo.responses_per_prompt
    questions = questions_of(run, [s for s in sessions for _ in range(size)], trainer.models.policy)
    rollout = trainer.rollout.generate(questions.ids, run.sampling(seed=run.seed))
    rollout = _replaced(rollout, [row["ids"][name] for row in rows], run.eos_ids)
    experience, _ = trainer.score(rollout, trainer.answers(questions, rollout))
    assert experience.category is not None  # the reward is the token reward model
    result = []
    for i, (session, row) in enumerate(zip(sessions, rows, strict=True)):
        b, n = i * size, len(row["ids"][name])
        text, offsets = token_offsets(run.tokenizer, row["ids"][name], run.eos_ids)
        values = experience.values
        result.append(HeatRow(
            id=session.id,
            prompt=row["prompt"],
            tokens=[text[start:end] for start, end in offsets],
            rewards=experience.rewards[b, :n].tolist(),
            categories=experience.category[b, :n].tolist(),
            advantages=experience.advantages[b, :n].tolist(),
            targets=list(session.targets),
            name=name,
            values=None if values is None else values[b, :n].tolist(),
            figures=row["figures"][name],
        ))  # fmt: skip
    return result


def _load_critic(run: Run, trainer: PPO) -> None:
    if trainer.models.critic is None:
        return
    critic = run.path(CRITIC)
    if not critic.exists():
        raise DataError(
            f"{critic}: no such file, because training needed no critic; give the "
            "--ppo.advantage of the training here too"
        )
    load_trained(trainer.models.critic, load_file(critic))


def _replaced(
    rollout: RolloutBatch, answers: Sequence[list[int]], eos_ids: Sequence[int]
) -> RolloutBatch:
    """The rollout with these answers as the first of those to each prompt."""
    responses, finish = [*rollout.response_ids], [*rollout.finish]
    size = len(responses) // len(answers)
    author = None if rollout.author is None else [*rollout.author]
    for i, ids in enumerate(answers):
        responses[i * size] = ids
        finish[i * size] = "eos" if ids[-1] in eos_ids else "length"
        if author is not None:
            author[i * size] = [True] * len(ids)
    return RolloutBatch(rollout.prompt_ids, responses, None, finish, author)
