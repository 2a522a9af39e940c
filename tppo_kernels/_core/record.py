"""Records: the arguments of a raw op as one NamedTuple, which its schema lists one by one.

    class GaeCall(NamedTuple):
        rewards: Tensor  # [B, T] or [N]
        mask: Tensor | None

A field may be a record itself, for arguments that several ops share; the schema then lists the
fields of that record in its place. Checks, fakes and backends take the record. The dispatcher and
autograd know only flat arguments: `flat` and `build` are the two ways between.
"""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, Union

import torch
from torch import Tensor
from torch.compiler import is_compiling

Record = TypeVar("Record", bound=tuple)

_SCHEMA = {Tensor: "Tensor", list[Tensor]: "Tensor[]", int: "SymInt", float: "float", bool: "bool",
           str: "str", torch.dtype: "ScalarType"}


@functools.cache
def _fields(record: type) -> dict[str, Any]:
    """The fields of a record with their types."""
    return typing.get_type_hints(record)


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _leaves(record: type, before: str = "") -> Iterator[tuple[str, Any]]:
    """(path, type) of everything that is not a record itself: ("mask", Tensor | None)."""
    for name, kind in _fields(record).items():
        if _is_record(kind):
            yield from _leaves(kind, f"{before}{name}.")
        else:
            yield before + name, kind


def schema(record: type) -> str:
    """The arguments of the raw op as torch's schema language has them."""
    names = [path.rpartition(".")[2] for path, _ in _leaves(record)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TypeError(f"{record.__name__} has {', '.join(twice)} in two places, expected one")
    return ", ".join(f"{_spell(record, path, kind)} {name}"
                     for name, (path, kind) in zip(names, _leaves(record), strict=True))


def _spell(record: type, path: str, kind: Any) -> str:
    optional = typing.get_origin(kind) in (Union, types.UnionType)
    kinds = [x for x in typing.get_args(kind) if x is not type(None)] if optional else [kind]
    if len(kinds) != 1 or kinds[0] not in _SCHEMA:
        raise TypeError(f"{record.__name__}: {path} is {kind}, expected a record, or one of "
                        f"{', '.join(_SCHEMA.values())} of the schema, or None beside it")
    return _SCHEMA[kinds[0]] + "?" * optional


@functools.cache
def flattener(record: type) -> Callable[[Any], tuple]:
    """What gives the arguments of such a record one by one, in the order of its schema."""
    paths = [path for path, _ in _leaves(record)]
    if not any("." in path for path in paths):
        return lambda call: call  # it is a tuple of them already
    outside_python = operator.attrgetter(*paths)  # of several paths: it gives a tuple
    return lambda call: _listed(call) if is_compiling() else outside_python(call)


def flat(call: tuple) -> tuple:
    """The arguments of a record, one by one, in the order of its schema."""
    return flattener(type(call))(call)


def _listed(call: tuple) -> tuple:
    """The same by code that Dynamo can trace."""
    args: tuple = ()
    for x in call:
        args += _listed(x) if hasattr(x, "_fields") else (x,)
    return args


def build(record: type[Record], values: Iterable[Any]) -> Record:
    """The record of arguments that come one by one, as the dispatcher and autograd give them."""
    if not any(map(_is_record, _fields(record).values())):
        return record(*values)
    rest = iter(values)
    return _built(record, rest)


def _built(record: type[Record], rest: Iterator[Any]) -> Record:
    return record(*(_built(kind, rest) if _is_record(kind) else next(rest)
                    for kind in _fields(record).values()))
