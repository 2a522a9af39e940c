"""Read and write YAML 1.2, in which 5e-6 is a number and `off` a text; a value knows its line."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import SafeRepresenter

from tppo.errors import DataError
from tppo.store.jsonl import bounded_bytes, write_text

MOST = 100_000
BYTES = 1 << 20  # reading a megabyte takes about ten seconds
Place = Sequence[str | int]


def read_yaml(path: str | os.PathLike[str]) -> tuple[Any, Callable[[Place], int | None]]:
    """What a YAML file holds, and a function that gives the line of the value at a place.

    Errors: DataError naming file and line; also for a key that a mapping has twice.
    """
    path = Path(path)
    try:
        text = bounded_bytes(path, BYTES).decode("utf-8-sig")
        tree = _yaml().compose(text)
        lines: dict[tuple[str | int, ...], int] = {}
        if tree is not None:
            _note(path, tree, (), lines, ())
        value = _yaml().load(text)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = "" if mark is None else f"line {mark.line + 1}: column {mark.column + 1}: "
        raise DataError(f"{path}: {at}not YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise DataError(f"{path}: not YAML: nested too deeply") from None
    except (YAMLError, ValueError) as error:  # not UTF-8, a control character, a huge number
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return value, lambda place: _line(lines, place)


def write_yaml(path: str | os.PathLike[str], value: Any) -> None:
    """Write mappings, lists and scalars in their order, whole or not at all."""
    stream = io.StringIO()
    _yaml().dump(value, stream)
    write_text(path, stream.getvalue())


def commented_yaml(
    value: Mapping[str, Any], comment: Callable[[str], str], place: str = "", width: int = 96
) -> list[str]:
    """Lines of YAML that `read_yaml` reads, with a comment above each value.

    value: mappings, lists and scalars, in their order.  comment: of the value at a place, such
    as "settings.ppo.lr"; "" for none.
    """
    lines: list[str] = []
    for key, item in value.items():
        at = f"{place}.{key}".lstrip(".")
        if text := comment(at):
            lines += [f"# {line}" for line in textwrap.wrap(text, width)]
        if isinstance(item, Mapping):
            inner = commented_yaml(item, comment, at, width - 2)
            lines += [f"{key}:", *(f"  {line}".rstrip() for line in inner)]
        else:
            stream, yaml = io.StringIO(), _yaml()
            yaml.width = 2**20  # a path with spaces stays on its line
            yaml.dump({key: item}, stream)
            lines += stream.getvalue().rstrip("\n").split("\n")
        if not place or not isinstance(item, Mapping):
            lines.append("")
    return lines if place else lines[:-1]


class _Representer(SafeRepresenter):
    """Escapes characters that do not print, such as U+0085, which would be lost otherwise."""

    def represent_str(self, data: str) -> ScalarNode:
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _note(
    path: Path,
    node: Node,
    place: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    above: tuple[Node, ...],
) -> None:
    """Record the line of every value below a node, and refuse a key that occurs twice."""
    lines.setdefault(place, node.start_mark.line + 1)
    if len(lines) > MOST:  # aliases of aliases hold more than any memory
        raise DataError(f"{path}: holds more than {MOST:,} values, expected settings")
    if any(node is parent for parent in above):
        raise DataError(f"{path}: line {node.start_mark.line + 1}: an alias that holds itself")
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            _note(path, item, (*place, index), lines, (*above, node))
    if not isinstance(node, MappingNode):
        return
    first: dict[str, int] = {}
    for key, item in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise DataError(f"{path}: line {line}: the key of a mapping was a list or a mapping, "
                            "expected a name")  # fmt: skip
        if key.value in first:
            raise DataError(
                f"{path}: line {line}: {'.'.join(map(str, (*place, key.value)))!r} again, "
                f"which line {first[key.value]} has too; expected each key once in a mapping"
            )
        first[key.value] = line
        inner = (*place, key.value)
        lines[inner] = line
        _note(path, item, inner, lines, (*above, node))


def _line(lines: dict[tuple[str | int, ...], int], place: Place) -> int | None:
    """The line of the value at a place, or of the nearest one that holds it."""
    for length in range(len(place), -1, -1):
        if (line := lines.get(tuple(place[:length]))) is not None:
            return line
    return None
