"""The models of PPO, all of which start from one folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tppo.methods.experience import Models
from tppo.models.config import ModelConfig
from tppo.models.policy import Critic
from tppo.models.recompute import recompute_layers


def ppo_models(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    path: Path,
    device: torch.device,
    config: ModelConfig,
    *,
    with_critic: bool,
) -> Models:
    """`policy` with its reference and, where it is needed, a critic from the folder `path`, held
    as `config` says.  `policy` and `ref` are loaded alike.
    """
    models = Models(
        policy=policy,
        ref=ref,
        critic=Critic.from_policy(path, device, config.dtype) if with_critic else None,
    )
    if config.gradient_checkpointing:
        for trained in models.trained.values():
            recompute_layers(trained)
    return models
