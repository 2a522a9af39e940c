"""The stages: what each is called, reads, writes and depends on, and where its function stands.

A stage of one's own, outside this package:

    from tppo.stages.registry import ANSWERS, Artifact, Stage, register

    LONGEST = Artifact("longest/answer.txt", "the longest generated answer")

    def longest(run):
        with run.stage("longest") as out:
            texts = [answer.text for answer in run.iter_answers()]
            (out / "answer.txt").write_text(max(texts, key=len))

    STAGE = register(Stage("longest", longest, "the longest answer", (ANSWERS,), (LONGEST,)))

`tppo package.module:STAGE --out DIR` runs it, and so does `Run(...).perform("longest")`.  What it
reads it declares: `Run.path` refuses anything else while the stage runs.

This file loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tppo.labels.label import machine_of
from tppo.stages.artifacts import (
    ANSWERS,
    CATEGORIES,
    CRITIC,
    EQUALS,
    HEAT_ROWS,
    HELDOUT_SESSIONS,
    IMPROVED,
    LABELS,
    MERGED_POLICY,
    MERGED_REWARD_MODEL,
    NOISE,
    OF_BASELINES,
    PIT_GAP,
    PIT_POLICY,
    PIT_REPORT,
    POLICY,
    PREFERENCES,
    QUERY_LENGTHS,
    RESULT,
    REWARD_MODEL,
    REWARD_REPORT,
    SER_MODEL,
    SER_POLICY,
    SER_REPORT,
    SFT_MODEL,
    TEST_ANSWERS,
    TEST_SESSIONS,
    TRAIN_SESSIONS,
    TRAINING,
    TRANSFER_SESSIONS,
    Artifact,
)
from tppo.stages.stage import (
    REGISTRY,
    RUN,
    Given,
    Stage,
    before,
    load_stage,
    register,
)

if TYPE_CHECKING:
    from tppo.stages.run import Run

__all__ = [
    "ANSWERS", "CATEGORIES", "CRITIC", "HEAT_ROWS", "HELDOUT_SESSIONS", "LABELS", "MERGED_POLICY",
    "MERGED_REWARD_MODEL", "NOISE", "OF_BASELINES", "POLICY", "QUERY_LENGTHS", "REGISTRY",
    "RESULT", "REWARD_MODEL", "REWARD_REPORT", "RUN", "SFT_MODEL", "TEST_ANSWERS",
    "TEST_SESSIONS", "TRAINING", "TRAIN_SESSIONS", "TRANSFER_SESSIONS", "Artifact", "Given",
    "Stage", "before", "load_stage", "register",
]  # fmt: skip

_HELD = "model.dtype"  # the type of weights in memory
_SAMPLING = ("generate.max_new_tokens", "generate.batch_size", "prefix", "rollout", _HELD)

_OF_REWARD_MODEL = (
    "reward_model", "-reward_model.model", "-reward_model.revision", "-reward_model.min_auc",
    "-reward_model.min_auc_sessions",
)  # fmt: skip


def _of_data(given: Given) -> tuple[str, ...]:
    if given.from_file:
        return "sessions.heldout_share", "sessions.test_share", "sessions.read"
    return (
        "sessions.train_users", "sessions.heldout_users", "sessions.test_users",
        "sessions.transfer_users", "sessions.queries",
    )  # fmt: skip


def _of_sft(given: Given) -> tuple[str, ...]:
    start = (_HELD, "lora") if given.from_model else ("scratch",)
    return "sft", "generate.max_new_tokens", "prefix", *start


def _of_label(given: Given) -> tuple[str, ...]:
    label = given.config.label
    by_hand = ("label.hand.answers", "label.hand.rest") if label.labeller == "hand" else ()
    if machine_of(label) is None:
        return "label.labeller", *by_hand
    if machine_of(label) == "rule":
        return "label.labeller", *by_hand, "label.sentence_threshold", "rule"
    return (
        "label.labeller", *by_hand,
        "label.endpoint", "-label.endpoint.base_url", "-label.endpoint.api_key_env",
        "-label.endpoint.concurrency", "-label.endpoint.max_retries", "-label.endpoint.timeout_s",
        "-label.endpoint.price_read", "-label.endpoint.price_written",
        "-label.endpoint.max_wait_s", "-label.endpoint.max_dropped",
    )  # fmt: skip


def _of_train(given: Given) -> tuple[str, ...]:
    from tppo.methods.config import WITHOUT_EFFECT  # not where only --help is wanted

    return (
        "generate.temperature", *_SAMPLING, "label.sentence_threshold", "ppo",
        *(f"-ppo.{name}" for name in WITHOUT_EFFECT), "rule", "judge", "lora",
    )  # fmt: skip


def _guide(run: Run) -> Path | None:
    from tppo.stages.guides import guide_of_run  # not where only --help is wanted

    return guide_of_run(run)


register(Stage(
    "data", "tppo.stages.data:data",
    "sessions, generated or read from --data and split by user; data inspect FILE looks at a log",
    outputs=(TRAIN_SESSIONS, HELDOUT_SESSIONS, TEST_SESSIONS, TRANSFER_SESSIONS),
    settings=_of_data,
    outside=lambda run: run.data,
    banner="Sessions come from {data} and are split by user.",
    flags=("--data",),
    in_run=True,
))  # fmt: skip
register(Stage(
    "sft", "tppo.stages.sft:sft",
    "supervised fine-tuning to the early stop; from scratch, or from --model",
    inputs=(TRAIN_SESSIONS, HELDOUT_SESSIONS),
    outputs=(SFT_MODEL,),
    settings=_of_sft,
    lost="no step of this process is lost",
    outside=lambda run: run.base,
    banner="{model} learns the true next queries, until held-out loss stops falling.",
    flags=("--model", "report_to"),
    in_run=True,
))  # fmt: skip
register(Stage(
    "generate", "tppo.stages.generate:generate",
    "answers of the SFT model",
    inputs=(TRAIN_SESSIONS, SFT_MODEL),
    outputs=(ANSWERS,),
    settings=("generate", "prefix", "rollout", _HELD),
    lost="no batch of this process is lost",
    banner="The SFT model answers training sessions; these answers will be labelled.",
    in_run=True,
))  # fmt: skip
register(Stage(
    "label", "tppo.stages.label:label_answers",
    "word and answer labels, by the rule, an endpoint or hand; or: label --agreement FILE",
    inputs=(TRAIN_SESSIONS, ANSWERS),
    outputs=(LABELS,),
    settings=_of_label,
    lost="labels of an endpoint are kept in label-cache.jsonl, those by hand in hand-labels.jsonl",
    banner="Every word and every answer is judged: does the user want it or not?",
    in_run=True,
    left_over="tppo.stages.label:label_lost_again",
))  # fmt: skip
register(Stage(
    "map", "tppo.stages.map:map_to_tokens",
    "word labels to token categories",
    inputs=(SFT_MODEL, ANSWERS, LABELS),
    outputs=(CATEGORIES, QUERY_LENGTHS),
    banner="The labels of words become labels of the policy's tokens.",
    in_run=True,
))  # fmt: skip
register(Stage(
    "train-rm", "tppo.stages.reward_model:train_rm",
    "the token reward model",
    inputs=(SFT_MODEL, ANSWERS, LABELS, CATEGORIES),
    outputs=(REWARD_MODEL, REWARD_REPORT),
    settings=("lora", *_OF_REWARD_MODEL, "label.sentence_threshold", "prefix", _HELD),
    lost="no step of this process is lost",
    outside=lambda run: run.own_reward_model,
    banner="The token reward model learns to tell wanted tokens from unwanted ones.",
    flags=("report_to",),
    in_run=True,
))  # fmt: skip
register(Stage(
    "train", "tppo.stages.ppo:train",
    "token-level PPO; resumes from its newest checkpoint",
    inputs=(
        TRAIN_SESSIONS, HELDOUT_SESSIONS, SFT_MODEL, ANSWERS, QUERY_LENGTHS, REWARD_MODEL,
        REWARD_REPORT,
    ),
    outputs=(POLICY, CRITIC, TRAINING),
    settings=lambda given: (*_of_train(given), "guided"),
    outside=_guide,
    banner="The policy is trained by token-level PPO from the SFT model.",
    flags=("reward_model.min_auc", "reward_model.min_auc_sessions", "algorithm", "rlgf", "guide",
           "report_to", "reward_server"),
    lost="no step of this process is lost",
    in_run=True,
    processes=True,
))  # fmt: skip
register(Stage(
    "baselines", "tppo.stages.baselines:baselines",
    "the same PPO with labels of sentences, and with rewards at the end; for the closing table",
    inputs=(*REGISTRY["train"].inputs, LABELS, CATEGORIES),
    outputs=OF_BASELINES,
    settings=lambda given: (*_of_train(given), "generate.samples", *_OF_REWARD_MODEL),
    banner="Two baselines are trained as PPO was: on labels of answers, and paid at the end.",
    lost="no step of PPO is lost",
))  # fmt: skip
register(Stage(
    "eval", "tppo.stages.evaluate:evaluate",
    "the closing table and result.json",
    inputs=(
        TRAIN_SESSIONS, TEST_SESSIONS, TRANSFER_SESSIONS, SFT_MODEL, POLICY, TRAINING,
        *OF_BASELINES,
    ),
    outputs=(RESULT, TEST_ANSWERS),
    settings=(
        "sft.lr", "sft.final_lr_share", "sft.batch_size", "sft.prompt_loss", "sft.grad_norm",
        "sft.max_tokens", *_SAMPLING, "label.sentence_threshold", "eval.temperatures",
        "eval.continued", "rule", "judge", "lora",
    ),
    lost="what it has done since its newest checkpoint is lost",
    banner="SFT and PPO answer the test users, who were in no training, and are judged.",
    in_run=True,
))  # fmt: skip
register(Stage(
    "heat", "tppo.stages.heat:heat",
    "answers of the closing table token by token, in the terminal and in report.html",
    inputs=(
        TRAIN_SESSIONS, TEST_SESSIONS, SFT_MODEL, QUERY_LENGTHS, REWARD_MODEL, POLICY, CRITIC,
        TEST_ANSWERS,
    ),
    outputs=(HEAT_ROWS,),
    settings=(
        "generate.temperature", *_SAMPLING, "ppo.reward", "ppo.reward_values",
        "ppo.length_alpha", "ppo.format_cost", "ppo.train_on_unlabelled", "ppo.bootstrap_truncated",
        "ppo.kl_coef", "ppo.gamma", "ppo.lam", "ppo.normalize", "ppo.max_tokens",
        "ppo.advantage", "ppo.responses_per_prompt", "eval.heat_users",
    ),
    banner="Answers are drawn token by token with what each token was paid.",
    in_run=True,
))  # fmt: skip
register(Stage(
    "noise", "tppo.stages.noise:noise",
    "how many answers the policy's gradient needs, by where rewards are paid and the critic's fit",
    inputs=(TRAIN_SESSIONS, SFT_MODEL, ANSWERS, QUERY_LENGTHS, REWARD_MODEL),
    outputs=(NOISE,),
    settings=(
        "generate.temperature", *_SAMPLING, "ppo.reward", "ppo.reward_values", "ppo.length_alpha",
        "ppo.format_cost", "ppo.train_on_unlabelled", "ppo.bootstrap_truncated", "ppo.kl_coef",
        "ppo.gamma", "ppo.lam", "ppo.max_tokens", "ppo.minibatch_size", "ppo.critic_lr",
        "ppo.grad_norm", "ppo.fit_critic", "lora", "eval.noise_answers",
    ),
))  # fmt: skip
register(Stage(
    "merge", "tppo.stages.merge:merge",
    "of a run with --lora: policy (once it is trained) and reward model as plain models",
    inputs=(SFT_MODEL, REWARD_MODEL, POLICY.if_there()),
    outputs=(MERGED_POLICY, MERGED_REWARD_MODEL),
    settings=(_HELD,),
))  # fmt: skip
register(Stage(
    "prefer", "tppo.stages.prefer:prefer",
    "which of two answers is better, by hand, for ser: label.hand.pairs of them",
    inputs=(TRAIN_SESSIONS, ANSWERS.of_every_round()),
    outputs=(PREFERENCES, EQUALS),
    settings=("label.hand.pairs",),
    lost="what was said is kept in hand-pairs.jsonl",
    flags=("label.hand",),
))  # fmt: skip
register(Stage(
    "ser", "tppo.stages.ser:ser_stage",
    "a reward model that labels for itself, from a share of the labels; or: ser --pairs FILE",
    inputs=(
        SFT_MODEL, ANSWERS, ANSWERS.of_every_round(), LABELS, LABELS.of_every_round(), CATEGORIES,
        PREFERENCES, EQUALS,
    ),
    outputs=(SER_MODEL, SER_REPORT),
    settings=(
        "ser", "-ser.scale", "lora", "reward_model", "-reward_model.model",
        "-reward_model.revision", "-reward_model.min_auc",
        "-reward_model.min_auc_sessions", "label.sentence_threshold", "prefix", _HELD,
    ),
    lost="what it has done since its newest checkpoint is lost",
    flags=("--model",),
))  # fmt: skip
register(Stage(
    "ser-train", "tppo.stages.ser_train:train_by_ser",
    "PPO with the reward model of ser; resumes from its newest checkpoint",
    inputs=(
        TRAIN_SESSIONS, HELDOUT_SESSIONS, SFT_MODEL, ANSWERS, QUERY_LENGTHS, SER_MODEL, SER_REPORT,
    ),
    outputs=(SER_POLICY,),
    settings=lambda given: (*_of_train(given), "ser.scale"),
    lost="no step of this process is lost",
    processes=True,
))  # fmt: skip
register(Stage(
    "pit", "tppo.stages.pit:pit_stage",
    "a policy that betters answers: SFT, gap model, two stages of PPO; or: pit --pairs FILE",
    inputs=(TRAIN_SESSIONS, SFT_MODEL, ANSWERS),
    outputs=(PIT_POLICY, PIT_GAP, PIT_REPORT),
    settings=lambda given: (
        *_of_train(given), *_OF_REWARD_MODEL, "sft", "pit", "-pit.improve_steps",
    ),
    lost="what it has done since its newest checkpoint is lost",
    flags=("--model",),
))  # fmt: skip
register(Stage(
    "improve", "tppo.stages.pit:improve_stage",
    "test users' answers, bettered k times by the policy of pit, each step judged",
    inputs=(TRAIN_SESSIONS, TEST_SESSIONS, SFT_MODEL, PIT_POLICY, PIT_GAP),
    outputs=(IMPROVED,),
    settings=(
        "generate.temperature", *_SAMPLING, "label.sentence_threshold", "pit.improve_steps",
        "reward_model.max_tokens", "rule", "judge",
    ),
))  # fmt: skip
