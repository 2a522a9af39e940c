"""How noisy the gradient of the policy is: how many answers it takes until it says something.

    B = tr(Sigma) / |G|^2

the simple noise scale (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training",
section 2.2, eq. 2.9), of the mean gradient G over answers and the covariance Sigma of the gradient
of one answer.  A batch of B answers has as much noise as signal; a method with half of B needs half
of the answers for a step that is as good.

The two unknowns are solved for from the squared norms at two batch sizes (appendix A.1):

    E|g_b|^2 = |G|^2 + tr(Sigma) / b          g_b: the mean gradient of a batch of b answers
    |G|^2     ~ (n |g_n|^2 - b mean |g_b|^2) / (n - b)
    tr(Sigma) ~ (mean |g_b|^2 - |g_n|^2) / (1/b - 1/n)

with blocks of b answers and all n of them.  Both are unbiased; |g_n|^2 alone is not an estimate of
|G|^2, because it holds tr(Sigma) / n of noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tppo.methods.experience import Experience
from tppo.models.guards import trainable
from tppo.models.policy import policy_logprobs

GROUPS = 8  # of blocks, each left out once for the standard error


class NoiseScale(NamedTuple):
    """Estimates over n answers; `answers` is infinite where the signal is not above 0."""

    answers: float  # B, in answers
    se: float  # its standard error by the jackknife over groups of blocks
    signal: float  # |G|^2
    noise: float  # tr(Sigma), of one answer


class _Sums(NamedTuple):
    """What one group of blocks adds up to."""

    blocks: int
    total: Tensor  # [K, P], for each of K gradients
    products: Tensor  # [K, K], of the gradients of the same block


class GradientNoise:
    """Running sums of K gradients, all of them of the same blocks of answers.

    They differ in where the rewards are paid, or in the critic; the answers are the same, so that
    what is compared is the method and not the sample.
    names: of the gradients.  block: answers in a block.
    """

    def __init__(self, names: Sequence[str], block: int):
        self.names, self.block = list(names), block
        self.groups: list[_Sums] = []
        self.blocks = 0

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Take up the mean gradients [P] over the answers of one more block."""
        rows = torch.stack([gradients[name].detach().double().cpu() for name in self.names])
        new = _Sums(1, rows, rows @ rows.T)
        place = self.blocks % GROUPS
        if place == len(self.groups):
            self.groups.append(new)
        else:
            self.groups[place] = _Sums(*map(torch.add, self.groups[place], new))  # type: ignore
        self.blocks += 1

    def scale(self, name: str) -> NoiseScale:
        """The noise scale of one gradient.  Errors: ValueError with fewer than two blocks."""
        k = self.names.index(name)
        signal, noise = self._solved(self._summed())
        answers = float(noise[k] / signal[k]) if signal[k] > 0 else math.inf
        parts = range(len(self.groups)) if self.blocks > 2 else ()
        without = [self._solved(self._summed(leave_out=g)) for g in parts]
        logs = [math.log(t[k] / s[k]) for s, t in without if s[k] > 0 and t[k] > 0]
        se = math.inf
        if len(logs) == len(without) > 1:
            mean = sum(logs) / len(logs)
            spread = sum((x - mean) ** 2 for x in logs) * (len(logs) - 1) / len(logs)
            se = answers * math.sqrt(spread)
        return NoiseScale(answers, se, float(signal[k]), float(noise[k]))

    def cosine(self, name: str, other: str) -> float:
        """cos(G, G') of two mean gradients, from products of different blocks alone.

        E of the product of two blocks that differ is G . G': what one block has in common with
        itself, which is noise, is left out of the numerator and of both lengths.  NaN where a
        signal is not above 0.
        """
        sums = self._summed()
        a, b = self.names.index(name), self.names.index(other)
        between = self._between(sums)
        lengths = between[a, a] * between[b, b]
        if between[a, a] <= 0 or between[b, b] <= 0:
            return math.nan
        return float(between[a, b] / lengths.sqrt())

    def _summed(self, leave_out: int | None = None) -> _Sums:
        kept = [sums for g, sums in enumerate(self.groups) if g != leave_out]
        blocks = sum(sums.blocks for sums in kept)
        if blocks < 2:
            raise ValueError(f"the gradients were of {blocks} blocks, expected at least 2")
        return _Sums(blocks, torch.stack([s.total for s in kept]).sum(0),
                     torch.stack([s.products for s in kept]).sum(0))  # fmt: skip

    @staticmethod
    def _between(sums: _Sums) -> Tensor:
        """The mean product of the gradients of two different blocks, [K, K]: it estimates G . G'.

        With m blocks of b answers, n = m b, this is (n |g_n|^2 - b mean |g_b|^2) / (n - b).
        """
        m = sums.blocks
        return (sums.total @ sums.total.T - sums.products) / (m * (m - 1))

    def _solved(self, sums: _Sums) -> tuple[Tensor, Tensor]:
        """|G|^2 and tr(Sigma) of each gradient, [K]."""
        signal = self._between(sums).diagonal()
        mean_square = sums.products.diagonal() / sums.blocks  # of a block
        return signal, self.block * (mean_square - signal)


def policy_gradient(model: torch.nn.Module, experience: Experience, temperature: float) -> Tensor:
    """The gradient by which PPO's first update begins, of the mean over answers, [P].

        g = 1/B sum_i sum_t A_it grad log pi(a_it)        t where `masks.policy`

    over the trained weights of the policy.  At the policy that sampled this is the gradient of the
    clipped objective, but for its division by tokens.
    """
    weights = trainable(model)
    logprobs, _ = policy_logprobs(model, experience.batch, temperature)  # type: ignore[arg-type]
    paid = torch.where(experience.masks.policy, experience.advantages * logprobs, 0.0)
    objective = paid.sum() / len(experience.batch.response_ids)
    found = torch.autograd.grad(objective, weights, allow_unused=True)
    return torch.cat([
        torch.zeros(w.numel()) if g is None else g.detach().float().flatten().cpu()
        for w, g in zip(weights, found, strict=True)
    ])  # fmt: skip
