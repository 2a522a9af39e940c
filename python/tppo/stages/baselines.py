"""Two baselines of token-level PPO by the same loop, which the closing table shows beside it.

    sentence_labels   of the same labelled answers the verdict on the whole alone is learnt, by a
                      sentence model that pays at the last token
    paid_at_end       the same token rewards, whose total is paid at the last token

Steps, answers a step and all other settings are those of `train`.  The critic of both is fitted
beforehand on the answers that the SFT model has generated, without which they learn later.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from tppo.methods.reward_model import IRRELEVANT, LabelledAnswer
from tppo.methods.sentence_model import SentenceReader, train_sentence_model
from tppo.rewards import Reward
from tppo.rewards.format import FormatReward
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward
from tppo.rewards.terminal import TerminalReward
from tppo.stages.answering.recipe import write_recipe
from tppo.stages.artifacts import BASELINES, POLICY, SFT_MODEL
from tppo.stages.models import new_ppo
from tppo.stages.parts import Parts
from tppo.stages.ppo import loop_of, policy_and_ref, recipe, run_reward
from tppo.stages.reward_rows import policy_rows, policy_twins
from tppo.stages.run import Run
from tppo.stages.study.presets import FEW, OF_FEW, OF_MANY
from tppo.store.checkpoint import Checkpoints
from tppo.store.run_folder import KEPT


def baselines(run: Run) -> None:
    """Train both; each leaves what `train` does in a folder of its own.  Resumes."""
    with run.stage("baselines", resume=True) as out:
        parts = Parts("baselines", out, None, run.seed)
        for name, reward_of in REWARDS.items():
            if not parts.done(name):
                with parts.part(name) as work:
                    baseline(run, work, reward_of)
            parts.copy(name)


def baseline(
    run: Run, out: Path, reward_of: Callable[[Run, PreTrainedModel, Path], Reward]
) -> None:
    """One of them.  reward_of: the reward, given the run, the SFT model and where checkpoints of
    what it trains are kept.
    """
    policy, ref = policy_and_ref(run, SFT_MODEL)
    config = run.config.ppo
    if config.advantage == "gae":
        config = replace(config, fit_critic=run.config.generate.samples)
    trainer = new_ppo(run, config, policy, ref, reward_of(run, ref, out / KEPT / "reward"))
    loop_of(run, out, trainer).run_all()
    write_recipe(out / POLICY.name, recipe(run))


def paid_at_end(run: Run, ref: PreTrainedModel, kept: Path) -> Reward:
    """What `train` is paid, at the last token."""
    return TerminalReward(run_reward(run, ref, ref))


def sentence_labels(run: Run, ref: PreTrainedModel, kept: Path) -> Reward:
    """What a sentence model pays that is trained on the same answers as often; form costs the same.

    Nobody knows which words of a twin were relevant where wholes alone are labelled: it is
    irrelevant.
    """
    rows, twins, config = policy_rows(run), policy_twins(run), run.config.reward_model
    data: list[LabelledAnswer] = [row for session in sorted(rows) for row in rows[session]]
    data += [row._replace(sentence=IRRELEVANT) for session in sorted(twins)
             for row in twins[session]]  # fmt: skip
    random.Random(f"{run.seed}/sentences").shuffle(data)
    answers = sum(map(len, rows.values()))
    arm = OF_FEW if answers <= FEW else OF_MANY  # as the study was tuned
    model = SentenceModel.from_policy(
        run.path(SFT_MODEL), run.device, arm.pooling, run.config.model.dtype, run.seed
    )
    reader = SentenceReader(model, run.tokenizer.pad_token_id, run.config.prefix, config.max_tokens)
    train_sentence_model(reader, data, [], config, seed=run.seed,
                         keeper=Checkpoints(kept, "baselines, sentence model"))  # fmt: skip
    ppo = run.config.ppo
    paid = SentenceModelReward(
        model, mode=arm.mode, scale=arm.scale, max_tokens=ppo.max_tokens
    )
    return FormatReward(paid, ppo.format_cost) if ppo.format_cost else paid


REWARDS = dict(zip(BASELINES, (sentence_labels, paid_at_end), strict=True))
