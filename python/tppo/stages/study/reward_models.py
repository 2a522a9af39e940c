"""The reward models of a study: trained from N labelled answers, kept, read as PPO and figures do.

Those of words and of sentences start from the trunk of the same SFT model and pass equally often
over the same answers and their twins; of each answer one has the labels of its words, the other one
label.  What DPO makes of the SFT model knows no labels: an answer is the worse one of a pair with
the true next queries.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tppo.labels.choice import most_doubtful
from tppo.methods.config import RewardModelConfig
from tppo.methods.doubt import answer_doubts
from tppo.methods.dpo import preferences, train_dpo
from tppo.methods.reward_model import (
    IRRELEVANT,
    RELEVANT,
    LabelledAnswer,
    PolicyTokens,
    enough_passes,
    train_reward_model,
)
from tppo.methods.sentence_model import SentenceReader, train_sentence_model
from tppo.models.batch import Batch
from tppo.models.folder import save_weights
from tppo.models.load import load_policy
from tppo.models.own_tokens import load_frozen, start_reward_model
from tppo.models.policy import RewardModel
from tppo.models.vocabulary import limit_vocabulary
from tppo.rewards import Reward
from tppo.rewards.format import FormatReward
from tppo.rewards.implicit import ImplicitReward, ImplicitScore
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward
from tppo.rewards.terminal import TerminalReward
from tppo.rewards.token_model import TokenModelReward
from tppo.sessions.prompts import encode_answer
from tppo.stages.artifacts import SFT_MODEL
from tppo.stages.study.config import ROUND, Cell, Noise
from tppo.stages.study.frozen import (
    fit_head,
    head_scores,
    load_head,
    save_head,
    sentence_model,
    states_of,
    word_model,
)
from tppo.stages.study.material import Labelled, Material, labelled_rows

ModelReward = TokenModelReward | SentenceModelReward | ImplicitReward
DPO_BETA, DPO_LR = 0.1, 1e-4
AT_ONCE = 256  # answers that a reward model rates at once
WEIGHTS = "model.safetensors"


def folder_of(material: Material, cell: Cell) -> Path:
    """Where the reward model of a cell lies."""
    seed = "" if material.seed == material.run.seed else f"seed-{material.seed}-"
    name = f"{seed}{cell.reward_model}-{material.study.mark}"
    return material.run.out / "reward-models" / name


def make_reward_model(material: Material, cell: Cell) -> None:
    """Train the reward model of a cell, unless it is there."""
    folder = folder_of(material, cell)
    if folder.exists():
        return
    work = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if cell.arm.layer:
        save_head(fit_head(material, cell), work)
    else:
        _train(material, cell, work)
    work.rename(folder)


def _train(material: Material, cell: Cell, work: Path) -> None:
    """A reward model whose weights are all its own, into the folder `work`."""
    if cell.arm.labels == "words":
        save_weights(word_model_of(material, chosen_first(material, cell), cell.noise), work)
    elif cell.arm.labels == "pairs":
        save_weights(_by_dpo(material, cell.answers), work)
    else:
        rows = labelled_rows(material, material.pool[: cell.answers], cell.noise, "sentences")
        config = _passes(material, len(rows))
        model = _sentence_model(material, cell)
        reader = SentenceReader(
            model, material.run.tokenizer.pad_token_id, material.run.config.prefix
        )
        train_sentence_model(reader, rows, [], config, seed=material.seed)
        save_file(model.state_dict(), work / WEIGHTS)


def chosen_first(material: Material, cell: Cell) -> list[Labelled]:
    """The answers that are labelled before PPO begins.

    Where they are those that a reward model is unsure of, one is trained of every round, with the
    noise of the cell.
    """
    pool, n = material.pool, cell.labelled_first
    if cell.arm.chosen != "unsure":
        return pool[:n]
    chosen, rest = pool[:ROUND], pool[ROUND:]
    users = {session.id: session.user for session in material.sessions}
    while len(chosen) < n:
        model = word_model_of(material, chosen, cell.noise)
        unread = [LabelledAnswer(a.prompt_ids, a.response_ids, (), 0) for a, _ in rest]
        doubts = answer_doubts(_reader(material, model), unread, material.run.config.reward_model)
        whose = [users[answer.session] for answer, _ in rest]
        done = Counter(users[answer.session] for answer, _ in chosen)
        next_ones = most_doubtful(doubts, whose, min(ROUND, n - len(chosen)), done)
        chosen = chosen + [rest[i] for i in next_ones]
        rest = [pair for i, pair in enumerate(rest) if i not in set(next_ones)]
    return chosen[:n]


def word_model_of(material: Material, pairs: Sequence[Labelled], noise: Noise) -> PreTrainedModel:
    """The token reward model of these labelled answers, from the trunk of the SFT model."""
    run, rows = material.run, labelled_rows(material, pairs, noise, "words")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(material.seed)
        model, _ = start_reward_model(
            None, run.path(SFT_MODEL), run.tokenizer, run.device, run.config.model.dtype
        )
    config = _passes(material, len(rows))
    train_reward_model(_reader(material, model), rows, config, seed=material.seed)
    return model


def _reader(material: Material, model: PreTrainedModel) -> PolicyTokens:
    return PolicyTokens(model, material.run.tokenizer.pad_token_id, material.run.config.prefix)


def _by_dpo(material: Material, answers: int) -> PreTrainedModel:
    """The SFT model after DPO on the true next queries against as many of its answers."""
    run, config = material.run, material.run.config.reward_model
    targets = {session.id: session.targets for session in material.sessions}
    given = [answer for answer, _ in material.pool[:answers]]
    pairs = preferences(
        [answer.prompt_ids for answer in given],
        [encode_answer(run.tokenizer, targets[answer.session]) for answer in given],
        [answer.response_ids for answer in given],
    )
    held = max(1, round(config.heldout_share * len(pairs)))  # it stops an epoch past its best
    policy = run.sft_model()
    train_dpo(policy, run.sft_model(), pairs[held:], pairs[:held], replace(config, lr=DPO_LR),
              pad_id=run.tokenizer.pad_token_id, seed=material.seed, beta=DPO_BETA,
              prefix=run.config.prefix)  # fmt: skip
    return policy


def dpo_policy(material: Material, cell: Cell) -> PreTrainedModel:
    """The policy that DPO has made of the pairs of a cell."""
    run = material.run
    policy = load_policy(folder_of(material, cell), run.device, run.config.model.dtype)
    return limit_vocabulary(policy, run.tokenizer)


def _sentence_model(material: Material, cell: Cell) -> SentenceModel:
    run = material.run
    return SentenceModel.from_policy(
        run.path(SFT_MODEL), run.device, cell.arm.pooling, run.config.model.dtype, material.seed
    )


def _passes(material: Material, rows: int) -> RewardModelConfig:
    """The settings with as many passes over the rows as the study's `reward_updates` take."""
    return enough_passes(material.run.config.reward_model, rows, material.study.reward_updates)


