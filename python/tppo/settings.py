"""Sections of the configuration: dataclasses whose fields hold their values to a type and a range.

The type and the range stand at the field and hold for Python, flags and YAML alike; pydantic checks
them when a section is made.  Nothing is converted: "3" is no number, 1 is not true.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import pydantic
import pydantic.dataclasses
from pydantic import BeforeValidator, ConfigDict, Field
from typing_extensions import dataclass_transform

from tppo.errors import DataError, short

T = TypeVar("T")

LIMIT = 2**63  # whole numbers are kept in 64 bits
Count = Annotated[int, Field(ge=1, lt=LIMIT)]
Natural = Annotated[int, Field(ge=0, lt=LIMIT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(pattern=r"\S")]


def _not_empty(path: Any) -> Any:
    if path == "":
        raise ValueError("was '', expected a path")
    return path


# An empty text would be the current folder, which is what an unset shell variable gives.
FilePath = Annotated[Path, BeforeValidator(_not_empty)]

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping of settings",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:,}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "path_type": "a path",
    "string_pattern_mismatch": "a text that is not blank",
    "string_type": "a text",
    "too_short": "at least {min_length} values",
    "tuple_type": "a list",
}


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def section(kind: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that refuses a value outside its field's type and range.

    Errors: making one raises DataError naming the field, what it was and what was expected.
    """
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)(kind)
    check = made.__init__

    @functools.wraps(check)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            check(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise DataError("; ".join(_messages(type(self), error, "None"))) from None

    made.__init__ = __init__
    return made


def from_dict(
    kind: type[T],
    values: Any,
    where: str = "config",
    line_of: Callable[[Sequence[str | int]], int | None] = lambda place: None,
) -> T:
    """A section from plain dicts, lists and scalars; absent keys keep their default.

    `line_of` gives the line where the value at a place, such as ("ppo", "lr"), stands.
    Errors: DataError, a line for each wrong value: where, line, field, was, expected.
    """
    # As JSON, because there a strict check takes a mapping for a section and a list for a tuple.
    try:
        text = json.dumps(values, default=str)
    except ValueError as error:  # a hexadecimal number with thousands of digits
        raise DataError(f"{where}: {error}") from None
    try:
        return pydantic.TypeAdapter(kind).validate_json(text)
    except pydantic.ValidationError as error:
        lines = [line_of(_place(details)) for details in error.errors()]
        found = sorted(zip(lines, _messages(kind, error, "null"), strict=True),
                       key=lambda pair: pair[0] or 0)  # fmt: skip
        raise DataError(
            "\n".join(
                f"{where}: " + ("" if line is None else f"line {line}: ") + message
                for line, message in found
            )
        ) from None


def _messages(kind: Any, error: pydantic.ValidationError, none: str) -> list[str]:
    return [_message(kind, details, none) for details in error.errors()]


def _place(details: Any) -> tuple[str | int, ...]:
    """Where the wrong value stands; of a missing item, where its list does."""
    return details["loc"][:-1] if details["type"] == "missing" else details["loc"]


def _message(kind: Any, details: Any, none: str) -> str:
    place, was, reason = _place(details), details["input"], details["type"]
    owner, hint = _types(kind, place)
    name = ".".join(str(part) for part in place)
    if reason == "value_error":  # from a section that looks at several of its fields
        return f"{name}: {details['ctx']['error']}" if name else str(details["ctx"]["error"])
    if reason == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(owner)]
        close = difflib.get_close_matches(str(place[-1]), known, 1)
        remedy = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
        parent = ".".join(str(part) for part in place[:-1])
        return (f"{parent}: " if parent else "") + f"unknown key {place[-1]!r}; {remedy}"
    if reason == "missing" or reason == "too_long":
        expected = f"{len(get_args(hint))} values"
    else:
        text = details["msg"].removeprefix("Input should be ")
        expected = _EXPECTED.get(reason, text).format(**details.get("ctx", {}))
    if reason == "literal_error":
        choices = [str(choice) for choice in get_args(_without_none(hint))]
        close = difflib.get_close_matches(str(was), choices, 1)
        expected += f"; did you mean {close[0]!r}?" if close else ""
    elif type(None) in get_args(hint):
        expected += f", or {none}"
    return (f"field {name!r}: " if name else "") + f"was {short(was)}, expected {expected}"


def _types(kind: Any, place: Sequence[str | int]) -> tuple[Any, Any]:
    """The section that holds a place, and the type of what stands there."""
    owner, hint = kind, kind
    for part in place:
        if dataclasses.is_dataclass(hint):
            owner, hint = hint, get_type_hints(hint).get(str(part))
        elif isinstance(part, int) and dataclasses.is_dataclass(next(iter(get_args(hint)), None)):
            hint = get_args(hint)[0]  # an item of a list of sections
            owner = hint
    return owner, hint


def _without_none(hint: Any) -> Any:
    arms = [arm for arm in get_args(hint) if arm is not type(None)]
    return arms[0] if type(None) in get_args(hint) and len(arms) == 1 else hint
