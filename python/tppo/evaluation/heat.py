"""Token heat maps: the reward, the value and the advantage of every token of an answer.

`heat_html` makes one self-contained HTML page (a notebook shows it in a frame), `heat_section` the
same as a part of a larger page, `print_heat` the same for a terminal. Positive is blue, negative
orange (kept apart by every common kind of colour blindness), and the sign is written too, so that
no meaning rests on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tppo.console import print_rows
from tppo.evaluation.page import figure, markup, number, page, signed, table, visible
from tppo.evaluation.style import HEAT

CATEGORIES = ("none", "irrelevant", "relevant")
CHANNELS = ("reward", "value", "advantage")  # the first letter of each is its class in the page
HEADINGS = ("Tokens", "Reward a token", "Reward an answer", "Relevant")


@dataclass(frozen=True)
class HeatRow:
    """One answer, token by token."""

    id: str
    """The question; answers with one id follow each other, and are shown side by side."""
    prompt: str
    tokens: list[str]
    """The text of every token; "" for one without characters, such as EOS."""
    rewards: list[float]
    categories: list[int]
    """0 none, 1 irrelevant, 2 relevant."""
    advantages: list[float] | None
    targets: list[str]
    name: str = ""
    """Who answered."""
    values: list[float] | None = None
    """What the critic expected before each token."""
    figures: Mapping[str, float] | None = None
    """What a judge said of the answer."""

    def __post_init__(self) -> None:
        for name in ("rewards", "categories", "advantages", "values"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(
                    f"{name} of row {self.id!r} had {len(values)} entries, "
                    f"expected one a token, {len(self.tokens)}"
                )
        if not set(self.categories) <= {0, 1, 2}:
            raise ValueError(f"categories of row {self.id!r} were {self.categories}, expected 0-2")

    @property
    def total(self) -> float:
        """The rewards of its tokens together."""
        return sum(value for value in self.rewards if math.isfinite(value))

    def of(self, channel: str) -> list[float] | None:
        """The rewards, values or advantages by the name of one of them."""
        return getattr(self, f"{channel}s")


def present(rows: Sequence[HeatRow]) -> list[str]:
    """The channels that some of the rows have."""
    return [name for name in CHANNELS if any(row.of(name) is not None for row in rows)]


class Scale(dict[str, float]):
    """The largest absolute number of each channel: the full colour."""

    @classmethod
    def of(cls, rows: Sequence[HeatRow]) -> Scale:
        """That of some answers."""
        return cls({
            name: max((abs(v) for row in rows for v in row.of(name) or () if math.isfinite(v)),
                      default=0.0)
            for name in CHANNELS
        })  # fmt: skip

    def strength(self, channel: str, value: float) -> float:
        """How strong the colour of a number is, from 0 to 1."""
        full = self[channel]
        return min(1.0, abs(value) / full) if math.isfinite(value) and full > 0 else 0.0


@dataclass(frozen=True)
class Summary:
    """The figures of one answer, or of several; `relevant` is a share of the labelled tokens."""

    tokens: int
    reward: float
    total: float
    relevant: float

    @classmethod
    def of(cls, rows: Sequence[HeatRow]) -> Summary:
        """Over all tokens of the rows."""
        categories = [category for row in rows for category in row.categories]
        labelled = [category == 2 for category in categories if category]
        return cls(
            len(categories),
            _mean([value for row in rows for value in row.rewards]),
            _mean([row.total for row in rows]),
            _mean([float(relevant) for relevant in labelled]),
        )

    def cells(self) -> list[str]:
        """What stands below the headings, as text."""
        share = "–" if math.isnan(self.relevant) else f"{100 * self.relevant:.0f} %"
        return [str(self.tokens), signed(self.reward), signed(self.total), share]


def heat_html(rows: Sequence[HeatRow], title: str = "Token heat map") -> str:
    """The heat map of some answers as one HTML page that loads nothing from elsewhere."""
    body = f"""<header>
