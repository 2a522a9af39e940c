"""One arm of a study: PPO with the reward model of N labelled answers, judged by fresh users; or
what is done instead of PPO.

Everything is over the trainer's own parts and in memory; only the SFT model and the trained reward
models, which arms share, are read from the study's folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from tppo.evaluation.judge import RuleJudge, judge_answers
from tppo.evaluation.metrics import evaluate_policy
from tppo.methods.best_of_n import best_of_n, kl_bound
from tppo.methods.config import PPOConfig
from tppo.methods.critic_fit import Answered, fit_critic
from tppo.methods.ppo import PPO
from tppo.models.batch import Batch
from tppo.models.rollout import RolloutBatch, build
from tppo.rewards import Answers, Questions, Reward
from tppo.rewards.terminal import TerminalReward
from tppo.stages.artifacts import SFT_MODEL
from tppo.stages.models import new_ppo
from tppo.stages.order import PromptOrder
from tppo.stages.ppo import answered, policy_and_ref, questions_of
from tppo.stages.study.config import Cell
from tppo.stages.study.guides import guided_by
from tppo.stages.study.material import Material, true_shares
from tppo.stages.study.reward_models import dpo_policy, reward_of, scores
from tppo.stages.study.rounds import Rounds
from tppo.stages.study.statistics import explained_by_lines
from tppo.store.jsonl import read_object, write_json

KEPT = ("words", "distinct_queries", "format", "kl", "length")
WRITTEN = 6  # answers of an outcome that can be read: figures do not say how they sound


def ppo_config(config: PPOConfig, cell: Cell) -> PPOConfig:
    """The settings of PPO with what the arm and its part say."""
    arm = cell.arm
    return replace(
        config,
        steps=cell.steps,
        batch_size=cell.step_answers // arm.responses_per_prompt,
        responses_per_prompt=arm.responses_per_prompt,
        advantage=arm.advantage,
        lam=arm.lam,
    )


def fitted(material: Material, trainer: PPO, answers: int) -> dict[str, Any]:
    """Fit the critic on answers of the SFT model, as many of the generated ones; what came of it.

    None of them is new, and none needs a label: the reward rates them.
    """
    chosen = [answer for answer, _ in material.pool[:answers]]
    existing = answered(chosen, material.train)
    fit = fit_critic(trainer, *existing)
    return {**fit._asdict(), "explained_by_paid": explained_by_paid(trainer, existing)}


@torch.no_grad()
def explained_by_paid(trainer: PPO, existing: Answered) -> float:
    """What of the rewards to come is explained by a line, one a position, through what the tokens
    before have earned: about the most that a critic can know, for what is still to be written is
    not known.  A tenth of the answers is asked about, the others give the lines.
    """
    reward, rollout = trainer.reward, existing.rollout
    at_end = isinstance(reward, TerminalReward)
    paid_by = reward.reward if isinstance(reward, TerminalReward) else reward
    device = trainer.models.policy.device
    batch = Batch(rollout.prompt_ids, rollout.response_ids, trainer.pad_id, device, trainer.prefix)
    rewards = paid_by(batch, trainer.answers(existing.questions, rollout)).rewards.double()
    total, before = rewards.sum(1, keepdim=True), rewards.cumsum(1) - rewards  # [B, 1], [B, T]
    to_come = total.expand_as(before) if at_end else total - before
    paid, left, mask = (x.cpu().numpy() for x in (before, to_come, batch.mask))
    return round(explained_by_lines(paid, left, mask, fitted=len(rewards) * 9 // 10), 4)


def judged(material: Material, policy: PreTrainedModel, ref: PreTrainedModel) -> dict[str, Any]:
    """Figures of the fresh users' answers, and for each user whether the answer is relevant."""
    run, users = material.run, material.judges
    judge = RuleJudge(run.config.label.sentence_threshold)
    figures, answers, _ = evaluate_policy(
        policy, ref, run.questions(users, policy), judge, run.sampling(seed=run.seed),
        tokenizer=run.tokenizer, sampler=run.config.sampler,
    )  # fmt: skip
    return _row(judge, answers, {name: figures[name] for name in ("kl", "length")})


def best_of(material: Material, cell: Cell, reward: Reward, ref: PreTrainedModel) -> dict[str, Any]:
    """The same of the best paid of several samples of the SFT model; the KL is its bound."""
    run, users, n = material.run, material.judges, cell.arm.responses_per_prompt
    pad_id, config = run.tokenizer.pad_token_id, run.config
    rollout = build(ref, config.sampler, pad_id=pad_id, eos_id=run.eos_ids)
    found = best_of_n(
        rollout, reward, questions_of(run, users, ref), n, run.sampling(seed=run.seed),
        tokenizer=run.tokenizer, pad_id=pad_id, eos_ids=run.eos_ids, device=run.device,
        prefix=config.prefix,
    ).answers  # fmt: skip
    length = sum(map(len, found.response_ids)) / len(users)
    judge = RuleJudge(config.label.sentence_threshold)
    return _row(judge, found, {"kl": kl_bound(n), "length": length})


