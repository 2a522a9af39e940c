"""The stages: what each is called, reads, writes and depends on, and where its function stands.

A stage of one's own, outside this package:

    from tppo.stages.artifacts import ANSWERS, Artifact
    from tppo.stages.registry import Stage, register

    LONGEST = Artifact("longest/answer.txt", "the longest generated answer")

    def longest(run):
        with run.stage("longest") as out:
            texts = [answer.text for answer in run.iter_answers()]
            (out / "answer.txt").write_text(max(texts, key=len))

    STAGE = register(Stage("longest", longest, "the longest answer", (ANSWERS,), (LONGEST,)))

`tppo package.module:STAGE --out DIR` runs it, and so does `Run(...).perform("longest")`.  What it
reads it declares: `Run.path` refuses anything else while the stage runs.

This file loads no torch; the functions are imported when their stages run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tppo.config import Config
from tppo.errors import DataError, short
from tppo.labels.rule import RULE
from tppo.methods.config import WITHOUT_EFFECT
from tppo.stages.artifacts import (
    ANSWERS,
    CATEGORIES,
    CRITIC,
    HEAT_MAP,
    HELDOUT_SESSIONS,
    LABELS,
    MERGED_POLICY,
    MERGED_REWARD_MODEL,
    NOISE,
    OF_BASELINES,
    POLICY,
    QUERY_LENGTHS,
    RESULT,
    REWARD_MODEL,
    REWARD_REPORT,
    SFT_MODEL,
    TEST_ANSWERS,
    TEST_SESSIONS,
    TRAIN_SESSIONS,
    TRAINING,
    TRANSFER_SESSIONS,
    Artifact,
)
from tppo.store.jsonl import plain

if TYPE_CHECKING:
    from tppo.stages.run import Run


@dataclass(frozen=True)
class Given:
    """What decides which settings a stage depends on."""

    config: Config
    from_file: bool
    """Whether sessions are read from a log of the user."""
    from_model: bool
    """Whether SFT starts from a model of the user."""
    judge: Callable[[], str | None] = lambda: None
    """What names a judge in place of the rule, asked only where a stage depends on it."""


@dataclass(frozen=True)
class Stage:
    """One stage; a stage that is not registered does not exist.

    settings: names of those that change its result: `ppo.lr` is one, `ppo` a section, `-ppo.lr` the
    section without it, "rule" the edition of the rule's verdicts, "judge" the name of a judge in
    place of the rule, if there is one, "lora" the adapters, if some are trained.  A setting that
    decides how fast, how often or whether at all something happens, but not what comes of it, is
    not among them: changing it repeats no stage.
    An own output among the inputs is of rounds before; the first round has none.
    """

    name: str
    function: Callable[[Run], None] | str
    """Does the work inside `with run.stage(name)`; as `module:name` it is imported late."""
    help: str
    inputs: tuple[Artifact, ...] = ()
    outputs: tuple[Artifact, ...] = ()
    """What others may read of it: where one is not written, the stage fails."""
    settings: tuple[str, ...] | Callable[[Given], tuple[str, ...]] = ()
    lost: str = "its work so far is lost"
    """What a signal costs a stage that is under way."""
    outside: Callable[[Run], Path | None] | None = None
    """What the stage reads that the user names, None where he names nothing."""
    in_run: bool = False
    """Whether `tppo run` runs it, in the order of registration."""
    processes: bool = False
    """Whether several processes of torchrun may share it."""
    left_over: Callable[[Run], bool] | str | None = None
    """What `tppo run` calls where the stage is finished; True where there was something to do."""

    def __call__(self, run: Run) -> None:
        """Do the work of the stage."""
        _resolved(self.function)(run)

    def go_on(self, run: Run) -> bool:
        """Do what a finished stage has left over; whether there was something."""
        return self.left_over is not None and _resolved(self.left_over)(run)

    def dependencies(self, given: Given) -> dict[str, Any]:
        """The settings that the result depends on, by name."""
        names = self.settings(given) if callable(self.settings) else self.settings
        return _chosen(given, names)


REGISTRY: dict[str, Stage] = {}


def register(stage: Stage) -> Stage:
    """Make a stage known, after those whose files it reads; gives it back.

    Errors: ValueError where its name is taken or not usable, an input is of no registered stage or
    is no output of it, or an output lies outside the stage's folder.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", stage.name) or re.search(r"-\d+$", stage.name):
        raise ValueError(f"stage name was {stage.name!r}, expected a lower-case letter, then "
                         "letters, digits, - and _; -NUMBER ends the names of rounds")  # fmt: skip
    if stage.name in REGISTRY or stage.name == "run":
        raise ValueError(f"stage name was {stage.name!r}, expected one that is not taken: there "
                         f"are run, {', '.join(REGISTRY)}")  # fmt: skip
    for output in stage.outputs:
        if output.stage != stage.name or not output.name:
            raise ValueError(f"stage {stage.name}: output {output.path!r}, expected a path "
                             f"{stage.name}/...")  # fmt: skip
    for artifact in stage.inputs:
        maker = stage if artifact.stage == stage.name else REGISTRY.get(artifact.stage)
        if maker is None or replace(artifact, every=False) not in maker.outputs:
            known = "no such stage is registered" if maker is None else "its stage has " + (
                ", ".join(output.path for output in maker.outputs) or "no outputs")  # fmt: skip
            raise ValueError(f"stage {stage.name}: input {artifact.path!r}, expected an output of "
                             f"a registered stage ({known})")  # fmt: skip
    REGISTRY[stage.name] = stage
    return stage


