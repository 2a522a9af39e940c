"""Token ids as rectangular tensors: prompts padded on the left, responses on the right.

prompt     prompt     response   response
. . p p p | a b c .   the column of the first response token is the same in every row, so one
p p p p p | a b . .   integer `prompt_length` serves `tppo_kernels.response_states`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """P prompt columns, then T response columns."""

    input_ids: Tensor  # [B, P+T] int64
    attention_mask: Tensor  # [B, P+T] int64, 1 at real tokens
    position_ids: Tensor  # [B, P+T] int64, counted over real tokens
    targets: Tensor  # [B, T] int64, the response tokens
    mask: Tensor  # [B, T] bool, True at sampled tokens, separators and EOS included
    prompt_length: int  # P

    @property
    def response_length(self) -> int:
        return self.targets.shape[1]

    def rows(self, index: Tensor) -> Batch:
        """The batch of some of the rows."""
        return Batch(
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            position_ids=self.position_ids[index],
            targets=self.targets[index],
            mask=self.mask[index],
            prompt_length=self.prompt_length,
        )


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Batch:
    """One batch of prompts and their responses; masks come from lengths, never from `pad_id`."""
    width = max(map(len, prompts))
    length = max(map(len, responses))
    ids, real = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        left, right = width - len(prompt), length - len(response)
        ids.append([pad_id] * left + [*prompt] + [*response] + [pad_id] * right)
        real.append([0] * left + [1] * (len(prompt) + len(response)) + [0] * right)
    input_ids = torch.tensor(ids, device=device)  # [B, P+T]
    attention_mask = torch.tensor(real, device=device)  # [B, P+T]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        targets=input_ids[:, width:],
        mask=attention_mask[:, width:].bool(),
        prompt_length=width,
    )


def pad_rows(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Ragged per-token numbers as a tensor of the shape, dtype and device of `like`, 0-filled."""
    out = torch.zeros_like(like)  # [B, T]
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.as_tensor(row, dtype=like.dtype)
    return out
