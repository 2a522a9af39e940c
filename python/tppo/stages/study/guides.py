"""The guides of a study's arms: the SFT model itself, or a policy that PPO has trained before."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from tppo.methods.config import RLGFConfig
from tppo.models.config import GuideConfig
from tppo.models.folder import save_model
from tppo.rewards import Reward
from tppo.rewards.terminal import TerminalReward
from tppo.sessions.prompts import encode_prompt
from tppo.stages.guides import UNGUIDED, Guided, Learner, new_guide
from tppo.stages.models import new_ppo
from tppo.stages.order import PromptOrder
from tppo.stages.ppo import policy_and_ref
from tppo.stages.registry import SFT_MODEL
from tppo.stages.study.config import Cell
from tppo.stages.study.material import Material


def guided_by(material: Material, cell: Cell, ref: PreTrainedModel, reward: Reward) -> Guided:
    """The algorithm of an arm with its guide."""
    arm, run = cell.arm, material.seeded
    if arm.algorithm == "ppo":
        return UNGUIDED
    config = GuideConfig()
    if arm.guide == "strong":
        config = GuideConfig(model=str(_strong(material, cell, reward)), top_p=1.0)
    rlgf = RLGFConfig(switch_step=max(1, cell.steps // 5))
    learner = Learner(ref, run.tokenizer, run.eos_ids, run.config.sampler, material.train,
                      encode_prompt)  # fmt: skip
    return Guided(arm.algorithm, new_guide(config, learner, run.device, run.config.model), rlgf,
                  config)  # fmt: skip


def _strong(material: Material, cell: Cell, reward: Reward) -> Path:
    """The folder of the strong guide: the policy of token-level PPO by the reward model of the
    cell, on three times the answers of the arm, which no budget counts.
    """
    steps, size = 3 * cell.steps // 2, 2 * cell.step_answers
    name = f"guide-{cell.reward_model}-{steps}-{size}-{material.study.mark}"
    folder = material.run.out / name
    if folder.exists():
        return folder
    run, work = material.seeded, folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    policy, ref = policy_and_ref(run, SFT_MODEL)
    config = replace(run.config.ppo, steps=steps, batch_size=size)
    paid = reward.reward if isinstance(reward, TerminalReward) else reward
    trainer = new_ppo(run, config, policy, ref, paid)
    order = PromptOrder(len(material.train), run.seed + 1)
    for step in range(steps):
        trainer.step(material.train.rows(order.rows(step * size, size)))
    save_model(policy, run.tokenizer, work)
    try:
        work.rename(folder)
    except OSError:  # another process has made the same one meanwhile
        shutil.rmtree(work)
    return folder
