"""The whole configuration: the sections, and the defaults that depend on the model.

A section is defined in the `config.py` of the folder that uses it.
"""

from __future__ import annotations

from dataclasses import field, replace

from tppo.evaluation.config import EvalConfig
from tppo.labels.config import LabelConfig
from tppo.methods.config import PITConfig, PPOConfig, RewardModelConfig, SERConfig, SFTConfig
from tppo.models.config import (
    AdapterConfig,
    GenerateConfig,
    ModelConfig,
    Prefix,
    ScratchConfig,
)
from tppo.sessions.config import SessionsConfig
from tppo.settings import section


@section
class Config:
    """Everything `tppo run` needs; each stage reads its own part."""

    prefix: Prefix = "shared"
    """shared computes a prompt once for all its responses; dense repeats it, to compare."""
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ser: SERConfig = field(default_factory=SERConfig)
    pit: PITConfig = field(default_factory=PITConfig)


def fill_defaults(config: Config, pretrained: bool) -> Config:
    """The configuration with every default that depends on where the model comes from."""
    sft, reward_model, ppo = (
        (2e-5, 1e-5, (5e-6, 1e-5)) if pretrained else (5e-3, 1e-3, (3e-4, 1e-3))
    )
    if config.reward_model.model is not None:
        reward_model = 1e-5
    if config.lora.on:  # adapters learn at about ten times the rate of all weights
        sft, reward_model = 10 * sft if pretrained else sft, 10 * reward_model
        ppo = (10 * ppo[0], 10 * ppo[1])
    prompt_loss = config.sft.prompt_loss
    return replace(
        config,
        sft=replace(
            config.sft,
            lr=config.sft.lr or sft,
            prompt_loss=not pretrained if prompt_loss is None else prompt_loss,
        ),
        reward_model=replace(config.reward_model, lr=config.reward_model.lr or reward_model),
        ppo=replace(
            config.ppo,
            lr=config.ppo.lr or ppo[0],
            critic_lr=config.ppo.critic_lr or ppo[1],
            max_passes=config.ppo.max_passes or 2.0,
        ),
    )
