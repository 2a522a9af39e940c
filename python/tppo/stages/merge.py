"""The merge stage: adapters become plain models, for programs that know no adapters."""

from __future__ import annotations

from tppo.errors import DataError
from tppo.models.adapters import is_adapter
from tppo.models.folder import save_model, save_weights
from tppo.models.load import load_policy, load_reward_model
from tppo.models.probe import write_probe
from tppo.progress import say
from tppo.stages.answering.recipe import copy_recipe
from tppo.stages.artifacts import MERGED_POLICY, MERGED_REWARD_MODEL, POLICY, REWARD_MODEL
from tppo.stages.run import Run


def merge(run: Run) -> None:
    """Policy and reward model as plain folders of transformers, each with its base in it; before
    PPO the reward model alone, for a server of it.
    """
    policy, reward = run.path(POLICY.if_there()), run.path(REWARD_MODEL)
    if policy.exists() and not is_adapter(policy):
        raise DataError(f"{policy}: a plain model, expected an adapter; nothing is to be merged")
    if not policy.exists() and not is_adapter(reward):
        raise DataError(f"{reward}: a plain model, expected an adapter; nothing is to be merged")
    with run.stage("merge") as out:
        if policy.exists():
            model = load_policy(policy, run.device, run.config.model.dtype)
            save_model(model, run.tokenizer, out / MERGED_POLICY.name)
            copy_recipe(policy, out / MERGED_POLICY.name)
        if is_adapter(reward):
            classifier = load_reward_model(reward, run.device, run.config.model.dtype)
            save_weights(classifier, out / MERGED_REWARD_MODEL.name)
            run.tokenizer.save_pretrained(out / MERGED_REWARD_MODEL.name)
            write_probe(classifier, run.tokenizer, out / MERGED_REWARD_MODEL.name)
    say(f"merged: {run.path(MERGED_POLICY).parent}")
