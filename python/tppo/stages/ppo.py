"""The PPO stage: guards, and the loop with what a run of stages gives it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tppo import stopping
from tppo.evaluation.judge import SESSION, RuleJudge, judge_answers
from tppo.labels.queries import answer_text, parse_answer, query_key
from tppo.methods.auc import check_auc
from tppo.methods.critic_fit import Answered
from tppo.methods.ppo import PPO
from tppo.methods.reward_model import check_signal
from tppo.methods.rlgf import TARGET
from tppo.models.folder import model_eos_ids
from tppo.models.own_tokens import load_frozen
from tppo.models.parallel import ALONE, World, joined
from tppo.models.rollout import RolloutBatch
from tppo.rewards import Answers, Questions, Reward
from tppo.rewards.format import QUERIES, FormatReward
from tppo.rewards.served import ServedReward, check_served
from tppo.rewards.token_model import SUGGESTED_LENGTH, TokenModelReward
from tppo.sessions.prompts import encode_prompt
from tppo.sessions.session import Session
from tppo.stages.answering.recipe import Recipe, paid_by, recipe_of, write_recipe
from tppo.stages.answers import Answer
from tppo.stages.artifacts import (
    POLICY,
    QUERY_LENGTHS,
    REWARD_MODEL,
    REWARD_REPORT,
    SFT_MODEL,
    Artifact,
)
from tppo.stages.guides import QUERIES as ASK_QUERIES
from tppo.stages.guides import UNGUIDED, Guided, Learner, new_guide
from tppo.stages.journal import Journal
from tppo.stages.loop import Held, Loop, Watch, response_figures
from tppo.stages.models import adapted, new_ppo, sft_origin
from tppo.stages.run import Run
from tppo.stages.trackers import followed
from tppo.store.jsonl import read_json


def train(run: Run) -> None:
    """Token-level PPO from the SFT model; resumes from its newest checkpoint.

    Under torchrun in several processes, of which the first alone writes.
    """
    with joined(run.device) as world, ExitStack() as stack:
        first = world.rank == 0
        stack.enter_context(stopping.deferrable())  # ends after the stage: it has its name by then
        out = world.of_first(
            stack.enter_context(run.stage("train", resume=True)) if first else None
        )
        report, config = read_json(run.path(REWARD_REPORT)), run.config
        check_signal(report, config.ppo.without_signal)
        check_auc(report, config.reward_model)
        journal = None
        if first:
            journal = stack.enter_context(followed(config.report_to, out, run.out, config.ppo))
        new_loop(run, out, world, journal).run_all()
        if first:
            write_recipe(out / POLICY.name, recipe(run))


def recipe(run: Run) -> Recipe:
    """How the policy was asked and paid, for those who ask it later."""
    config = run.config
    paid = paid_by(config.ppo, read_json(run.path(QUERY_LENGTHS))["median_query_tokens"])
    return recipe_of(run.sessions("train"), run.max_new_tokens, config.generate.temperature, paid)


def new_loop(run: Run, out: Path, world: World, journal: Journal | None = None) -> Loop:
    """The loop over the training sessions that writes into `out`, judged on the held-out ones."""
    policy, ref = policy_and_ref(run, SFT_MODEL)
    reward, guided = run_reward(run, policy, ref), guided_by(run, policy, ref)
    trainer = new_ppo(run, run.config.ppo, policy, ref, reward, world, guided)
    return loop_of(run, out, trainer, journal=journal)


def loop_of(
    run: Run,
    out: Path,
    trainer: PPO,
    about: Mapping[str, Any] | None = None,
    journal: Journal | None = None,
) -> Loop:
    """The same with a trainer of one's own.

    about: what the report says of the reward; by default how good the token reward model is.
    """
    policy, heldout = trainer.models.policy, run.sessions("heldout")
    questions = questions_of(run, run.sessions("train"), policy)
    longest = max(map(len, questions.ids)) + trainer.sampling.max_new_tokens
    check_served(trainer.reward, run.tokenizer, longest)
    if about is None:
        report = read_json(run.path(REWARD_REPORT))
        about = {key: report[key] for key in ("auc", "relevant_share", "sessions", "labeller")}
    return Loop(
        trainer,
        questions,
        Held(run.questions(heldout, policy), run.judge, run.config.sampler),
        out,
        run.tokenizer,
        watch=Watch(
            partial(answer_figures, RuleJudge(run.config.label.sentence_threshold)),
            {"relevance": "reward/rule"},
        ),
        about=about,
        existing=partial(generated_answers, run, questions, trainer.config.fit_critic),
        journal=journal,
    )


def generated_answers(run: Run, questions: Questions, n: int) -> Answered:
    """n of the generated answers to fit the critic on, at most all of them, drawn at random."""
    answers = list(run.iter_answers())
    chosen = random.Random(f"{run.seed}/critic-answers").sample(answers, min(n, len(answers)))
    return answered(chosen, questions)


def answered(answers: Sequence[Answer], questions: Questions) -> Answered:
    """Generated answers as a critic is fitted on them, each with its question out of `questions`;
    those to one question follow each other.
    """
    places = {session.id: k for k, session in enumerate(questions.columns[SESSION])}
    ordered = sorted(answers, key=lambda answer: (places[answer.session], answer.id))
    rollout = RolloutBatch(
        [answer.prompt_ids for answer in ordered],
        [answer.response_ids for answer in ordered],
        None,
        [answer.finish for answer in ordered],
    )
    return Answered(questions.rows([places[answer.session] for answer in ordered]), rollout)


def answer_figures(rule: RuleJudge, answers: Answers) -> dict[str, float]:
    """What the reward model does not see of the answers: the rule's verdict, format, variety."""
    figures = judge_answers(rule, answers)
    keys = [query_key(query) for text in answers.texts for query in parse_answer(text)]
    usual = response_figures(answers)
    return {
        "reward/rule": figures["relevance"],
        "reward/rule_words": figures["words"],
        "response/length": usual["response/length"],
        "response/format": figures["format"],
        "response/eos": usual["response/eos"],
        "response/distinct_words": len({word for key in keys for word in key}),
        "response/distinct_queries": len(set(keys)),
        "response/queries_not_repeated": figures["distinct_queries"],
    }


