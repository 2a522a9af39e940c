"""What a user gives the Python door: told apart, checked before anything is loaded, and named."""

from __future__ import annotations

import inspect
import operator
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from tppo.config import Config, fill_defaults
from tppo.errors import DataError, short
from tppo.evaluation.judge import CallableJudge, Judge
from tppo.methods.advantages import GRPO, RLOO
from tppo.methods.config import Algorithm, PPOConfig, RLGFConfig
from tppo.methods.rlgf import TARGET
from tppo.models.config import (
    AdapterConfig,
    GenerateConfig,
    GuideConfig,
    Prefix,
    RolloutName,
    Sampler,
    VLLMConfig,
)
from tppo.models.rollout.installed import need_vllm
from tppo.rewards import Answers, Reward
from tppo.rewards.function import FunctionReward
from tppo.rewards.terminal import TerminalReward
from tppo.rewards.user_function import named_with_source
from tppo.stages.guides import check_guide, guide_folder

OF_THE_TOKEN_MODEL = ("reward", "reward_values", "length_alpha", "format_cost",
                      "train_on_unlabelled")  # fmt: skip
_JUDGE = "a function f(prompts, completions, **columns) -> list of numbers, or a tppo.Judge"


class RewardJudge:
    """The training reward as the judge of held-out answers: it sees nothing that PPO does not."""

    name = "the training reward itself"

    def __init__(self, reward: FunctionReward) -> None:
        self.reward = reward

    def __call__(self, answers: Answers) -> dict[str, list[float]]:
        """The total reward of each answer."""
        return {"reward": self.reward.totals(answers)}


def check_model(model: Any) -> None:
    """Errors: DataError where `model` names no place, such as a model that is loaded already."""
    if isinstance(model, (str, os.PathLike)):
        return
    remedy = "a local folder, a .gguf file, or an id of the Hugging Face hub"
    if hasattr(model, "save_pretrained"):
        remedy += ("; model.save_pretrained(FOLDER) and tokenizer.save_pretrained(FOLDER) make a "
                   "folder of one that is loaded")  # fmt: skip
    raise DataError(f"model was a {type(model).__name__}, expected {remedy}")


def check_sections(**given: tuple[Any, type]) -> None:
    """Errors: DataError naming the argument that is neither None nor of its class."""
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise DataError(f"{name} was {short(value)}, a {type(value).__name__}, expected a "
                            f"tppo.{kind.__name__}")  # fmt: skip


def checked_seed(seed: Any) -> int:
    """The seed as an int.  Errors: DataError where it is no whole number in 0 .. 2^32 - 1."""
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise DataError(f"seed was {short(seed)}, expected a whole number in 0 .. 2^32 - 1")
    return number


def check_place(device: Any, prefix: Any) -> None:
    """Errors: DataError naming the one of the two that is not what it may be."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", str(device)):
        raise DataError(f"device was {short(device)}, expected auto, cpu, cuda or cuda:N")
    if prefix not in get_args(Prefix):
        choices = " or ".join(get_args(Prefix))
        raise DataError(f"prefix was {short(prefix)}, expected {choices}")


def as_sampler(rollout: Any, generate: GenerateConfig, prefix: Prefix) -> Sampler:
    """Who samples, from a name or the settings of vLLM.

    Errors: DataError where it is neither, or vLLM is not here.
    """
    vllm = rollout if isinstance(rollout, VLLMConfig) else VLLMConfig()
    name: Any = "vllm" if vllm is rollout else rollout
    if name not in get_args(RolloutName):
        choices = ", ".join(map(repr, get_args(RolloutName)))
        raise DataError(f"rollout was {short(rollout)}, expected {choices} or a tppo.VLLMConfig")
    if name == "vllm":
        need_vllm()
    return Sampler(name, vllm, generate.batch_size, prefix)


def given_rollout(settings: Config) -> RolloutName | VLLMConfig:
    """Who samples by the settings of a run, as `as_sampler` takes it."""
    return settings.vllm if settings.rollout == "vllm" else settings.rollout


def check_advantage_given(advantage: Any, config: PPOConfig) -> None:
    """Errors: DataError where it is no `Advantage`, or compares responses where there is one."""
    if isinstance(advantage, str):
        raise DataError(f"advantage was {advantage!r}, expected a tppo.Advantage; by name it is a "
                        f"setting: tppo.PPOConfig(advantage={advantage!r})")  # fmt: skip
    if isinstance(advantage, type) or not callable(advantage):
        raise DataError(f"advantage was {short(advantage)}, expected an object, such as "
                        "tppo.GRPO(kl_coef=0.1)")  # fmt: skip
    if not isinstance(getattr(advantage, "needs_critic", None), bool):
        raise DataError(
            f"advantage {type(advantage).__name__} has no needs_critic, expected True where it "
            "wants the values of a critic, False where none is to be trained"
        )
    if isinstance(advantage, GRPO | RLOO) and config.responses_per_prompt < 2:
        raise DataError(
            f"config.responses_per_prompt was 1, expected at least 2 with {advantage}, which "
            "compares the responses of one prompt"
        )


def as_reward(given: Any) -> Reward:
    """A reward of `given`: a `Reward` (called with batch and answers), or functions of the user."""
    if isinstance(given, type):
        raise DataError(f"reward was the class {given.__name__}, expected an object of it: "
                        f"{given.__name__}(...)")  # fmt: skip
    if _is_reward(given):
        return given
    if not callable(given) and not isinstance(given, list | tuple):
        raise DataError(f"reward was {short(given)}, a {type(given).__name__}, expected a function "
                        "f(prompts, completions, **columns) -> list")  # fmt: skip
    for i, part in enumerate(given if isinstance(given, list | tuple) else ()):
        if _is_reward(part):
            raise DataError(f"reward[{i}] was a tppo.Reward, which is called with (batch, "
                            "answers); expected functions alone in a list")  # fmt: skip
    return FunctionReward(given)


def _is_reward(given: Any) -> bool:
    """Whether it is called with batch and answers, by the names of its first two parameters."""
    return hasattr(given, "forward") or _parameters(given)[:2] == ["batch", "answers"]


def _parameters(given: Any) -> list[str]:
    try:
        return list(inspect.signature(given).parameters)
    except (TypeError, ValueError):
        return []


def function_of(reward: Reward) -> FunctionReward | None:
    """The functions of the user that a reward is made of; None for another one."""
    while isinstance(reward, TerminalReward):
        reward = reward.reward
    return reward if isinstance(reward, FunctionReward) else None


def as_guide(given: Any) -> Any:
    """The guide of `given`: a `GuideConfig`, checked as far as it is before a model is loaded, or a
    `Rollout` of the user.

    Errors: DataError where it is neither, and no place of a model; ValueError for an endpoint.
    """
    if given is None or isinstance(given, str | os.PathLike):
        given = GuideConfig(model=None if given is None else str(given))
    if isinstance(given, GuideConfig):
        check_guide(given)
    elif isinstance(given, type) or not callable(getattr(given, "generate", None)):
        raise DataError(f"guide was {short(given)}, a {type(given).__name__}, expected the place "
                        "of a model, a tppo.GuideConfig, or an object with the method generate of "
                        "a Rollout")  # fmt: skip
    return given


def guide_files(settings: Config, pickles: bool) -> list[Path]:
    """The folder of another model that guides.  Errors: DataError where there is none."""
    found = guide_folder(settings.guide, pickles)
    return [] if found is None else [found]


def guide_identity(settings: Config, guide: Any) -> dict[str, str]:
    """What tells a guide of the user's from another one, where there is a guide."""
    if settings.algorithm == "ppo":
        return {}
    return {} if isinstance(guide, GuideConfig) else {"guide of the user": described(guide)}


