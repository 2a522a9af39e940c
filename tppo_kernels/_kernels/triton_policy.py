"""The per-token formula of `ppo_loss` in Triton; in plain torch it stands in its reference."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_losses import clamped_to, exp, times


@triton.jit
def _clip(ratio, advantage, weight, low, high, dual):
    """w l, w dl/dd, and where it was clipped low, high and by the dual clip (inf: none)."""
    free = -advantage * ratio
    held = -advantage * clamped_to(ratio, low, high)
    clipped = held > free
    loss = tl.where(clipped, held, free)
    ceiling = -dual * advantage
    is_dual = (advantage < 0.0) & (loss > ceiling)
    slope = tl.where(clipped | is_dual, 0.0, free)
    return (times(weight, tl.where(is_dual, ceiling, loss)), times(weight, slope),
            clipped & (ratio < low), clipped & (ratio > high), is_dual)


@triton.jit
def _cispo(ratio, logprob, advantage, weight, low, high):
    """w l, w dl/dlogprob, and where clip(r), a constant of the differentiation, is not r."""
    slope = -advantage * clamped_to(ratio, low, high)
    return times(weight, slope * logprob), times(weight, slope), ratio < low, ratio > high


@triton.jit
def _sapo(ratio, advantage, weight, low, high, tau_pos, tau_neg):
    """w l, w dl/dd, and where "clip" would have clipped; sigmoid(x) by e^-|x|, which is <= 1."""
    tau = tl.where(advantage > 0.0, tau_pos, tau_neg)
    x = tau * (ratio - 1.0)
    size = tl.abs(x)
    e = tl.where(size > 87.0, 0.0, exp(-size))
    of_size = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + e)
    of_minus = e * of_size
    gate = tl.div_rn(tl.full(x.shape, 4.0, tl.float32), tau) * tl.where(x < 0.0, of_minus, of_size)
    slope = -advantage * 4.0 * times(of_size * of_minus, ratio)  # flat: 0 * inf is 0
    return (times(weight, -advantage * gate), times(weight, slope),
            (advantage < 0.0) & (ratio < low), (advantage > 0.0) & (ratio > high))


@triton.jit
def policy_loss(ratio, logprob, advantage, weight, numbers, OBJECTIVE: tl.constexpr):
    """w l, w dl/dd, w dl/dlogprob beside it, and where it counts as clipped low, high and dual."""
    low, high = numbers[0], numbers[1]
    none = tl.zeros(ratio.shape, tl.float32)
    if OBJECTIVE == "clip":
        loss, slope, is_low, is_high, is_dual = _clip(ratio, advantage, weight, low, high,
                                                      numbers[2])
        return loss, slope, none, is_low, is_high, is_dual
    elif OBJECTIVE == "cispo":
        loss, slope, is_low, is_high = _cispo(ratio, logprob, advantage, weight, low, high)
        return loss, none, slope, is_low, is_high, none != 0.0
    else:
        loss, slope, is_low, is_high = _sapo(ratio, advantage, weight, low, high, numbers[7],
                                             numbers[8])
        return loss, slope, none, is_low, is_high, none != 0.0
