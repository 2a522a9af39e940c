"""The whole configuration: the sections, and the defaults that depend on the model.

A section is defined in the `config.py` of the folder that uses it.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any

from tppo.evaluation.config import EvalConfig
from tppo.labels.config import LabelConfig
from tppo.methods.config import (
    Algorithm,
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
    Prefix,
    RewardServerConfig,
    RolloutName,
    Sampler,
    ScratchConfig,
    VLLMConfig,
)
from tppo.sessions.config import SessionsConfig
from tppo.settings import Text, section
from tppo.store.jsonl import plain


@section
class Config:
    """Everything `tppo run` needs; each stage reads its own part."""

    prefix: Prefix = "shared"
    """shared computes a prompt once for all its responses; dense repeats it, to compare."""
    rollout: RolloutName = "hf"
    """Who samples: hf, transformers' generate; vllm, an engine beside the models in the same
    process (docs/vllm.md)."""
    algorithm: Algorithm = "ppo"
    """Of the stage train: ppo, or one of those in which a guide writes a part of the answers, with
    settings in the sections rlgf and guide: ppo++, aggrevated, lols, d2lols."""
    report_to: Text = "none"
    """Live trackers: tensorboard,wandb,trackio."""
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    rlgf: RLGFConfig = field(default_factory=RLGFConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    reward_server: RewardServerConfig = field(default_factory=RewardServerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ser: SERConfig = field(default_factory=SERConfig)
    pit: PITConfig = field(default_factory=PITConfig)

    @property
    def sampler(self) -> Sampler:
        """How answers are sampled."""
        return Sampler(self.rollout, self.vllm, self.generate.batch_size, self.prefix)

    def __post_init__(self) -> None:
        if self.rollout != "vllm" and self.vllm != VLLMConfig():
            raise ValueError(f"vllm was {self.vllm}, expected the defaults with rollout "
                             f"{self.rollout}, --vllm.memory-share {VLLMConfig().memory_share:g}, "
                             "or --rollout vllm")  # fmt: skip
        if self.algorithm == "ppo":
            for name in ("rlgf", "guide"):
                given = getattr(self, name)
                if given != type(given)():
                    raise ValueError(f"{name} was {given}, expected the defaults with algorithm "
                                     "ppo, which has no guide: --algorithm ppo++")  # fmt: skip
            return
        with_guide = f"with algorithm {self.algorithm}"
        if self.ppo.advantage != "gae":
            raise ValueError(f"ppo.advantage was {self.ppo.advantage!r}, expected 'gae' "
                             f"{with_guide}, which needs a critic")  # fmt: skip
        if self.algorithm in ("aggrevated", "d2lols") and self.ppo.fit_critic:
            raise ValueError(f"ppo.fit_critic was {self.ppo.fit_critic}, expected 0 {with_guide}: "
                             "its critic begins with the guide's values, and the answers for the "
                             "fit are the learner's")  # fmt: skip
        if self.algorithm != "ppo++" and not self.rlgf.beta_aggrevated:
            raise ValueError(f"rlgf.beta_aggrevated was 0, expected more {with_guide}: the learner "
                             "would write nothing, and learn nothing")  # fmt: skip
        if self.ppo.adaptive_kl is not None and not self.rlgf.kl_in_reward:
            raise ValueError("ppo.adaptive_kl was given and rlgf.kl_in_reward False, expected "
                             "True: it moves what KL costs of the reward")  # fmt: skip


def guided_settings(config: Config) -> dict[str, Any]:
    """What the weights depend on of an algorithm with a guide, but for the guide's own weights;
    nothing of plain PPO, whose manifests know no guide.
    """
    if config.algorithm == "ppo":
        return {}
    rlgf, guide = plain(config.rlgf), plain(config.guide)
    del rlgf["max_skipped"]
    kept = ("temperature", "top_p", "name", "system")
    return {"algorithm": config.algorithm, "rlgf": rlgf,
            "guide": {name: guide[name] for name in kept}}  # fmt: skip


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
