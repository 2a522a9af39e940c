"""The loss of the policy: how a step of the optimiser uses log-probs and advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

import tppo_kernels as tk

if TYPE_CHECKING:
    from tppo.methods.experience import Experience


class PolicyObjective(Protocol):
    """The loss of the policy over a part of a minibatch."""

    def __call__(
        self,
        head: tk.FusedLMHead,
        states: Tensor,  # [B, T, D], which the head reads
        data: Experience,
        *,
        temperature: float,
        num_tokens: Tensor,  # [], trained tokens of the whole minibatch: the loss's denominator
    ) -> Any:
        """What `head.loss` gives: `loss` with its gradient, `metrics`, `logprobs` [B, T]."""
        ...


@dataclass(frozen=True)
class Clipped:
    """The clipped objective of PPO (Schulman et al. 2017, eq. 7) over tokens.

    E[min(r_t A_t, clip(r_t, 1 - clip, 1 + clip) A_t)], r_t the ratio to the policy that sampled.
    """

    clip: float = 0.2

    def __call__(
        self,
        head: tk.FusedLMHead,
        states: Tensor,
        data: Experience,
        *,
        temperature: float,
        num_tokens: Tensor,
    ) -> Any:
        """The loss over `data.masks.policy`, without logits."""
        return head.loss(
            states,
            data.batch.targets,
            data.logprobs,
            data.advantages,
            data.masks.policy,
            clip_low=self.clip,
            clip_high=self.clip,
            temperature=temperature,
            num_tokens=num_tokens,
        )
