"""Reinforcement learning with guided feedback: a frozen guide writes a part of the answers.

Chang et al. 2023, "Learning to Generate Better Than Your LLM" (arXiv 2306.11816, sections 4 and 5;
algorithms 1 to 4).  A step of every algorithm but plain PPO:

    1  one of the two writes a whole answer of T tokens, the roll-in
    2  with probability 1 - beta it is cut at h = 0, else at h ~ U{1, ..., T - 1}
    3  the other one writes on behind its first h tokens, the roll-out; the mixed answer is paid
    4  GAE over the whole mixed answer
    5  PPO's loss over the learner's tokens alone

    algorithm     roll-in    roll-out   policy trained on   critic trained on   what V estimates
    PPO           -          learner    all                 all                 the learner's
    PPO++         guide      learner    behind h            behind h            the learner's
    AggreVaTeD    learner    guide      before h            behind h            the guide's
    LOLS          a step of PPO++ with probability tau, else one of AggreVaTeD; a critic for each
    D2LOLS        steps of AggreVaTeD up to `switch_step`, of PPO++ behind it; one critic

All of it is the `Rollout` that writes mixed answers, the mask of the critic, and which critic's
turn it is.  KL is paid where the learner wrote (`kl_in_reward`), as in PPO.  The loss may have a
term of the true answer y*:  loss + target_nll / sum |y*| sum_t -log pi(y*_t | x, y*_<t).

What the paper leaves open, and is decided here: an answer that is not cut needs no roll-in, and
none is written; T = 1 is not cut; of D2LOLS the critic goes on from the guide's values; advantages
are whitened where `normalize` is on, as in PPO here (the authors' code does not whiten: it is
`--ppo.no-normalize`); the term of the true answer is off (the authors' code: 0.1).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tppo.methods.config import Algorithm, RLGFConfig
from tppo.methods.experience import Experience, Losses
from tppo.methods.ppo import PPO
from tppo.models.batch import Batch
from tppo.models.policy import TwoCritics, policy_logprobs
from tppo.models.rollout import LOST, Rollout, RolloutBatch, Sampling, together
from tppo.plain_text import plain_text
from tppo.progress import say
from tppo.rewards import Answers, Questions

PLAIN, PLUS, AGGREVATED, LOLS, D2LOLS = "ppo", "ppo++", "aggrevated", "lols", "d2lols"
SKIPPED = "guide/skipped"  # the figure of a step that was not taken, for want of a guide's answer
TARGET = "target"  # the column that holds the true answer, a text


class GuideLost(RuntimeError):
    """The guide gave no answer to some of a step's prompts."""


class MixedRollout:
    """Answers that learner and guide write together; `author` is True at the learner's tokens.

    kind: PPO++, AggreVaTeD, or PPO, in which the learner writes alone.
    guide: any `Rollout`; where it gives no answer (`finish` LOST), no answer of the call counts.
    sampling: the guide's temperature and top_p.
    """

    shares_out = True

    def __init__(self, learner: Rollout, guide: Rollout, config: RLGFConfig, sampling: Sampling):
        self.learner, self.guide, self.config, self.sampling = learner, guide, config, sampling
        self.kind = PLAIN

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """One answer a row, a function of weights, arguments and `kind`.

        Errors: ValueError with forced prefixes, which are this class's own means.
        """
        if prefixes is not None:
            raise ValueError("prefixes were given, expected None where a guide writes too")
        if self.kind == PLAIN:
            return together(self.learner, prompts, sampling)
        plus, rng = self.kind == PLUS, random.Random(f"{sampling.seed}/cut")
        beta = self.config.beta if plus else self.config.beta_aggrevated
        draws = [(rng.random(), rng.random()) for _ in prompts]
        mixed = [i for i, (chance, _) in enumerate(draws) if chance < beta]
        begun: list[list[int]] = [[] for _ in prompts]
        if mixed:
            # Another seed than behind the cut: there the same draws would come again.
            early = replace(sampling, seed=(sampling.seed + 15_485_863) % 2**31)
            rolled = self._write(plus, [prompts[i] for i in mixed], early, None)
            if LOST in rolled.finish:
                return _lost(prompts)
            for i, ids in zip(mixed, rolled.response_ids, strict=True):
                begun[i] = ids[: _cut(len(ids), draws[i][1])]
        found = self._write(not plus, prompts, sampling, begun)
        if LOST in found.finish:
            return _lost(prompts)
        assert found.author is not None  # of forced beginnings: True where the later one wrote
        author = [[late == plus for late in row] for row in found.author]
        told = found.logprobs if plus else None  # those of the guide say nothing of the learner
        return found._replace(logprobs=told, author=author)

    def _write(
        self,
        by_guide: bool,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[int]] | None,
    ) -> RolloutBatch:
        if not by_guide:
            return together(self.learner, prompts, sampling, begun)
        own = replace(sampling, temperature=self.sampling.temperature, top_p=self.sampling.top_p)
        return together(self.guide, prompts, own, begun)


def _cut(length: int, draw: float) -> int:
    """h ~ U{1, ..., T - 1} from a draw in [0, 1); 0 of an answer of one token."""
    return 1 + int(draw * (length - 1)) if length > 1 else 0


def _lost(prompts: Sequence[Sequence[int]]) -> RolloutBatch:
    nothing: list[list[int]] = [[] for _ in prompts]
    return RolloutBatch([[*p] for p in prompts], nothing, None, [LOST] * len(prompts))


