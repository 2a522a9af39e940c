"""Token-level PPO (Ouyang et al., EMNLP 2025) with a frozen token reward model.

One step:
    responses    sampled from the policy at one temperature, G a prompt, prefilled once
    old, ref     log-probs of the same tokens under the policy and the frozen SFT model
    rewards      class of each token -> reward, times the length penalty
    advantages   GAE over reward - kl_coef * (log pi - log ref), whitened
    update       clipped policy loss and critic loss, `epochs` times over shuffled minibatches

Every model reads a prompt once for its G responses, and every head reads the states of response
tokens alone; the policy loss comes straight from them, without logits.  Of several processes each
samples, reads and differentiates its share of the responses, balanced by tokens; advantages and
the optimiser's step are those of all of them together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tppo_kernels as tk
from tppo.methods.config import PPOConfig
from tppo.methods.guards import check_gradients, check_shared_prefix, check_step_zero_ratio
from tppo.models.batch import Batch
from tppo.models.config import Prefix
from tppo.models.guards import check_figures, check_step, check_weights
from tppo.models.parallel import ALONE, World
from tppo.models.policy import Critic, policy_head, policy_logprobs, policy_states
from tppo.models.rollout import Rollout, RolloutBatch, Sampling

PPO_REMEDY = "usually a smaller --ppo.lr or --ppo.critic-lr helps"


class Models(NamedTuple):
    """The four models of PPO; only policy and critic are trained.

    reward: gives class logits [B, T, 3] of a batch, at the policy's tokens.
    """

    policy: PreTrainedModel
    ref: PreTrainedModel
    critic: Critic
    reward: nn.Module


class Experience(NamedTuple):
    """A scored rollout, detached."""

    batch: Batch
    category: Tensor  # [B, T] int64, class of the reward model
    rewards: Tensor  # [B, T] of the reward model, KL not included
    logprobs: Tensor  # [B, T] under the policy that sampled
    values: Tensor  # [B, T]
    advantages: Tensor  # [B, T] whitened
    returns: Tensor  # [B, T]
    train_mask: Tensor  # [B, T] bool

    def rows(self, index: Sequence[int]) -> Experience:
        """Some of the responses, itself for all of them; T may shrink to the longest of them."""
        batch = self.batch.rows(index)
        if batch is self.batch:
            return self
        length = batch.targets.shape[1]
        return Experience(batch, *(field[index, :length] for field in self[1:]))


class Losses(NamedTuple):
    """What a part of a minibatch adds to its figures."""

    policy: Tensor  # []
    value: Tensor  # []
    policy_metrics: Any  # of tk.ppo_loss
    value_metrics: Any  # of tk.value_loss
    squared_log_ratio: Tensor  # [], summed over the train mask


class PPOTrainer:
    """Policy, critic, their optimiser and the step count: all that a step changes."""

    def __init__(
        self,
        models: Models,
        rollout: Rollout,
        config: PPOConfig,
        *,
        sampling: Sampling,
        pad_id: int,
        eos_id: int | Sequence[int],
        seed: int,
        prefix: Prefix = "shared",
        world: World = ALONE,
    ):
        self.models, self.rollout, self.config, self.sampling = models, rollout, config, sampling
        self.pad_id, self.seed, self.prefix, self.world = pad_id, seed, prefix, world
        self.eos_ids = [eos_id] if isinstance(eos_id, int) else [*eos_id]
        self.step_count, self.weights_checked = 0, False
        models.ref.requires_grad_(False)
        models.reward.requires_grad_(False)
        assert config.lr is not None and config.critic_lr is not None
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(models.policy.parameters()), "lr": config.lr},
                {"params": list(models.critic.parameters()), "lr": config.critic_lr},
            ],
            weight_decay=0.0,
        )

    def step(
        self, prompts: Sequence[Sequence[int]], suggested_lengths: Sequence[float]
    ) -> tuple[dict[str, float], RolloutBatch]:
        """One PPO step on `prompts`, one response for each row of them; its metrics, the rollout.

        The G rows of one prompt follow each other.
        """
        self.step_count += 1
        if not self.weights_checked:  # later steps begin where an update was checked
            check_weights(f"before ppo step {self.step_count}", self.models._asdict())
            self.weights_checked = True
        rollout = self._sample(prompts)
        experience, metrics = self.score(rollout, suggested_lengths)
        metrics |= self.update(experience)
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["episode"] = self.step_count * len(prompts)
        return metrics, rollout

    def _sample(self, prompts: Sequence[Sequence[int]]) -> RolloutBatch:
        """One response a row; each process samples those of its prompts, from a seed of its own."""
        size, world = self.config.responses_per_prompt, self.world
        mine = [i for i in range(len(prompts)) if i // size % world.size == world.rank]
        seed = step_seed(self.seed, self.step_count, world.rank)
        sampled = self.rollout.generate([prompts[i] for i in mine],
                                        replace(self.sampling, seed=seed))  # fmt: skip
        rows = {i: row for part in world.exchanged((mine, sampled.response_ids, sampled.finish))
                for i, *row in zip(*part, strict=True)}  # fmt: skip
        responses, finish = zip(*(rows[i] for i in range(len(prompts))), strict=True)
        return RolloutBatch([[*p] for p in prompts], list(responses), None, list(finish))

    @torch.no_grad()
    def score(
        self, rollout: RolloutBatch, suggested_lengths: Sequence[float]
    ) -> tuple[Experience, dict[str, float]]:
        """Old and reference log-probs, token rewards, values and advantages of a rollout."""
        config, device = self.config, self.models.policy.device
        batch = Batch(rollout.prompt_ids, rollout.response_ids, self.pad_id, device, self.prefix)
        old, ref, classes, values, after = self._read(batch)
        reward = tk.token_rewards(
            classes,
            batch.mask,
            mode=config.reward,
            suggested_length=None
            if config.length_alpha is None
            else torch.tensor(suggested_lengths, device=device),  # [B]
            alpha=config.length_alpha or 0.0,
            values=config.reward_values,
        )
        train_mask = self.train_mask(batch, reward.category)  # [B, T]
        result = tk.token_advantages(
            reward.rewards,
            values,
            batch.mask,
            train_mask=train_mask,
            logprobs=old,
            ref_logprobs=ref,
            kl_coef=config.kl_coef,
            gamma=config.gamma,
            lam=config.lam,
            bootstrap=self.bootstrap(rollout.finish, after),
            normalize=config.normalize,
        )
        check_figures(
            f"ppo step {self.step_count}",
            {
                "log-probs of the policy": old,
                "log-probs of the reference": ref,
                "class logits of the reward model": classes,
                "values of the critic": values,
                "values of the critic after the last tokens": after,
                "advantages": result.advantages,
            },
        )
        experience = Experience(
            batch=batch,
            category=reward.category,
            rewards=reward.rewards,
            logprobs=old,
            values=values,
            advantages=result.advantages,
            returns=result.returns,
            train_mask=train_mask,
        )
        return experience, self._rollout_metrics(rollout, old, ref, reward.rewards)

    def _read(self, batch: Batch) -> list[Tensor]:
        """Log-probs of policy and reference, class logits, values, and the values after: [B, T]
        but for class logits [B, T, 3] and the values after [B]; 0 where masked.
        """
        models, temperature, world = self.models, self.sampling.temperature, self.world
        read: list[tuple[list[int], tuple[Tensor, ...]]] = []
        for index in batch.parts(self.config.max_tokens, world.size)[world.rank]:
            part = batch.rows(index)
            old, _ = policy_logprobs(models.policy, part, temperature)
            ref, _ = policy_logprobs(models.ref, part, temperature)
            read.append((index, (old, ref, models.reward(part), *models.critic(part))))
        results: list[Tensor] = []
        for index, found in chain.from_iterable(world.exchanged(read)):
            if not results:
                results = [
                    torch.zeros(
                        *batch.mask.shape[: x.dim()], *x.shape[2:], dtype=x.dtype,
                        device=batch.mask.device,
                    )
                    for x in found
                ]  # fmt: skip
            for result, x in zip(results, found, strict=True):
                result[(index, slice(x.shape[1])) if x.dim() > 1 else index] = x
        return results

    def update(self, experience: Experience) -> dict[str, float]:
        """`epochs` passes over shuffled minibatches; policy and critic step together."""
        config, size = self.config, self.config.responses_per_prompt
        groups = range(0, len(experience.batch.response_ids), size)
        rng = random.Random(step_seed(self.seed, self.step_count))
        parts: list[dict[str, float]] = []
        for _ in range(config.epochs):
            order = [i + j for i in rng.sample(groups, len(groups)) for j in range(size)]
            for first in range(0, len(order), config.minibatch_size):
                data = experience.rows(order[first : first + config.minibatch_size])
                parts.append(self._minibatch(data, not parts))
        trained = {"policy": self.models.policy, "critic": self.models.critic}
        check_weights(f"after ppo step {self.step_count}", trained)
        ratios = torch.tensor([part["val/ratio"] for part in parts])
        means = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        return means | {"val/ratio_var": ratios.var(correction=0).item()}

    def _minibatch(self, data: Experience, first: bool) -> dict[str, float]:
        config, models, world = self.config, self.models, self.world
        mine = data.batch.parts(config.max_tokens, world.size)[world.rank]
        parts = [data.rows(index) for index in mine]
        step_zero = first and self.step_count == 1
        if step_zero and config.verify_prefix and parts and parts[0].batch.shares:
            check_shared_prefix(models, parts[0].batch, self.sampling.temperature)
        self.optimizer.zero_grad()
        losses = [self._backward(part, data, step_zero) for part in parts]
        for model in (models.policy, models.critic):
            world.add_gradients(model.parameters())
        if step_zero:
            check_gradients(models, data)
        trained = {"policy": models.policy, "critic": models.critic}
        norms = {
            name: torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm)
            for name, model in trained.items()
        }
        # Of all processes: each of them has the same figures, and stops or goes on as they do.
        whole = [*chain.from_iterable(world.exchanged(losses))]
        sums = {
            "policy loss": sum(part.policy for part in whole),
            "value loss": sum(part.value for part in whole),
        }
        check_step(f"ppo step {self.step_count}", trained, sums, norms, PPO_REMEDY)
        self.optimizer.step()
        return _minibatch_metrics(whole)

    def _backward(self, part: Experience, whole: Experience, step_zero: bool) -> Losses:
        """Loss and gradients of a part of a minibatch, with the denominators of the whole."""
        config, policy = self.config, self.models.policy
        policy_loss = policy_head(policy).loss(
            policy_states(policy, part.batch),  # [B, T, D]
            part.batch.targets,
            part.logprobs,
            part.advantages,
            part.train_mask,
            clip_low=config.clip,
            clip_high=config.clip,
            temperature=self.sampling.temperature,
            num_tokens=whole.train_mask.sum(),
        )
        if step_zero:
            check_step_zero_ratio(policy_loss.logprobs, part.logprobs, part.train_mask)
        values, _ = self.models.critic(part.batch)  # [B, T]
        value_loss = tk.value_loss(
            values,
            part.returns,
            part.batch.mask,
            old_values=part.values,
            clip=config.value_clip,
            num_tokens=whole.batch.mask.sum(),
        )
        (policy_loss.loss + value_loss.loss).backward()
        moved = torch.where(part.train_mask, policy_loss.logprobs - part.logprobs, 0.0)  # [B, T]
        return Losses(
            policy_loss.loss.detach(),
            value_loss.loss.detach(),
            policy_loss.metrics,
            value_loss.metrics,
            moved.square().sum(),
        )

    def train_mask(self, batch: Batch, category: Tensor) -> Tensor:
        """Every sampled token; the paper read literally: those of class 1 or 2, and EOS."""
        if self.config.train_on_unlabelled:
            return batch.mask
        ends = torch.isin(batch.targets, batch.targets.new_tensor(self.eos_ids))  # [B, T]
        return batch.mask & ((category > 0) | ends)

    def bootstrap(self, finish: Sequence[str], after: Tensor) -> Tensor:
        """V after the last token of cut responses, 0 elsewhere, [B].

        By default only without the length penalty: past the suggested length the penalty pays
        nothing, and a V that is never a training target there would.
        """
        wanted = self.config.bootstrap_truncated
        if not (self.config.length_alpha is None if wanted is None else wanted):
            return torch.zeros_like(after)
        cut = torch.tensor([reason == "length" for reason in finish], device=after.device)
        return torch.where(cut, after, torch.zeros_like(after))

    def _rollout_metrics(
        self, rollout: RolloutBatch, old: Tensor, ref: Tensor, rewards: Tensor
    ) -> dict[str, float]:
        """TRL's names for figures of a rollout: sums over a response, means over responses."""
        kl = (old - ref).sum(1).mean().item()
        score = rewards.sum(1)  # [B]
        return {
            "objective/kl": kl,
            "objective/entropy": -old.sum(1).mean().item(),
            "objective/non_score_reward": -self.config.kl_coef * kl,
            "objective/rlhf_reward": score.mean().item() - self.config.kl_coef * kl,
            "objective/scores": score.mean().item(),
            "objective/scores_std": score.std(correction=0).item(),
            "val/num_eos_tokens": float(rollout.finish.count("eos")),
        }


def _minibatch_metrics(losses: Sequence[Losses]) -> dict[str, float]:
    """TRL's names for figures of an optimiser step, over all its parts."""
    policy, value = losses[0].policy_metrics, losses[0].value_metrics
    for part in losses[1:]:
        policy, value = policy.merged(part.policy_metrics), value.merged(part.value_metrics)
    squared = sum(part.squared_log_ratio.item() for part in losses)
    return {
        "policy/approxkl_avg": 0.5 * squared / max(policy.tokens.item(), 1),
        "policy/clipfrac_avg": policy.clip_fraction.item(),
        "policy/entropy_avg": policy.entropy.item(),
        "loss/policy_avg": sum(part.policy.item() for part in losses),
        "loss/value_avg": sum(part.value.item() for part in losses),
        "val/clipfrac_avg": value.clip_fraction.item(),
        "val/ratio": policy.ratio_mean.item(),
        "val/explained_variance": value.explained_variance.item(),
    }


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Independent seeds of the steps of one run, and of the processes in a step."""
    return (seed * 1_000_003 + step * 7_919 + rank * 104_729) % 2**31
