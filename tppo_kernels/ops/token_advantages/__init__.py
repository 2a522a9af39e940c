"""Advantages of every token in one call: KL-shaped rewards, GAE, whitening, statistics."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core.check import FP32_MAX, Check, offsets
from ..._core.keywords import suggests
from ..._core.metrics import floats
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.sequence import KL_ESTIMATORS, compute_dtype, has_valid_token
from ..whiten import check_group, over_group
from . import reference
from .reference import AdvantagesCall, WhitenAdvantages

_op = Op("token_advantages", cpu=("cpp", "reference"), cuda=("cuda", "triton", "reference"))

NBYTES_PER_TOKEN = 29  # gae's 17, two log-probs and the shaped rewards; whitening: 8 more


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test and the benchmarks' gate."""
    g = torch.Generator().manual_seed(0)
    rewards, values, logprobs, ref = torch.randn(4, 3, 17, generator=g, dtype=torch.float64)
    return (rewards, values, torch.rand(3, 17, generator=g) < 0.7), {
        "logprobs": logprobs, "ref_logprobs": ref, "kl_coef": 0.1, "gamma": 0.99}


class AdvantageStats(NamedTuple):
    """Scalars on the device, over the action mask of this process."""

    n: Tensor  # action tokens, int64
    reward_mean: Tensor  # of the shaped rewards
    reward_std: Tensor
    kl_mean: Tensor  # of the estimator, not multiplied by kl_coef; 0 without log-probs
    advantage_mean: Tensor  # of the raw advantages
    advantage_std: Tensor
    return_mean: Tensor
    return_std: Tensor

    def means(self) -> dict[str, float]:
        """What a logger takes: the fields by name, as floats. Reads the device once: call it when
        logging, outside `torch.compile`."""
        return floats(self._asdict())


class TokenAdvantages(NamedTuple):
    """The results of `token_advantages`, fp32 (fp64 for fp64 inputs), detached."""

    advantages: Tensor  # [B, T] or [N]
    returns: Tensor  # [B, T] or [N]
    rewards: Tensor  # [B, T] or [N]
    stats: AdvantageStats


def _check_values(call: AdvantagesCall) -> None:
    op, mask, train_mask = "token_advantages", call.mask, call.train_mask
    offsets(op, call.cu_seqlens, call.token_rewards.shape[0])
    seen = partial(has_valid_token, call.token_rewards, mask, call.cu_seqlens)
    values_between(op, "kl_coef", call.kl_coef, -FP32_MAX, FP32_MAX)
    values_between(op, "gamma", call.gamma, -FP32_MAX, FP32_MAX)
    values_between(op, "lam", call.lam, 0.0, 1.0, seen)
    values_between(op, "value_lam", call.value_lam, 0.0, 1.0, seen)
    if mask is not None and train_mask is not None and bool((train_mask & ~mask).any()):
        where = (train_mask & ~mask).nonzero()[0].tolist()
        raise ValueError(f"token_advantages: train_mask is True at {where}, where mask is False, "
                         "expected a subset of mask")


def _fake(call: AdvantagesCall) -> tuple[Tensor, ...]:
    like = call.token_rewards
    dtype = compute_dtype(like, call.values, call.logprobs, call.ref_logprobs)
    tokens = [like.new_empty(like.shape, dtype=dtype) for _ in range(3)]
    return (*tokens, like.new_empty(7, dtype=dtype), like.new_empty((), dtype=torch.int64),
            like.new_empty(4, dtype=torch.float64))


_fwd = _op.define(
    "token_advantages_fwd -> (Tensor advantages, Tensor returns, Tensor rewards, Tensor stats, "
    "Tensor, Tensor)", reference.fwd, _fake, _check_values, record=AdvantagesCall)
_whiten = _op.define("token_advantages_whiten -> (Tensor advantages)", reference.whiten,
                     lambda call: torch.empty_like(call.advantages), record=WhitenAdvantages)