def _row(judge: RuleJudge, answers: Answers, beside: Mapping[str, float]) -> dict[str, Any]:
    verdicts = judge(answers)
    figures = {**{name: sum(x) / len(x) for name, x in verdicts.items()}, **beside}
    relevant = "".join(str(value) for value in verdicts["relevance"])
    return {"relevant": relevant, **{name: round(figures[name], 4) for name in KEPT},
            "written": answers.texts[:WRITTEN]}  # fmt: skip


def start_of(material: Material) -> dict[str, Any]:
    """Figures of the SFT model, with which the curves of all arms of a seed begin."""
    path = material.run.out / f"start-{material.study.mark}.json"
    if not path.exists():
        sft = material.run.sft_model()
        write_json(path, {"step": 0, "answers": 0, **judged(material, sft, sft)})
    found = read_object(path)
    assert found is not None
    return found


def train_arm(material: Material, cell: Cell) -> dict[str, Any]:
    """The outcome of a cell: its reward model's scores of fresh answers, and the curve of PPO, or
    where the arm is not PPO what came of it.
    """
    start, arm = time.monotonic(), cell.arm
    found: dict[str, Any] = {
        "shares": [round(share, 5) for share in true_shares(material.fresh)],
        "curve": [], "critic_fit": {}, "sampled": [],
    }  # fmt: skip
    reward = None
    if cell.steps or not arm.layer:
        policy, ref = policy_and_ref(material.seeded, SFT_MODEL)
        reward = reward_of(material, cell, ref)
    if cell.steps:
        assert reward is not None
        if arm.method == "ppo":
            found |= trained(material, cell, policy, ref, reward)
        else:
            row = (judged(material, dpo_policy(material, cell), ref) if arm.method == "dpo"
                   else best_of(material, cell, reward, ref))  # fmt: skip
            found["curve"] = [{"step": 0, "answers": 0, **row}]
    found["scores"] = [round(score, 5) for score in scores(material, cell, reward)]
    return found | {"seconds": round(time.monotonic() - start, 1)}


def trained(
    material: Material, cell: Cell, policy: PreTrainedModel, ref: PreTrainedModel, reward: Reward
) -> dict[str, Any]:
    """PPO of a cell: the curve of figures of fresh users, and of the answers of each step."""
    run = material.seeded
    config = ppo_config(run.config.ppo, cell)
    trainer = new_ppo(run, config, policy, ref, reward,
                      guided=guided_by(material, cell, ref, reward))  # fmt: skip
    fit = fitted(material, trainer, cell.arm.fit_critic) if cell.arm.fit_critic else {}
    size = cell.arm.responses_per_prompt
    order = PromptOrder(len(material.train), run.seed)
    curve, sampled = [start_of(material)], list[dict[str, Any]]()
    explained: list[float] = []
    rounds = Rounds(material, cell)
    for step in range(1, cell.steps + 1):
        rounds.before(step, trainer)
        chosen = order.rows((step - 1) * config.batch_size, config.batch_size)
        questions = material.train.rows([i for i in chosen for _ in range(size)])
        figures, rollout = trainer.step(questions)
        sampled.append(of_the_step(material, trainer, questions, rollout, figures))
        if "val/explained_variance" in figures:  # there is a critic
            explained.append(figures["val/explained_variance"])
        if step == cell.steps or cell.eval_every and step % cell.eval_every == 0:
            row = judged(material, policy, trainer.models.ref)
            if explained:
                row["explained_variance"] = round(sum(explained) / len(explained), 4)
            curve.append({"step": step, "answers": step * cell.step_answers, **row})
            explained = []
    return {"curve": curve, "critic_fit": fit, "sampled": sampled}


def of_the_step(
    material: Material,
    trainer: PPO,
    questions: Questions,
    rollout: RolloutBatch,
    figures: dict[str, float],
) -> dict[str, Any]:
    """What the rule says of the answers that a step sampled, before the step trained on them."""
    rule = RuleJudge(material.run.config.label.sentence_threshold)
    answers = trainer.answers(questions, rollout).rows(trainer.counted(rollout))
    verdict = judge_answers(rule, answers)
    return {"relevance": round(verdict["relevance"], 4), "words": round(verdict["words"], 4),
            "kl": round(figures["objective/kl"], 4)}  # fmt: skip