def reward_of(material: Material, cell: Cell, sft: PreTrainedModel) -> Reward:
    """What pays in PPO, by the frozen reward model of a cell; every arm pays alike for faults of
    the form.  sft: the model that a head reads.
    """
    arm, config = cell.arm, material.run.config.ppo
    reward: Reward = _model_reward(material, cell, sft)
    if config.format_cost:
        reward = FormatReward(reward, config.format_cost)
    return TerminalReward(reward) if arm.paid == "end" and arm.labels != "sentences" else reward


def _model_reward(material: Material, cell: Cell, sft: PreTrainedModel) -> ModelReward:
    """What the reward model of a cell pays, without what the form costs."""
    run, arm, config = material.run, cell.arm, material.run.config.ppo
    folder = folder_of(material, cell)
    if arm.labels == "pairs":
        implied = ImplicitScore(dpo_policy(material, cell), run.sft_model(), DPO_BETA * arm.scale)
        return ImplicitReward(implied, max_tokens=config.max_tokens)
    if arm.labels == "sentences":
        if arm.layer:
            model = sentence_model(sft, arm.layer, arm.pooling, load_head(folder))
        else:
            model = _sentence_model(material, cell)
            model.load_state_dict(load_file(folder / WEIGHTS))
        return SentenceModelReward(
            model, mode=arm.mode, scale=arm.scale, max_tokens=config.max_tokens
        )
    return TokenModelReward(
        word_model(sft, arm.layer, load_head(folder)) if arm.layer else load_frozen(
            folder, run.tokenizer, run.device, run.eos_ids, run.config.model.dtype
        ),
        mode=config.reward,
        values=[value * arm.scale for value in config.reward_values],
        length_alpha=config.length_alpha,
        max_tokens=config.max_tokens,
    )  # fmt: skip


def replace_word_model(reward: Reward, model: PreTrainedModel) -> None:
    """Pay by this token reward model from now on, where `reward` pays by another one."""
    paid_by = _of_a_model(reward)
    assert isinstance(paid_by, TokenModelReward) and isinstance(paid_by.model, RewardModel)
    paid_by.model.model.load_state_dict(model.state_dict())


def _of_a_model(reward: Reward | None) -> ModelReward:
    """What rates answers inside of what pays for the form, or at the end."""
    while isinstance(reward, TerminalReward | FormatReward):
        reward = reward.reward
    assert isinstance(reward, ModelReward)
    return reward


@torch.no_grad()
def scores(material: Material, cell: Cell, reward: Reward | None) -> list[float]:
    """How good a reward model thinks each fresh answer: larger is better.

    Of a model of words the relevant share that it expects, sum_t p_t(2) / sum_t (p_t(1) + p_t(2));
    of others their score.
    reward: what pays by it; a head over frozen states needs none.
    """
    run, pairs, found = material.run, material.fresh, list[float]()
    if cell.arm.layer:
        rows = [LabelledAnswer(a.prompt_ids, a.response_ids, (), 0) for a, _ in pairs]
        states = states_of(material, cell.arm.layer, rows)
        return head_scores(cell, load_head(folder_of(material, cell)), states)
    rated = _of_a_model(reward)
    for first in range(0, len(pairs), AT_ONCE):
        answers = [answer for answer, _ in pairs[first : first + AT_ONCE]]
        batch = Batch(
            [answer.prompt_ids for answer in answers],
            [answer.response_ids for answer in answers],
            run.tokenizer.pad_token_id, run.device, run.config.prefix,
        )  # fmt: skip
        if not isinstance(rated, TokenModelReward):
            found += rated.part_size.read(batch, rated.model).tolist()
            continue
        chance = rated.logits(batch).float().softmax(-1) * batch.mask[..., None]  # [B, T, 3]
        relevant, irrelevant = chance[..., RELEVANT].sum(1), chance[..., IRRELEVANT].sum(1)
        found += (relevant / (relevant + irrelevant)).tolist()
    return found
