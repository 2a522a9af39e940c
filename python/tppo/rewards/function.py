"""Rewards by a function of the user: of whole answers, of tokens, or of spans of characters."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tppo_kernels as tk
from tppo.errors import DataError, short
from tppo.models.batch import Batch
from tppo.rewards import Answers, TokenReward
from tppo.rewards.user_function import GIVEN, UserFunction

_LARGEST = torch.finfo(torch.float32).max
_EXPECTED = (
    "a number for the answer, a list with one number a token, or a list of (start, end, "
    "value) over the characters of the answer"
)


class _Paid(NamedTuple):
    """What the functions pay for a batch, collected in double precision."""

    terminal: Tensor  # [B]
    dense: Tensor  # [B, T]
    spans: list[tuple[int, int, int, float]]  # (b, t, t + 1, value)


class FunctionReward:
    """Rewards by one function of the user, or by the sum of several.

    A function is `f(prompts, completions, **columns) -> list` as in TRL (see `UserFunction`).  Each
    entry of the list is for one answer y of n tokens (EOS included) whose text has c characters:

        a number v                 r_n += v: at the last token
        a list of n numbers        r_t += v_t: at every token
        a list of (start, end, v)  r_t += v at t = max{u : token u writes one of the characters
                                   start..end-1}, 0 <= start < end <= c

    A span is paid once, whole, at the last token that writes a part of it: the total does not
    depend on the tokenizer, and the tokens of the span before it get their credit by the return.
    Characters are those of the decoded answer, without EOS and special tokens.  Where spans end in
    one token, their values add up.  Where the bytes of one character stand in several tokens, each
    of them writes it, so that a span which ends there is paid at the last of them.
    None: the function has nothing to say of this answer.

    Errors: DataError naming function, entry and text where an entry is none of these, not finite,
    has another number of tokens, or a span lies outside the text; and where no function has
    anything to say of an answer.
    """

    def __init__(self, function: Callable[..., Any] | Sequence[Callable[..., Any]]) -> None:
        given = list(function) if isinstance(function, Sequence) else [function]
        for f in given:
            if not callable(f):
                raise DataError(f"reward was {short(f)}, a {type(f).__name__}, expected a function")
        if not given:
            raise DataError("reward was an empty list, expected at least one function")
        self.functions = [UserFunction(f, "reward function") for f in given]

    @property
    def name(self) -> str:
        """The functions as messages call them."""
        return " + ".join(function.name for function in self.functions)

    def check(self, columns: Sequence[str]) -> None:
        """Errors: DataError where a function needs a column that is not there."""
        for function in self.functions:
            try:
                function.check(columns)
            except DataError as error:
                if len(function.needs) != 2 or {*function.needs} & {*GIVEN, *columns}:
                    raise
                raise DataError(f"{error}; a tppo.Reward is told by the names of its parameters: "
                                "(batch, answers)") from None  # fmt: skip

    def __call__(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards of the answers at their tokens."""
        return TokenReward(self._rewards(answers, batch.mask.cpu()).to(batch.mask.device))

    def totals(self, answers: Answers) -> list[float]:
        """The total reward of each answer."""
        lengths = torch.tensor([len(ids) for ids in answers.response_ids])  # [B]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, T]
        return self._rewards(answers, mask).sum(1, dtype=torch.float64).tolist()

    def _rewards(self, answers: Answers, mask: Tensor) -> Tensor:
        paid = _Paid(
            torch.zeros(mask.shape[0], dtype=torch.float64),
            torch.zeros(mask.shape, dtype=torch.float64),
            [],
        )
        silent = set(range(mask.shape[0]))
        for function in self.functions:
            for b, entry in enumerate(function(answers)):
                if entry is not None:
                    silent.discard(b)
                    _Entry(function.name, b, answers).pay(entry, paid)
        if silent:
            b = min(silent)
            raise DataError(
                f"{self.name}: entry {b} was None, expected a reward of one function at least; the "
                f"answer was {short(answers.texts[b])}"
            )
        placed = tk.place_rewards(mask, terminal=paid.terminal, dense=paid.dense, spans=paid.spans)
        return placed.rewards.float()  # [B, T]


class _Entry:
    """One entry of what a function returned: checked, then paid."""

    def __init__(self, function: str, b: int, answers: Answers) -> None:
        self.where, self.b, self.answers = f"{function}: entry {b}", b, answers

    def pay(self, entry: Any, paid: _Paid) -> None:
        entry = entry.tolist() if hasattr(entry, "tolist") else entry
        if _is_number(entry):
            paid.terminal[self.b] += self.finite(entry, "")
        elif not isinstance(entry, list):
            raise self.error("", entry, _EXPECTED)
        elif entry and all(map(_is_number, entry)):
            self.pay_tokens(entry, paid)
        else:
            for k, span in enumerate(entry):
                self.pay_span(k, span, paid)

    def pay_tokens(self, values: list[Any], paid: _Paid) -> None:
        n = len(self.answers.response_ids[self.b])
        if len(values) != n:
            raise self.error(
                "", values, f"{n} numbers, one a token (completion_ids, EOS included), and not "
                f"{len(values)}; spans are given as a list of (start, end, value)"
            )  # fmt: skip
        for t, value in enumerate(values):
            paid.dense[self.b, t] += self.finite(value, f", token {t}")

    def pay_span(self, k: int, span: Any, paid: _Paid) -> None:
        part, text = f", item {k}", self.answers.texts[self.b]
        if not isinstance(span, list | tuple) or len(span) != 3:
            raise self.error(part, span, "(start, end, value); " + _EXPECTED)
        try:
            start, end = operator.index(span[0]), operator.index(span[1])
        except TypeError:
            raise self.error(part, span, "whole numbers for start and end") from None
        if not _is_number(span[2]):
            raise self.error(part, span, "a number for value")
        value = self.finite(span[2], part)
        if not 0 <= start < end <= len(text):
            raise self.error(part, span, f"0 <= start < end <= {len(text)}, the characters of the "
                             "answer")  # fmt: skip
        t = tk.align.last_writer(self.answers.offsets[self.b], start, end)
        if t is None:
            raise self.error(part, span, "characters that a token of the answer writes")
        paid.spans.append((self.b, t, t + 1, value))

    def finite(self, value: Any, part: str) -> float:
        try:
            number = float(value)
        except OverflowError:  # a whole number of more than 308 digits
            number = math.inf
        if not abs(number) <= _LARGEST:  # NaN too
            raise self.error(part, number, "a finite number, also in fp32")
        return number

    def error(self, part: str, was: Any, expected: str) -> DataError:
        text = short(self.answers.texts[self.b])
        return DataError(
            f"{self.where}{part}: was {short(was)}, expected {expected} (the answer was {text})"
        )


def _is_number(value: Any) -> bool:
    """Real numbers, and arrays and tensors that hold a single one."""
    return isinstance(value, numbers.Real) or (
        hasattr(value, "item") and getattr(value, "ndim", 1) == 0
    )
