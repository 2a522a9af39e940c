"""An unknown keyword of a public operator is answered with the names that were probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
SHARED = 4  # letters at the beginning that two names must have in common


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
    """Up to three names that `word` resembles, by the first rule that finds any: a misspelling,
    a common beginning, a distant likeness, a part between underscores in common."""
    def alike(cutoff: float) -> list[str]:
        return difflib.get_close_matches(word, names, 3, cutoff)

    def begins(name: str) -> bool:
        return name.startswith(word[:SHARED]) or word.startswith(name)

    parts = set(word.split("_"))
    found = (alike(0.8) or [n for n in names if begins(n)] or alike(0.6)
             or [n for n in names if parts & set(n.split("_"))])
    return found[:3]
