"""The clipped policy loss of token-level PPO, with its gradient computed in the same pass."""

from __future__ import annotations

import functools
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core.check import FP32_MAX, Check, describe, offsets
from ..._core.derivatives import first_only, wanted
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.metrics import floats
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.sequence import KL_ESTIMATORS, compute_dtype, detached
from . import reference
from .reference import OBJECTIVES, Formula, PolicyLossCall, PolicyLossGradient, PolicyTerms

_op = Op("ppo_loss", cpu=("cpp", "reference"), cuda=("cuda", "triton", "reference"))

# logprobs, old and advantages in fp32, the mask; the derivative written, read and scaled
NBYTES_PER_TOKEN = 25


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(3, 17, generator=g, dtype=torch.float64)
    logprobs, ref = old + 0.4 * torch.randn(2, 3, 17, generator=g, dtype=torch.float64)
    advantages, entropy = torch.randn(2, 3, 17, generator=g, dtype=torch.float64)
    return (logprobs, old, advantages, torch.rand(3, 17, generator=g) < 0.7), {
        "dual_clip": 1.5, "entropy": entropy.abs(), "entropy_coef": 0.1, "ref_logprobs": ref,
        "kl_coef": 0.3, "weights": torch.rand(3, generator=g, dtype=torch.float64)}

POLICY_MEANS = ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual",
                "clamped_fraction", "approx_kl_k1", "approx_kl_k3", "ratio_mean", "entropy", "kl")


class PolicyMetrics(NamedTuple):
    """Sums over the mask, as 0-d tensors on the device: of micro-batches, `merged` adds them.

    Fractions and means are properties: a sum by `tokens`, 0 where there are none; no host read.
    `means()` gives them all as a plain dict of floats, for a logger.
    d and r are those of `ppo_loss`, d always the token's own. A term that was not given sums to 0.
    Clips: "cispo" bounds its weight whatever A is, so it counts tokens of any A; "sapo" clips
    nothing, and counts the tokens whose gradient "clip" would drop.
    """

    tokens: Tensor  # valid tokens
    clip_low_count: Tensor  # A < 0 and r < 1 - clip_low
    clip_high_count: Tensor  # A > 0 and r > 1 + clip_high
    clip_dual_count: Tensor  # A < 0 and the loss above -c A; 0 but of "clip"
    clamped_count: Tensor  # |logprob - old| > max_log_ratio
    approx_kl_k1_sum: Tensor  # -d: KL(old || new) of tokens drawn from the old policy
    approx_kl_k3_sum: Tensor  # r - 1 - d, the same without negative values
    ratio_sum: Tensor  # r; the sequence's under ratio="sequence"
    entropy_sum: Tensor
    kl_sum: Tensor  # KL against ref_logprobs as it is in the loss: clamped, times r where weighted
    ratio_max: Tensor  # the largest r; merged by maximum

    def merged(self, other: PolicyMetrics) -> PolicyMetrics:
        """The metrics of two batches together."""
        sums = [a + b for a, b in zip(self[:-1], other[:-1], strict=True)]
        return PolicyMetrics._make([*sums, torch.maximum(self.ratio_max, other.ratio_max)])

    def means(self) -> dict[str, float]:
        """What a logger takes: every fraction and mean, `ratio_max` and `tokens`, by name, as
        floats. Reads the device once: call it when logging, outside `torch.compile`."""
        return floats({"tokens": self.tokens, "ratio_max": self.ratio_max,
                       **{name: getattr(self, name) for name in POLICY_MEANS}})

    def _mean(self, total: Tensor) -> Tensor:
        return total / self.tokens.clamp(min=1)

    @property
    def clip_fraction_low(self) -> Tensor:
        return self._mean(self.clip_low_count)

    @property
    def clip_fraction_high(self) -> Tensor:
        return self._mean(self.clip_high_count)

    @property
    def clip_fraction_dual(self) -> Tensor:
        return self._mean(self.clip_dual_count)

    @property
    def clip_fraction(self) -> Tensor:
        """Low and high together; tokens of the dual clip are counted apart."""
        return self._mean(self.clip_low_count + self.clip_high_count)

    @property
    def clamped_fraction(self) -> Tensor:
        return self._mean(self.clamped_count)

    @property
    def approx_kl_k1(self) -> Tensor:
        return self._mean(self.approx_kl_k1_sum)

    @property
    def approx_kl_k3(self) -> Tensor:
        return self._mean(self.approx_kl_k3_sum)

    @property
    def ratio_mean(self) -> Tensor:
        return self._mean(self.ratio_sum)

    @property
    def entropy(self) -> Tensor:
        return self._mean(self.entropy_sum)

    @property
    def kl(self) -> Tensor:
        return self._mean(self.kl_sum)


