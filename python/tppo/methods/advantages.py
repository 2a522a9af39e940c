"""From rewards of tokens to the advantages that the policy is trained with.

An advantage is any callable that fits `Advantage`; `ADVANTAGES` holds those that
`--ppo.advantage` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import tppo_kernels as tk
from tppo.methods.config import PPOConfig


class Masks(NamedTuple):
    """Four masks, never one for two purposes: all [B, T] bool, the last three subsets of the first.

    The action tokens of a row are its first ones, without a gap.
    """

    action: Tensor  # the response's tokens: the steps of the MDP
    policy: Tensor  # tokens whose log-prob is trained
    critic: Tensor  # tokens before which the value is trained
    kl: Tensor  # tokens that pay KL


class TokenAdvantages(NamedTuple):
    """What an advantage gives, detached."""

    advantages: Tensor  # [B, T]; the policy is trained on them where `masks.policy` is True
    returns: Tensor | None = None  # [B, T], the critic's targets; None where none is needed


class Advantage(Protocol):
    """Rewards of tokens become advantages."""

    @property
    def needs_critic(self) -> bool:
        """Whether `values` are wanted; where not, no critic is loaded or trained."""
        ...

    def __call__(
        self,
        rewards: Tensor,  # [B, T], without KL
        values: Tensor | None,  # [B, T], before each token; None without a critic
        masks: Masks,
        old: Tensor,  # [B, T], log-probs of the policy that sampled
        ref: Tensor,  # [B, T], log-probs of the reference
        groups: Sequence[int],  # [B], the number of the prompt that a response answers
        bootstrap: Tensor | None = None,  # [B], the value after a cut response; None without critic
    ) -> TokenAdvantages:
        """Advantages of all responses of a step, whichever process sampled them."""
        ...


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation over rewards minus KL, whitened: `tk.token_advantages`.

    KL is paid where `masks.kl` is True, and the whitening is over `masks.policy`.
    """

    kl_coef: float
    gamma: float = 1.0
    lam: float = 0.95
    normalize: bool = True
    needs_critic = True

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor | None,
        masks: Masks,
        old: Tensor,
        ref: Tensor,
        groups: Sequence[int],
        bootstrap: Tensor | None = None,
    ) -> TokenAdvantages:
        """Advantages and the critic's targets.  Errors: ValueError without values."""
        if values is None:
            raise ValueError("values were None, expected those of a critic, which GAE needs")
        found = tk.token_advantages(
            rewards,
            values,
            masks.action,
            train_mask=masks.policy,
            logprobs=old,
            ref_logprobs=torch.where(masks.kl, ref, old),
            kl_coef=self.kl_coef,
            gamma=self.gamma,
            lam=self.lam,
            bootstrap=bootstrap,
            normalize=self.normalize,
        )
        return TokenAdvantages(found.advantages, found.returns)


ADVANTAGES: dict[str, Callable[[PPOConfig], Advantage]] = {
    "gae": lambda config: GAE(config.kl_coef, config.gamma, config.lam, config.normalize),
}
