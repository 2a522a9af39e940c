"""The flags that a settings class gives, each with its sentence: what `--help` prints.

The parser is tyro's; a test holds that the flags listed here are the ones that it takes.  The
sentence of a flag is the string below its field in the source, or, where pydantic or tyro are told
one (`arg(help=...)`), that.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

T = TypeVar("T")

LEFT = 28  # columns of the flags; sentences stand to the right of them
WIDEST = 110
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


class Flag(NamedTuple):
    """One flag, or, without dashes, an argument that is given by its position."""

    name: str
    place: str
    """Names of the fields that lead to it, parted by dots: `settings.ppo.lr`."""
    values: str
    """What may follow it, such as N or {a,b}; empty where it is yes or no."""
    default: Any
    text: str
    section: type
    """The class that the field is in."""


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether one of the arguments asks for help."""
    return any(argument in (*HELP, HELP_ALL) for argument in arguments)


def parse(
    kind: type[T],
    prog: str,
    about: str,
    arguments: Sequence[str],
    *,
    first: Callable[[Flag], bool] = lambda flag: True,
) -> T:
    """The settings that arguments give, or, where they ask for help, the page and the end.

    prog: what is typed before them.  first: whether a flag is on the page of --help; where some are
    not, --help-all shows every one.
    """
    if not wants_help(arguments):
        import tyro

        return tyro.cli(kind, prog=prog, args=arguments)
    flags = list(flags_of(kind))
    few = flags if HELP_ALL in arguments else [flag for flag in flags if first(flag)]
    notes = [f"{prog} {HELP_ALL} lists {len(flags) - len(few)} more flags."]
    given = [f"{flag.name} {flag.values}".rstrip() for flag in flags if flag.name[:1] != "-"]
    usage = " ".join([prog, *given, "[flags]"])
    print(help_text(usage, about, few, notes if len(few) < len(flags) else ()))
    sys.exit(0)


@functools.cache
def sentences(kind: type) -> dict[str, str]:
    """What the source says of each field of a class: the string that stands below it."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(below.value.value.split())
    return found


def flags_of(kind: type, default: Any = None, prefix: str = "", place: str = "") -> Iterator[Flag]:
    """The flags of a settings class in order; `default` is an instance whose values they have."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        value = _value(field) if default is None else getattr(default, field.name)
        inner, given = _bare(hint), _told(hint)
        own = field.name.replace("_", "-") if given.name is None else given.name
        whole = f"{prefix}{own}" if given.prefixed else own
        at = f"{place}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            yield from flags_of(inner, value, f"{whole}." if own else whole, at)
            continue
        text = sentences(kind).get(field.name, "")
        name = own.upper() if given.positional else f"--{whole}"
        values = "{True,False}" if inner is bool and hint is not bool else _values(inner)
        if given.positional:
            values = "..." if values.endswith("...") else ""
        yield Flag(name, at, given.metavar or values, value, text, kind)


def _value(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; dataclasses.MISSING where it has to be given."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


class _Told(NamedTuple):
    """What the annotation of a field tells tyro."""

    name: str | None = None
    prefixed: bool = True
    positional: bool = False
    metavar: str = ""


def _told(hint: Any) -> _Told:
    name, prefixed, positional, metavar = _Told()
    for item in getattr(hint, "__metadata__", ()):
        if hasattr(item, "prefix_name"):
            name, prefixed = item.name, item.prefix_name is not False
        positional |= str(item) == "Positional" or getattr(item, "_name", "") == "Positional"
        metavar = getattr(item, "metavar", None) or metavar
    return _Told(name, prefixed, positional, metavar)


def _bare(hint: Any) -> Any:
    """A type without annotations, and without None where something else is possible."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        if len(arms) == 1:
            return _bare(arms[0])
    return hint


_LETTERS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def _values(hint: Any) -> str:
    """What a flag of this type is followed by."""
    if hint is bool:
        return ""
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) is tuple:
        return " ".join("..." if arm is ... else _values(_bare(arm)) for arm in get_args(hint))
    return _LETTERS.get(hint, "VALUE")


def shown(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    return str(value) if str(value) else "''"


def heading(flag: Flag) -> str:
    """The first sentence of the class that a flag is in."""
    text = inspect.getdoc(flag.section) or flag.section.__name__
    return text.split("\n\n")[0].replace("\n", " ")


def help_text(
    usage: str,
    about: str,
    flags: Sequence[Flag],
    notes: Sequence[str] = (),
    *,
    heading: Callable[[Flag], str] = heading,
) -> str:
    """The page that `--help` prints.

    usage: what is typed.  about: sentences on what it does.  notes: lines below the flags.
    heading: of the group that a flag stands in; by default the first line of its class.
    """
    width = min(WIDEST, max(60, shutil.get_terminal_size().columns))
    lines = [f"usage: {usage}", "", *textwrap.wrap(about, width)]
    group = None
    for flag in flags:
        above = heading(flag)
        if above and above != group:
            lines += ["", *textwrap.wrap(above, width)]
            group = above
        lines += _entry(flag, width)
    for note in notes:
        lines += ["", *textwrap.wrap(note, width)]
    return "\n".join(lines)


def _entry(flag: Flag, width: int) -> list[str]:
    """The lines of one flag: its name on the left, its sentence and its default on the right."""
    left = f"  {flag.name} {flag.values}".rstrip()
    off = ""
    if flag.default is True:
        dots, _, last = flag.name.rpartition(".")
        off = f"; {dots}.no-{last}" if dots else f"; --no-{last.removeprefix('--')}"
    missing = flag.default is dataclasses.MISSING
    text = f"{flag.text} [{'needed' if missing else shown(flag.default)}{off}]".lstrip()
    left = f"{left.ljust(LEFT - 2)}  "
    # Spaces of the first line, which textwrap would drop, are the flag's place.
    lines = textwrap.wrap(text, width, initial_indent="\0" * len(left),
                          subsequent_indent=" " * LEFT, break_long_words=False,
                          break_on_hyphens=False)  # fmt: skip
    return [left.rstrip() if not lines[0].strip("\0") else left + lines[0].lstrip("\0"),
            *lines[1:]]  # fmt: skip
