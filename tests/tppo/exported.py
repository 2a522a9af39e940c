"""A small model as a finished run leaves it, without the minutes of a training.

Its weights are large, so that every log-prob depends on everything before it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from _weights import enlarged

from tppo.models.config import ScratchConfig
from tppo.models.folder import save_model
from tppo.models.load import load_reward_model
from tppo.models.policy import new_policy
from tppo.models.probe import write_probe
from tppo.models.tokenizer import train_tokenizer
from tppo.sessions.config import SessionsConfig
from tppo.sessions.prompts import prompt_text
from tppo.sessions.session import Session
from tppo.sessions.synthetic import generate_sessions
from tppo.stages.answering.recipe import Paid, Recipe, recipe_of, write_recipe
from tppo.stages.artifacts import POLICY, REWARD_MODEL
from tppo.store.run_folder import RunFolder

PAID = Paid("argmax", (0.0, -0.5, 0.5), 2.0, 5.0)


def sessions() -> list[Session]:
    """The sessions that the tokenizer and the recipe are made of."""
    small = SessionsConfig(train_users=20, heldout_users=1, test_users=1, transfer_users=0)
    return generate_sessions(small, 0).train


def export(out: Path, recipe: Recipe | None = None, template: str | None = None) -> Path:
    """A folder with a policy and a token reward model at the places of a run's."""
    torch.manual_seed(5)
    texts = [text for s in sessions() for text in (prompt_text(s), "\n".join(s.targets))]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.chat_template = template
    config = ScratchConfig(hidden_size=32, intermediate_size=32, layers=2, heads=2, max_length=256)
    made = out / "made"
    policy, classifier = made / POLICY.path, made / REWARD_MODEL.path
    policy.mkdir(parents=True)
    save_model(enlarged(new_policy(config, tokenizer)), tokenizer, policy)
    write_recipe(policy, recipe or recipe_of(sessions(), 12, 1.0, PAID))
    reward = load_reward_model(policy, torch.device("cpu"))
    reward.config.own_tokens = False
    enlarged(reward).save_pretrained(classifier)
    tokenizer.save_pretrained(classifier)
    write_probe(reward, tokenizer, classifier)
    for artifact in (POLICY, REWARD_MODEL):
        with RunFolder(out).stage(artifact.stage) as work:
            (made / artifact.path).rename(work / artifact.name)
    shutil.rmtree(made)
    return out