def check_targets(rlgf: RLGFConfig, columns: Sequence[str]) -> None:
    """Errors: DataError where the loss wants true answers and the prompts have none."""
    if rlgf.target_nll and TARGET not in columns:
        raise DataError(f"rlgf.target_nll was {rlgf.target_nll:g} and the prompts have no column "
                        f"{TARGET!r}, expected one with the true answer to each")  # fmt: skip


def check_columns(reward: Reward, *of: Sequence[str] | None) -> None:
    """Errors: DataError where a function of the reward takes what one of several prompts' columns
    do not have; None stands for prompts that are not given.
    """
    function = function_of(reward)
    for columns in of:
        if function is not None and columns is not None:
            function.check(columns)


def as_judge(given: Any, reward: Reward, columns: Sequence[str] | None) -> Judge | None:
    """The judge of held-out prompts that have these columns, None where there are none.

    Errors: DataError where it is no judge, or takes what the columns do not have.
    """
    if columns is None:
        if given is not None:
            raise DataError("judge was given and heldout was None, expected held-out prompts for "
                            "the judge too")  # fmt: skip
        return None
    if given is None:
        function = function_of(reward)
        if function is None:
            raise DataError(f"judge was None, expected one for the held-out prompts: {_JUDGE}")
        return RewardJudge(function)
    if not callable(given) or isinstance(given, type):
        raise DataError(f"judge was {short(given)}, a {type(given).__name__}, expected {_JUDGE}")
    if isinstance(getattr(given, "name", None), str):
        return given
    if _parameters(given)[:1] == ["answers"]:
        raise DataError(f"judge {short(given)} is called with (answers) and has no name, expected "
                        "a text `name`, by which the table and the log call it")  # fmt: skip
    judge = CallableJudge(given, getattr(given, "__qualname__", type(given).__qualname__))
    judge.function.check(columns)
    return judge


def described(thing: Any) -> str:
    """What a part of the training is called, with a mark that changes where its source does."""
    if isinstance(thing, FunctionReward):
        return " + ".join(described(function.function) for function in thing.functions)
    if isinstance(thing, RewardJudge):
        return f"{thing.name}: {described(thing.reward)}"
    if isinstance(thing, TerminalReward):
        return f"the total of {described(thing.reward)}"
    if isinstance(thing, CallableJudge):
        return described(thing.function.function)
    return named_with_source(thing)


def own_settings(
    config: PPOConfig,
    reward: Reward,
    lora: AdapterConfig,
    algorithm: Algorithm,
    rlgf: RLGFConfig | None,
    guide: Any,
) -> Config:
    """The settings with defaults filled for a model that is not from scratch.

    Errors: DataError for what does not fit a reward function, or an algorithm without a guide.
    """
    if function_of(reward) is not None:
        default = PPOConfig()
        for name in OF_THE_TOKEN_MODEL:
            if getattr(config, name) != getattr(default, name):
                raise DataError(
                    f"config.{name} was {getattr(config, name)!r}, expected the default: it "
                    "belongs to the token reward model, and the reward is a function"
                )
    if algorithm == "ppo" and guide != GuideConfig():
        raise DataError(f"guide was {short(guide)}, expected None with algorithm ppo, which has "
                        "no guide: algorithm='ppo++'")  # fmt: skip
    given = Config(
        ppo=config, lora=lora, algorithm=algorithm, rlgf=rlgf or RLGFConfig(),
        guide=guide if isinstance(guide, GuideConfig) else GuideConfig(),
    )  # fmt: skip
    filled = fill_defaults(given, pretrained=True)
    # as many as the steps take
    return replace(filled, ppo=replace(filled.ppo, max_passes=config.max_passes))