class PolicyLoss(NamedTuple):
    """The results of `ppo_loss`, fp32 (fp64 for fp64 inputs)."""

    loss: Tensor  # []
    metrics: PolicyMetrics  # detached


def require(op: str, term: str, coef_name: str, coef: Any) -> None:
    """Raises ValueError where a coefficient that is not 0 asks for a tensor that is not there."""
    if float(coef) != 0:
        raise ValueError(f"{op}: {term} is None, expected a tensor, because {coef_name} is "
                         f"{float(coef):g}")


def check_terms(
        check: Check,
        tensors: tuple[Any, ...],  # old_logprobs, advantages, ref_logprobs, weights
        formula: tuple[Any, ...],  # in the order of `Formula`
        over: tuple[Any, ...],  # in the order of `Reduction`
        cu_seqlens: Tensor | None,  # [B + 1] int32
) -> PolicyTerms:
    """Checks the terms of a loss and gives them: tensors without their graph, scalars as 0-d
    tensors."""
    tokens, (old, advantages, ref, weights) = check.tokens(cu_seqlens), tensors
    (low, high, dual, limit, entropy_coef, kl_coef, kl_clamp, tau_pos, tau_neg, ratio,
     kl_estimator, kl_ratio_weighted, objective) = formula
    check.tensor("old_logprobs", old, tokens)
    advantages = check.spread("advantages", advantages, cu_seqlens)
    check.tensor("ref_logprobs", ref, tokens, optional=True)
    weights = check.spread("weights", weights, cu_seqlens, optional=True)
    check.choice("ratio", ratio, ("token", "sequence"))
    check.choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check.choice("kl_ratio_weighted", kl_ratio_weighted, (False, True))
    check.choice("objective", objective, tuple(OBJECTIVES))
    if dual is not None and objective != "clip":
        raise ValueError(f"{check.op}: dual_clip is {describe(dual)}, expected None, because "
                         f"objective is {objective!r}: the dual clip bounds the loss of 'clip'")
    is_sapo = objective == "sapo"
    tau_pos = check.scalar("tau_pos", tau_pos, above=0.0)
    tau_neg = check.scalar("tau_neg", tau_neg, above=0.0)
    checked = Formula(
        check.scalar("clip_low", low, low=0.0, high=inf),
        check.scalar("clip_high", high, low=0.0, high=inf),
        check.scalar("dual_clip", dual, above=1.0, high=inf, optional=True),
        check.scalar("max_log_ratio", limit, above=0.0, high=inf),
        check.scalar("entropy_coef", entropy_coef), check.scalar("kl_coef", kl_coef),
        check.scalar("kl_clamp", kl_clamp, above=0.0, high=inf, optional=True),
        tau_pos if is_sapo else None, tau_neg if is_sapo else None, ratio, kl_estimator,
        kl_ratio_weighted, objective)
    num_tokens, num_sequences, norm_length, reduction = over
    denominators = check.reduction(reduction, num_tokens, num_sequences, norm_length, cu_seqlens)
    if ref is None and not isinstance(kl_coef, Tensor):
        require(check.op, "ref_logprobs", "kl_coef", kl_coef)
    return PolicyTerms(detached(old), detached(advantages), detached(ref), detached(weights),
                       checked, denominators, cu_seqlens)


def check_values(op: str, terms: PolicyTerms) -> None:
    """Checks the ranges of the values that both losses take."""
    low, high, dual, limit, entropy_coef, kl_coef, kl_clamp, tau_pos, tau_neg, *_ = terms.formula
    offsets(op, terms.cu_seqlens, terms.old_logprobs.shape[0])
    values_between(op, "clip_low", low, 0.0, inf)
    values_between(op, "clip_high", high, 0.0, inf)
    values_between(op, "dual_clip", dual, 1.0, inf, open_low=True)
    values_between(op, "max_log_ratio", limit, 0.0, inf, open_low=True)
    values_between(op, "entropy_coef", entropy_coef, -FP32_MAX, FP32_MAX)
    values_between(op, "kl_coef", kl_coef, -FP32_MAX, FP32_MAX)
    values_between(op, "kl_clamp", kl_clamp, 0.0, inf, open_low=True)
    values_between(op, "tau_pos", tau_pos, 0.0, FP32_MAX, open_low=True)
    values_between(op, "tau_neg", tau_neg, 0.0, FP32_MAX, open_low=True)
    if terms.ref_logprobs is None:
        require(op, "ref_logprobs", "kl_coef", kl_coef)