def new_trainer(run: Run, world: World = ALONE, start: Artifact = SFT_MODEL) -> PPO:
    """PPO over the policy in `start`, with the reference and, where it is needed, the critic from
    SFT, and the frozen reward model.
    """
    config = run.config.ppo
    policy, ref = policy_and_ref(run, start)
    return new_ppo(run, config, policy, ref, run_reward(run, policy, ref), world)


def run_reward(
    run: Run, policy: PreTrainedModel, ref: PreTrainedModel, model: Artifact = REWARD_MODEL
) -> Reward:
    """What pays in a run of stages: a frozen token reward model, here or, where it is that of
    train-rm, at `--reward-server`, and the form where it costs.
    """
    config, server = run.config.ppo, run.config.reward_server
    paid: dict[str, Any] = {
        "mode": config.reward, "values": config.reward_values, "length_alpha": config.length_alpha,
    }  # fmt: skip
    reward: Reward
    if server.base_url and model == REWARD_MODEL:
        reward = ServedReward(server, run.path(model), **paid)
    else:
        eos_ids, dtype = model_eos_ids(run.tokenizer, policy), run.config.model.dtype
        frozen = load_frozen(run.path(model), run.tokenizer, run.device, eos_ids, dtype, base=ref)
        reward = TokenModelReward(frozen, **paid, max_tokens=config.max_tokens)
    return FormatReward(reward, config.format_cost) if config.format_cost else reward


def guided_by(run: Run, policy: PreTrainedModel, ref: PreTrainedModel) -> Guided:
    """The algorithm of `--algorithm` with the guide that the run names."""
    config, guide = run.config, run.config.guide
    if config.algorithm == "ppo":
        return UNGUIDED
    if guide.base_url and guide.system is None:
        guide = replace(guide, system=ASK_QUERIES)
    learner = Learner(
        ref, run.tokenizer, model_eos_ids(run.tokenizer, ref), config.sampler,
        questions_of(run, run.sessions("train"), policy), encode_prompt,
    )  # fmt: skip
    rollout = new_guide(guide, learner, run.device, config.model)
    return Guided(config.algorithm, rollout, config.rlgf, guide)


def policy_and_ref(run: Run, start: Artifact) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The policy in `start` and the SFT model, whose weights it shares with LoRA."""
    ref, lora = run.sft_model(), run.config.lora
    if lora.on and start == SFT_MODEL:
        return adapted(ref, lora, run.seed, sft_origin(run)), ref
    return run.load_policy(start, over=ref if lora.on else None), ref


def questions_of(run: Run, sessions: Sequence[Session], policy: PreTrainedModel) -> Questions:
    """The sessions as a reward sees them."""
    columns: dict[str, Sequence[Any]] = {
        SUGGESTED_LENGTH: suggested_lengths(run, sessions),
        QUERIES: [len(session.targets) for session in sessions],
        TARGET: [answer_text(session.targets) for session in sessions],
    }
    return run.questions(sessions, policy, **columns)


def suggested_lengths(run: Run, sessions: Sequence[Session]) -> list[float]:
    """Tokens after which the length penalty bites: the queries' median length times their
    number, plus the separators between them.
    """
    median = read_json(run.path(QUERY_LENGTHS))["median_query_tokens"]
    counts = [len(session.targets) for session in sessions]
    return [float(median * n + (n - 1)) for n in counts]
