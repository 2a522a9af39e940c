"""The critic fitted before the first step of PPO, on answers of the policy as it starts.

With the reward of a whole answer at its last token a critic that starts at 0 has to learn from
scratch what an answer is worth.  Answers of the SFT model exist by then, and need no label: the
reward rates them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tppo_kernels as tk
from tppo.methods.advantages import rewards_to_go
from tppo.methods.early_stop import train_to_best
from tppo.methods.experience import columns
from tppo.methods.optimizer import AdamW
from tppo.methods.ppo import PPO
from tppo.models.batch import Batch, pad_rows
from tppo.models.guards import check_figures, check_step, check_weights, trainable
from tppo.models.rollout import RolloutBatch
from tppo.progress import say
from tppo.rewards import Questions

MAX_EPOCHS = 20
HELDOUT_SHARE = 0.1
REMEDY = "usually a smaller --ppo.critic-lr helps"


class Answered(NamedTuple):
    """Answers of the policy as PPO finds it, a row for each of the questions."""

    questions: Questions
    rollout: RolloutBatch


class CriticFit(NamedTuple):
    """What a fit did; the critic holds the weights of `best_epoch`."""

    answers: int
    epochs: int
    best_epoch: int  # 0: no epoch was better than the critic as it was
    explained_variance_before: float  # of the rewards to come of held-out answers
    explained_variance_after: float


class _Rated(NamedTuple):
    """Answers with what is still to come at each token."""

    prompts: list[list[int]]
    responses: list[list[int]]
    returns: list[list[float]]

    def rows(self, index: Sequence[int]) -> _Rated:
        return _Rated([self.prompts[i] for i in index], [self.responses[i] for i in index],
                      [self.returns[i] for i in index])  # fmt: skip


def fit_critic(ppo: PPO, questions: Questions, rollout: RolloutBatch) -> CriticFit:
    """Fit `ppo`'s critic to the rewards of answers that the policy as it is would give.

        V_t -> G_t = sum_{k>=t} gamma^(k-t) r_k

    by the mean squared error over tokens, an epoch past its best on a tenth of the prompts.  KL to
    the reference is no part of G: the policy is the reference still.  A cut answer whose value
    would be bootstrapped in PPO is left out: what comes behind it is not known.

    rollout: the answers, a row for each of `questions`.  The critic's optimiser in PPO starts anew.
    Errors: ValueError without a critic, or with fewer than two prompts; GuardError where a figure
    is not finite.
    """
    critic = ppo.models.critic
    if critic is None:
        raise ValueError(f"the advantage was {ppo.advantage!r}, expected one with a critic to fit")
    check_weights("before the critic's fit", {"critic": critic})
    kept = [i for i, why in enumerate(rollout.finish) if why == "eos" or not ppo.bootstraps]
    prompts = list(dict.fromkeys(tuple(rollout.prompt_ids[i]) for i in kept))
    if len(prompts) < 2:
        raise ValueError(f"the critic was given answers to {len(prompts)} prompts, expected at "
                         "least 2: one is held out")  # fmt: skip
    rated = _rated(ppo, questions.rows(kept), rollout, kept)
    random.Random(f"{ppo.seed}/critic").shuffle(prompts)
    held_out = set(prompts[: max(1, round(HELDOUT_SHARE * len(prompts)))])
    sides = [tuple(prompt) in held_out for prompt in rated.prompts]
    heldout, train = (rated.rows([i for i, side in enumerate(sides) if side == wanted])
                      for wanted in (True, False))  # fmt: skip
    optimizer = AdamW(trainable(critic), lr=ppo.config.critic_lr or 0.0)
    rng, explained = random.Random(f"{ppo.seed}/critic-order"), []

    def epoch(number: int) -> None:
        order = rng.sample(range(len(train.prompts)), len(train.prompts))
        size = ppo.config.minibatch_size
        for first in range(0, len(order), size):
            _step(ppo, train.rows(_by_prompt(train, order[first : first + size])), optimizer,
                  f"critic fit, epoch {number}")  # fmt: skip

    def loss() -> float:
        found = [_losses(ppo, heldout.rows(range(i, min(i + 256, len(heldout.prompts)))))
                 for i in range(0, len(heldout.prompts), 256)]  # fmt: skip
        metrics = [part for losses in found for _, part in losses]
        merged = metrics[0]
        for part in metrics[1:]:
            merged = merged.merged(part)
        explained.append(merged.explained_variance.item())
        square = merged.error_m2 / merged.tokens + merged.error_mean.square()
        return square.item()

    losses = train_to_best(critic, MAX_EPOCHS, epoch, loss)
    optimizer.zero_grad()
    check_weights("after the critic's fit", {"critic": critic})
    best = losses.index(min(losses))
    fit = CriticFit(len(kept), len(losses) - 1, best, explained[0], explained[best])
    say(f"ppo: the critic is fitted on {fit.answers} answers in {best} epochs; it explains "
        f"{fit.explained_variance_after:.2f} of the variance of their rewards to come (before: "
        f"{fit.explained_variance_before:.2f})")  # fmt: skip
    return fit


def sampled(ppo: PPO, questions: Questions, n: int) -> Answered:
    """n new answers of the policy, spread over the questions."""
    rng, order = random.Random(f"{ppo.seed}/critic-questions"), list[int]()
    while len(order) < n:
        order += rng.sample(range(len(questions)), len(questions))
    asked = questions.rows(sorted(order[:n]))
    return Answered(asked, ppo.sample(asked.ids))


def _rated(ppo: PPO, questions: Questions, rollout: RolloutBatch, kept: Sequence[int]) -> _Rated:
    """The kept answers with their rewards to come, rated as those of a step are."""
    prompts, responses = ([field[i] for i in kept] for field in rollout[:2])
    batch = Batch(prompts, responses, ppo.pad_id, ppo.models.policy.device, ppo.prefix)
    places = {prompt: k for k, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    groups = [places[tuple(prompt)] for prompt in prompts]
    answers = replace(ppo.answers(questions, RolloutBatch(prompts, responses, None, [])),
                      groups=groups)  # fmt: skip
    with torch.no_grad():
        rated = ppo.rated(batch, answers)
    rewards, *_ = columns(batch, [*chain.from_iterable(ppo.world.exchanged(rated))])
    check_figures("the critic's fit", {"rewards": rewards})
    masks, nothing = ppo.masks(batch, None), torch.zeros_like(rewards)
    returns = rewards_to_go(rewards, masks, nothing, nothing, 0.0, ppo.config.gamma)  # [B, T]
    rows = zip(returns.tolist(), responses, strict=True)
    return _Rated(prompts, responses, [row[: len(ids)] for row, ids in rows])


def _by_prompt(data: _Rated, rows: Sequence[int]) -> list[int]:
    """The rows so that answers to one prompt follow each other and share it."""
    return sorted(rows, key=lambda i: data.prompts[i])


def _step(ppo: PPO, data: _Rated, optimizer: AdamW, where: str) -> None:
    """One step of the optimiser."""
    critic, world = ppo.models.critic, ppo.world
    assert critic is not None
    losses = _losses(ppo, data, optimizer)
    world.add_gradients(critic.parameters())
    norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), ppo.config.grad_norm)
    check_step(where, {"critic": critic}, {"value loss": sum(loss for loss, _ in losses)},
               {"critic": norm}, REMEDY)  # fmt: skip
    optimizer.step()


def _losses(
    ppo: PPO, data: _Rated, optimizer: AdamW | None = None
) -> list[tuple[Tensor, Any]]:
    """Loss and metrics of the parts of a minibatch, of all processes; with an optimiser its
    gradients are made, those of this process.
    """
    batch = Batch(data.prompts, data.responses, ppo.pad_id, ppo.models.policy.device, ppo.prefix)

    def read(tokens: int) -> list[tuple[Tensor, Any]]:
        if optimizer is not None:
            optimizer.zero_grad()
        return [_part(ppo, data, batch, rows, optimizer is not None)
                for rows in ppo.share(batch, tokens)]  # fmt: skip

    return [*chain.from_iterable(ppo.world.exchanged(ppo.part_size.fitted(batch, read)))]


def _part(
    ppo: PPO, data: _Rated, batch: Batch, rows: Sequence[int], train: bool
) -> tuple[Tensor, Any]:
    """Loss and metrics of these rows, with the denominator of the batch."""
    critic, part = ppo.models.critic, batch.rows(rows)
    assert critic is not None
    with torch.set_grad_enabled(train):
        values, _ = critic(part)  # [B, T]
        returns = pad_rows([data.returns[i] for i in rows], values.detach())  # [B, T]
        loss = tk.value_loss(values, returns, part.mask, num_tokens=batch.mask.sum())
    if train:
        loss.loss.backward()
    return loss.loss.detach(), loss.metrics