@suggests
def token_advantages(
        token_rewards: Tensor,  # [B, T] or [N]
        values: Tensor,  # [B, T] or [N]
        mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        *,
        train_mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        logprobs: Tensor | None = None,  # [B, T] or [N]
        ref_logprobs: Tensor | None = None,  # [B, T] or [N]
        kl_coef: float | Tensor = 0.0,  # []
        kl_estimator: str = "k1",
        gamma: float | Tensor = 1.0,  # []
        lam: float | Tensor = 0.95,  # [] or [B]
        value_lam: float | Tensor | None = None,  # [] or [B]
        bootstrap: Tensor | None = None,  # [B]
        normalize: bool = True,
        unbiased: bool = True,
        group: Any = None,
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        ) -> TokenAdvantages:
    """Rewards minus KL, then `gae`, then `whiten`, with the statistics a trainer logs.

        rewards_t  = token_reward_t - kl_coef k(logprob_t, ref_logprob_t)
        A, returns = gae(rewards, values, mask, gamma, lam, value_lam, bootstrap)
        advantages = whiten(A, train_mask)        A itself where `normalize` is False

    token_rewards, values, logprobs, ref_logprobs: [B, T], or packed [N] with `cu_seqlens` [B + 1]
    int32. mask: the action mask, over which KL is paid and `stats` is taken. train_mask: a subset
    of it, `mask` itself where None; normalised advantages are 0 outside. kl_coef: a number or 0-d;
    a number other than 0, or a 0-d tensor (which is not read), needs both log-probs; with them and
    kl_coef 0 the KL is only measured. kl_estimator: of `KL_ESTIMATORS`. gamma, lam, value_lam,
    bootstrap: as in `gae`. unbiased: as in `whiten`, for `stats` too. group: whitens over all its
    processes, each of which must call, also one without a token; `stats` stays this process's own.

    Source: Ziegler et al. 2019, eq. 2 (the KL inside the reward); `gae` and `whiten` for the rest.
    """
    check = Check("token_advantages")
    mask = check.sequences("token_rewards", token_rewards, mask, cu_seqlens)
    tokens = check.tokens(cu_seqlens)
    check.tensor("values", values, tokens)
    train_mask = check.mask("train_mask", train_mask, tokens)
    check.tensor("logprobs", logprobs, tokens, optional=True)
    check.tensor("ref_logprobs", ref_logprobs, tokens, optional=True)
    check.tensor("bootstrap", bootstrap, "B", optional=True)
    check.choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check.choice("normalize", normalize, (True, False))
    check.choice("unbiased", unbiased, (True, False))
    coef = check.scalar("kl_coef", kl_coef)
    shaped = isinstance(kl_coef, Tensor) or kl_coef != 0
    for name, given, other in (("logprobs", logprobs, ref_logprobs),
                               ("ref_logprobs", ref_logprobs, logprobs)):
        if given is None and (shaped or other is not None):
            why = f"kl_coef is {kl_coef}" if shaped else "the other log-probs are given"
            raise ValueError(f"token_advantages: {name} is None, expected a tensor because {why}")
    discount = check.scalar("gamma", gamma)
    lam_rows = check.per_sequence("lam", lam, low=0.0, high=1.0)
    value_rows = check.per_sequence("value_lam", value_lam, low=0.0, high=1.0, optional=True)
    check_group(check, group)
    together = normalize and group is None
    advantages, returns, rewards, stats, n, moments = _fwd(AdvantagesCall(
        token_rewards, values, mask, train_mask, logprobs, ref_logprobs, coef, discount,
        lam_rows, value_rows, bootstrap, cu_seqlens, kl_estimator, unbiased, together))
    if normalize and not together:
        trained = mask if train_mask is None else train_mask
        advantages = _whiten(WhitenAdvantages(advantages, trained, over_group(moments, group),
                                              unbiased))
    kl, reward, advantage, back, *stds = stats.unbind()
    return TokenAdvantages(advantages, returns, rewards, AdvantageStats(
        n=n, kl_mean=kl, reward_mean=reward, reward_std=stds[0], advantage_mean=advantage,
        advantage_std=stds[1], return_mean=back, return_std=stds[2]))
