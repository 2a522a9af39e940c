"""From rewards of tokens to the advantages that the policy is trained with.

An advantage is any callable that fits `Advantage`; `ADVANTAGES` holds those that
`--ppo.advantage` names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class GRPO:
    """Group relative advantages (Shao et al. 2024, DeepSeekMath, section 4.1), without a critic.

        G_it = sum_{k>=t} gamma^(k-t) (r_ik - kl_coef (old_ik - ref_ik))     KL where `masks.kl`
        A_it = (G_it - mean_j G_jt) / (std + eps)
        std^2 = 1 / (n - 1) sum_j (mean_t (G_jt - mean_i G_it)^2)

    over the n responses j of one prompt.  A response that has ended counts in mean_j G_jt with its
    last token's G.  Where the reward is paid at the last token, gamma is 1 and KL costs nothing,
    G_jt is the total of response j at every token, and A is the paper's with outcome supervision.
    Its process supervision normalises the rewards instead, and sums afterwards.  The paper has KL
    as a term of the loss; here it is a part of the reward, as in GAE.

    normalize: divide by the deviation; without it this is the advantage of Dr. GRPO (Liu et al.
    2025).  Where all responses are paid alike, advantages are 0.
    """

    kl_coef: float
    gamma: float = 1.0
    normalize: bool = True
    eps: float = 1e-4
    needs_critic = False

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
        """Advantages.  Errors: ValueError where a prompt has one response alone."""
        group = _Groups(groups, masks.action)
        to_go = rewards_to_go(rewards, masks, old, ref, self.kl_coef, self.gamma)  # [B, T]
        off = torch.where(masks.action, to_go - group.mean(to_go), 0.0)  # [B, T]
        if not self.normalize:
            return TokenAdvantages(off)
        squares = off.square().sum(1, keepdim=True) / group.lengths  # [B, 1]
        variance = group.sum(squares) / (group.sizes - 1)  # [B, 1]
        return TokenAdvantages(off / (variance.sqrt() + self.eps))


@dataclass(frozen=True)
class RLOO:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, eq. 7), without a critic.

        G_it = sum_{k>=t} gamma^(k-t) (r_ik - kl_coef (old_ik - ref_ik))     KL where `masks.kl`
        A_it = G_it - 1 / (n - 1) sum_{j != i} G_jt

    over the n responses j of one prompt; one that has ended counts with its last token's G.  The
    baseline of a response holds nothing of itself, so that the gradient is unbiased.  Where the
    reward is paid at the last token, gamma is 1 and KL costs nothing, A is the paper's, the same at
    every token of a response.  As in the paper, KL is a part of the reward.
    """

    kl_coef: float
    gamma: float = 1.0
    needs_critic = False

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
        """Advantages.  Errors: ValueError where a prompt has one response alone."""
        group = _Groups(groups, masks.action)
        to_go = rewards_to_go(rewards, masks, old, ref, self.kl_coef, self.gamma)  # [B, T]
        # G_i - (n mean - G_i) / (n - 1) = n / (n - 1) (G_i - mean)
        off = (to_go - group.mean(to_go)) * (group.sizes / (group.sizes - 1))  # [B, T]
        return TokenAdvantages(torch.where(masks.action, off, 0.0))


@dataclass(frozen=True)
class ReMax:
    """REINFORCE with the greedy answer as baseline (Li et al. 2024, section 4), without a critic.

        G_it = sum_{k>=t} gamma^(k-t) (r_ik - kl_coef (old_ik - ref_ik))     KL where `masks.kl`
        A_it = G_it - G_gt          g: the greedy response to the same prompt

    The greedy response is the one of its prompt that pays no KL and is not trained on:
    `tppo.methods.greedy` puts it into each group.  It has ended where t is behind it, and counts
    with its last token's G.  Where the reward is paid at the last token, gamma is 1 and KL costs
    nothing, A is the paper's, the total less the greedy total, at every token.
    """

    kl_coef: float
    gamma: float = 1.0
    needs_critic = False
    greedy_baseline = True

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
        """Advantages.  Errors: ValueError where a prompt has not one greedy response."""
        group = _Groups(groups, masks.action)
        to_go = rewards_to_go(rewards, masks, old, ref, self.kl_coef, self.gamma)  # [B, T]
        greedy = ~masks.kl.any(1, keepdim=True)  # [B, 1]
        if not bool((group.sum(greedy.float()) == 1).all()):
            raise ValueError("a prompt has none or several responses that are not trained on, "
                             "expected one, the greedy one")  # fmt: skip
        baseline = group.sum(torch.where(greedy, group.held(to_go), 0.0))  # [B, T]
        return TokenAdvantages(torch.where(masks.kl, to_go - baseline, 0.0))


def rewards_to_go(
    rewards: Tensor, masks: Masks, old: Tensor, ref: Tensor, kl_coef: float, gamma: float
) -> Tensor:
    """G_t = sum_{k>=t} gamma^(k-t) (r_k - kl_coef (old_k - ref_k)), KL where `masks.kl`, [B, T].

    It is GAE with values of 0 and lambda 1.
    """
    return tk.token_advantages(
        rewards,
        torch.zeros_like(rewards),
        masks.action,
        logprobs=old,
        ref_logprobs=torch.where(masks.kl, ref, old),
        kl_coef=kl_coef,
        gamma=gamma,
        lam=1.0,
        normalize=False,
    ).advantages


class _Groups:
    """The responses of a step by their prompts.

    Sums are products with the matrix of who belongs where, which a GPU adds up in the same order
    every time, and in double precision.
    """

    def __init__(self, groups: Sequence[int], action: Tensor):
        sizes = Counter(groups)
        if min(sizes.values()) < 2:
            raise ValueError(
                "a prompt has one response alone, expected at least two to compare: "
                "--ppo.responses-per-prompt 2 or more"
            )
        self.action = action  # [B, T]
        self.lengths = action.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
        place = {group: k for k, group in enumerate(sizes)}
        self.index = torch.tensor([place[group] for group in groups], device=action.device)  # [B]
        self.member = nn.functional.one_hot(self.index, len(sizes)).double()  # [B, prompts]
        self.sizes = self.member.sum(0)[self.index, None].float()  # [B, 1]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the group of each row, for each of them: [B, ...] as x."""
        return (self.member.T @ x.double())[self.index].to(x.dtype)

    def held(self, to_go: Tensor) -> Tensor:
        """At each position, [B, T]; a row that has ended keeps its last."""
        places = torch.arange(to_go.shape[1], device=to_go.device)  # [T]
        return to_go.gather(1, torch.minimum(places, self.lengths - 1))

    def mean(self, to_go: Tensor) -> Tensor:
        """The mean over the group of what is held at each position, [B, T]."""
        return self.sum(self.held(to_go)) / self.sizes


ADVANTAGES: dict[str, Callable[[PPOConfig], Advantage]] = {
    "gae": lambda config: GAE(config.kl_coef, config.gamma, config.lam, config.normalize),
    "grpo": lambda config: GRPO(config.kl_coef, config.gamma, config.normalize),
    "rloo": lambda config: RLOO(config.kl_coef, config.gamma),
    "remax": lambda config: ReMax(config.kl_coef, config.gamma),
}