class GuidedPPO(PPO):
    """PPO by one of the algorithms above; `PPO` says what it is given besides.

    guide: what writes beside the policy.  guide_sampling: its temperature and top_p.
    With `LOLS` the critic in `models` is a `TwoCritics`.
    Errors: ValueError where `kl_in_reward` is off and the advantage has no field `kl_coef`.
    """

    def __init__(
        self,
        *given: Any,
        algorithm: Algorithm,
        guide: Rollout,
        rlgf: RLGFConfig,
        guide_sampling: Sampling,
        **options: Any,
    ):
        super().__init__(*given, **options)
        self.algorithm, self.rlgf = algorithm, rlgf
        self.targets: dict[tuple[int, ...], list[int]] = {}
        self.mix = MixedRollout(self.rollout, guide, rlgf, guide_sampling)
        self.rollout = self.mix
        if not rlgf.kl_in_reward and algorithm != PLAIN:
            known: Any = self.advantage
            names = [field.name for field in fields(known)] if is_dataclass(known) else []
            if "kl_coef" not in names:
                raise ValueError(f"kl_in_reward was False and the advantage {known!r}, expected a "
                                 "dataclass with the field kl_coef, which becomes 0")  # fmt: skip
            self.advantage = cast(Any, replace(known, kl_coef=0.0))

    def kind(self, step: int) -> str:
        """Which algorithm a step is of; a function of seed and step, so that a run resumes."""
        if self.algorithm == LOLS:
            chance = random.Random(f"{self.seed}/lols/{step}").random()
            return PLUS if chance < self.rlgf.tau else AGGREVATED
        if self.algorithm == D2LOLS:
            last = self.rlgf.last_aggrevated(self.schedules.steps)
            return AGGREVATED if step <= last else PLUS
        return self.algorithm

    def begin(self, step: int) -> str:
        """Give rollout, masks and critic the kind of a step."""
        self.mix.kind = kind = self.kind(step)
        critic: Any = self.models.critic
        if isinstance(critic, TwoCritics):
            critic.turn = "guide" if kind == AGGREVATED else "learner"
        return kind

    def step(self, questions: Questions) -> tuple[dict[str, float], RolloutBatch]:
        """As in PPO; where the guide gives no answer nothing changes but the count of steps, and
        the rollout is empty.
        """
        kind = self.begin(self.step_count + 1)
        try:
            metrics, rollout = super().step(questions)
        except GuideLost:
            say(f"ppo: step {self.step_count} is skipped: the guide gave no answer")
            return {SKIPPED: 1.0, "policy/updates": 0.0}, RolloutBatch([], [], None, [])
        own = sum(map(sum, rollout.author or []))
        tokens = sum(map(len, rollout.response_ids))
        return metrics | {
            SKIPPED: 0.0,
            "guide/tokens": 1.0 - own / tokens if rollout.author else 0.0,
            "guide/aggrevated": float(kind == AGGREVATED),
        }, rollout

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """As in PPO.  Errors: GuideLost, in every process, where the guide gave none in one."""
        rollout = super().sample(prompts, prefixes)
        if LOST in rollout.finish:
            raise GuideLost(f"{rollout.finish.count(LOST)} of {len(prompts)} answers")
        return rollout

    def score(
        self, rollout: RolloutBatch, answers: Answers
    ) -> tuple[Experience, dict[str, float]]:
        """As in PPO; keeps the true answers to the prompts, where the loss has them."""
        if self.rlgf.target_nll:
            encoder = plain_text(answers.tokenizer)
            pairs = zip(rollout.prompt_ids, answers.columns[TARGET], strict=True)
            self.targets = {tuple(p): [*encoder.ids(text), self.eos_ids[0]] for p, text in pairs}
        return super().score(rollout, answers)

    def masks(
        self,
        batch: Batch,
        category: Tensor | None,
        author: Sequence[Sequence[bool]] | None = None,
    ) -> Any:
        """Policy and KL: the learner's tokens.  Critic: behind the cut, whoever wrote there."""
        masks = super().masks(batch, category, author)
        if self.mix.kind != AGGREVATED:
            return masks
        return masks._replace(critic=masks.action & ~masks.critic)  # of PPO's: the learner's

    def _backward(self, part: Experience, whole: Experience, step_zero: bool) -> Losses:
        losses = super()._backward(part, whole, step_zero)
        if not self.rlgf.target_nll or self.schedules.critic_alone(self.step_count):
            return losses
        prompts = part.batch.prompt_ids
        rows = [self.targets[tuple(prompt)] for prompt in prompts]
        batch = Batch(prompts, rows, self.pad_id, part.batch.device, part.batch.prefix)
        logprobs, _ = policy_logprobs(self.models.policy, batch, 1.0)  # [B, T*]
        total = sum(len(self.targets[tuple(prompt)]) for prompt in whole.batch.prompt_ids)
        nll = -torch.where(batch.mask, logprobs, 0.0).sum() / total
        (self.rlgf.target_nll * nll).backward()
        return losses._replace(target=nll.detach())


def in_brackets(trainer: PPO) -> str:
    """The algorithm behind the name of the method, where it is not plain PPO."""
    return f" ({trainer.algorithm})" if isinstance(trainer, GuidedPPO) else ""