<h1>{markup(title)}</h1>
<p>Every token of an answer with what it was paid: token-level PPO (Ouyang et al., EMNLP 2025).</p>
</header>
<main>
{heat_section(rows)}
</main>"""
    return page(visible(title), HEAT, body)


def heat_section(
    rows: Sequence[HeatRow], about: Mapping[str, str] | None = None, file: str = ""
) -> str:
    """The means by who answered, a switch between reward, value and advantage, a legend, and a card
    for every question with the answers to it side by side.

    about: markup that stands before the card of a question, by its id.  file: of the run folder,
    where the rows stand in this order.
    """
    scale, channels = Scale.of(rows), present(rows)
    judged = [(row, _judged(row, i, file)) for i, row in enumerate(rows)]
    cards = "\n".join(
        (about or {}).get(id, "") + _card(list(answers), scale)
        for id, answers in groupby(judged, key=lambda pair: pair[0].id)
    )
    return f"""{_summary_table(rows)}
{_switch(channels)}<div class="heat">
{_legend(scale, channels)}
{cards}
</div>"""


def print_heat(
    rows: Sequence[HeatRow], console: Console | None = None, title: str = "Token heat map"
) -> None:
    """Print the heat map of some answers: colours where the terminal has them, signs everywhere."""
    console = console or Console()
    shown = Table("Answer", *HEADINGS, title=title, title_justify="left")
    for column in shown.columns[1:]:
        column.justify = "right"
    lines = [(_called(row), Summary.of([row]).cells()) for row in rows]
    lines += [(f"all {name}".strip(), Summary.of(named).cells()) for name, named in _by_name(rows)]
    print_rows(console, shown, lines, total=True)
    scale = Scale.of(rows)
    for row in rows:
        console.print(Text.assemble((_called(row), "bold"), "  true: "), end="")
        console.print(Text(" · ".join(map(visible, row.targets))), style="italic")
        console.print(_terminal_tokens(row, scale), "", sep="\n")


def _called(row: HeatRow) -> str:
    return visible(f"{row.id} {row.name}".strip())


def _by_name(rows: Sequence[HeatRow]) -> list[tuple[str, list[HeatRow]]]:
    names = dict.fromkeys(row.name for row in rows) or {"": None}
    return [(visible(name), [row for row in rows if row.name == name]) for name in names]


def _terminal_tokens(row: HeatRow, scale: Scale) -> Text:
    """The answer on its background of colours; a small sign follows every rewarded token."""
    text = Text("  ")
    for token, reward in zip(row.tokens, row.rewards, strict=True):
        strength = scale.strength("reward", reward)
        red, green, blue = (44, 110, 190) if reward > 0 else (190, 90, 10)
        style = f"white on rgb({red},{green},{blue})" if strength > 0.5 else ""
        if 0 < strength <= 0.5:
            style = "bright_blue underline" if reward > 0 else "yellow underline"
        text.append(visible(token.strip("\n")) or ("" if token else "∎"), style)
        text.append({1: "⁺", -1: "⁻"}.get(_sign(reward), ""))
        text.append("\n  " if "\n" in token else "")
    return text


def _switch(channels: Sequence[str]) -> str:
    """Radio buttons that choose what is shown; the style sheet does the rest."""
    if len(channels) < 2:
        return ""
    return "".join(
        f'<input type="radio" name="show" id="show-{name}"{" checked" if i == 0 else ""}>'
        f'<label for="show-{name}">{name.capitalize()}</label>\n'
        for i, name in enumerate(channels)
    )


def _legend(scale: Scale, channels: Sequence[str]) -> str:
    ends = "".join(
        f'<span class="{name}-only">{signed(-scale[name])}<i class="ramp"></i>'
        f"{signed(scale[name])} {name}</span>"
        for name in channels
    )
    marks = "".join(
        f'<span><b class="mark">{mark}</b> {name}</span>'
        for mark, name in zip(_MARKS[1:], CATEGORIES[1:], strict=True)
    )
    return f'<p class="key">{ends}<span class="marks">{marks}</span></p>'


def _summary_table(rows: Sequence[HeatRow]) -> str:
    """A row for each that answered; of two also what the second has more."""
    named = [(name, Summary.of(found)) for name, found in _by_name(rows)]
    lines = [[escape(name or "all"), *summary.cells()] for name, summary in named]
    if len(named) == 2:
        (one, before), (other, after) = named
        more = 100 * (after.relevant - before.relevant)
        lines.append([
            f"{escape(other)} less {escape(one)}", f"{after.tokens - before.tokens:+d}",
            signed(after.reward - before.reward), signed(after.total - before.total),
            "–" if math.isnan(more) else f"{signed(more, 0)} points",
        ])  # fmt: skip
    return table(("Means", *HEADINGS), lines, "Summary", foot=len(named) == 2)


def _judged(row: HeatRow, i: int, file: str) -> str:
    """The first two figures of an answer, which is row i of the file."""
    found = [(markup(name), figure(value, number(value), file, i, "figures", name))
             for name, value in list((row.figures or {}).items())[:2]]  # fmt: skip
    return "".join(f", {name} {shown}" for name, shown in found)


def _card(answers: Sequence[tuple[HeatRow, str]], scale: Scale) -> str:
    first = answers[0][0]
    targets = "".join(f"<li>{markup(target)}</li>" for target in first.targets)
    sides = "\n".join(_side(row, judged, scale) for row, judged in answers)
    return f"""<article>
<h3>{markup(first.id)}</h3>
<div class="sides">
{sides}
</div>
<h4>True next queries</h4>
<ul class="targets">{targets}</ul>
<details><summary>Prompt</summary><pre>{markup(first.prompt, keep=chr(10))}</pre></details>
</article>"""


def _side(row: HeatRow, judged: str, scale: Scale) -> str:
    """An answer below its figures."""
    lines = "\n".join(f'<ol class="tokens">{"".join(line)}</ol>' for line in _lines(row, scale))
    name = f"<b>{markup(row.name)}</b>, " if row.name else ""
    return f"<div><h4>{name}reward {signed(row.total)} in all{judged}</h4>\n{lines}</div>"


def _lines(row: HeatRow, scale: Scale) -> Iterator[list[str]]:
    """The tokens as list items, a new list after each line break."""
    line: list[str] = []
    for position, token in enumerate(row.tokens):
        line.append(_token(row, position, scale))
        if "\n" in token:
            yield line
            line = []
    if line:
        yield line


_MARKS = ("", "✗", "✓")


def _token(row: HeatRow, position: int, scale: Scale) -> str:
    text, category = row.tokens[position], row.categories[position]
    shown = visible(text) if text else "∎"
    title = f"token {position + 1}: {shown}"
    mark = f"<b>{_MARKS[category]}</b>" if category else ""
    classes, style, figures = "t word" if text.startswith(" ") else "t", [], ""
    for channel in CHANNELS:
        values = row.of(channel)
        if values is None:
            continue
        value, letter = values[position], channel[0]
        title += f", {channel} {signed(value)}"
        title += f", {CATEGORIES[category]}" if channel == "reward" else ""
        style.append(f"--{letter}:{scale.strength(channel, value):.2f}")
        classes += f" {letter}{_sign(value)}"
        figures += f'<span class="{channel}-only">{signed(value)}</span>'
    return (
        f'<li class="{classes}" style="{";".join(style)}" title="{escape(title)}" '
        f'aria-label="{escape(title)}"><bdi>{escape(shown.strip(" ") or shown)}</bdi>'
        f'<small class="figures" aria-hidden="true">{mark}{figures}</small></li>'
    )


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
