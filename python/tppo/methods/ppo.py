"""Token-level PPO (Ouyang et al., EMNLP 2025), in three pieces that a caller may use one by one.

    sample(prompts)            responses of the policy at one temperature, G a prompt, prefilled
                               once: a `RolloutBatch`
    score(rollout, answers)    log-probs under the policy and the frozen reference, rewards of
                               tokens, values, advantages: an `Experience`
    update(experience)         policy loss and critic loss, `epochs` times over shuffled minibatches

What pays (`Reward`), how that becomes advantages (`Advantage`) and the loss of the policy
(`PolicyObjective`) are given; by default GAE over rewards minus KL, and the clipped loss.

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

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import tppo_kernels as tk
from tppo.methods.advantages import ADVANTAGES, Advantage, Masks
from tppo.methods.config import PPOConfig
from tppo.methods.experience import (
    Experience,
    Losses,
    Models,
    Reading,
    columns,
    learner_masks,
    minibatch_metrics,
    rollout_metrics,
)
from tppo.methods.greedy import GreedyLast
from tppo.methods.guards import (
    check_advantage,
    check_gradients,
    check_reward,
    check_shared_prefix,
    check_step_zero,
)
from tppo.methods.objective import Clipped, PolicyObjective
from tppo.methods.optimizer import AdamW
from tppo.methods.schedules import Schedules
from tppo.methods.spoilt import SPOILT, Skips, SpoiltRollout, check_experience
from tppo.models.batch import Batch
from tppo.models.config import Prefix
from tppo.models.guards import check_weights, not_finite, trainable
from tppo.models.parallel import ALONE, World
from tppo.models.part_size import PartSize
from tppo.models.policy import policy_head, policy_logprobs, policy_states
from tppo.models.rollout import Rollout, RolloutBatch, Sampling, together
from tppo.rewards import Answers, Questions, Reward
from tppo.rewards.token_model import TokenModelReward


class PPO:
    """The models, their optimiser and the step count: all that a step changes.

    reward: where it runs a model it is an `nn.Module`, which is frozen here.
    advantage: by default the one that `config.advantage` names.  objective: by default the clipped
    one with `config.clip`.
    tokenizer: what `Answers.texts` are read with; None where the reward looks at ids alone.
    Errors: ValueError where the advantage needs a critic that is not given, or the other way round.
    """

    def __init__(
        self,
        models: Models,
        rollout: Rollout,
        config: PPOConfig,
        *,
        reward: Reward,
        advantage: Advantage | None = None,
        objective: PolicyObjective | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: Sampling,
        pad_id: int,
        eos_id: int | Sequence[int],
        seed: int,
        prefix: Prefix = "shared",
        world: World = ALONE,
    ):
        self.models, self.rollout, self.config, self.sampling = models, rollout, config, sampling
        self.advantage = advantage or ADVANTAGES[config.advantage](config)
        if getattr(self.advantage, "greedy_baseline", False):
            self.rollout = GreedyLast(rollout, config.responses_per_prompt)
        self.objective = objective or Clipped(config.clip)
        self.reward, self.tokenizer = reward, tokenizer
        self.pad_id, self.seed, self.prefix, self.world = pad_id, seed, prefix, world
        self.eos_ids = [eos_id] if isinstance(eos_id, int) else [*eos_id]
        self.step_count, self.weights_checked = 0, False
        self.skips, self.part_size = Skips(config.max_spoilt), PartSize(config.max_tokens)
        if self.advantage.needs_critic != (models.critic is not None):
            raise ValueError(
                f"models.critic was {'None' if models.critic is None else 'a critic'}, expected "
                f"{'one' if models.critic is None else 'None'} for advantages of {self.advantage}"
            )
        models.ref.requires_grad_(False)
        if isinstance(reward, nn.Module):
            reward.requires_grad_(False)
        self.schedules = Schedules(config)
        self.schedules.priced(self.advantage)  # refuses one without a coefficient to adapt
        rates = self.schedules.rates(1)
        self.optimizer = AdamW(
            [{"params": trainable(x), "lr": rates[name]} for name, x in models.trained.items()],
            lr=rates["policy"],
        )

    @property
    def policy_weights(self) -> list[Tensor]:
        """What the optimiser changes of the policy: in float32 where the model holds 16 bits."""
        return self.optimizer.param_groups[0]["params"]

    def step(self, questions: Questions) -> tuple[dict[str, float], RolloutBatch]:
        """One PPO step with one response for each row of `questions`; its metrics, the rollout.

        The G rows of one prompt follow each other.
        """
        self.step_count += 1
        if not self.weights_checked:  # later steps begin where an update was checked
            check_weights(f"before ppo step {self.step_count}", self._with_weights())
            self.weights_checked = True
        self.skips.of_step = 0
        rollout = self.sample(questions.ids)
        try:
            experience, metrics = self.score(rollout, self.answers(questions, rollout))
        except SpoiltRollout as found:
            self.skips.add(self.step_count, found.data, str(found), self._with_weights())
            return {SPOILT: 1.0, "policy/updates": 0.0}, rollout
        metrics |= self.update(experience)
        self.schedules.adapt(self.step_count, metrics["objective/kl"], len(questions))
        metrics["episode"] = self.step_count * len(questions)
        return metrics, rollout

    def _with_weights(self) -> dict[str, nn.Module]:
        """Every model by name, that of the reward included."""
        found = {**self.models._asdict(), "reward": self.reward}
        return {name: model for name, model in found.items() if isinstance(model, nn.Module)}

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """One response a row; several processes share them out, and draw what one would.

        prefixes: forced beginnings, one a row, which the policy is not trained on.
        """
        seed = step_seed(self.seed, self.step_count)
        sampling = replace(self.sampling, seed=seed, world=self.world)
        found = together(self.rollout, prompts, sampling, prefixes)
        author = found.author if found.author and any(found.author) else None
        return found._replace(prompt_ids=[[*p] for p in prompts], author=author)

    def answers(self, questions: Questions, rollout: RolloutBatch) -> Answers:
        """What the reward may look at: the rollout's responses to these questions."""
        size = self.config.responses_per_prompt
        groups = [i // size for i in range(len(questions))]
        return Answers(
            questions.prompts,
            rollout.response_ids,
            questions.columns,
            self.tokenizer,  # type: ignore[arg-type]  # a reward of ids alone needs none
            self.eos_ids,
            groups,
        )

    def counted(self, rollout: RolloutBatch) -> Sequence[int]:
        """The responses that figures are of: all but the greedy ones that are a baseline."""
        size, greedy = self.config.responses_per_prompt, isinstance(self.rollout, GreedyLast)
        return [i for i in range(len(rollout.finish)) if not greedy or i % size < size - 1]

    @torch.no_grad()
    def score(self, rollout: RolloutBatch, answers: Answers) -> tuple[Experience, dict[str, float]]:
        """Old and reference log-probs, token rewards, values and advantages of a rollout."""
        device = self.models.policy.device
        batch = Batch(rollout.prompt_ids, rollout.response_ids, self.pad_id, device, self.prefix)
        read = self._read(batch, answers)
        masks = self.masks(batch, read.category, rollout.author)
        bootstrap = None if read.after is None else self.bootstrap(rollout.finish, read.after)
        found = self.schedules.priced(self.advantage)(
            read.rewards, read.values, masks, read.old, read.ref, answers.groups, bootstrap
        )
        found = check_advantage(found, batch.mask, self.advantage.needs_critic)
        experience = Experience(
            batch=batch,
            masks=masks,
            rewards=read.rewards,
            category=read.category,
            logprobs=read.old,
            values=read.values,
            advantages=found.advantages,
            returns=found.returns,
        )
        check_experience(self.step_count, read, experience)
        rows, kl_coef = self.counted(rollout), self.schedules.kl_coef
        return experience, rollout_metrics(rollout, read, masks.kl, kl_coef, rows)

    def _read(self, batch: Batch, answers: Answers) -> Reading:
        """Each process reads its share of the responses with every model, and rates its own."""
        models, temperature, world = self.models, self.sampling.temperature, self.world

        def read(index: list[int]) -> tuple[list[int], tuple[Tensor, ...]]:
            part = batch.rows(index)
            old, _ = policy_logprobs(models.policy, part, temperature)
            ref, _ = policy_logprobs(models.ref, part, temperature)
            return index, (old, ref, *(models.critic(part) if models.critic else ()))

        states = self.part_size.fitted(
            batch, lambda n: [read(index) for index in self.share(batch, n)]
        )
        exchanged = world.exchanged((states, self.rated(batch, answers)))
        old, ref, *of_critic = columns(batch, [row for part, _ in exchanged for row in part])
        rewards, *category = columns(batch, [row for _, part in exchanged for row in part])
        values, after = of_critic or (None, None)
        return Reading(old, ref, rewards, category[0] if category else None, values, after)

    def rated(self, batch: Batch, answers: Answers) -> list[tuple[list[int], tuple[Tensor, ...]]]:
        """What the reward gives for this process's share of the responses, a part for `columns`."""
        # Whole prompts, not a share by tokens: a reward may compare the responses of a prompt.
        world = self.world
        indices = [i for i, g in enumerate(answers.groups) if g % world.size == world.rank]
        if not indices:
            return []
        own = batch.rows(indices)
        found = check_reward(self.reward(own, answers.rows(indices)), own.mask)
        return [(indices, tuple(x for x in found if x is not None))]

    def update(self, experience: Experience) -> dict[str, float]:
        """`epochs` passes over shuffled minibatches; policy and critic step together.

        With `target_kl` they end with the first minibatch beyond it, which is not stepped on.
        """
        config, size = self.config, self.config.responses_per_prompt
        groups = range(0, len(experience.batch.response_ids), size)
        rng = random.Random(step_seed(self.seed, self.step_count))
        rates = self._set_rates()
        orders = ([i + j for i in rng.sample(groups, len(groups)) for j in range(size)]
                  for _ in range(config.epochs))  # fmt: skip
        minibatches = (order[first : first + config.minibatch_size] for order in orders
                       for first in range(0, len(order), config.minibatch_size))  # fmt: skip
        parts: list[dict[str, float]] = []
        updates = 0
        for rows in minibatches:
            figures, stepped = self._minibatch(experience.rows(rows), not parts)
            parts += [figures] if figures else []
            if figures and not stepped:
                break
            updates += stepped
        self.optimizer.zero_grad()  # their memory is free while the next responses are sampled
        check_weights(f"after ppo step {self.step_count}", self.models.trained, trained=True)
        ratios = torch.tensor([part["val/ratio"] for part in parts])
        rates |= {SPOILT: float(self.skips.of_step)} if self.skips.of_step else {}
        if not parts:
            return rates | {"policy/updates": 0.0}
        means = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        of_policy = 0 if self.schedules.critic_alone(self.step_count) else updates
        return means | rates | {
            "val/ratio_var": ratios.var(correction=0).item(), "policy/updates": of_policy,
        }  # fmt: skip

    def _set_rates(self) -> dict[str, float]:
        """Give the optimiser the learning rates of this step; they are figures of it."""
        rates = self.schedules.rates(self.step_count)
        for group, name in zip(self.optimizer.param_groups, self.models.trained, strict=True):
            group["lr"] = rates[name]
        named = {"lr": rates["policy"], "critic_lr": rates["critic"]}
        return named if self.models.critic is not None else {"lr": named["lr"]}

    def _minibatch(self, data: Experience, first: bool) -> tuple[dict[str, float], bool]:
        """One optimiser step, unless `target_kl` forbids it; its figures, whether it was taken.
        None of them where the minibatch is skipped, because some of it is not finite."""
        config, models, world = self.config, self.models, self.world
        alone = self.schedules.critic_alone(self.step_count)
        trained = {name: model for name, model in models.trained.items()
                   if name == "critic" or not alone}  # fmt: skip
        # The policy's first update is checked as the critic's is, where that came before.
        step_zero = first and self.step_count in (1, config.critic_warmup_steps + 1)
        own = self.share(data.batch, self.part_size.tokens)
        if step_zero and config.verify_prefix and own and data.batch.rows(own[0]).shares:
            check_shared_prefix(models, self.reward, data.batch.rows(own[0]),
                                self.sampling.temperature)  # fmt: skip
        losses = self.part_size.fitted(data.batch, lambda n: self.gradients(data, n, step_zero))
        for model in trained.values():
            world.add_gradients(model.parameters())
        if step_zero:
            check_gradients(trained, data)
        norms = {
            name: torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm)
            for name, model in trained.items()
        }
        # Of all processes: each of them has the same figures, and stops or goes on as they do.
        whole = [*chain.from_iterable(world.exchanged(losses))]
        sums = {"policy loss": sum(part.policy for part in whole)}
        if models.critic is not None:
            sums["value loss"] = sum(part.value for part in whole if part.value is not None)
        _, why = not_finite(f"ppo step {self.step_count}", trained, sums, norms)
        if why:
            self.optimizer.zero_grad()
            self.skips.add(self.step_count, data, why, self._with_weights(), part="minibatch")
            return {}, False
        figures = minibatch_metrics(whole)
        if config.target_kl is not None and figures["policy/approxkl_avg"] > config.target_kl:
            return figures, False
        self.optimizer.step()
        self.skips.in_row = 0
        return figures, True

    def gradients(self, data: Experience, max_tokens: int, step_zero: bool = False) -> list[Losses]:
        """The gradients of a minibatch, from the beginning, with so many tokens read at once."""
        self.optimizer.zero_grad()
        parts = self.share(data.batch, max_tokens)
        return [self._backward(data.rows(index), data, step_zero) for index in parts]

    def share(self, batch: Batch, max_tokens: int) -> list[list[int]]:
        """The responses of this process, in parts of so many tokens; which ones they are depends on
        no process's memory, or some would be read twice and others not at all.
        """
        own = batch.parts(self.config.max_tokens, self.world.size)[self.world.rank]
        if max_tokens == self.config.max_tokens or not own:
            return own
        rows = sorted(chain.from_iterable(own))
        (parts,) = batch.rows(rows).parts(max_tokens)
        return [[rows[i] for i in part] for part in parts]

    def _backward(self, part: Experience, whole: Experience, step_zero: bool) -> Losses:
        """Loss and gradients of a part of a minibatch, with the denominators of the whole."""
        policy, critic, trained = self.models.policy, self.models.critic, part.masks.policy
        alone = self.schedules.critic_alone(self.step_count)
        with torch.set_grad_enabled(not alone):
            policy_loss = self.objective(
                policy_head(policy),
                policy_states(policy, part.batch),  # [B, T, D]
                part,
                temperature=self.sampling.temperature,
                num_tokens=whole.masks.policy.sum(),
            )
        if step_zero:
            check_step_zero(policy, part, policy_loss.logprobs, self.sampling.temperature)
        moved = torch.where(trained, policy_loss.logprobs - part.logprobs, 0.0)  # [B, T]
        figures = policy_loss.loss.detach(), policy_loss.metrics, moved.square().sum()
        if not alone:  # first: the activations of one model at a time are in memory
            policy_loss.loss.backward()
        if critic is None:
            return Losses(*figures)
        assert part.returns is not None  # `check_advantage`
        values, _ = critic(part.batch)  # [B, T]
        value_loss = tk.value_loss(
            values,
            part.returns,
            part.masks.critic,
            old_values=part.values,
            clip=self.config.value_clip,
            num_tokens=whole.masks.critic.sum(),
        )
        value_loss.loss.backward()
        return Losses(*figures, value_loss.loss.detach(), value_loss.metrics)

    def masks(
        self,
        batch: Batch,
        category: Tensor | None,
        author: Sequence[Sequence[bool]] | None = None,
    ) -> Masks:
        """What the learner wrote is trained, in policy and critic, and pays KL."""
        literal = None if self.config.train_on_unlabelled else self.eos_ids
        return learner_masks(batch, category, author, literal)

    @property
    def bootstraps(self) -> bool:
        """Whether a cut response has a value behind its last token.

        By default only with the token model itself without its length penalty: past the suggested
        length the penalty pays nothing, and V, never trained there, would; what another reward pays
        for the whole of a cut answer would count twice.
        """
        if self.config.bootstrap_truncated is not None:
            return self.config.bootstrap_truncated
        return isinstance(self.reward, TokenModelReward) and self.reward.length_alpha is None

    def bootstrap(self, finish: Sequence[str], after: Tensor) -> Tensor:
        """V after the last token of cut responses where it is wanted, 0 elsewhere, [B]."""
        if not self.bootstraps:
            return torch.zeros_like(after)
        cut = torch.tensor([reason == "length" for reason in finish], device=after.device)
        return torch.where(cut, after, torch.zeros_like(after))


def step_seed(seed: int, step: int) -> int:
    """Independent seeds of the steps of one run."""
    return (seed * 1_000_003 + step * 7_919) % 2**31
