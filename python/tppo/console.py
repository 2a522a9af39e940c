"""What is printed fits the terminal: its character set, and its width."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded where something is drawn: `tppo --help` draws nothing
    from rich.console import Console
    from rich.table import Table

_PLAIN = {
    "±": "+/-", "−": "-", "–": "-", "·": "|", "…": "...", "⁺": "+", "⁻": "-", "∎": "$",
    "⏎": "\\n", "⇥": "\\t",
}  # fmt: skip


def _plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: signs as ASCII says them, other characters by their number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or ascii(c)[1:-1] for c in characters), error.end


codecs.register_error("tppo.plain", _plain)


def accept_any_text() -> None:
    """Let stdout and stderr replace what their character set lacks, instead of ending the run.

    One that is closed (`>&-`) takes everything and shows nothing.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tppo.plain")


def is_unicode(stream: Any) -> bool:
    """Whether a stream's character set has every character."""
    return (getattr(stream, "encoding", None) or "").lower().startswith("utf")


def print_rows(
    console: Console,
    table: Table,
    rows: Sequence[tuple[str, Sequence[str]]],
    *,
    total: bool = False,
) -> None:
    """Print a table whose columns are made, with `rows` of a name and cells as text; with `total`
    the last one is set apart.

    Where the terminal is too narrow for it, each cell gets a line of its own, so that no figure is
    cut.
    """
    from rich.measure import Measurement
    from rich.text import Text

    for i, (name, cells) in enumerate(rows):
        table.add_row(Text(name), *cells, end_section=total and i == len(rows) - 2)
    wide = console.options.update(max_width=10_000)
    if Measurement.get(console, wide, table).maximum <= console.width:
        console.print(table)
        return
    if table.title is not None:
        console.print(table.title, style="italic")
    headers = [str(column.header) for column in table.columns[1:]]
    longest = max(map(len, headers), default=0)
    for name, cells in rows:
        console.print(Text(name, "bold"))
        for header, cell in zip(headers, cells, strict=True):
            console.print(Text(f"  {header.ljust(longest)}  {cell}"))
