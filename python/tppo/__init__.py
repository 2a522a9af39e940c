"""Token-level PPO (Ouyang et al., EMNLP 2025) over `tppo_kernels`: in a script of one's own, or
stage by stage (`tppo run`).

    import tppo
    trainer = tppo.PPOTrainer("path/or/hub-id", reward=my_reward, prompts=prompts)
    trainer.train()
    trainer.save("out")
    print(tppo.load("out").answer("red running shoes"))

`import tppo` loads nothing else; each name below loads what it needs when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tppo.evaluation.judge import CallableJudge, Judge, RuleJudge
    from tppo.methods.advantages import GAE, GRPO, RLOO, Advantage, Masks, TokenAdvantages
    from tppo.methods.config import (
        PITConfig,
        PPOConfig,
        RewardModelConfig,
        RLGFConfig,
        SERConfig,
        SFTConfig,
    )
    from tppo.models.config import (
        AdapterConfig,
        GenerateConfig,
        GuideConfig,
        ModelConfig,
        RewardServerConfig,
        VLLMConfig,
    )
    from tppo.models.rollout.vllm import VLLMRollout
    from tppo.rewards import Answers, Reward, TokenReward
    from tppo.rewards.dense import ABC, RED, RTO
    from tppo.rewards.function import FunctionReward
    from tppo.rewards.served import ServedReward
    from tppo.rewards.terminal import TerminalReward
    from tppo.rewards.token_model import TokenModelReward
    from tppo.stages.answering.answerer import Answerer, load
    from tppo.stages.artifacts import Artifact
    from tppo.stages.pit_files import pit
    from tppo.stages.registry import Stage, register
    from tppo.stages.ser_files import ser
    from tppo.stages.trainer import PPOTrainer

_HOMES = {
    "tppo.evaluation.judge": ("CallableJudge", "Judge", "RuleJudge"),
    "tppo.methods.advantages": ("GAE", "GRPO", "RLOO", "Advantage", "Masks", "TokenAdvantages"),
    "tppo.methods.config": (
        "PITConfig", "PPOConfig", "RLGFConfig", "RewardModelConfig", "SERConfig", "SFTConfig",
    ),
    "tppo.models.config": (
        "AdapterConfig", "GenerateConfig", "GuideConfig", "ModelConfig", "RewardServerConfig",
        "VLLMConfig",
    ),
    "tppo.models.rollout.vllm": ("VLLMRollout",),
    "tppo.rewards": ("Answers", "Reward", "TokenReward"),
    "tppo.rewards.dense": ("ABC", "RED", "RTO"),
    "tppo.rewards.function": ("FunctionReward",),
    "tppo.rewards.served": ("ServedReward",),
    "tppo.rewards.terminal": ("TerminalReward",),
    "tppo.rewards.token_model": ("TokenModelReward",),
    "tppo.stages.answering.answerer": ("Answerer", "load"),
    "tppo.stages.artifacts": ("Artifact",),
    "tppo.stages.pit_files": ("pit",),
    "tppo.stages.registry": ("Stage", "register"),
    "tppo.stages.ser_files": ("ser",),
    "tppo.stages.trainer": ("PPOTrainer",),
}

__all__ = [
    "ABC",
    "GAE",
    "GRPO",
    "RED",
    "RLOO",
    "RTO",
    "AdapterConfig",
    "Advantage",
    "Answerer",
    "Answers",
    "Artifact",
    "CallableJudge",
    "FunctionReward",
    "GenerateConfig",
    "GuideConfig",
    "Judge",
    "Masks",
    "ModelConfig",
    "PITConfig",
    "PPOConfig",
    "PPOTrainer",
    "RLGFConfig",
    "Reward",
    "RewardModelConfig",
    "RewardServerConfig",
    "RuleJudge",
    "SERConfig",
    "SFTConfig",
    "ServedReward",
    "Stage",
    "TerminalReward",
    "TokenAdvantages",
    "TokenModelReward",
    "TokenReward",
    "VLLMConfig",
    "VLLMRollout",
    "load",
    "pit",
    "register",
    "ser",
]


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        """The public name, from the module that defines it."""
        for home, names in _HOMES.items():
            if name in names:
                return _load(home, name)
        import difflib

        close = difflib.get_close_matches(name, __all__, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module 'tppo' has no attribute {name!r}{hint}")


def _load(home: str, name: str) -> Any:
    import importlib

    try:
        found = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("tppo", "tppo_kernels"):
            raise
        raise ModuleNotFoundError(
            f"tppo.{name} needs {error.name}, which is not installed: "
            "pip install 'tppo-kernels[train]'",
            name=error.name,
        ) from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
