"""Token values between two tokenizers of one text, by character offsets.

A reward model may cut a text into other tokens than the policy does. Both tokenizers know which
characters each token stands for (`offset_mapping` of a fast tokenizer), and through these
characters values are moved from one to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.check import describe


def transfer(offsets_from: Any, offsets_to: Any, x: Any) -> Any:
    """The values of one tokenizer's tokens, at the tokens of another tokenizer of the same text.

        y[j] = x[i] where token i of `offsets_from` covers the last character of token j of
               `offsets_to`; 0 where none does, and where token j has no characters

    Where several tokens cover that character (byte-level tokenizers cut inside characters), the
    one that ends first, so that a token that ends there goes before one that reaches beyond; of
    several that end there too, the last, or, for several tokens j that end there, the same one
    counted from the last. A tokenizer's values therefore come back unchanged from itself.

    One text: offsets are token lists of half-open (start, end) pairs, or [S, 2]; x is [S], the
    result [T], zero-width offsets included. A batch: a list of those, of any lengths, or
    [B, S, 2]; x is a list of [S], and the result a list, or x is [B, S], whose slots behind the
    tokens of a text are not read, and the result [B, T], 0 behind them. Offsets may be lists,
    NumPy arrays or tensors. The result is detached, in the dtype and on the device of x: an array
    for an array, a tensor for a tensor or for numbers.

    Raises ValueError / TypeError that name the argument, the text and the token.
    """
    batched, listed = _depth(x) > 1, isinstance(x, list | tuple)
    sources, targets, values = (list(v) if batched else [v] for v in (offsets_from, offsets_to, x))
    if not len(sources) == len(targets) == len(values):
        raise ValueError(f"transfer: offsets_from, offsets_to and x hold {len(sources)}, "
                         f"{len(targets)} and {len(values)} texts, expected the same number")
    pairs_from = [_pairs("offsets_from", text, offsets) for text, offsets in enumerate(sources)]
    pairs_to = [_pairs("offsets_to", text, offsets) for text, offsets in enumerate(targets)]
    given = [_values(text, value, len(pairs), longer=batched and not listed)
             for text, (value, pairs) in enumerate(zip(values, pairs_from, strict=True))]

    lengths = [len(pairs) for pairs in pairs_to]
    if given:
        taken = torch.cat([given[0].new_zeros(1), *given])  # at 0 what an index of -1 takes
        index = covering(*_one_text(pairs_from, pairs_to)).to(taken.device)
        results = list(taken[index + 1].split(lengths))
    else:
        results = []
    if listed or not batched:
        results = [_like(result, value) for result, value in zip(results, values, strict=True)]
        return results if batched else results[0]
    padded = torch.as_tensor(x).new_zeros(len(results), max(lengths, default=0))
    for row, result in zip(padded, results, strict=True):
        row[:len(result)] = result
    return _like(padded, x)


def covering(
        source: Tensor,  # [S, 2]
        target: Tensor,  # [T, 2]
) -> Tensor:
    """The source token that covers the last character of each target token, or -1.

    source: [S, 2], target: [T, 2], half-open character offsets; returns int64 [T]. Which of
    several: see `transfer`.
    """
    tokens = (source[:, 1] > source[:, 0]).nonzero()[:, 0]
    ends, order = source[tokens, 1].sort(stable=True)
    tokens = tokens[order]  # those with characters, by their end
    index = target.new_full((len(target),), -1)
    seen = (target[:, 1] > target[:, 0]).nonzero()[:, 0]
    if not len(tokens) or not len(seen):
        return index
    starts = source[tokens, 0]
    earliest = starts.flip(0).cummin(0).values.flip(0)  # of this token and all that end later
    last = target[seen, 1] - 1  # the last character

    at = torch.searchsorted(ends, last, right=True)  # the first token that ends behind it
    covered = (at < len(ends)) & (earliest[at.clamp(max=len(ends) - 1)] <= last)
    seen, last, at = seen[covered], last[covered], at[covered]
    while bool((beyond := starts[at] > last).any()):  # only where tokens overlap out of order
        at = at + beyond
    mirrored = torch.searchsorted(ends, ends[at], right=True) - 1 - _rank_from_last(last)
    at = torch.where(ends[at] == last + 1, torch.maximum(at, mirrored), at)
    index[seen] = tokens[at]
    return index


def _rank_from_last(last: Tensor) -> Tensor:
    """How many later tokens have the same last character."""  # [T]
    ordered, order = last.sort(stable=True)
    rank = torch.empty_like(last)
    rank[order] = (torch.searchsorted(ordered, ordered, right=True) - 1
                   - torch.arange(len(last), device=last.device))
    return rank


def _one_text(*sides: list[Tensor]) -> list[Tensor]:
    """Joins the texts of a batch to one: their offsets are shifted so that none overlap."""
    ends = [int(pairs.max()) for side in sides for pairs in side if len(pairs)]
    stride = max(ends, default=0)
    return [torch.cat([pairs + text * stride for text, pairs in enumerate(side)])
            for side in sides]


def _depth(x: Any) -> int:
    """1 for the values of one text, 2 for those of a batch."""
    if isinstance(x, list | tuple):
        return 1 + _depth(x[0]) if len(x) else 1
    return int(getattr(x, "ndim", 0))


def _pairs(name: str, text: int, offsets: Any) -> Tensor:
    """Offsets as int64 [S, 2] on the CPU, with 0 <= start <= end."""
    pairs = _tensor(name, text, offsets).cpu()
    if pairs.dim() and pairs.shape[0] == 0:
        return pairs.new_zeros((0, 2), dtype=torch.int64)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"transfer: {name} of text {text} has shape {list(pairs.shape)}, expected "
                         "[tokens, 2]: (start, end) pairs")
    if pairs.is_floating_point() or pairs.is_complex() or pairs.dtype == torch.bool:
        raise TypeError(f"transfer: {name} of text {text} has dtype {pairs.dtype}, expected whole "
                        "numbers")
    bad = ((pairs[:, 0] < 0) | (pairs[:, 1] < pairs[:, 0])).nonzero()[:, 0]
    if len(bad):
        token = int(bad[0])
        raise ValueError(f"transfer: {name} of text {text} is {tuple(pairs[token].tolist())} at "
                         f"token {token}, expected 0 <= start <= end")
    return pairs.long()


def _values(text: int, x: Any, tokens: int, longer: bool) -> Tensor:
    """The values of a text's tokens, [S]; the padding behind them is cut off."""
    values = _tensor("x", text, x).detach()
    if values.dim() != 1 or values.shape[0] < tokens or (values.shape[0] > tokens and not longer):
        raise ValueError(f"transfer: x of text {text} has shape {list(values.shape)}, expected "
                         f"[{tokens}]: one value for each token of offsets_from")
    return values[:tokens]


def _tensor(name: str, text: int, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        expected = "a value for each token" if name == "x" else "(start, end) pairs"
        raise TypeError(f"transfer: {name} of text {text} is {describe(value)}, expected numbers: "
                        f"{expected} ({error})") from error


def _like(result: Tensor, x: Any) -> Any:
    """An array where x is one, else the tensor."""
    is_array = hasattr(x, "__array__") and not isinstance(x, Tensor)
    return result.numpy() if is_array else result
