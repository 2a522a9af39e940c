"""Records: the arguments of a raw op as one NamedTuple, which its schema lists one by one.

    class GaeCall(NamedTuple):
        rewards: Tensor  # [B, T] or [N]
        mask: Tensor | None

A field may be a record itself, for arguments that several ops share; the schema then lists the
fields of that record in its place. Checks, fakes and backends take the record. The dispatcher and
autograd know only flat arguments: `flat` and `build` convert between the two.
"""

from __future__ import annotations

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
_INNER: dict[type, tuple[type | None, ...]] = {}  # of each field, the record that it is
_READ: dict[type, Callable[[Any], tuple]] = {}  # what reads all arguments, where some are inner


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _leaves(record: type, before: str = "") -> Iterator[tuple[str, Any]]:
    """(path, type) of everything that is not a record itself: ("mask", Tensor | None)."""
    for name, kind in typing.get_type_hints(record).items():
        if _is_record(kind):
            yield from _leaves(kind, f"{before}{name}.")
        else:
            yield before + name, kind


def schema(record: type) -> str:
    """The arguments of the raw op as torch's schema language has them.

    It must be called before `flat` and `build` can take such records.
    """
    _learn(record)
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


def _learn(record: Any) -> None:
    """Reads the types of a record's fields once, so that Dynamo need not trace that at calls."""
    kinds = typing.get_type_hints(record).values()
    _INNER[record] = tuple(kind if _is_record(kind) else None for kind in kinds)
    for kind in filter(None, _INNER[record]):
        _learn(kind)
    paths = [path for path, _ in _leaves(record)]
    if any("." in path for path in paths):
        _READ[record] = operator.attrgetter(*paths)  # of several paths: it gives a tuple


def flat(call: tuple) -> tuple:
    """The arguments of a record, one by one, in the order of its schema."""
    if is_compiling():
        return _listed(call)
    read = _READ.get(type(call))  # an attrgetter, which is faster than `_listed`
    return call if read is None else read(call)  # without inner records it is a tuple of them


def _listed(call: tuple) -> tuple:
    args: tuple = ()
    for x in call:
        args += _listed(x) if isinstance(x, tuple) else (x,)
    return args


def build(record: type[Record], values: Iterable[Any]) -> Record:
    """The record of arguments that come one by one, as the dispatcher and autograd give them."""
    if not any(_INNER[record]):
        return record(*values)
    return _built(record, iter(values))


def _built(record: type[Record], rest: Iterator[Any]) -> Record:
    return record(*[next(rest) if inner is None else _built(inner, rest)
                    for inner in _INNER[record]])
