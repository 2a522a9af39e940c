"""The clipped policy loss straight from hidden states: its gradients are computed in forward."""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._core.check import FP32_MAX, LABELS, Check, offsets
from ..._core.derivatives import refuse_forward_mode
from ..._core.eager import surely
from ..._core.keywords import suggests
from ..._core.op import _LIB, Op
from ..._kernels.values import values_between
from ..._math.chunks import shard_of
from ..._math.rows import slot_count
from ..._math.sequence import KL_ESTIMATORS, compute_dtype
from ..linear_logprobs import (
    ARGUMENTS,
    budget_of,
    check_choice_of_rows,
    check_head,
    check_rows,
    check_scalars,
    check_scaling,
    kept_nbytes,
    savable,
)
from ..ppo_loss import PolicyMetrics
from . import reference

_op = Op("linear_ppo_loss", cpu=("cpp", "reference"), cuda=("triton", "reference"))


class LinearPolicyLoss(NamedTuple):
    """The results of `linear_ppo_loss`, fp32 (fp64 where an input is fp64)."""

    loss: Tensor  # []
    metrics: PolicyMetrics  # detached
    logprobs: Tensor  # [B, T] or [N], detached
    entropy: Tensor  # [B, T] or [N], detached


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 17, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(40, 8, generator=g, dtype=torch.float64)
    targets = torch.randint(40, (3, 17), generator=g)
    old = -3.0 - torch.rand(3, 17, generator=g, dtype=torch.float64)
    advantages = torch.randn(3, 17, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 17, generator=g) < 0.7
    return (hidden, weight, targets, old, advantages, mask), {
        "clip_low": 0.9, "clip_high": 9.0, "entropy_coef": 0.1, "ref_logprobs": old + 0.3,
        "kl_coef": 0.2}


def _check_values(hidden, weight, targets, mask, bias, rows, temperature, softcap, logit_scale,
                  valid_vocab, capacity, budget, group, old_logprobs, advantages, ref_logprobs,
                  weights, clip_low, clip_high, dual_clip, max_log_ratio, entropy_coef, kl_coef,
                  num_tokens, num_sequences, norm_length, cu_seqlens, *_) -> None:
    op = "linear_ppo_loss"
    columns = shard_of(weight.shape[0], valid_vocab, group).total
    check_rows(op, targets, mask, rows, columns)
    check_scaling(op, mask, rows, temperature, softcap, logit_scale)
    offsets(op, cu_seqlens, targets.shape[0])
    values_between(op, "clip_low", clip_low, 0.0, inf)
    values_between(op, "clip_high", clip_high, 0.0, inf)
    values_between(op, "dual_clip", dual_clip, 1.0, inf, open_low=True)
    values_between(op, "max_log_ratio", max_log_ratio, 0.0, inf, open_low=True)
    values_between(op, "entropy_coef", entropy_coef, -FP32_MAX, FP32_MAX)
    values_between(op, "kl_coef", kl_coef, -FP32_MAX, FP32_MAX)
    if ref_logprobs is None:
        _require_reference(kl_coef)


def _require_reference(kl_coef: Any) -> None:
    if kl_coef != 0:
        raise ValueError("linear_ppo_loss: ref_logprobs is None, expected a tensor, because "
                         f"kl_coef is {float(kl_coef):g}")


def _fake(hidden, weight, targets, mask, bias, rows, *rest):
    capacity, given = rest[4], (hidden, weight, bias)
    dtype = compute_dtype(*given)
    terms_dtype = compute_dtype(*given, *rest[7:11])
    m = slot_count(targets.numel(), rows, capacity)
    empty = hidden.new_empty
    shapes = ((m, hidden.shape[-1]), weight.shape, weight.shape[:1])
    grads = (empty(shape if wanted else 0, dtype=dtype)
             for shape, wanted in zip(shapes, rest[-3:], strict=True))
    return (empty((), dtype=terms_dtype), empty(reference.METRICS, dtype=terms_dtype),
            empty(targets.shape, dtype=dtype), empty(targets.shape, dtype=dtype), *grads)


