"""`tppo train --reward module:function`: the Python door from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tppo.config import Config
from tppo.errors import DataError
from tppo.rewards.user_function import load_given
from tppo.stages.given import given_rollout
from tppo.stages.trainer import PPOTrainer


def train_by_function(
    reward: str | None,
    judge: str | None,
    model: Path | None,
    data: Path | None,
    heldout: Path | None,
    settings: Config,
    **options: Any,
) -> None:
    """What `PPOTrainer(...).train()` does, to the same weights.

    reward, judge: `module:function`.  data, heldout: JSONL files of prompts.  settings: those of
    `ppo`, `generate`, `model`, `lora`, `algorithm`, `rlgf`, `guide`, `prefix`, `rollout`, `vllm`
    and `report_to` are used.  options: the trainer's others, by name.
    Errors: DataError naming what is not given.
    """
    if settings.reward_server.base_url:
        raise DataError(f"--reward-server.base-url was {settings.reward_server.base_url!r}, "
                        "expected none with --reward, which may name a tppo.ServedReward itself")
    for name, value, expected in (
        ("--reward", reward, "module:function; --heldout and --judge are of such a training"),
        ("--data", data, "a JSONL file of prompts"),
        ("--model", model, "the model to train"),
    ):
        if value is None:
            raise DataError(f"{name} was not given, expected {expected}")
    assert model is not None and reward is not None
    PPOTrainer(
        model,
        reward=load_given("--reward", reward),
        prompts=data,
        heldout=heldout,
        judge=None if judge is None else load_given("--judge", judge),
        config=settings.ppo,
        generate=settings.generate,
        loading=settings.model,
        lora=settings.lora,
        algorithm=settings.algorithm,
        rlgf=settings.rlgf,
        guide=settings.guide,
        prefix=settings.prefix,
        rollout=given_rollout(settings),
        report_to=settings.report_to,
        **options,
    ).train()
