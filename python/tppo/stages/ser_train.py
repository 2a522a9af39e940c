"""PPO with the reward model that `tppo ser` has made."""

from __future__ import annotations

from contextlib import ExitStack

from transformers import PreTrainedModel

from tppo import stopping
from tppo.models.parallel import joined
from tppo.progress import say
from tppo.rewards import Reward
from tppo.rewards.format import FormatReward
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward
from tppo.stages.answering.recipe import write_recipe
from tppo.stages.artifacts import SER_MODEL, SER_POLICY, SER_REPORT, SFT_MODEL
from tppo.stages.models import new_ppo
from tppo.stages.ppo import loop_of, policy_and_ref, recipe, run_reward
from tppo.stages.run import Run
from tppo.store.jsonl import read_json


def train_by_ser(run: Run) -> None:
    """PPO from the SFT model; resumes from its newest checkpoint, and processes may share it."""
    with joined(run.device) as world, ExitStack() as stack:
        first = world.rank == 0
        stack.enter_context(stopping.deferrable())  # ends after the stage: it has its name by then
        out = world.of_first(
            stack.enter_context(run.stage("ser-train", resume=True)) if first else None
        )
        report = read_json(run.path(SER_REPORT))
        policy, ref = policy_and_ref(run, SFT_MODEL)
        trainer = new_ppo(run, run.config.ppo, policy, ref, ser_reward(run, policy, ref), world)
        about = {"labels": report["labels"], "rounds": report["rounds"]}
        loop_of(run, out, trainer, about).run_all()
        if first:
            write_recipe(out / SER_POLICY.name, recipe(run))


def ser_reward(run: Run, policy: PreTrainedModel, ref: PreTrainedModel) -> Reward:
    """That of SER's token reward model, or of its model of whole answers; form costs the same.

    Either is read here: the server that the run may have for `train` has the model of train-rm.
    """
    if url := run.config.reward_server.base_url:
        say(f"ser-train: the reward model of ser is read here; --reward-server.base-url {url} is "
            "for that of train-rm")  # fmt: skip
    if read_json(run.path(SER_REPORT))["labels"] == "words":
        return run_reward(run, policy, ref, SER_MODEL)
    model, config = run.path(SER_MODEL), run.config.ppo
    paid = SentenceModelReward(
        SentenceModel.load(model, run.device, run.config.model.dtype),
        scale=run.config.ser.scale,
        max_tokens=config.max_tokens,
    )
    return FormatReward(paid, config.format_cost) if config.format_cost else paid