def _check_values(call: PolicyLossCall) -> None:
    check_values("ppo_loss", call.terms)
    if call.entropy is None:
        require("ppo_loss", "entropy", "entropy_coef", call.terms.formula.entropy_coef)


def _fake(call: PolicyLossCall) -> tuple[Tensor, ...]:
    logprobs = call.logprobs
    empty = functools.partial(logprobs.new_empty, dtype=compute_dtype(
        logprobs, call.entropy, *call.terms[:4]))
    return (empty(()), empty(logprobs.shape if call.grad_logprobs else 0),
            empty(logprobs.shape if call.grad_entropy else 0), empty(len(PolicyMetrics._fields)),
            empty(()))


def _fake_bwd(call: PolicyLossGradient) -> tuple[Tensor, Tensor]:
    return (torch.empty_like(call.dlogprobs, dtype=call.logprobs_dtype),
            torch.empty_like(call.dentropy, dtype=call.entropy_dtype))


_fwd = _op.define("ppo_loss_fwd -> (Tensor loss, Tensor dlogprobs, Tensor dentropy, "
                  "Tensor metrics, Tensor)", reference.fwd, _fake, _check_values,
                  record=PolicyLossCall)
_bwd = _op.define("ppo_loss_bwd -> (Tensor dlogprobs, Tensor dentropy)", reference.bwd, _fake_bwd,
                  record=PolicyLossGradient)


class _PolicyLoss(torch.autograd.Function):
    """Forward keeps the derivatives; backward multiplies them by the incoming gradient.

    logprobs and entropy are arguments beside the record: autograd sees no tensor inside one.
    """

    @staticmethod
    def forward(ctx, logprobs, entropy, call):
        needed = ctx.needs_input_grad
        loss, dlogprobs, dentropy, metrics, scale = _fwd(PolicyLossCall(
            logprobs, entropy, call.mask, call.terms, needed[0], needed[1]))
        ctx.dtypes = (logprobs.dtype, loss.dtype if entropy is None else entropy.dtype)
        ctx.save_for_backward(logprobs if needed[0] else None, entropy if needed[1] else None,
                              scale, dlogprobs, dentropy)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @first_only(2)
    def backward(ctx, grad_loss, _):
        dlogprobs, dentropy = _bwd(PolicyLossGradient(grad_loss, *ctx.saved_tensors[2:],
                                                      *ctx.dtypes))
        needed = ctx.needs_input_grad
        return dlogprobs if needed[0] else None, dentropy if needed[1] else None, None


