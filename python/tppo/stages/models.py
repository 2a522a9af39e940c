"""The models of PPO, all of which start from one folder: whole ones, or adapters over one base.

And PPO over those of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tppo.methods.advantages import ADVANTAGES
from tppo.methods.config import PPOConfig
from tppo.methods.experience import Models
from tppo.methods.ppo import PPO
from tppo.models.adapters import Origin, add_adapter, shared_copy
from tppo.models.config import AdapterConfig, ModelConfig
from tppo.models.folder import model_eos_ids
from tppo.models.parallel import ALONE, World
from tppo.models.policy import Critic, TwoCritics
from tppo.models.recompute import recompute_layers
from tppo.models.rollout import build
from tppo.models.token_classifier import state_size
from tppo.rewards import Reward
from tppo.stages.artifacts import SFT_MODEL
from tppo.stages.guides import UNGUIDED, Guided
from tppo.stages.run import Run


def ppo_models(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    path: Path,
    device: torch.device,
    config: ModelConfig,
    lora: AdapterConfig,
    *,
    critics: int,
    seed: int,
) -> Models:
    """`policy` with its reference and, where they are needed, one or two critics from the folder
    `path`, held as `config` says.

    With LoRA the policy shares the weights of the reference, and so does a critic.  Else all are
    loaded alike.  seed: of the critics' adapters.
    """

    def new_critic(number: int) -> Critic:
        if not lora.on:
            return Critic.from_policy(path, device, config.dtype)
        trunk = add_adapter(shared_copy(ref.base_model), lora, seed=seed + number)
        return Critic(trunk, state_size(ref.config)).to(device).eval()

    found = [new_critic(number) for number in range(1, critics + 1)]
    if config.gradient_checkpointing:
        for trained in (policy, *found):
            recompute_layers(trained)
    critic: Any = TwoCritics(*found) if critics == 2 else found[0] if found else None
    return Models(policy=policy, ref=ref, critic=critic)


def new_ppo(
    run: Run,
    config: PPOConfig,
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    reward: Reward,
    world: World = ALONE,
    guided: Guided = UNGUIDED,
) -> PPO:
    """PPO over `policy` by `config`, with a critic from SFT where the advantage needs one."""
    advantage = ADVANTAGES[config.advantage](config)
    pad_id, eos_ids = run.tokenizer.pad_token_id, model_eos_ids(run.tokenizer, policy)
    models = ppo_models(policy, ref, run.path(SFT_MODEL), run.device, run.config.model,
                        run.config.lora, critics=guided.critics(advantage),
                        seed=run.seed)  # fmt: skip
    return guided.trainer(
        models,
        build(policy, run.config.sampler, pad_id=pad_id, eos_id=eos_ids),
        config,
        reward=reward,
        advantage=advantage,
        tokenizer=run.tokenizer,
        sampling=run.sampling(),
        pad_id=pad_id,
        eos_id=eos_ids,
        seed=run.seed,
        prefix=run.config.prefix,
        world=world,
    )


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
