"""What a user's reward function gives for an answer: a number, a number a token, or spans.

    a number v                 v at the last token
    a list of n numbers        one for each of the n tokens, the EOS included
    a list of (start, end, v)  v at the last token that writes one of the characters start..end-1
                               of the answer's text, 0 <= start < end <= its length

The convention of `reward=` in the trainer `tppo`.  None: the function has nothing to say.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tppo_kernels as tk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXPECTED = ("a number, a list with one number a token, or a list of (start, end, value) over the "
             "characters of the answer")


class TokenRewards:
    """The rewards that one function has paid for a batch of answers, at their tokens."""

    def __init__(self, function: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.function, self.tokenizer = function, tokenizer
        self.tokens: list[list[float] | None] = []
        """One entry an answer: a number for each of its tokens; None where it got one number."""

    def totals(self, entries: Sequence[Any], texts: Sequence[Any],
               ids: Sequence[Sequence[int]]) -> list[float | None]:
        """The total of each answer, None where the function gave None; keeps `tokens`.

        texts: the answers as the function got them: texts, or lists of one chat message.
        Raises ValueError that names the function, the entry, what it was and what was expected.
        """
        if not isinstance(entries, list | tuple) and not hasattr(entries, "tolist"):
            raise ValueError(f"{self.function} returned {_short(entries)}, expected a list with "
                             "one entry an answer")
        entries = entries.tolist() if hasattr(entries, "tolist") else entries
        if len(entries) != len(ids):
            raise ValueError(f"{self.function} returned {len(entries)} entries, expected "
                             f"{len(ids)}: one an answer")
        self.tokens, totals = [], []
        for b, entry in enumerate(entries):
            entry = entry.tolist() if hasattr(entry, "tolist") else entry
            paid = None
            if isinstance(entry, list):
                flat = all(map(_is_number, entry)) and (entry or not ids[b])
                paid = self._dense(b, entry, ids[b]) if flat else self._spans(
                    b, entry, texts[b], ids[b])
                total: float | None = math.fsum(paid)
            elif entry is None:
                total = None
            else:
                total = self._number(b, "", entry)
            self.tokens.append(paid)
            totals.append(total)
        return totals

    def _dense(self, b: int, values: list[Any], ids: Sequence[int]) -> list[float]:
        if len(values) != len(ids):
            raise self._error(b, "", values, f"{len(ids)} numbers, one a token (completion_ids), "
                              f"and not {len(values)}; spans are (start, end, value)")
        return [self._number(b, f", token {t}", value) for t, value in enumerate(values)]

    def _spans(self, b: int, spans: list[Any], text: Any, ids: Sequence[int]) -> list[float]:
        paid = [0.0] * len(ids)
        for k, span in enumerate(spans):
            if not isinstance(span, list | tuple) or len(span) != 3:
                raise self._error(b, f", item {k}", span, f"(start, end, value); {_EXPECTED}")
        if not spans:
            return paid
        shown, offsets = self._characters(b, text, ids)
        for k, (first, behind, value) in enumerate(spans):
            part, span = f", item {k}", (first, behind, value)
            try:
                start, end = operator.index(first), operator.index(behind)
            except TypeError:
                raise self._error(b, part, span, "whole numbers for start and end") from None
            if not 0 <= start < end <= len(shown):
                raise self._error(b, part, span, f"0 <= start < end <= {len(shown)}, the "
                                  "characters of the answer")
            t = tk.align.last_writer(offsets, start, end)
            if t is None:
                raise self._error(b, part, span, "characters that a token of the answer writes")
            paid[t] += self._number(b, part, value)
        return paid

    def _characters(self, b: int, text: Any, ids: Sequence[int]
                    ) -> tuple[str, list[tuple[int, int]]]:
        """The text that the function saw, and the characters in it of each token."""
        if isinstance(text, list):
            text = text[0].get("content") if len(text) == 1 else None
        written, offsets = tk.align.token_offsets(self.tokenizer, list(ids))
        at = written.find(text) if isinstance(text, str) else -1
        if at < 0 or written.strip() != text.strip():
            raise self._error(b, "", text, "a text that is what the tokens of the answer write, "
                              "for spans of its characters; give one number a token here")
        return text, [(max(0, start - at), max(0, end - at)) for start, end in offsets]

    def _number(self, b: int, part: str, value: Any) -> float:
        if not _is_number(value):
            raise self._error(b, part, value, _EXPECTED)
        number = float(value)
        if not math.isfinite(number):
            raise self._error(b, part, number, "a finite number")
        return number

    def _error(self, b: int, part: str, was: Any, expected: str) -> ValueError:
        return ValueError(f"{self.function}: entry {b}{part} was {_short(was)}, expected "
                          f"{expected}")


def _is_number(value: Any) -> bool:
    """Real numbers, and arrays and tensors that hold a single one."""
    return isinstance(value, numbers.Real) or (
        hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def _short(value: Any, width: int = 120) -> str:
    text = f"{value!r}, a {type(value).__name__}"
    return text if len(text) <= width else f"{text[:width - 3]}..."
