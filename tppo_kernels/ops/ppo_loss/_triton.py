"""`ppo_loss` in Triton: forward and backward, a launch each.

Memory moved by forward: every column and the mask once, 33 B a token with all of them and both
gradients in fp32; logprobs, old and mask once more (from the cache) where a sequence's length or
mean ratio is asked for, and those and ref again for the gradient of a sequence ratio.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._kernels.launch import launching_on
from ..._kernels.losses import arrange, like_slopes, pair, policy_numbers, share_of, supports
from ..._kernels.triton_losses import (
    PROGRAMS,
    TILE,
    clamped_to,
    column,
    exp,
    exp_beyond_linear,
    is_last,
    kl,
    leave,
    number,
    parts_of,
    scale_of,
    scaled,
    shape_of,
    span,
    ticket,
    times,
    total,
    valid_tokens,
)
from ..._kernels.triton_policy import policy_loss
from . import reference
from .reference import METRICS, PolicyLossCall, PolicyLossGradient, columns_of

__all__ = ["bwd", "fwd", "supports"]

SUMS = 13  # loss, the metrics in their order, sequences with a valid token


@triton.jit
def _write(grads, place, valid, clamped, slope, by_logprob, c, numbers):
    """The derivatives of a block without the scale: through the ratio, and beside it."""
    dlogprobs_ptr, dentropy_ptr = grads
    sequence, off = place
    if dlogprobs_ptr is not None:
        both = c * (tl.where(clamped, 0.0, slope) + by_logprob)
        tl.store(dlogprobs_ptr + sequence[2] + off, tl.where(valid, both, 0.0),
                 mask=off < sequence[3])
    if dentropy_ptr is not None:
        tl.store(dentropy_ptr + sequence[2] + off, tl.where(valid, -numbers[4] * c, 0.0),
                 mask=off < sequence[3])


@triton.jit
def _finish(parts_ptr, loss_ptr, metrics_ptr, scale_ptr, count, length, lacking,
            COUNT_OF: tl.constexpr, PROGRAMS: tl.constexpr):
    """Loss, metrics and scale from the sums of all programs."""
    scale = scale_of(total(parts_ptr, 1, PROGRAMS), total(parts_ptr, 12, PROGRAMS), count, length,
                     COUNT_OF)
    loss = (scale.to(tl.float64) * total(parts_ptr, 0, PROGRAMS)).to(tl.float32)
    tl.store(loss_ptr, tl.where(lacking == 0.0, loss, float("nan")))
    tl.store(scale_ptr, scale)
    for k in tl.static_range(1, 11):
        tl.store(metrics_ptr + k - 1, total(parts_ptr, k, PROGRAMS).to(tl.float32))
    ratios = total(parts_ptr, 8, PROGRAMS)  # NaN where one of them is, which a maximum drops
    top = tl.max(parts_of(parts_ptr, 11, PROGRAMS), 0)
    tl.store(metrics_ptr + 10, tl.where(ratios == ratios, top, ratios).to(tl.float32))


@triton.jit
def _log_ratio(logprobs, old, place, valid, limit):
    """logprob, d, and where it was clamped."""  # [BLOCK]
    logprob = column(logprobs, place, valid, 1)
    raw = logprob - column(old, place, valid, 1)
    return logprob, clamped_to(raw, -limit, limit), tl.abs(raw) > limit


@triton.jit
def _sequence(logprobs, old, mask, sequence, limit, BLOCK: tl.constexpr):
    """The tokens of a sequence, at least 1, and the mean of their d."""
    tokens = tl.zeros([BLOCK], tl.int32)
    ds = tl.zeros([BLOCK], tl.float64)
    for start in range(0, sequence[3], BLOCK):
        place = (sequence, start + tl.arange(0, BLOCK))
        valid = valid_tokens(mask, place)
        _, d, _ = _log_ratio(logprobs, old, place, valid, limit)
        tokens += valid.to(tl.int32)
        ds += d.to(tl.float64)
    size = tl.maximum(tl.sum(tokens, 0), 1).to(tl.float32)
    return size, tl.div_rn(tl.sum(ds, 0).to(tl.float32), size)


@triton.jit
def _sequence_slopes(columns, mask, sequence, grads, slope, mean_d, c, numbers,
                     ADVANTAGE_STEP: tl.constexpr, WEIGHT_STEP: tl.constexpr,
                     OBJECTIVE: tl.constexpr, ESTIMATOR: tl.constexpr, CLAMPED: tl.constexpr,
                     WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the derivatives of a sequence whose tokens share the ratio and so its slope."""
    for start in range(0, sequence[3], BLOCK):
        place = (sequence, start + tl.arange(0, BLOCK))
        valid = valid_tokens(mask, place)
        logprob, _, clamped = _log_ratio(columns[0], columns[1], place, valid, numbers[3])
        if OBJECTIVE == "cispo" or WEIGHTED:  # the ratio is in what comes beside it
            _, _, by_logprob = _terms(columns, place, valid, mean_d, numbers, ADVANTAGE_STEP,
                                      WEIGHT_STEP, True, OBJECTIVE, ESTIMATOR, CLAMPED, WEIGHTED)
        else:
            kl_slope = tl.zeros([BLOCK], tl.float32)
            if columns[4][0] is not None:
                ref = column(columns[4], place, valid, 1)
                if CLAMPED:
                    _, kl_slope = kl(logprob, ref, numbers[6], ESTIMATOR)
                else:
                    _, kl_slope = kl(logprob, ref, None, ESTIMATOR)
            by_logprob = times(numbers[5], kl_slope)
        _write(grads, place, valid, clamped, slope, by_logprob, c, numbers)


