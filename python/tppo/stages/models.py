"""The models of PPO, all of which start from one folder: whole ones, or adapters over one base."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tppo.methods.experience import Models
from tppo.models.adapters import Origin, add_adapter, shared_copy
from tppo.models.config import AdapterConfig, ModelConfig
from tppo.models.policy import Critic
from tppo.models.recompute import recompute_layers
from tppo.models.token_classifier import state_size
from tppo.stages.registry import SFT_MODEL
from tppo.stages.run import Run


def ppo_models(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    path: Path,
    device: torch.device,
    config: ModelConfig,
    lora: AdapterConfig,
    *,
    with_critic: bool,
    seed: int,
) -> Models:
    """`policy` with its reference and, where it is needed, a critic from the folder `path`, held
    as `config` says.

    With LoRA the policy shares the weights of the reference, and so does the critic.  Else both are
    loaded alike.  seed: of the critic's adapter.
    """
    critic = None
    if with_critic and lora.on:
        trunk = add_adapter(shared_copy(ref.base_model), lora, seed=seed + 1)
        critic = Critic(trunk, state_size(ref.config)).to(device).eval()
    elif with_critic:
        critic = Critic.from_policy(path, device, config.dtype)
    models = Models(policy=policy, ref=ref, critic=critic)
    if config.gradient_checkpointing:
        for trained in models.trained.values():
            recompute_layers(trained)
    return models


def sft_origin(run: Run) -> Origin:
    """The SFT model as the folders of adapters name it: by the path from there, so that a run's
    folder can be moved.
    """
    return Origin(f"../../{run.path(SFT_MODEL).relative_to(run.out).as_posix()}")


def adapted(
    base: PreTrainedModel, lora: AdapterConfig, seed: int, origin: Origin
) -> PreTrainedModel:
    """A policy that shares the weights of `base`, with a new adapter."""
    return add_adapter(shared_copy(base), lora, seed=seed, origin=origin)
