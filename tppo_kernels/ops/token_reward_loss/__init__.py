"""The loss of the token-level reward model: words and whole answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core.check import FLOATS, FP32_MAX, LABELS, Check, describe, offsets
from ..._core.derivatives import first_only, wanted
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.metrics import floats
from ..._core.op import Op
from ..._core.record import build, flat
from ..._kernels.values import values_between
from ..._math.sequence import compute_dtype, has_valid_token, on, valid_mask
from . import reference
from .reference import TokenRewardLossCall, TokenRewardLossGradient

_op = Op("token_reward_loss")


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 17, 3, generator=g, dtype=torch.float64)
    labels = torch.randint(3, (3, 17), generator=g)
    sentences = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    return (logits, labels, torch.rand(3, 17, generator=g) < 0.7, sentences), {
        "class_weights": (0.5, 1.0, 2.0), "balance": 1.0, "seed": 3}


class TokenRewardMetrics(NamedTuple):
    """Detached device tensors over the valid tokens; `judged` tokens are labelled 1 or 2."""

    tokens: Tensor  # [], valid tokens
    kept: Tensor  # [], of them, those in the zone of the local loss
    class_count: Tensor  # [3], valid tokens of each label
    class_correct: Tensor  # [3], of them, those whose most probable class is the label
    class_accuracy: Tensor  # [3], their quotient, 0 where the label is missing
    sequences: Tensor  # [], sequences with a judged token
    expected_reward: Tensor  # [], mean of sum_c c P(c) over judged tokens
    argmax_reward: Tensor  # [], mean of argmax_c P(c) over judged tokens
    argmax_global_loss: Tensor  # [], the global loss as the paper has it, with argmax_c P(c)

    def means(self) -> dict[str, float]:
        """What a logger takes: the fields by name, as floats, those of the classes with _0, _1, _2
        behind it. Reads the device once: call it when logging, outside `torch.compile`."""
        named = {}
        for name, value in self._asdict().items():
            parts = {name: value} if not value.dim() else {
                f"{name}_{c}": x for c, x in enumerate(value.unbind())}
            named.update(parts)
        return floats(named)


class TokenRewardLoss(NamedTuple):
    """The result of `token_reward_loss`; the three losses are differentiable in the logits."""

    loss: Tensor  # []
    local_loss: Tensor  # []
    global_loss: Tensor  # []
    metrics: TokenRewardMetrics


def _check_values(call: TokenRewardLossCall) -> None:
    op = "token_reward_loss"
    _, labels, mask, sentence_labels, class_weights, balance, _, cu_seqlens, *_ = call
    offsets(op, cu_seqlens, labels.shape[0])
    values_between(op, "labels", labels, 0, 2, mask)

    def read() -> Tensor:
        judged = valid_mask(labels, mask) & ((labels == 1) | (labels == 2))
        return has_valid_token(labels, judged, cu_seqlens)

    values_between(op, "sentence_labels", sentence_labels, -FP32_MAX, FP32_MAX, read)
    for index, weight in enumerate(class_weights):
        values_between(op, f"class_weights[{index}]", weight, 0, FP32_MAX)
    values_between(op, "balance", balance, 0, inf, open_low=True)


def _fake_fwd(call: TokenRewardLossCall) -> tuple[Tensor, ...]:
    def new(shape: Sequence[int]) -> Tensor:
        return call.logits.new_empty(shape, dtype=compute_dtype(call.logits))

    slope = call.logits.shape if call.grad_logits else (0,)
    return new(()), new(()), new((12,)), new(slope), new(slope)


_fwd = _op.define("token_reward_loss_fwd -> (Tensor local_loss, Tensor global_loss, "
                  "Tensor metrics, Tensor dlocal, Tensor dglobal)", reference.fwd, _fake_fwd,
                  _check_values, record=TokenRewardLossCall)
_bwd = _op.define("token_reward_loss_bwd -> (Tensor dlogits)", reference.bwd,
                  lambda call: torch.empty_like(call.dlocal), record=TokenRewardLossGradient)


class _TokenRewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = build(TokenRewardLossCall, args)
        local, total, metrics, dlocal, dglobal = _fwd(call)
        ctx.save_for_backward(call.logits, dlocal, dglobal)
        ctx.dtype = call.logits.dtype
        ctx.mark_non_differentiable(metrics)
        return local, total, metrics

    @staticmethod
    @first_only(1)
    def backward(ctx: Any, grad_local: Tensor, grad_global: Tensor, _: Any
                 ) -> tuple[Tensor | None, ...]:
        _, dlocal, dglobal = ctx.saved_tensors
        grad = _bwd(TokenRewardLossGradient(grad_local, grad_global, dlocal, dglobal))
        return grad.to(ctx.dtype), *(None,) * (len(ctx.needs_input_grad) - 1)


@suggests
def token_reward_loss(
        logits: Tensor,  # [B, T, 3] or [N, 3]
        labels: Tensor,  # [B, T] or [N]
        mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        sentence_labels: Tensor | None = None,  # [B]
        *,
        local_weight: float | Tensor = 0.4,  # []
        global_weight: float | Tensor = 0.6,  # []
        class_weights: Sequence[float] | Tensor | None = None,  # [3]
        balance: float | Tensor | None = 3.0,  # []
        seed: int | Tensor | None = None,  # []
        local_reduction: str = "token",
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        ) -> TokenRewardLoss:
    """Cross-entropy of the token classes and squared error of each answer's mean reward.

        loss   = local_weight local + global_weight global
        local  = 1/n sum over t in the zone of -w[label_t] log P(label_t)
        global = mean over sequences b of (mean_t R_t - sentence_label_b)^2,  R_t = sum_c c P_t(c)

    The zone is the mask and the balance draw: of the classes 1 and 2 the one with more valid
    tokens in the batch keeps each of them with probability min(1, balance n_min / n_max), class 0
    stays whole; `balance=None`, or a class without a token, switches the draw off. n counts the
    zone's tokens, also under `class_weights` w (torch divides by the sum of the weights); with
    `local_reduction="sequence"`, the sequences with a valid token (the paper's 1/n sum: about the
    answer's length times larger). The global mean over t runs over all valid tokens labelled 1 or
    2, whatever was drawn; a sequence without one is left out, and its label is never read.

    logits: [B, T, 3], or packed [N, 3] with `cu_seqlens` [B + 1] int32. labels: int64 or int32,
    0..2 where valid. sentence_labels: [B], floating or whole numbers on the scale of R, or None:
    global is 0. class_weights: 3 numbers >= 0 or [3]; None: 1. seed: an int64 or a 0-d tensor of
    whole numbers, required with a draw; give each step (and rank) another. The draw depends on it
    and on a token's index among the valid tokens of the batch: not on padding, nor on torch's
    global generator. Gradients reach logits, from any of the three losses.

    Under `torch.compile` a Python float is a constant; give 0-d tensors for scalars that change.
    On a GPU a label outside 0..2 makes the local loss NaN; with TPPO_CHECK=1 it raises, as on CPU.

    Raises ValueError / TypeError that name the argument. Source: token-level PPO (Ouyang et al.,
    EMNLP 2025), L_local and L_global. There R is the argmax, which has no gradient: its figure is
    `metrics.argmax_global_loss`.
    """
    check = Check("token_reward_loss")
    mask = check.sequences("logits", logits, mask, cu_seqlens, trailing="3")
    check.tensor("labels", labels, check.tokens(cu_seqlens), LABELS)
    check.tensor("sentence_labels", sentence_labels, "B", FLOATS + LABELS, optional=True)
    local_part = check.scalar("local_weight", local_weight, low=0.0)
    global_part = check.scalar("global_weight", global_weight, low=0.0)
    weights = check.scalars("class_weights", (1.0, 1.0, 1.0) if class_weights is None
                            else class_weights, 3, low=0.0)
    check.choice("local_reduction", local_reduction, ("token", "sequence"))
    keep = check.scalar("balance", balance, above=0.0, high=inf, optional=True)
    draw = _seed(check, seed, keep)
    grad = wanted(logits)
    call = TokenRewardLossCall(logits, labels, mask, sentence_labels, weights, keep, draw,
                               cu_seqlens, local_reduction, grad)
    if grad:
        local, total, metrics = recorded(_TokenRewardLoss, *flat(call))
    else:
        local, total, metrics, _, _ = _fwd(call)
    loss = on(local_part, local) * local + on(global_part, total) * total
    return TokenRewardLoss(loss, local, total, _metrics(metrics))


def _seed(check: Check, seed: Any, balance: Tensor | None) -> Tensor | None:
    """The seed as a 0-d int64 tensor; None without a draw."""
    if isinstance(seed, Tensor):
        if seed.dim() or seed.dtype not in LABELS:
            raise ValueError(f"{check.op}: seed is {describe(seed)}, expected a whole number or a "
                             "0-d tensor of int64 or int32")
        return None if balance is None else seed.long()
    if seed is not None:
        seed = check.number("seed", seed, low=-2**63, high=2**63 - 1, kind=int)
    elif balance is not None:
        raise ValueError(f"{check.op}: seed is None, expected a whole number, because balance is "
                         "on (balance=None switches the random draw off)")
    return None if balance is None else torch.tensor(seed, dtype=torch.int64, device="cpu")


def _metrics(x: Tensor) -> TokenRewardMetrics:
    """The metrics of the raw op by name."""
    count, correct = x[2:5], x[5:8]
    return TokenRewardMetrics(x[0], x[1], count, correct, correct / count.clamp(min=1), x[8], x[9],
                              x[10], x[11])
