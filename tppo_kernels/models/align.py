"""Characters of tokens, and token values between two tokenizers of one text by them.

A reward model may cut a text into other tokens than the policy does. Both tokenizers know which
characters each token stands for (`offset_mapping` of a fast tokenizer), and through these
characters values are moved from one to the other.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._core.check import describe
from .pieces import pieces_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("tppo_kernels")


def decode(
        tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_ids: Collection[int] = ()
) -> str:
    """The text of token ids, special tokens left out.

    eos_ids: ids that end an answer; the last token is left out where it is one of them, because
    not every end is a special token of the tokenizer.
    """
    shown = ids[:-1] if ids and ids[-1] in eos_ids else ids
    text = tokenizer.decode(
        list(shown), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)  # a list only for a batch
    return text


def token_offsets(
        tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_ids: Collection[int] = ()
) -> tuple[str, list[tuple[int, int]]]:
    """The text of sampled ids and the half-open character span of each of them, in linear time.

    Sampled ids need not be those that the tokenizer, a fast one, gives for their text. Tokens that
    share one character (bytes of it) all get that character; a special token gets (s, s), and so
    does a last one that is one of `eos_ids`.
    """
    if ids and ids[-1] in eos_ids:
        text, before = token_offsets(tokenizer, ids[:-1])
        return text, [*before, (len(text), len(text))]
    text = decode(tokenizer, ids)
    spans = pieces_of(tokenizer, partial(decode, tokenizer)).spans(text, ids)
    if spans is None:
        _log_slow(type(tokenizer).__name__)
        spans = _spans_by_prefixes(tokenizer, text, ids)
    return text, spans


def last_writer(offsets: Sequence[tuple[int, int]], start: int, end: int) -> int | None:
    """The last token that writes one of the characters start..end-1, None where none does.

    offsets: the characters of each token, half-open, as `token_offsets` gives them.
    """
    written = (t for t, (a, b) in enumerate(offsets) if a < min(b, end) and b > start)
    return max(written, default=None)


def _spans_by_prefixes(
        tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]
) -> list[tuple[int, int]]:
    """The spans from decoding every prefix: for tokenizers whose tokens change their neighbours.

    Where a prefix ends in half a character, it differs from the text there: that character is the
    token's. A token that shows nothing gets (s, s).
    """
    spans, start = [], 0
    for i in range(len(ids)):
        prefix = decode(tokenizer, ids[:i + 1])
        end = _common(text, prefix)
        half = end < min(len(prefix), len(text))
        spans.append((start, max(start, end + half)))
        start = max(start, end)
    return spans


@cache
def _log_slow(name: str) -> None:
    _log.warning("%s: what a token adds depends on its neighbours; offsets come from decoding "
                 "prefixes", name)


def _common(text: str, prefix: str) -> int:
    """Length of the longest common prefix; half a character decodes to another one."""
    if text.startswith(prefix):
        return len(prefix)
    return next(i for i, character in enumerate(prefix) if text[i:i + 1] != character)


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
