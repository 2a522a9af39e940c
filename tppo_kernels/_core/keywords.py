"""The error of an unknown keyword of a public operator, with the names that were probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
SHARED = 4  # letters at the beginning that two names must have in common
SHORTEST = 3  # letters of a name that a longer word may begin with


def suggests(function: Function) -> Function:
    """The function, with a TypeError of its own for a keyword that it does not have."""
    names = tuple(inspect.signature(function).parameters)
    known = frozenset(names)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if not known.issuperset(keywords):
            raise TypeError(_unknown(function.__name__, keywords, names))
        return function(*args, **keywords)

    return cast(Function, call)


def _unknown(op: str, keywords: dict[str, Any], names: Sequence[str]) -> str:
    word = next(k for k in keywords if k not in names)
    meant = near(word, names)
    rest = f"did you mean {', '.join(meant)}?" if meant else f"expected one of {', '.join(names)}"
    return f"{op}: unknown keyword {word}, {rest}"


def near(word: str, names: Sequence[str]) -> list[str]:
    """Up to three names that `word` resembles, by the first rule that finds any: a misspelling, or
    `mask` for whatever ends so; a common beginning, or a name that a part between underscores
    begins with; a distant likeness; a part in common."""
    def alike(cutoff: float) -> list[str]:
        return difflib.get_close_matches(word, names, 3, cutoff)

    def begins(name: str) -> bool:
        return name.startswith(word[:SHARED]) or word.startswith(name)

    parts = set(word.split("_"))
    masks = [n for n in names if n == "mask" and word.endswith("mask")]
    inside = [n for n in names if len(n) >= SHORTEST and any(p.startswith(n) for p in parts)]
    found = ([*alike(0.9), *masks, *alike(0.8)]
             or [n for n in names if begins(n)] + inside or alike(0.6)
             or [n for n in names if parts & set(n.split("_"))])
    return list(dict.fromkeys(found))[:3]