@triton.jit
def _terms(columns, place, valid, mean_d, numbers, ADVANTAGE_STEP: tl.constexpr,
           WEIGHT_STEP: tl.constexpr, SEQUENCE: tl.constexpr, OBJECTIVE: tl.constexpr,
           ESTIMATOR: tl.constexpr, CLAMPED: tl.constexpr, WEIGHTED: tl.constexpr):
    """What each token adds to the sums, whether it was clamped in the fifth place, and the slopes
    of its loss without entropy: through the ratio, and beside it."""
    logprobs, old, advantages, entropies, refs, weights = columns
    entropy_coef, kl_coef = numbers[4], numbers[5]
    logprob, d, clamped = _log_ratio(logprobs, old, place, valid, numbers[3])
    advantage = column(advantages, place, valid, ADVANTAGE_STEP)
    weight = tl.full(d.shape, 1.0, tl.float32)
    if weights[0] is not None:
        weight = column(weights, place, valid, WEIGHT_STEP)
    e = exp(d)
    ratio = e
    if SEQUENCE:
        ratio = exp(mean_d) + tl.zeros(d.shape, tl.float32)
    ratio = tl.where(valid, ratio, 0.0)
    loss, slope, own, is_low, is_high, is_dual = policy_loss(ratio, logprob, advantage, weight,
                                                             numbers, OBJECTIVE)
    entropy = tl.zeros(d.shape, tl.float32)
    kl_value, kl_slope = entropy, entropy
    if entropies[0] is not None:
        entropy = column(entropies, place, valid, 1)
    if refs[0] is not None:
        ref = column(refs, place, valid, 1)
        if CLAMPED:
            kl_value, kl_slope = kl(logprob, ref, numbers[6], ESTIMATOR)
        else:
            kl_value, kl_slope = kl(logprob, ref, None, ESTIMATOR)
        if WEIGHTED:
            kl_value, kl_slope = ratio * kl_value, ratio * kl_slope
            slope += times(kl_coef, kl_value)  # d(r k)/dd = r k
    by_logprob = times(kl_coef, kl_slope)
    if OBJECTIVE == "cispo":
        by_logprob += own
    loss = loss + times(-entropy_coef, entropy) + times(kl_coef, kl_value)
    return ((tl.where(valid, loss, 0.0), valid, is_low & valid, is_high & valid, is_dual, clamped,
             -d, exp_beyond_linear(d, e), ratio, entropy, kl_value), slope, by_logprob)


@triton.jit
def _add(sums, terms, c):
    """The sums of a program with a block's terms; the loss by its sequence's share, in fp64."""
    loss, tokens, lows, highs, duals, clamped, k1, k3, ratios, entropies, kls, top = sums
    return (loss + terms[0].to(tl.float64) * c.to(tl.float64), tokens + terms[1].to(tl.int32),
            lows + terms[2].to(tl.int32), highs + terms[3].to(tl.int32),
            duals + terms[4].to(tl.int32), clamped + terms[5].to(tl.int32),
            k1 + terms[6].to(tl.float64), k3 + terms[7].to(tl.float64),
            ratios + terms[8].to(tl.float64), entropies + terms[9].to(tl.float64),
            kls + terms[10].to(tl.float64), tl.where(terms[8] > top, terms[8], top))


@triton.jit
def _numbers(low, high, dual, limit, entropy_coef, kl_coef, kl_clamp, tau_pos, tau_neg,
             OBJECTIVE: tl.constexpr, CLAMPED: tl.constexpr):
    """1 - clip_low, 1 + clip_high and the others, from (number, pointer) of each; the last three
    are None where the formula does not have them."""
    bound = tl.zeros([], tl.float32)
    pos, neg = bound, bound
    if CLAMPED:
        bound = number(kl_clamp)
    if OBJECTIVE == "sapo":
        pos, neg = number(tau_pos), number(tau_neg)
    return (1.0 - number(low), 1.0 + number(high), number(dual), number(limit),
            number(entropy_coef), number(kl_coef), bound, pos, neg)


