"""The clipped policy loss straight from hidden states: its gradients are computed in forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._core.check import LABELS, Check
from ..._core.derivatives import refuse_forward_mode, savable
from ..._core.eager import surely
from ..._core.keywords import suggests
from ..._core.op import _LIB, Op
from ..._core.record import build
from ..._math.linear import LinearInputs, slot_count
from ..._math.sequence import compute_dtype
from ..linear_logprobs import (
    LEARNERS,
    budget_of,
    by_input,
    check_choice_of_rows,
    check_head,
    kept_nbytes,
)
from ..linear_logprobs import check_values as check_inputs
from ..ppo_loss import PolicyMetrics, check_terms
from ..ppo_loss import check_values as check_terms_values
from ..ppo_loss.reference import METRICS
from ..token_logprobs import check_scaling
from . import reference
from .reference import LinearPolicyLossCall, LinearPolicyLossGradient

_op = Op("linear_ppo_loss", cpu=("cpp", "chunked", "reference"),
         cuda=("triton", "chunked", "reference"), other=("chunked", "reference"))


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


def _check_values(call: LinearPolicyLossCall) -> None:
    check_inputs("linear_ppo_loss", call.inputs)
    check_terms_values("linear_ppo_loss", call.terms)


def _fake(call: LinearPolicyLossCall) -> tuple[Tensor, ...]:
    inputs, hidden, weight = call.inputs, call.inputs.hidden, call.inputs.weight
    dtype = compute_dtype(hidden, weight, inputs.bias)
    terms_dtype = compute_dtype(hidden, weight, inputs.bias, *call.terms[:4])
    slots = slot_count(inputs.targets.numel(), inputs.rows, inputs.capacity)
    shapes = ((slots, hidden.shape[-1]), weight.shape, weight.shape[:1])
    wanted = (call.grad_hidden, call.grad_weight, call.grad_bias)
    grads = (hidden.new_empty(shape if want else 0, dtype=dtype)
             for shape, want in zip(shapes, wanted, strict=True))
    logprobs, entropy = (hidden.new_empty(inputs.targets.shape, dtype=dtype) for _ in range(2))
    return (hidden.new_empty((), dtype=terms_dtype), hidden.new_empty(METRICS, dtype=terms_dtype),
            logprobs, entropy, *grads)


def _fake_bwd(call: LinearPolicyLossGradient) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = call.dhidden, call.dweight, call.dbias
    shape = (*call.targets.shape, dhidden.shape[1]) if dhidden.dim() == 2 else dhidden.shape
    return (dhidden.new_empty(shape, dtype=call.hidden_dtype),
            dweight.new_empty(dweight.shape, dtype=call.weight_dtype),
            dbias.new_empty(dbias.shape, dtype=call.bias_dtype))


_fwd = _op.define(
    "linear_ppo_loss_fwd -> (Tensor loss, Tensor metrics, Tensor logprobs, Tensor entropy, "
    "Tensor dhidden, Tensor dweight, Tensor dbias)",
    reference.fwd, _fake, _check_values, record=LinearPolicyLossCall, registers_autograd=True)
_bwd = _op.define("linear_ppo_loss_bwd -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
                  reference.bwd, _fake_bwd, record=LinearPolicyLossGradient,
                  registers_autograd=True)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    given = build(LinearPolicyLossCall, inputs).inputs
    bias = given.weight if given.bias is None else given.bias
    ctx.capacity = given.capacity
    ctx.dtypes = [x.dtype for x in (given.hidden, given.weight, bias)]
    ctx.save_for_backward(*output[4:], *map(savable, (given.targets, given.mask, given.rows)))


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    arguments = (grad_loss, *ctx.saved_tensors, ctx.capacity, *ctx.dtypes)
    return by_input(ctx, _bwd(LinearPolicyLossGradient._make(arguments)))


# Not an `autograd.Function`: see `linear_logprobs`.
torch.library.register_autograd("tppo_kernels::linear_ppo_loss_fwd", _backward,
                                setup_context=_setup_context, lib=_LIB)


@suggests
def linear_ppo_loss(
        hidden: Tensor,  # [B, T, D] or [N, D]
        weight: Tensor,  # [V, D], or [V / W, D] of a group
        targets: Tensor,  # [B, T] or [N] int64 or int32
        old_logprobs: Tensor,  # [B, T] or [N]
        advantages: Tensor,  # [B, T] or [N], [B] or [B, 1]
        mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        *,
        clip_low: float | Tensor = 0.2,  # []
        clip_high: float | Tensor = 0.2,  # []
        dual_clip: float | Tensor | None = None,  # []
        ratio: str = "token",  # "token", "sequence"
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
        bias: Tensor | None = None,  # [V]
        temperature: float | Tensor = 1.0,  # [], [B, T] or [N]
        softcap: float | Tensor | None = None,  # []
        logit_scale: float | Tensor = 1.0,  # []
        valid_vocab: int | None = None,
        memory: str | int = "auto",  # "auto", "store", "recompute", or bytes
        entropy_grad: bool = True,
        rows: Tensor | None = None,  # [M] int64
        capacity: int | None = None,
        group: Any = None,  # a torch.distributed.ProcessGroup
) -> LinearPolicyLoss:
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
    valid_vocab, name = check_head(check, weight, bias, valid_vocab, group)
    scaling = check_scaling(check, tokens, temperature, softcap, logit_scale, LEARNERS)
    check.choice("entropy_grad", entropy_grad, (True, False))
    terms = check_terms(
        check, (old_logprobs, advantages, ref_logprobs, weights),
        (clip_low, clip_high, dual_clip, max_log_ratio, entropy_coef, kl_coef, kl_clamp, tau_pos,
         tau_neg, ratio, kl_estimator, kl_ratio_weighted, objective),
        (num_tokens, num_sequences, norm_length, reduction), cu_seqlens)
    refuse_forward_mode("linear_ppo_loss", hidden, weight, bias)
    rows, capacity = check_choice_of_rows(check, hidden, mask, rows, capacity)
    wanted = [_trains(x) for x in (hidden, weight, bias)]
    inputs = LinearInputs(hidden, weight, targets, mask, bias, rows, scaling, valid_vocab, capacity,
                          budget_of(check, memory, hidden.device), name)
    if ratio == "sequence" and any(wanted):
        inputs = _keeping_exponentials(inputs, memory)
    results = _fwd(LinearPolicyLossCall(inputs, terms, entropy_grad, *wanted))
    return LinearPolicyLoss(results[0], PolicyMetrics(*results[1].unbind()), *results[2:4])


def _trains(x: Tensor | None) -> bool:
    return torch.is_grad_enabled() and x is not None and x.requires_grad


def _keeping_exponentials(inputs: LinearInputs, memory: str | int) -> LinearInputs:
    """With the budget that the exponentials, which a sequence ratio keeps, leave to the chunk."""
    budget, nbytes = inputs.budget, kept_nbytes(inputs)
    if memory == "recompute":
        raise ValueError("linear_ppo_loss: memory is 'recompute', expected 'store' or 'auto', "
                         "because ratio is 'sequence'")
    if isinstance(memory, str):
        return inputs
    if surely(nbytes > budget):
        raise ValueError(f"linear_ppo_loss: memory is {memory}, expected at least {nbytes} bytes "
                         "or 'store', because ratio is 'sequence'")
    return inputs._replace(budget=budget - nbytes)