@suggests
def ppo_loss(
        logprobs: Tensor,  # [B, T] or [N]
        old_logprobs: Tensor,  # [B, T] or [N]
        advantages: Tensor,  # [B, T] or [N], [B] or [B, 1]
        mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        *,
        clip_low: float | Tensor = 0.2,  # []
        clip_high: float | Tensor = 0.2,  # []
        dual_clip: float | Tensor | None = None,  # []
        ratio: str = "token",  # "token", "sequence"
        entropy: Tensor | None = None,  # [B, T] or [N]
        entropy_coef: float | Tensor = 0.0,  # []
        ref_logprobs: Tensor | None = None,  # [B, T] or [N]
        kl_coef: float | Tensor = 0.0,  # []
        kl_estimator: str = "k2",  # of KL_ESTIMATORS
        kl_clamp: float | Tensor | None = None,  # []
        kl_ratio_weighted: bool = False,
        objective: str = "clip",  # "clip", "cispo", "sapo"
        tau_pos: float | Tensor = 1.0,  # []
        tau_neg: float | Tensor = 1.05,  # []
        weights: Tensor | None = None,  # [B, T] or [N], [B] or [B, 1]
        reduction: str = "token-mean",  # of REDUCTIONS
        num_tokens: int | Tensor | None = None,  # []
        num_sequences: int | str | Tensor | None = None,  # [], or "all"
        norm_length: int | Tensor | None = None,  # []
        max_log_ratio: float | Tensor = 20.0,  # []
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
) -> PolicyLoss:
    """The policy loss over the train mask, with entropy and KL terms, and its metrics.

        d = where(mask, logprob - old, 0) clamped to +-max_log_ratio; "sequence": its mean (GSPO)
        r = exp(d), clip(r) = r in [1 - clip_low, 1 + clip_high]
        objective "clip" (PPO): l = max(-A r, -A clip(r)); dual_clip c > 1: min(l, -c A) where A < 0
                  "cispo":      l = -A clip(r) logprob, clip(r) without gradient
                  "sapo":       l = -A (4 / tau) sigmoid(tau (r - 1)), tau_pos where A > 0, tau_neg
        KL = kl_estimator of (logprob, ref), in +-kl_clamp; kl_ratio_weighted: times r
        loss = Red(w l) - entropy_coef Red(H) + kl_coef Red(KL)

    logprobs, old_logprobs, entropy, ref_logprobs: [B, T], or packed [N] with `cu_seqlens`.
    advantages, weights (0 selects the token away): the same, [B] or [B, 1]; packed with N = B, [N].
    mask: bool or whole numbers, 0 where the token is not trained on.
    Red, at its denominators >= 1: "token-mean" (num_tokens, the valid tokens), "token-sum",
    "seq-mean-token-sum" and "seq-mean-token-mean" (num_sequences, those with a valid token, or
    "all": those without too, as TRL and SkyRL), "seq-mean-token-sum-norm" (num_sequences *
    norm_length, T; required when packed). A denominator of another reduction is not used: counts of
    the whole batch make micro-batches add up to it.

    Differentiable in logprobs and entropy only, once and backward. r has gradient 0 at a clamped
    token, and l where "clip" clips it; where its branches meet, r at a clip edge counts as inside
    and l = -c A as not clipped: judge gradients near an edge within a band. "cispo" drops no token:
    its gradient is -A clip(r) also where r is clipped or clamped. "sapo" clips nothing: its clip
    edges are those of the metrics. Both take ratio="sequence" too, and no dual_clip (ValueError).
    TRL's cispo bounds r by epsilon_high alone: clip_low=1, clip_high=epsilon_high - 1.
    kl_clamp gives gradient 0 beyond, but "k1+" and "k3+" keep k2's (verl; 10 is its k3's).
    kl_ratio_weighted: the gradient is that of KL and of r (TRL; DeepSeek-V3.2). inf - inf is NaN at
    a valid token.
    A coefficient of 0 is off, and so are infinite clips and an infinite max_log_ratio. One that is
    not 0 without its tensor is a ValueError; given as a tensor on a GPU, NaN. Under `torch.compile`
    a Python float is a constant: give 0-d tensors.

    Raises ValueError / TypeError that name the argument. Source: Schulman et al. 2017 (PPO) eq. 7;
    dual clip: Ye et al. 2020; sequence ratio: Zheng et al. 2025 (GSPO); cispo: MiniMax-M1, arXiv
    2506.13585; sapo: Gao et al., arXiv 2511.20347; KL estimators: Schulman.
    """
    check = Check("ppo_loss")
    mask = check.sequences("logprobs", logprobs, mask, cu_seqlens)
    check.tensor("entropy", entropy, check.tokens(cu_seqlens), optional=True)
    terms = check_terms(
        check, (old_logprobs, advantages, ref_logprobs, weights),
        (clip_low, clip_high, dual_clip, max_log_ratio, entropy_coef, kl_coef, kl_clamp, tau_pos,
         tau_neg, ratio, kl_estimator, kl_ratio_weighted, objective),
        (num_tokens, num_sequences, norm_length, reduction), cu_seqlens)
    if entropy is None and not isinstance(entropy_coef, Tensor):
        require("ppo_loss", "entropy", "entropy_coef", entropy_coef)
    call = PolicyLossCall(logprobs, entropy, detached(mask), terms, False, False)
    if wanted(logprobs, entropy):
        loss, metrics = recorded(_PolicyLoss, logprobs, entropy, call)
    else:
        loss, _, _, metrics, _ = _fwd(call)
    return PolicyLoss(loss, PolicyMetrics(*metrics.unbind()))