@triton.jit(do_not_specialize=[
    "logprobs_stride", "old_stride", "advantages_stride", "entropy_stride", "ref_stride",
    "weights_stride", "mask_stride", "B", "T", "N"])
def _ppo_loss_fwd_kernel(
        logprobs_ptr, old_ptr, advantages_ptr, entropy_ptr, ref_ptr, weights_ptr, mask_ptr,
        logprobs_stride, old_stride, advantages_stride, entropy_stride, ref_stride, weights_stride,
        mask_stride, offsets_ptr, B, T, N, low, high, dual, limit, entropy_coef, kl_coef, count,
        length, low_ptr, high_ptr, dual_ptr, limit_ptr, entropy_coef_ptr, kl_coef_ptr, count_ptr,
        length_ptr, kl_clamp, tau_pos, tau_neg, kl_clamp_ptr, tau_pos_ptr, tau_neg_ptr,
        dlogprobs_ptr, dentropy_ptr, loss_ptr, metrics_ptr, scale_ptr, parts_ptr,
        ticket_ptr, ADVANTAGE_STEP: tl.constexpr, WEIGHT_STEP: tl.constexpr,
        SEQUENCE: tl.constexpr, BY_LENGTH: tl.constexpr, COUNT_OF: tl.constexpr,
        OBJECTIVE: tl.constexpr, ESTIMATOR: tl.constexpr, CLAMPED: tl.constexpr,
        WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """Loss, derivatives without the scale, metrics and scale of all sequences."""
    numbers = _numbers((low, low_ptr), (high, high_ptr), (dual, dual_ptr), (limit, limit_ptr),
                       (entropy_coef, entropy_coef_ptr), (kl_coef, kl_coef_ptr),
                       (kl_clamp, kl_clamp_ptr), (tau_pos, tau_pos_ptr), (tau_neg, tau_neg_ptr),
                       OBJECTIVE, CLAMPED)
    logprobs, old = (logprobs_ptr, logprobs_stride), (old_ptr, old_stride)
    refs, mask = (ref_ptr, ref_stride), (mask_ptr, mask_stride)
    columns = (logprobs, old, (advantages_ptr, advantages_stride), (entropy_ptr, entropy_stride),
               refs, (weights_ptr, weights_stride))
    grads = (dlogprobs_ptr, dentropy_ptr)
    zero, none = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    sums = (zero, none, none, none, none, none, zero, zero, zero, zero, zero,
            tl.zeros([BLOCK], tl.float32))
    live = tl.full([], 0, tl.int32)
    for b in range(tl.program_id(0).to(tl.int64), B, tl.num_programs(0)):
        begin, tokens = span(offsets_ptr, b, T, N)
        sequence = (offsets_ptr, b, begin, tokens)  # here: Triton 3.6 returns no pointer of None
        size, mean_d = tl.full([], 1.0, tl.float32), tl.full([], 0.0, tl.float32)
        if SEQUENCE or BY_LENGTH:
            size, mean_d = _sequence(logprobs, old, mask, sequence, numbers[3], BLOCK)
        c = tl.div_rn(1.0, size) if BY_LENGTH else tl.full([], 1.0, tl.float32)
        slopes, before = zero, sums[1]
        for start in range(0, sequence[3], BLOCK):
            place = (sequence, start + tl.arange(0, BLOCK))
            valid = valid_tokens(mask, place)
            terms, slope, by_logprob = _terms(columns, place, valid, mean_d, numbers,
                                              ADVANTAGE_STEP, WEIGHT_STEP, SEQUENCE, OBJECTIVE,
                                              ESTIMATOR, CLAMPED, WEIGHTED)
            sums = _add(sums, terms, c)
            slopes += slope.to(tl.float64)
            if not SEQUENCE:
                _write(grads, place, valid, terms[5], slope, by_logprob, c, numbers)
        live += (tl.max(sums[1] - before, 0) > 0).to(tl.int32)
        if SEQUENCE:
            slope = tl.div_rn(tl.sum(slopes, 0).to(tl.float32), size)
            _sequence_slopes(columns, mask, sequence, grads, slope, mean_d, c, numbers,
                             ADVANTAGE_STEP, WEIGHT_STEP, OBJECTIVE, ESTIMATOR, CLAMPED, WEIGHTED,
                             BLOCK)
    for k in tl.static_range(11):
        leave(parts_ptr, k, tl.sum(sums[k], 0), PROGRAMS)
    leave(parts_ptr, 11, tl.max(sums[11], 0), PROGRAMS)
    leave(parts_ptr, 12, live, PROGRAMS)
    if is_last(ticket_ptr):
        lacking = tl.full([], 0.0, tl.float32)  # what a coefficient asks for without its tensor
        if entropy_ptr is None:
            lacking += tl.abs(lacking + numbers[4])
        if ref_ptr is None:
            lacking += tl.abs(lacking + numbers[5])
        _finish(parts_ptr, loss_ptr, metrics_ptr, scale_ptr, (count, count_ptr),
                (length, length_ptr), lacking, COUNT_OF, PROGRAMS)


@triton.jit(do_not_specialize=["n", "n_entropy"])
def _ppo_loss_bwd_kernel(grad_ptr, scale_ptr, dlogprobs_ptr, logprobs_out_ptr, n, dentropy_ptr,
                         entropy_out_ptr, n_entropy, BLOCK: tl.constexpr):
    """grad * scale * derivative in the types of the results, 0 where a derivative is 0."""
    factor = tl.load(grad_ptr).to(tl.float32) * tl.load(scale_ptr)
    scaled(dlogprobs_ptr, logprobs_out_ptr, n, factor, BLOCK)
    scaled(dentropy_ptr, entropy_out_ptr, n_entropy, factor, BLOCK)


def fwd(call: PolicyLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dlogprobs, dentropy, metrics, scale), fp32; see `reference.fwd`."""
    terms, formula, logprobs = call.terms, call.terms.formula, call.logprobs
    if logprobs.numel() == 0:
        return reference.fwd(call)
    share, sequence = share_of(terms.over, logprobs), formula.ratio == "sequence"
    batch = arrange(columns_of(call), call.mask, terms.cu_seqlens, share.of_sequences or sequence)
    numbers, given = policy_numbers(formula), (formula.kl_clamp, formula.tau_pos, formula.tau_neg)
    # a kernel whose loss has no such number is compiled without it
    further = [(None, None) if x is None else y for x, y in zip(given, numbers[6:], strict=True)]
    numbers = [*numbers[:6], pair(share.denominator), pair(share.length)]
    shape = shape_of(batch)
    if sequence and (formula.objective == "cispo" or formula.kl_ratio_weighted):
        shape["maxnreg"] = 168  # all terms are computed twice: with 128 some would be spilled
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logprobs.device)
    loss, metrics, scale = empty(()), empty(METRICS), empty(())
    dlogprobs = empty(logprobs.shape if call.grad_logprobs else 0)
    dentropy = empty(logprobs.shape if call.grad_entropy else 0)
    with launching_on(logprobs):
        parts = torch.empty(SUMS, PROGRAMS, dtype=torch.float64, device=logprobs.device)
        _ppo_loss_fwd_kernel[(min(batch.batch, PROGRAMS),)](
            *batch.columns, batch.mask, *batch.strides, batch.mask_stride, batch.cu_seqlens,
            batch.batch, batch.tokens, batch.total, *(x for x, _ in numbers),
            *(p for _, p in numbers), *(x for x, _ in further), *(p for _, p in further),
            dlogprobs if call.grad_logprobs else None,
            dentropy if call.grad_entropy else None, loss, metrics, scale, parts, ticket(logprobs),
            ADVANTAGE_STEP=batch.steps[2], WEIGHT_STEP=batch.steps[5],
            SEQUENCE=sequence, BY_LENGTH=share.by_length, COUNT_OF=share.count_of,
            OBJECTIVE=formula.objective, ESTIMATOR=formula.kl_estimator,
            CLAMPED=formula.kl_clamp is not None, WEIGHTED=formula.kl_ratio_weighted,
            PROGRAMS=PROGRAMS, **shape)
    return loss, dlogprobs, dentropy, metrics, scale


def bwd(call: PolicyLossGradient) -> tuple[Tensor, Tensor]:
    """The gradients in the inputs' dtypes, both in one launch; see `reference.bwd`."""
    slopes, logprobs_grad = like_slopes(call.dlogprobs, call.logprobs_dtype)
    entropy_slopes, entropy_grad = like_slopes(call.dentropy, call.entropy_dtype)
    n, m = slopes.numel(), entropy_slopes.numel()
    if n or m:
        with launching_on(call.scale):
            _ppo_loss_bwd_kernel[(triton.cdiv(max(n, m), TILE),)](
                call.grad_loss, call.scale, slopes, logprobs_grad, n, entropy_slopes, entropy_grad,
                m, BLOCK=TILE, num_warps=4)
    return logprobs_grad, entropy_grad