def load_stage(name: str) -> Stage:
    """The registered stage that `module:name` names; the module may lie in the working directory.

    Errors: DataError naming what is not there, or is no Stage.
    """
    from tppo.rewards.user_function import load_object  # not where only --help is wanted

    found = load_object(name)
    if not isinstance(found, Stage):
        raise DataError(f"{name} was {short(found)}, expected a Stage of tppo.stages.registry")
    return found if REGISTRY.get(found.name) is found else register(found)


def before(name: str) -> list[str]:
    """The stages whose files a stage reads, and theirs, in order."""
    found: set[str] = set()
    left = [name]
    while left:
        direct = {artifact.stage for artifact in REGISTRY[left.pop()].inputs}
        left += direct - found
        found |= direct
    return [other for other in REGISTRY if other in found - {name}]


def _resolved(function: Any) -> Any:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return attrgetter(name)(import_module(module))


def _chosen(given: Given, names: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        if name.startswith("-"):
            section, _, key = name.removeprefix("-").rpartition(".")
            del found[section][key]
        elif name == "judge":
            judge = given.judge()
            found |= {} if judge is None else {name: judge}
        elif name == "lora":
            found |= {name: plain(given.config.lora)} if given.config.lora.on else {}
        else:
            found[name] = RULE if name == "rule" else plain(attrgetter(name)(given.config))
    return found


_HELD = "model.dtype"  # the type of weights in memory
_SAMPLING = ("generate.max_new_tokens", "generate.batch_size", "prefix", _HELD)

_OF_REWARD_MODEL = (
    "reward_model", "-reward_model.model", "-reward_model.revision", "-reward_model.min_auc",
    "-reward_model.min_auc_sessions",
)  # fmt: skip
_OF_TRAIN = (
    "generate.temperature", *_SAMPLING, "label.sentence_threshold", "ppo",
    *(f"-ppo.{name}" for name in WITHOUT_EFFECT), "rule", "judge", "lora",
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
    if given.config.label.labeller == "rule":
        return "label.labeller", "label.sentence_threshold", "rule"
    return (
        "label.labeller",
        "label.endpoint", "-label.endpoint.base_url", "-label.endpoint.api_key_env",
        "-label.endpoint.concurrency", "-label.endpoint.max_retries", "-label.endpoint.timeout_s",
        "-label.endpoint.price_read", "-label.endpoint.price_written",
        "-label.endpoint.max_wait_s", "-label.endpoint.max_dropped",
    )  # fmt: skip


register(Stage(
    "data", "tppo.stages.data:data",
    "sessions: generated, or read from --data; split by user; or: data inspect FILE",
    outputs=(TRAIN_SESSIONS, HELDOUT_SESSIONS, TEST_SESSIONS, TRANSFER_SESSIONS),
    settings=_of_data,
    outside=lambda run: run.data,
    in_run=True,
))  # fmt: skip
register(Stage(
    "sft", "tppo.stages.sft:sft",
    "supervised fine-tuning to the early stop; from scratch, or from --model",
    inputs=(TRAIN_SESSIONS, HELDOUT_SESSIONS),
    outputs=(SFT_MODEL,),
    settings=_of_sft,
    lost="its steps so far are lost",
    outside=lambda run: run.base,
    in_run=True,
))  # fmt: skip
register(Stage(
    "generate", "tppo.stages.generate:generate",
    "answers of the SFT model",
    inputs=(TRAIN_SESSIONS, SFT_MODEL),
    outputs=(ANSWERS,),
    settings=("generate", "prefix", _HELD),
    lost="its answers so far are lost",
    in_run=True,
))  # fmt: skip
register(Stage(
    "label", "tppo.stages.label:label_answers",
    "word and answer labels, by the rule or an endpoint; or: label --agreement FILE",
    inputs=(TRAIN_SESSIONS, ANSWERS),
    outputs=(LABELS,),
    settings=_of_label,
    lost="labels of an endpoint are kept in label-cache.jsonl",
    in_run=True,
    left_over="tppo.stages.label:label_lost_again",
))  # fmt: skip
register(Stage(
    "map", "tppo.stages.map:map_to_tokens",
    "word labels to token categories",
    inputs=(SFT_MODEL, ANSWERS, LABELS),
    outputs=(CATEGORIES, QUERY_LENGTHS),
    in_run=True,
))  # fmt: skip
register(Stage(
    "train-rm", "tppo.stages.reward_model:train_rm",
    "the token reward model",
    inputs=(SFT_MODEL, ANSWERS, LABELS, CATEGORIES),
    outputs=(REWARD_MODEL, REWARD_REPORT),
    settings=("lora", *_OF_REWARD_MODEL, "label.sentence_threshold", "prefix", _HELD),
    lost="its steps so far are lost",
    outside=lambda run: run.own_reward_model,
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
    settings=_OF_TRAIN,
    lost="no step of this process is lost",
    in_run=True,
    processes=True,
))  # fmt: skip
register(Stage(
    "baselines", "tppo.stages.baselines:baselines",
    "the same PPO with labels of sentences, and with rewards at the end; for the closing table",
    inputs=(*REGISTRY["train"].inputs, LABELS, CATEGORIES),
    outputs=OF_BASELINES,
    settings=(*_OF_TRAIN, "generate.samples", *_OF_REWARD_MODEL),
    lost="its steps so far are lost",
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
    in_run=True,
))  # fmt: skip
register(Stage(
    "heat", "tppo.stages.evaluate:heat",
    "token heat map, as HTML and in the terminal",
    inputs=(
        TRAIN_SESSIONS, TEST_SESSIONS, SFT_MODEL, QUERY_LENGTHS, REWARD_MODEL, POLICY, CRITIC,
    ),
    outputs=(HEAT_MAP,),
    settings=(
        "generate.temperature", *_SAMPLING, "ppo.reward", "ppo.reward_values",
        "ppo.length_alpha", "ppo.format_cost", "ppo.train_on_unlabelled", "ppo.bootstrap_truncated",
        "ppo.kl_coef", "ppo.gamma", "ppo.lam", "ppo.normalize", "ppo.max_tokens",
        "ppo.advantage", "ppo.responses_per_prompt", "eval.heat_users",
    ),
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
    "of a run with --lora: policy and reward model as plain models, their base in them",
    inputs=(SFT_MODEL, REWARD_MODEL, POLICY),
    outputs=(MERGED_POLICY, MERGED_REWARD_MODEL),
    settings=(_HELD,),
))  # fmt: skip
