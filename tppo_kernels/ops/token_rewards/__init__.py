"""Token rewards from a reward model's classes, with the length penalty of token-level PPO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.check import FP32_MAX, LABELS, Check, offsets
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.sequence import compute_dtype, has_valid_token
from . import reference
from .reference import TokenRewardsCall

_op = Op("token_rewards")


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 17, 3, generator=g, dtype=torch.float64)
    return (logits, torch.rand(3, 17, generator=g) < 0.7), {
        "mode": "expected", "suggested_length": 6.5}


class TokenRewards(NamedTuple):
    """The two results of `token_rewards`, detached; both 0 where masked."""

    rewards: Tensor  # [B, T] or [N], fp32 (fp64 for fp64 logits)
    category: Tensor  # [B, T] or [N], int64: the most probable class, the first where several tie


def _check_values(call: TokenRewardsCall) -> None:
    offsets("token_rewards", call.cu_seqlens, call.class_logits.shape[0])
    seen = partial(has_valid_token, call.class_logits[..., 0], call.mask, call.cu_seqlens)
    values_between("token_rewards", "suggested_length", call.suggested_length, 0.0, FP32_MAX, seen)
    values_between("token_rewards", "alpha", call.alpha, 0.0, FP32_MAX)


def _fake(call: TokenRewardsCall) -> tuple[Tensor, Tensor]:
    logits = call.class_logits
    return (logits.new_empty(logits.shape[:-1], dtype=compute_dtype(logits)),
            logits.new_empty(logits.shape[:-1], dtype=torch.int64))


_fwd = _op.define("token_rewards_fwd -> (Tensor rewards, Tensor category)", reference.fwd, _fake,
                  _check_values, record=TokenRewardsCall)


@suggests
def token_rewards(
        class_logits: Tensor,  # [B, T, 3] or [N, 3]
        mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        *,
        mode: str = "argmax",
        suggested_length: float | Tensor | None = None,  # [] or [B]
        alpha: float | Tensor = 2.0,  # []
        values: Sequence[float] | Tensor = (0.0, -0.5, 0.5),  # [3]
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        ) -> TokenRewards:
    """The reward of every action token from the reward model's three classes.

        R_t = values[argmax_c logits_tc]             mode "argmax"
        R_t = sum_c softmax(logits_t)_c values[c]    mode "expected"
        r_t = R_t sigmoid(6 - alpha (l_t - suggested_length)), l_t = 1, 2, ... over action tokens

    class_logits: [B, T, 3], or packed [N, 3] with `cu_seqlens` [B + 1] int32; class 0 is no reward,
    1 irrelevant, 2 relevant. mask: bool or whole numbers, the action mask. values: what each class
    pays; centred by default, (0, 1, 2) on the paper's scale. suggested_length: in tokens, a number,
    0-d or [B], at least 0; None: no length penalty. alpha: at least 0. The penalty is .9975 at the
    suggested length and, at alpha 2, .5 three tokens further. A NaN logit gives a NaN reward in
    both modes.

    Under `torch.compile` a Python float is a constant; give 0-d tensors for scalars that change.

    Raises ValueError / TypeError that name the argument. Source: token-level PPO (Ouyang et al.,
    EMNLP 2025), length-weighted penalty; the centred values and the expectation are additions.
    """
    check = Check("token_rewards")
    mask = check.sequences("class_logits", class_logits, mask, cu_seqlens, trailing="3")
    check.choice("mode", mode, ("argmax", "expected"))
    if isinstance(suggested_length, Tensor) and suggested_length.dtype in LABELS:
        suggested_length = suggested_length.double()
    length = check.per_sequence("suggested_length", suggested_length, low=0.0, optional=True)
    penalty = check.scalar("alpha", alpha, low=0.0)
    worth = check.scalars("values", values, 3)
    with torch.no_grad():
        return TokenRewards(*_fwd(TokenRewardsCall(
            class_logits, mask, worth, length, penalty, cu_seqlens, mode == "expected")))
