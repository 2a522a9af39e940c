"""What PPO's three pieces hand on to each other: models, a scored rollout, figures of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tppo.methods.advantages import Masks
from tppo.models.batch import Batch, assembled, pad_rows
from tppo.models.policy import Critic
from tppo.models.rollout import RolloutBatch


class Models(NamedTuple):
    """The models of PPO; only policy and critic are trained."""

    policy: PreTrainedModel
    ref: PreTrainedModel
    critic: Critic | None = None  # None where the advantage needs none

    @property
    def trained(self) -> dict[str, nn.Module]:
        """What is trained, checkpointed and kept, by name."""
        found = {"policy": self.policy, "critic": self.critic}
        return {name: model for name, model in found.items() if model is not None}


class Reading(NamedTuple):
    """What models and reward make of a rollout; 0 where masked."""

    old: Tensor  # [B, T], log-probs of the policy
    ref: Tensor  # [B, T], log-probs of the reference
    rewards: Tensor  # [B, T]
    category: Tensor | None  # [B, T]
    values: Tensor | None  # [B, T]; None without a critic
    after: Tensor | None  # [B], values after the last tokens


class Experience(NamedTuple):
    """A scored rollout, detached."""

    batch: Batch
    masks: Masks
    rewards: Tensor  # [B, T], KL not included
    category: Tensor | None  # [B, T] int64, of a reward that has classes
    logprobs: Tensor  # [B, T] under the policy that sampled
    values: Tensor | None  # [B, T], None without a critic
    advantages: Tensor  # [B, T]
    returns: Tensor | None  # [B, T], the critic's targets

    def rows(self, index: Sequence[int]) -> Experience:
        """Some of the responses, itself for all of them; T may shrink to the longest of them."""
        batch = self.batch.rows(index)
        if batch is self.batch:
            return self
        length = batch.targets.shape[1]

        def cut(field: Tensor | None) -> Tensor | None:
            return None if field is None else field[index, :length]

        masks = Masks(*(mask[index, :length] for mask in self.masks))
        return Experience(batch, masks, *map(cut, self[2:]))  # type: ignore[arg-type]


class Losses(NamedTuple):
    """What a part of a minibatch adds to its figures; None is what its training does not have."""

    policy: Tensor  # []
    policy_metrics: Any  # of tk.ppo_loss
    squared_log_ratio: Tensor  # [], summed over the tokens trained
    value: Tensor | None = None  # []
    value_metrics: Any = None  # of tk.value_loss
    target: Tensor | None = None  # [], the true answers' negative log-likelihood a token


def minibatch_metrics(losses: Sequence[Losses]) -> dict[str, float]:
    """TRL's names for figures of an optimiser step, over all its parts."""
    policy, value = losses[0].policy_metrics, losses[0].value_metrics
    for part in losses[1:]:
        policy = policy.merged(part.policy_metrics)
        value = None if value is None else value.merged(part.value_metrics)
    squared = sum(part.squared_log_ratio.item() for part in losses)
    figures = {
        "policy/approxkl_avg": 0.5 * squared / max(policy.tokens.item(), 1),
        "policy/clipfrac_avg": policy.clip_fraction.item(),
        "policy/entropy_avg": policy.entropy.item(),
        "loss/policy_avg": sum(part.policy.item() for part in losses),
        "val/ratio": policy.ratio_mean.item(),
    }
    if losses[0].target is not None:
        figures["loss/target_nll"] = sum(x.target.item() for x in losses if x.target is not None)
    if value is None:
        return figures
    return figures | {
        "loss/value_avg": sum(part.value.item() for part in losses if part.value is not None),
        "val/clipfrac_avg": value.clip_fraction.item(),
        "val/explained_variance": value.explained_variance.item(),
    }


def rollout_metrics(
    rollout: RolloutBatch, read: Reading, own: Tensor, kl_coef: float, rows: Sequence[int]
) -> dict[str, float]:
    """TRL's names for figures of a rollout: sums over a response, means over responses.

    own: the tokens that pay KL, [B, T]: those that were drawn from the policy.
    rows: the responses that count; a greedy baseline does not.
    """
    kl = torch.where(own, read.old - read.ref, 0.0).sum(1)[rows].mean().item()
    score = read.rewards.sum(1)[rows]
    return drift_metrics(rollout, read.old, own) | {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -torch.where(own, read.old, 0.0).sum(1)[rows].mean().item(),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score.mean().item() - kl_coef * kl,
        "objective/scores": score.mean().item(),
        "objective/scores_std": score.std(correction=0).item(),
        "val/num_eos_tokens": float([rollout.finish[i] for i in rows].count("eos")),
    }


def drift_metrics(rollout: RolloutBatch, old: Tensor, own: Tensor) -> dict[str, float]:
    """How far the log-probs of the engine that sampled are from the trainer's, which are trained
    with: |difference| of the tokens that the policy wrote, in nats; nothing where it tells none.
    """
    if rollout.logprobs is None:
        return {}
    apart = torch.where(own, pad_rows(rollout.logprobs, old) - old, 0.0).abs()  # [B, T]
    mean = apart.sum() / own.sum().clamp(min=1)
    return {"rollout/logprob_drift_max": apart.max().item(),
            "rollout/logprob_drift_mean": mean.item()}  # fmt: skip


def columns(batch: Batch, rows: list[tuple[list[int], tuple[Tensor, ...]]]) -> list[Tensor]:
    """What was found for parts of a batch, each kind of it for the whole."""
    kinds = zip(*(found for _, found in rows), strict=True)
    return [assembled(batch.mask, [(i, x) for (i, _), x in zip(rows, kind, strict=True)])
            for kind in kinds]  # fmt: skip


def learner_masks(
    batch: Batch,
    category: Tensor | None,
    author: Sequence[Sequence[bool]] | None,
    literal: Sequence[int] | None,
) -> Masks:
    """The masks of what the learner wrote, which author says where another wrote too.

    A forced token is a step of the MDP, and no more: its reward counts in the returns before it.
    literal: the ids that end an answer; of the policy only they and tokens of class 1 or 2 are
    trained, as the paper reads literally.
    """
    own = batch.mask
    if author is not None:
        lengths = [*map(len, author)], [*map(len, batch.response_ids)]
        if lengths[0] != lengths[1]:
            raise ValueError(f"author had rows of {lengths[0]}, expected one entry a response "
                             f"token, {lengths[1]}")  # fmt: skip
        own = pad_rows(author, batch.mask)  # [B, T]
    policy = own
    if literal is not None and category is not None:
        ends = torch.isin(batch.targets, batch.targets.new_tensor(literal))  # [B, T]
        policy = own & ((category > 0) | ends)
    return Masks(action=batch.mask, policy=policy, critic=own, kl=own)
