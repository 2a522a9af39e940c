"""The error of data and settings that are wrong, and how its message shows a value."""

from __future__ import annotations


class DataError(ValueError):
    """A data file is not what it should be: the message says which file, line and field."""


def short(value: object, limit: int = 80) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deeply to be shown"
    return text if len(text) <= limit else text[: limit - 3] + "..."
