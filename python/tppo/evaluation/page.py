"""Self-contained HTML pages: the frame, which loads nothing and runs nothing, and their parts.

Whatever a page shows of data goes through `markup`, and every number that stands in a file of a run
through `figure`, which names the file, so that a test can hold each against its source.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from html import escape

from tppo.evaluation.style import BASE


def page(title: str, css: str, body: str, *, reload_s: int | None = None) -> str:
    """The whole page.  title: text, which is escaped.  css: what is added to the style that all
    pages share.  body: markup, as it stands.  reload_s: the browser loads the page again so often.

    Its content security policy lets no script run and nothing be loaded, whatever `body` holds.
    """
    again = "" if reload_s is None else f'<meta http-equiv="refresh" content="{reload_s}">\n'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
{again}<title>{escape(title)}</title>
<style>{BASE}{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def figure(value: float, text: str, file: str, *keys: str | int) -> str:
    """A number with where it stands: a file of the run folder, and the way to it inside, which the
    page holds as `FILE#/key/key` (a JSON pointer; a row of a JSONL file is a number from 0).

    text: the number as it is shown, which a test compares with the value.
    """
    way = "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)
    return f'<data value="{value!r}" data-source="{escape(f"{file}#{way}")}">{escape(text)}</data>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    *,
    foot: int = 0,
) -> str:
    """A table whose first column names its rows; on a narrow screen every row becomes a list.

    rows: cells as markup.  head, caption: text.  foot: how many of the last rows are set apart.
    """
    heading = "".join(f'<th scope="col">{markup(cell)}</th>' for cell in head)
    drawn = [
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f'<td data-label="{escape(name)}">{cell}</td>'
                  for name, cell in zip(head[1:], row[1:], strict=True))
        + "</tr>\n" for row in rows
    ]  # fmt: skip
    split = len(drawn) - foot
    last = f"<tfoot>{''.join(drawn[split:])}</tfoot>" if foot else ""
    return (
        f'<div class="scroll"><table><caption>{markup(caption)}</caption>'
        f"<thead><tr>{heading}</tr></thead><tbody>\n{''.join(drawn[:split])}</tbody>{last}"
        "</table></div>\n"
    )


def markup(text: str, keep: str = "") -> str:
    """A text as markup that shows it, and nothing else: see `visible`."""
    return escape(visible(text, keep))


def visible(text: str, keep: str = "") -> str:
    """The text with a visible sign for each character that has none, or that would act on others.

    A joiner inside an emoji stays; control characters and changes of direction do not act.
    keep: characters that stay as they are.
    """
    return "".join(
        character if character in keep else _SIGNS.get(character) or _harmless(character)
        for character in text
    )


_SIGNS = {"\n": "⏎", "\t": "⇥", "\u200d": "\u200d"}


def _harmless(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\\u{ord(character):04x}"
    return character


def signed(value: float, digits: int = 2) -> str:
    """`+0.50`, `−0.50`, `0.00`; a dash for what is no number."""
    if not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def number(value: float, digits: int = 3) -> str:
    """A number for people: thousands apart, whole ones without a point, else `digits` figures; a
    dash for what is no number.
    """
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000 or value == round(value):
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def seconds(value: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"
