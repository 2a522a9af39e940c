"""The critic's squared error, with optional value clipping and its gradient in the same pass."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.check import Check, offsets
from ..._core.derivatives import first_only, wanted
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.metrics import floats
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.sequence import compute_dtype, detached
from . import reference
from .reference import ValueLossCall, ValueLossGradient

_op = Op("value_loss", cpu=("cpp", "reference"), cuda=("cuda", "triton", "reference"))

# values, returns and old values in fp32, the mask; the derivative written, read and scaled
NBYTES_PER_TOKEN = 25


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    values, returns, old = torch.randn(3, 3, 17, generator=g, dtype=torch.float64)
    return (values, returns, torch.rand(3, 17, generator=g) < 0.7), {"old_values": old, "clip": 0.5}


class ValueMetrics(NamedTuple):
    """Sufficient statistics over the mask, as 0-d tensors on the device.

    `merged` joins those of micro-batches; the properties need no host read. `means()` gives a
    plain dict of floats, for a logger.
    """

    tokens: Tensor  # valid tokens
    clip_count: Tensor  # tokens whose loss is the clipped branch's
    return_mean: Tensor
    return_m2: Tensor  # sum of squared deviations of returns from their mean
    error_mean: Tensor  # of returns - values
    error_m2: Tensor

    def merged(self, other: ValueMetrics) -> ValueMetrics:
        """The metrics of two batches together. Source: Chan, Golub, LeVeque 1979."""
        tokens = self.tokens + other.tokens
        part = other.tokens / tokens.clamp(min=1)

        def moments(mean: Tensor, m2: Tensor, mean_2: Tensor, m2_2: Tensor) -> list[Tensor]:
            shift = mean_2 - mean
            return [mean + shift * part, m2 + m2_2 + shift.square() * self.tokens * part]

        return ValueMetrics(tokens, self.clip_count + other.clip_count,
                            *moments(self.return_mean, self.return_m2, *other[2:4]),
                            *moments(self.error_mean, self.error_m2, *other[4:6]))

    def means(self) -> dict[str, float]:
        """What a logger takes, by name, as floats: `tokens`, the clip fraction, the explained
        variance, mean and standard deviation of returns and of errors (returns - values). Reads
        the device once: call it when logging, outside `torch.compile`."""
        tokens = self.tokens.clamp(min=1)
        return floats({
            "tokens": self.tokens, "clip_fraction": self.clip_fraction,
            "explained_variance": self.explained_variance, "return_mean": self.return_mean,
            "return_std": (self.return_m2 / tokens).sqrt(), "error_mean": self.error_mean,
            "error_std": (self.error_m2 / tokens).sqrt()})

    @property
    def clip_fraction(self) -> Tensor:
        return self.clip_count / self.tokens.clamp(min=1)

    @property
    def explained_variance(self) -> Tensor:
        """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary.

        A variance up to (1e-6 mean)^2 is rounding, not variance.
        """
        rounding = self.tokens * (1e-6 * self.return_mean).square()
        varies = ~(self.return_m2 <= rounding)  # NaN varies: it shows
        explained = 1 - self.error_m2 / torch.where(varies, self.return_m2, 1.0)
        return torch.where(varies, explained, torch.zeros_like(explained))


class ValueLoss(NamedTuple):
    """The results of `value_loss`, fp32 (fp64 for fp64 inputs)."""

    loss: Tensor  # []
    metrics: ValueMetrics  # detached


def _check_values(call: ValueLossCall) -> None:
    offsets("value_loss", call.cu_seqlens, call.values.shape[0])
    values_between("value_loss", "clip", call.clip, 0.0, inf)


def _fake(call: ValueLossCall) -> tuple[Tensor, ...]:
    values, dtype = call.values, compute_dtype(call.values, call.returns, call.old_values)
    return (values.new_empty((), dtype=dtype),
            values.new_empty(values.shape if call.grad else 0, dtype=dtype),
            values.new_empty(len(ValueMetrics._fields), dtype=dtype),
            values.new_empty((), dtype=dtype))


_fwd = _op.define("value_loss_fwd -> (Tensor loss, Tensor dvalues, Tensor metrics, Tensor)",
                  reference.fwd, _fake, _check_values, record=ValueLossCall)
_bwd = _op.define("value_loss_bwd -> (Tensor dvalues)", reference.bwd,
                  lambda call: torch.empty_like(call.dvalues, dtype=call.dtype),
                  record=ValueLossGradient)


class _ValueLoss(torch.autograd.Function):
    """Forward keeps the derivative; backward multiplies it by the incoming gradient.

    The values come apart from the record, because autograd sees no tensor inside one.
    """

    @staticmethod
    def forward(ctx, values, call):
        loss, dvalues, metrics, scale = _fwd(ValueLossCall(values, *call[1:]))
        ctx.dtype = values.dtype
        ctx.save_for_backward(values, scale, dvalues)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @first_only(1)
    def backward(ctx, grad_loss, _):
        _, scale, dvalues = ctx.saved_tensors
        return _bwd(ValueLossGradient(grad_loss, scale, dvalues, ctx.dtype)), None


@suggests
def value_loss(
        values: Tensor,  # [B, T] or [N]
        returns: Tensor,  # [B, T] or [N]
        mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        *,
        old_values: Tensor | None = None,  # [B, T] or [N]
        clip: float | Tensor | None = None,  # []
        reduction: str = "token-mean",
        num_tokens: int | Tensor | None = None,  # []
        num_sequences: int | str | Tensor | None = None,  # [], or "all"
        norm_length: int | Tensor | None = None,  # []
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        ) -> ValueLoss:
    """The critic's loss over the value mask, and its metrics.

        l = 0.5 max((V - R)^2, (V_clip - R)^2), V_clip = V_old + clamp(V - V_old, -clip, clip)
        loss = Red(l)

    values, returns, old_values: [B, T], or packed [N] with `cu_seqlens` [B + 1] int32. mask: bool
    or whole numbers. clip: None is off, l = 0.5 (V - R)^2; old_values is then not read. It bounds
    the step of V in the units of the returns: 0.2 with returns of 10 stops the critic. Reductions
    and their denominators: as in `ppo_loss`.

    Differentiable in values only, once and backward. The gradient of the clipped branch, where it
    is the larger one and V is beyond the clip, is 0; where the branches meet it is V - R: judge
    gradients near an edge within a band. Under `torch.compile` a Python float is a constant:
    give a 0-d tensor.

    Raises ValueError / TypeError that name the argument. Source: PPO2 of OpenAI baselines.
    """
    check = Check("value_loss")
    mask = check.sequences("values", values, mask, cu_seqlens)
    check.tensor("returns", returns, check.tokens(cu_seqlens))
    check.tensor("old_values", old_values, check.tokens(cu_seqlens), optional=True)
    bound = check.scalar("clip", clip, low=0.0, high=inf, optional=True)
    if bound is not None and old_values is None:
        raise ValueError("value_loss: old_values is None, expected a tensor, because clip is given")
    over = check.reduction(reduction, num_tokens, num_sequences, norm_length, cu_seqlens)
    old_values = None if bound is None else detached(old_values)
    grad = wanted(values)
    call = ValueLossCall(values, detached(returns), mask, old_values, bound, over, cu_seqlens, grad)
    if grad:
        loss, metrics = recorded(_ValueLoss, values, call)
    else:
        loss, _, metrics, _ = _fwd(call)
    return ValueLoss(loss, ValueMetrics(*metrics.unbind()))
