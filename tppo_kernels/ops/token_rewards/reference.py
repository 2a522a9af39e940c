"""The specification of `token_rewards` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.sequence import compute_dtype, on, select, spread, valid_mask


class TokenRewardsCall(NamedTuple):
    """The arguments of a raw call."""

    class_logits: Tensor  # [B, T, 3] or [N, 3]
    mask: Tensor | None  # [B, T] or [N] bool
    values: list[Tensor]  # [3], a 0-d tensor each
    suggested_length: Tensor | None  # [] or [B]
    alpha: Tensor  # []
    cu_seqlens: Tensor | None  # [B + 1] int32
    expected: bool  # whether a reward is the expectation, not that of the best class


def fwd(call: TokenRewardsCall) -> tuple[Tensor, Tensor]:
    """(rewards, category); see `tppo_kernels.token_rewards`."""
    class_logits, mask, values, suggested_length, alpha, cu_seqlens, expected = call
    dtype = compute_dtype(class_logits)
    valid = valid_mask(class_logits[..., 0], mask)  # [B, T] or [N]
    logits = select(class_logits, valid[..., None], dtype)  # [B, T, 3] or [N, 3]
    category = logits.argmax(-1)
    worth = torch.stack([on(value, logits) for value in values])  # [3]
    if expected:
        reward = (torch.softmax(logits, -1) * worth).sum(-1)
    else:  # argmax picks a class out of NaN too: the reward must not hide it
        reward = torch.where(logits.isnan().any(-1), float("nan"), worth[category])
    if suggested_length is not None:
        index = token_index(valid, cu_seqlens).to(dtype)
        over = index - spread(suggested_length.to(dtype), reward, cu_seqlens)
        reward = reward * torch.sigmoid(6 - on(alpha, reward) * over)
    return select(reward, valid), select(category, valid)


def token_index(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The 1-based index of each valid token among its sequence's."""  # [B, T] or [N], int64
    if cu_seqlens is None:
        return mask.cumsum(1)
    count = mask.cumsum(0)
    before = torch.cat([count.new_zeros(1), count])[cu_seqlens[:-1].long()]  # [B]
    return count - spread(before, count, cu_seqlens)
