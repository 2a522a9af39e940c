"""Which tokens of a batch count: those of a mask by place, those of a response by its end."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._core.check import LABELS, Check
from .._core.keywords import suggests


@suggests
def valid_rows(
        mask: Tensor,  # [...] bool or whole numbers
) -> Tensor:
    """The flat positions of the True tokens of a mask, ascending: int64 [n_valid].

    mask: bool, or whole numbers (0 is not valid), of any shape. The size of the result is read on
    the host: call it once a batch, outside `torch.compile` and graph capture, and give it to the
    linear operators as `rows`.
    """
    check = Check("valid_rows")
    if mask is None:
        check.tensor("mask", mask, "...")
    mask = check.mask("mask", mask, "...")
    return mask.reshape(-1).nonzero()[:, 0]


@suggests
def response_mask(
        tokens: Tensor,  # [..., T] int64 or int32
        eos_id: int | Iterable[int] | Tensor,  # [] or [E]
) -> Tensor:
    """The mask of responses up to and including the first token that ends each of them.

        mask[..., t] = no tokens[..., s] with s < t is an end

    tokens: [..., T], what was generated, without the prompt. eos_id: the id that ends a response,
    or several of them (Llama 3 and Qwen have two), any of which does. Whatever follows the first
    end is masked, so that padding may have the id of EOS. A response without an end, which was cut
    at its greatest length, is True in all its T places; where such rows were padded afterwards,
    take `mask & (tokens != pad_id)`.

    Gives bool [..., T]. The end itself is an action of the policy, and is trained. No value is read
    on the host.

    Raises ValueError / TypeError that name the argument.
    """
    check = Check("response_mask")
    check.tensor("tokens", tokens, "... T", LABELS)
    if isinstance(eos_id, Tensor):
        check.tensor("eos_id", eos_id, "E|", LABELS)
        ends = eos_id.reshape(-1)
    else:
        named = {"eos_id": eos_id}
        if isinstance(eos_id, Iterable) and not isinstance(eos_id, str):
            named = {f"eos_id[{i}]": x for i, x in enumerate(eos_id)}
        most = torch.iinfo(tokens.dtype).max
        ids = [check.number(name, x, low=0, high=most, kind=int) for name, x in named.items()]
        ends = torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)
    if ends.shape[0] == 0:
        raise ValueError("response_mask: eos_id is empty, expected one or more token ids")
    end = torch.isin(tokens, ends)
    return end.cumsum(-1) - end.long() == 0
