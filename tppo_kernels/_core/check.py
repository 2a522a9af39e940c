"""Argument checks: one grammar for shapes, dtypes, devices and scalars.

`Check("gae").tensor("rewards", rewards, "B T | N")` binds the letters at their first use; later
tensors must agree with them. Shapes are words of letters ("B T"), alternatives are separated by
"|", and a leading "..." binds any leading sizes. Messages name the argument, what it was, and what
was expected.

What needs a tensor's values (`offsets`, and `values_between` of `_kernels/values.py`) is checked
inside the raw ops: always on CPU, on a GPU only under TPPO_CHECK=1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .eager import constant, surely
from .packed import sequence_index

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.int64, torch.int32)
MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
         torch.uint32, torch.uint64)
STRIDED = torch.strided
FP32_MAX = torch.finfo(torch.float32).max
INT64_MAX = torch.iinfo(torch.int64).max  # what a raw op takes for a whole number
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
              "seq-mean-token-sum-norm")


_PARSED: dict[str, list[tuple[str, tuple[str, ...], bool, bool]]] = {}


def _parse(shape: str) -> list[tuple[str, tuple[str, ...], bool, bool]]:
    """(text, letters, whether the first is "...", whether all bind a size) of each alternative;
    a shape is parsed once."""
    split = [(words.strip(), tuple(words.split())) for words in shape.split("|")]
    parsed = _PARSED[shape] = [
        (text, letters, letters[:1] == ("...",), all(x.isalpha() or x == "..." for x in letters))
        for text, letters in split]
    return parsed


class Reduction(NamedTuple):
    """How a loss adds up its tokens; the denominators of a batch that others share in."""

    num_tokens: Tensor | None  # []; None: the valid tokens of this batch
    num_sequences: Tensor | None  # []; None: its sequences with a valid token
    norm_length: Tensor | None  # []; None: T
    reduction: str  # of REDUCTIONS


class Check:
    """The checks of one call; letters and the device are bound by the tensors seen first."""

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, Any] = {}
        self.owner: dict[str, str] = {}
        self.seen: dict[str, Sequence[int]] = {}  # what a shape was the last time
        self.device: torch.device | None = None
        self.device_of = ""  # the name of the tensor that bound it

    def tensor(self, name: str, value: Any, shape: str,
               dtypes: Sequence[torch.dtype] = FLOATS, *, optional: bool = False) -> None:
        """Checks the shape of `value`, its dtype, and that it is on the device of the others."""
        if value is None and optional:
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.op}: {name} is {describe(value)}, expected a tensor [{shape}]")
        if value.dtype not in dtypes:
            expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{self.op}: {name} has dtype {str(value.dtype).removeprefix('torch.')}"
                            f", expected {expected}")
        if value.layout is not STRIDED:
            raise TypeError(f"{self.op}: {name} has layout {value.layout}, expected torch.strided")
        if self.device is None:
            self.device, self.device_of = value.device, name
        elif value.device != self.device:
            raise ValueError(f"{self.op}: {name} is on {value.device}, expected {self.device} "
                             f"as {self.device_of}")
        sizes = value.shape
        if sizes == self.seen.get(shape):
            return
        alternatives = _PARSED.get(shape) or _parse(shape)
        if len(alternatives) > 1 and is_compiling():  # first those that surely match: no guard
            alternatives = sorted(alternatives, key=lambda a: not self._fits(sizes, a[1]))
        for text, letters, leading, plain in alternatives:
            if (sizes == self.seen.get(text)
                    or self._bind(name, sizes, letters, leading, plain)):
                self.seen[text] = sizes
                return
        raise ValueError(f"{self.op}: {name} has shape {list(sizes)}, expected "
                         f"{' or '.join(self._spell(words) for words in shape.split('|'))}")

    def _fits(self, sizes: Any, letters: tuple[str, ...]) -> bool:
        """Whether the sizes are known to be those of letters that are already bound."""
        return len(sizes) == len(letters) and all(
            letter in self.sizes and surely(self.sizes[letter] == size)
            for letter, size in zip(letters, sizes, strict=True))

    def _bind(self, name: str, sizes: Any, letters: tuple[str, ...], leading: bool,
              plain: bool) -> bool:
        if leading:
            cut = len(sizes) - len(letters) + 1
            if cut < 0:
                return False
            sizes = tuple(sizes)
            sizes = (sizes[:cut], *sizes[cut:])
        elif len(sizes) != len(letters):
            return False
        if not plain:
            for letter, size in zip(letters, sizes, strict=True):
                known = self._known(letter)  # no `in`: it would ask whether a traced size is None
                if known is not None and known != size:
                    return False
        bound, owner = self.sizes, self.owner
        for i, letter in enumerate(letters):
            if bound.setdefault(letter, sizes[i]) != sizes[i]:
                for new in bound.keys() - owner.keys():
                    del bound[new]
                return False
        for letter in letters:
            owner.setdefault(letter, name)
        if leading:
            self.seen["..."] = sizes[0]
        return True

    def _known(self, letter: str) -> Any:
        if letter in self.sizes:
            return self.sizes[letter]
        if letter.isalpha() or letter == "...":
            return None
        head, _, plus = letter.partition("+")
        if plus and head in self.sizes:
            return self.sizes[head] + int(plus)
        return int(letter) if letter.isdigit() else None

    def _spell(self, words: str) -> str:
        letters = words.split()
        known = [self._known(letter) for letter in letters]
        text = f"[{', '.join(letters)}]"
        if any(size is not None and str(size) != letter
               for letter, size in zip(letters, known, strict=True)):
            sizes = ", ".join(letter if size is None else ", ".join(map(str, size))
                              if isinstance(size, tuple) else str(size)
                              for letter, size in zip(letters, known, strict=True))
            owners = dict.fromkeys(self.owner[x] for x in letters if x in self.owner)
            text += f" = [{sizes}]" + (f" as {', '.join(owners)}" if owners else "")
        return text

    def mask(self, name: str, value: Any, shape: str) -> Any:
        """A mask as bool, or None: a whole number that is not 0 is valid, and floats are refused.

        Returns a Tensor or None (typed Any: callers rebind the argument).
        """
        if value is None:
            return None
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            raise TypeError(
                f"{self.op}: {name} has dtype {str(value.dtype).removeprefix('torch.')}, expected "
                f"bool or whole numbers (0 is not valid): give {name}.bool() where it holds 0 and "
                "1 only; fractions are weights, the argument weights= of ppo_loss and "
                "linear_ppo_loss")
        self.tensor(name, value, shape, MASKS)
        return value if value.dtype == torch.bool else value != 0

    def sequences(self, name: str, x: Any, mask: Any, cu_seqlens: Any, *,
                  trailing: str = "") -> Any:
        """Checks that x is padded [B, T], or packed [N] where `cu_seqlens` [B + 1] is given.

        `trailing`: the letters of the sizes behind a token, where it is more than a number.
        Returns the mask as `Check.mask` does.
        """
        tokens = self.tokens(cu_seqlens)
        self.tensor(name, x, f"{tokens} {trailing}" if trailing else tokens)
        if cu_seqlens is not None:
            self.packing(cu_seqlens)
        return self.mask("mask", mask, tokens)

    def spread(self, name: str, value: Any, cu_seqlens: Any, *, optional: bool = False) -> Any:
        """A value a token, or one a sequence ([B] or [B, 1], given back as [B]).

        Returns a Tensor or None (typed Any: callers rebind the argument).
        """
        if value is None and optional:
            return None
        self.tensor(name, value, f"{self.tokens(cu_seqlens)} | B | B 1")
        if value.dim() == 1 or value.shape[1] != 1 or self.sizes.get("T") == 1:
            return value
        value, batch = value[:, 0], self.sizes["B"]
        if cu_seqlens is None or surely(self.sizes["N"] != batch):
            return value
        index = sequence_index(self.sizes["N"], cu_seqlens)  # [B] would be taken for [N]
        return value[index.clamp(max=batch - 1)]

    def packing(self, cu_seqlens: Any) -> None:
        """Checks that `cu_seqlens` is int32 [B + 1], which binds B."""
        self.tensor("cu_seqlens", cu_seqlens, "B+1", (torch.int32,))
        if cu_seqlens.shape[0] < 1:
            raise ValueError(f"{self.op}: cu_seqlens has shape {list(cu_seqlens.shape)}, expected "
                             "[B + 1] with at least the leading 0")
        self.sizes["B"], self.owner["B"] = cu_seqlens.shape[0] - 1, "cu_seqlens"

    @staticmethod
    def tokens(cu_seqlens: Tensor | None) -> str:
        """The shape of a per-token argument in this layout."""
        return "B T" if cu_seqlens is None else "N"

    def scalar(self, name: str, value: Any, *, low: float = -FP32_MAX, high: float = FP32_MAX,
               above: float = -math.inf, optional: bool = False) -> Any:
        """A number or a 0-d tensor as a detached 0-d tensor; a number's range is checked here.

        It must be finite, unless `high` is infinite, where infinity switches a term off.
        Returns a Tensor, or None where that is allowed (typed Any: callers rebind the argument).
        """
        if type(value) is float and low <= value <= high and value > above:
            return constant(value)
        if value is None and optional:
            return None
        if isinstance(value, Tensor):
            if value.dim() or value.dtype not in FLOATS:
                raise ValueError(f"{self.op}: {name} is {describe(value)}, expected a number or a "
                                 "0-d floating tensor")
            self._reachable(name, value)
            return value.detach()
        return constant(self.number(name, value, low=low, high=high, above=above))

    def _reachable(self, name: str, value: Tensor) -> None:
        """Checks that a 0-d tensor is on the device of the others, or on the CPU."""
        if not value.is_cpu and self.device not in (None, value.device):
            raise ValueError(f"{self.op}: {name} is on {value.device}, expected {self.device} as "
                             f"{self.device_of}, or cpu")

    def per_sequence(self, name: str, value: Any, *, low: float = -FP32_MAX,
                     high: float = FP32_MAX, optional: bool = False) -> Any:
        """As `scalar`, or one value a sequence: a [B] tensor."""
        if isinstance(value, Tensor) and value.dim():
            self.tensor(name, value, "B")
            return value.detach()
        return self.scalar(name, value, low=low, high=high, optional=optional)

    def scalars(self, name: str, values: Any, count: int, *, low: float = -FP32_MAX
                ) -> list[Tensor]:
        """A sequence of `count` finite numbers, or a tensor [count], as detached 0-d tensors."""
        if isinstance(values, Tensor):
            self.tensor(name, values, str(count))
            return list(values.detach().unbind())
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            raise ValueError(f"{self.op}: {name} is {describe(values)}, expected {count} numbers "
                             f"or a tensor [{count}]")
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                continue
            self.number(f"{name}[{index}]", value, low=low, high=FP32_MAX)
        return [self.scalar(f"{name}[{i}]", value) for i, value in enumerate(values)]

    def reduction(self, reduction: Any, num_tokens: Any, num_sequences: Any, norm_length: Any,
                  cu_seqlens: Tensor | None) -> Reduction:
        """Checks a reduction; gives its denominators as 0-d tensors, or None where not given.

        num_sequences "all": B, so that sequences without a valid token count too.
        """
        self.choice("reduction", reduction, REDUCTIONS)
        if (reduction == "seq-mean-token-sum-norm" and cu_seqlens is not None
                and norm_length is None):
            raise ValueError(f"{self.op}: norm_length is None, expected a length, because "
                             f"reduction is {reduction!r} and the layout is packed")
        if num_tokens is num_sequences is norm_length is None:
            return Reduction(None, None, None, reduction)
        if isinstance(num_sequences, str):
            if num_sequences != "all":
                raise ValueError(f"{self.op}: num_sequences is {num_sequences!r}, expected a whole "
                                 "number, a 0-d tensor, 'all', or None for the sequences with a "
                                 "valid token")
            num_sequences = self.sizes["B"]
        return Reduction(
            self.count("num_tokens", num_tokens), self.count("num_sequences", num_sequences),
            self.count("norm_length", norm_length), reduction)

    def count(self, name: str, value: Any) -> Tensor | None:
        """A whole number >= 0, or a 0-d tensor (whole numbers too), as a detached 0-d tensor."""
        if value is None:
            return None
        if isinstance(value, Tensor):
            if value.dim() or value.dtype not in FLOATS + LABELS:
                raise ValueError(f"{self.op}: {name} is {describe(value)}, expected a whole number "
                                 "or a 0-d tensor")
            self._reachable(name, value)
            return value.detach()
        return constant(self.number(name, value, low=0, high=FP32_MAX, kind=int))

    def number(self, name: str, value: Any, *, low: float = -math.inf, high: float = math.inf,
               above: float = -math.inf, kind: type | tuple[type, ...] = (int, float)) -> Any:
        """A number, after a check of its type and of low <= value <= high, value > above.

        A number of NumPy is returned as one of Python, which does not overflow where NumPy's does.
        """
        if not isinstance(value, kind) and isinstance(value, Integral if kind is int else Real):
            value = int(value) if isinstance(value, Integral) else float(value)
        if isinstance(value, bool) or not isinstance(value, kind):
            expected = "a whole number" if kind is int else "a number"
            raise TypeError(f"{self.op}: {name} is {describe(value)}, expected {expected}")
        assert isinstance(value, int | float)
        high = INT64_MAX if kind is int and high == math.inf else high
        if not low <= value <= high or not value > above:
            raise ValueError(f"{self.op}: {name} is {value!r:.80}, expected "
                             f"{_range(low, high, above)}")
        return value

    def choice(self, name: str, value: Any, options: Sequence[Any]) -> None:
        """Checks that a value is one of a list of options."""
        for option in options:
            if value is option:
                return
        if not any(value is o or (type(value) is type(o) and value == o) for o in options):
            raise ValueError(f"{self.op}: {name} is {value!r}, expected one of "
                             f"{', '.join(map(repr, options))}")


def _range(low: float, high: float, above: float) -> str:
    """The range of a number in a message."""
    bounds = [f">= {low:g}" for _ in "x" if low > -FP32_MAX and above == -math.inf]
    bounds += [f"> {above:g}" for _ in "x" if above > -math.inf]
    bounds += [f"<= {high:g}" for _ in "x" if high < FP32_MAX]
    if high != FP32_MAX:
        return f"a number {' and '.join(bounds) or 'and not NaN'}"
    return f"a number {' and '.join(bounds)} and finite" if bounds else "a finite number"


def describe(value: Any) -> str:
    """A value in a message: a tensor by shape and dtype, anything else by type and text."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    return f"{type(value).__name__} {value!r:.80}"


def offsets(op: str, cu_seqlens: Tensor | None, length: int) -> None:
    """Checks the values of `cu_seqlens`: 0 = first <= ... <= last = N."""
    if cu_seqlens is None:
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != length or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(f"{op}: cu_seqlens is {cu_seqlens.tolist()!s:.200}, expected offsets that "
                         f"start at 0, never decrease and end at N = {length}")
