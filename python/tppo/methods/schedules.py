"""What changes from step to step of PPO: learning rates, who is trained, the coefficient of KL.

Everything but the coefficient is a function of the step's number, so that the coefficient is all
that a checkpoint has to hold.  It follows from figures that every process has alike.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from tppo.methods.advantages import Advantage
from tppo.methods.config import PPOConfig

LARGEST_ERROR = 0.2  # of the measured KL against its target, by which the coefficient changes


def rate_share(step: int, steps: int, warmup: int, config: PPOConfig) -> float:
    """The part of the learning rate that step n of N has, with a warm-up of W steps.

        n / W                                  while n <= W
        f + (1 - f) (1 - p)                    linear
        f + (1 - f) (1 + cos(pi p)) / 2        cosine
        p = (n - 1 - W) / (N - W)              f: `final_lr_share`

    It is above 0 in every step, the first and the last included; 1 after the warm-up where the
    schedule is constant.
    """
    if step <= warmup:
        return step / warmup
    if config.lr_schedule == "constant":
        return 1.0
    done = (step - 1 - warmup) / max(steps - warmup, 1)
    left = 1.0 - done if config.lr_schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return config.final_lr_share + (1.0 - config.final_lr_share) * left


def next_kl_coef(kl_coef: float, kl: float, responses: int, target: float, horizon: float) -> float:
    """The coefficient after a step (Ziegler et al. 2019, section 2.2, the horizon as in TRL).

        c <- c (1 + clip(KL / target - 1, -.2, .2) n / horizon)        n responses in the step

    kl: the mean over responses of the sum of log(policy / reference), in nats.
    """
    error = min(max(kl / target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
    return kl_coef * (1.0 + error * responses / horizon)


class Schedules:
    """The state of a run's schedules; `steps` is the length of the run, which its owner may set."""

    def __init__(self, config: PPOConfig):
        self.config, self.steps, self.kl_coef = config, config.steps, config.kl_coef

    def critic_alone(self, step: int) -> bool:
        """Whether the step trains the critic and leaves the policy as it is.

        An update that no step was counted for (`PPO.update` called by itself, step 0) is as that of
        the first step, here and in `rates`.
        """
        return max(step, 1) <= self.config.critic_warmup_steps

    def rates(self, step: int) -> dict[str, float]:
        """The learning rates of a step; those of the policy count from its own first step."""
        step = max(step, 1)
        config, before = self.config, self.config.critic_warmup_steps
        assert config.lr is not None and config.critic_lr is not None
        own = 0.0
        if not self.critic_alone(step):
            own = rate_share(step - before, self.steps - before, config.lr_warmup_steps, config)
        critic = rate_share(step, self.steps, config.critic_lr_warmup_steps, config)
        return {"policy": config.lr * own, "critic": config.critic_lr * critic}

    def check_length(self) -> None:
        """Errors: ValueError where the run ends before the policy is trained."""
        if self.steps <= self.config.critic_warmup_steps:
            raise ValueError(
                f"critic_warmup_steps was {self.config.critic_warmup_steps}, expected fewer than "
                f"the {self.steps} steps of this run: the policy is trained after them "
                "(--ppo.critic-warmup-steps)"
            )

    def adapt(self, step: int, kl: float, responses: int) -> None:
        """Move the coefficient of KL towards the target, if there is one, after a step."""
        target = self.config.adaptive_kl
        if target is not None and not self.critic_alone(step):
            self.kl_coef = next_kl_coef(
                self.kl_coef, kl, responses, target, self.config.adaptive_kl_horizon
            )

    def priced(self, advantage: Advantage) -> Advantage:
        """The advantage with the coefficient as it is now; itself without a target."""
        if self.config.adaptive_kl is None:
            return advantage
        known: Any = advantage
        names = [field.name for field in fields(known)] if is_dataclass(known) else []
        if "kl_coef" not in names:
            raise ValueError(
                f"adaptive_kl was {self.config.adaptive_kl:g} and the advantage was {advantage!r}, "
                "expected a dataclass with the field kl_coef, which the target moves"
            )
        return cast(Advantage, replace(known, kl_coef=self.kl_coef))

    def state(self) -> dict[str, float]:
        """What a checkpoint holds of this."""
        return {"kl_coef": self.kl_coef}

    def load(self, state: dict[str, float]) -> None:
        """Go on from what `state` gave."""
        self.kl_coef = state["kl_coef"]
