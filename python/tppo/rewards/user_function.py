"""Functions of the user, called by TRL's convention: f(prompts, completions, **columns) -> list."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import CodeType
from typing import Any

from tppo.errors import DataError, short
from tppo.rewards import Answers

GIVEN = ("prompts", "completions", "completion_ids")  # besides the columns


class UserFunction:
    """A function of the user and what it is called in messages.

    It is called once for many answers, by keyword, with what it takes of

        prompts         as the user gave them: texts, or lists of chat messages
        completions     the answers: texts for texts, [{"role": "assistant", "content": text}] for
                        chats
        completion_ids  token ids of the answers, the EOS included where it was written
        every other column of the prompts by its name

    each a list with one entry an answer; one that has **kwargs gets all of them.  It returns a list
    (or an array) with one entry an answer.
    """

    def __init__(self, function: Callable[..., Any], kind: str) -> None:
        inner = function.func if isinstance(function, partial) else function
        name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
        self.function, self.name = function, f"{kind} {name}"
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.name}: {error}, expected a Python function") from None
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.takes = {p.name for p in by_name}
        self.needs = [p.name for p in by_name if p.default is p.empty]
        by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if by_position or not (self.takes or self.takes_all):
            raise DataError(
                f"{self.name} takes {by_position or 'nothing'} by position alone, expected "
                "parameters that can be given by name: prompts, completions, columns, **kwargs"
            )

    def check(self, columns: Iterable[str]) -> None:
        """Errors: DataError where the function needs what neither the answers nor columns have."""
        known = [*GIVEN, *columns]
        for name in self.needs:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise DataError(
                    f"{self.name} takes {name!r}, expected one of {', '.join(GIVEN)} or a column "
                    f"of the prompts ({', '.join(sorted(columns)) or 'they have none'})"
                    + (f"; did you mean {close[0]!r}?" if close else "")
                )

    def __call__(self, answers: Answers) -> list[Any]:
        """One entry an answer.

        Errors: DataError where the function raises an error (with its file and line), or returns
        something else than a list with one entry an answer.
        """
        self.check(answers.columns)
        given = {
            "prompts": list(answers.prompts),
            "completions": completions(answers),
            "completion_ids": [list(ids) for ids in answers.response_ids],
            **{name: list(column) for name, column in answers.columns.items()},
        }
        chosen = {k: v for k, v in given.items() if self.takes_all or k in self.takes}
        try:
            found = self.function(**chosen)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"{self.name} raised {type(error).__name__}: {error} ({at.filename}, line "
                f"{at.lineno})"
            ) from error
        found = found.tolist() if hasattr(found, "tolist") else found
        n = len(answers.response_ids)
        if not isinstance(found, list | tuple):
            raise DataError(
                f"{self.name} returned {short(found)}, a {type(found).__name__}, expected a list "
                f"with one entry for each of {n} answers"
            )
        if len(found) != n:
            raise DataError(f"{self.name} returned {len(found)} entries, expected {n}: one an "
                            "answer")  # fmt: skip
        return list(found)


def completions(answers: Answers) -> list[Any]:
    """The answers in the form of their prompts: texts, or lists of one chat message."""
    chats = [not isinstance(prompt, str) for prompt in answers.prompts]
    return [
        [{"role": "assistant", "content": text}] if chat else text
        for chat, text in zip(chats, answers.texts, strict=True)
    ]


def named_with_source(thing: Any) -> str:
    """What a function or an object is called, with a mark that changes where its source does.

    The values of a dataclass and those bound by `partial` count too.  Where there is no source, as
    of what `exec` has made, what it was compiled to stands for it.
    """
    inner = thing.func if isinstance(thing, partial) else thing
    owner = inner if hasattr(inner, "__qualname__") else type(inner)
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        source = _compiled(owner)
    values: Any = None
    if isinstance(thing, partial):
        values = thing.args, thing.keywords
    elif owner is not inner:
        values = thing
    if values is not None:  # the same in every process: an address is not
        source += re.sub(r" at 0x[0-9a-fA-F]+", "", repr(values))
    mark = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{owner.__module__}:{owner.__qualname__} ({mark})"


def _compiled(thing: Any) -> str:
    """The byte code of a function, or of those of a class, with the constants and names in it."""
    if isinstance(thing, type):
        return "".join(f"{name}{_compiled(value)}" for name, value in vars(thing).items())
    if isinstance(thing, frozenset):  # in an order that is the same in every process
        return str(sorted(map(repr, thing)))
    code = thing if isinstance(thing, CodeType) else getattr(thing, "__code__", None)
    if code is None:
        return ""
    constants = [_compiled(c) if isinstance(c, CodeType | frozenset) else repr(c)
                 for c in code.co_consts]  # fmt: skip
    defaults = getattr(thing, "__defaults__", None), getattr(thing, "__kwdefaults__", None)
    return repr((code.co_code, code.co_names, code.co_varnames, constants, defaults))


def load_object(place: str) -> Any:
    """What `module:name` names; the module is looked for in the working directory too.

    Errors: DataError naming what is not there.
    """
    module_name, colon, name = place.partition(":")
    if not colon or not module_name or not name or "/" in module_name:
        raise DataError(f"was {place!r}, expected module:function, such as my_rewards:by_words")
    if module_name.endswith(".py"):
        raise DataError(f"was {place!r}, expected module:function: {module_name[:-3]}:{name}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise DataError(
                f"{place}: module {module_name!r} imports {missing!r}, which is not installed"
            ) from error
        raise DataError(
            f"{place}: there is no module {missing!r}, neither in {here} nor where Python looks "
            "for modules (PYTHONPATH)"
        ) from None
    except Exception as error:
        raise DataError(
            f"{place}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, _names(vars(found)), 1)
            raise DataError(
                f"{place}: {module_name!r} ({getattr(module, '__file__', 'no file')}) has no "
                f"{part!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        found = getattr(found, part)
    return found


def load_given(flag: str, place: str) -> Any:
    """What a flag names as `module:name`.  Errors: those of `load_object`, naming the flag."""
    try:
        return load_object(place)
    except DataError as error:
        raise DataError(f"{flag} {error}") from error.__cause__


def _names(values: Iterable[str]) -> Sequence[str]:
    return [name for name in values if not name.startswith("_")]
