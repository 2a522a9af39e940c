"""The specification of `linear_ppo_loss`: `ppo_loss` of `linear_logprobs`, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.linear import LinearInputs
from ..linear_logprobs import reference as linear
from ..linear_logprobs.reference import LinearLogprobsCall, Rows
from ..ppo_loss import reference as policy
from ..ppo_loss.reference import PolicyLossCall, PolicyTerms


class LinearPolicyLossCall(NamedTuple):
    """The arguments of the raw forward op."""

    inputs: LinearInputs
    terms: PolicyTerms
    entropy_grad: bool  # whether the entropy is differentiated
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool


class LinearPolicyLossGradient(NamedTuple):
    """The arguments of the raw backward op; what forward computed waits in fp32 (fp64)."""

    grad_loss: Tensor  # []
    dhidden: Tensor  # [M, D], or [0]
    dweight: Tensor  # [V, D], or [0]
    dbias: Tensor  # [V], or [0]
    targets: Tensor  # [...]
    mask: Tensor | None  # [...] bool
    rows: Tensor | None  # [M]
    capacity: int | None
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    bias_dtype: torch.dtype


def fwd(call: LinearPolicyLossCall) -> tuple[Tensor, ...]:
    """(loss [], metrics [11], logprobs, entropy, dhidden [M, D], dweight [V, D], dbias [V]).

    The gradients are in the dtype of the computation; one that is not wanted is empty. See
    `tppo_kernels.linear_ppo_loss`.
    """
    inputs, wanted = call.inputs, (call.grad_hidden, call.grad_weight, call.grad_bias)
    logprobs, entropy, _, _ = linear.fwd(LinearLogprobsCall(inputs, "none"))
    loss, dlogprobs, dentropy, metrics, _ = policy.fwd(PolicyLossCall(
        logprobs, entropy, inputs.mask, call.terms, True, call.entropy_grad))
    grads = [logprobs.new_empty(0) for _ in wanted]
    if any(wanted):
        slopes = (dlogprobs.to(logprobs.dtype),
                  dentropy.to(logprobs.dtype) if call.entropy_grad else None)
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            dhidden, *of_head = linear.gradients(inputs, *slopes)
        every = (linear.rows_of(inputs).take(dhidden), *of_head)
        grads = [every[i] if want else grads[i] for i, want in enumerate(wanted)]
    return loss, metrics, logprobs, entropy, *grads


def bwd(call: LinearPolicyLossGradient) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden [..., D], weight and bias: those of forward times grad_loss."""
    hidden, weight, bias = (
        (x * call.grad_loss).to(dtype)
        for x, dtype in zip(call[1:4], call[-3:], strict=True))
    if hidden.dim() == 2:
        rows = Rows(call.targets.numel(), call.mask, call.rows, call.capacity, hidden.device)
        hidden = rows.put(hidden).reshape(*call.targets.shape, hidden.shape[1])
    return hidden, weight, bias