def _fake_bwd(grad_loss, dhidden, dweight, dbias, targets, *rest):
    shape = (*targets.shape, dhidden.shape[1]) if dhidden.dim() == 2 else dhidden.shape
    return tuple(x.new_empty(size, dtype=dtype) for x, size, dtype in zip(
        (dhidden, dweight, dbias), (shape, dweight.shape, dbias.shape), rest[-3:], strict=True))


_fwd = _op.define(
    f"linear_ppo_loss_fwd({ARGUMENTS}, Tensor old_logprobs, Tensor advantages,"
    " Tensor? ref_logprobs, Tensor? weights, Tensor clip_low, Tensor clip_high,"
    " Tensor? dual_clip, Tensor max_log_ratio, Tensor entropy_coef, Tensor kl_coef,"
    " Tensor? num_tokens, Tensor? num_sequences, Tensor? norm_length, Tensor? cu_seqlens,"
    " str ratio, str kl_estimator, str reduction, bool entropy_grad, bool grad_hidden,"
    " bool grad_weight, bool grad_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.fwd, _fake, _check_values, registers_autograd=True)
_bwd = _op.define(
    "linear_ppo_loss_bwd(Tensor grad_loss, Tensor dhidden, Tensor dweight, Tensor dbias,"
    " Tensor targets, Tensor? mask, Tensor? rows, SymInt? capacity, ScalarType hidden_dtype,"
    " ScalarType weight_dtype, ScalarType bias_dtype) -> (Tensor, Tensor, Tensor)",
    reference.bwd, _fake_bwd, registers_autograd=True)
_ARGUMENTS = 34  # of the raw op


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    hidden, weight, _, _, bias = inputs[:5]
    ctx.capacity = inputs[10]
    ctx.dtypes = [x.dtype for x in (hidden, weight, weight if bias is None else bias)]
    ctx.save_for_backward(*output[4:], *(savable(inputs[i]) for i in (2, 3, 5)))


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return (None,) * _ARGUMENTS
    grads = _bwd(grad_loss, *ctx.saved_tensors, ctx.capacity, *ctx.dtypes)
    hidden, weight, bias = (g if ctx.needs_input_grad[i] else None
                            for g, i in zip(grads, (0, 1, 4), strict=True))
    return (hidden, weight, None, None, bias, *(None,) * (_ARGUMENTS - 5))


torch.library.register_autograd("tppo_kernels::linear_ppo_loss_fwd", _backward,
                                setup_context=_setup_context, lib=_LIB)


@suggests
def linear_ppo_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor,
                    advantages: Tensor, mask: Tensor | None = None, *,
                    clip_low: float | Tensor = 0.2, clip_high: float | Tensor = 0.2,
                    dual_clip: float | Tensor | None = None, ratio: str = "token",
                    entropy_coef: float | Tensor = 0.0, ref_logprobs: Tensor | None = None,
                    kl_coef: float | Tensor = 0.0, kl_estimator: str = "k2",
                    weights: Tensor | None = None, reduction: str = "token-mean",
                    num_tokens: int | Tensor | None = None,
                    num_sequences: int | Tensor | None = None,
                    norm_length: int | Tensor | None = None,
                    max_log_ratio: float | Tensor = 20.0, cu_seqlens: Tensor | None = None,
                    bias: Tensor | None = None, temperature: float | Tensor = 1.0,
                    softcap: float | Tensor | None = None, logit_scale: float | Tensor = 1.0,
                    valid_vocab: int | None = None, memory: str | int = "auto",
                    entropy_grad: bool = True, rows: Tensor | None = None,
                    capacity: int | None = None, group: Any = None) -> LinearPolicyLoss:
    """`ppo_loss` of `linear_logprobs`, with no logits, log-prob gradients or backward products.

        logprob, entropy = linear_logprobs(hidden, weight, targets, mask, ...)
        loss, metrics    = ppo_loss(logprob, old_logprobs, advantages, mask, entropy=entropy, ...)

    hidden: [B, T, D], or packed [N, D] with `cu_seqlens`; weight: [V, D], bias: [V]; the tokens'
    arguments [B, T] or [N]; advantages and weights also [B] or [B, 1]. Keywords as in the
    two operators.

    Differentiable in hidden, weight and bias, once: their gradients are computed in forward, chunk
    by chunk (6NVD; without gradients for weight and bias 4NVD), and backward multiplies them by
    the incoming gradient on the device, then rounds them to the dtypes of the inputs: they wait in
    fp32. No logits or exponentials are kept; `memory` bounds the chunk, by "auto" to 1 GiB on a CPU
    and to a sixteenth of a GPU's memory, 1 to 8 GiB: larger chunks take less time.
    `ratio="sequence"` needs all tokens of a sequence before the first gradient, so exponentials
    of all rows inside forward: `memory` "store", "auto", or a number of bytes that holds them.
    `entropy_grad=False` takes the entropy as a constant. `mask` is the train mask. With
    `capacity`, one valid row too many makes the loss and its gradients NaN.

    For micro-batches give `num_tokens`, `num_sequences` of the whole batch. Under `torch.compile` a
    Python float is a constant; give 0-d tensors for scalars that change.
    Raises ValueError / TypeError that name the argument.
    """
    check = Check("linear_ppo_loss")
    mask = check.sequences("hidden", hidden, mask, cu_seqlens, trailing="D")
    tokens = check.tokens(cu_seqlens)
    check.tensor("targets", targets, tokens, LABELS)
    check.tensor("old_logprobs", old_logprobs, tokens)
    advantages = check.spread("advantages", advantages, cu_seqlens)
    check.tensor("ref_logprobs", ref_logprobs, tokens, optional=True)
    weights = check.spread("weights", weights, cu_seqlens, optional=True)
    valid_vocab, name = check_head(check, weight, bias, valid_vocab, group)
    scaling = check_scalars(check, tokens, temperature, softcap, logit_scale)
    check.choice("ratio", ratio, ("token", "sequence"))
    check.choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check.choice("entropy_grad", entropy_grad, (True, False))
    scalars = (
        check.scalar("clip_low", clip_low, low=0.0, high=inf),
        check.scalar("clip_high", clip_high, low=0.0, high=inf),
        check.scalar("dual_clip", dual_clip, above=1.0, high=inf, optional=True),
        check.scalar("max_log_ratio", max_log_ratio, above=0.0, high=inf),
        check.scalar("entropy_coef", entropy_coef), check.scalar("kl_coef", kl_coef),
        *check.reduction(reduction, num_tokens, num_sequences, norm_length, cu_seqlens)[:3])
    if ref_logprobs is None and not isinstance(kl_coef, Tensor):
        _require_reference(kl_coef)
    refuse_forward_mode("linear_ppo_loss", hidden, weight, bias)
    rows, capacity = check_choice_of_rows(check, hidden, mask, rows, capacity)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad
              for x in (hidden, weight, bias)]
    budget = budget_of(check, memory, hidden.device)
    if ratio == "sequence" and any(wanted):
        budget = _sequence_budget(memory, budget, kept_nbytes(
            hidden, weight, bias, scaling.softcap, slot_count(targets.numel(), rows, capacity),
            valid_vocab))
    loss, metrics, logprobs, entropy, *_ = _fwd(
        hidden, weight, targets, mask, bias, rows, *scaling, valid_vocab, capacity, budget, name,
        *(x if x is None else x.detach() for x in (old_logprobs, advantages, ref_logprobs,
                                                   weights)),
        *scalars, cu_seqlens, ratio, kl_estimator, reduction, entropy_grad, *wanted)
    return LinearPolicyLoss(loss, PolicyMetrics(*metrics.unbind()), logprobs, entropy)


def _sequence_budget(memory: str | int, budget: int, nbytes: int) -> int:
    """What the exponentials that a sequence ratio keeps leave to the chunk."""
    if memory == "recompute":
        raise ValueError("linear_ppo_loss: memory is 'recompute', expected 'store' or 'auto', "
                         "because ratio is 'sequence'")
    if isinstance(memory, str):
        return budget
    if surely(nbytes > budget):
        raise ValueError(f"linear_ppo_loss: memory is {memory}, expected at least {nbytes} bytes "
                         "or 'store', because ratio is 'sequence'")
    return budget - nbytes
