"""Token heat maps: the reward and the advantage of every token of an answer.

`write_heat` makes one self-contained HTML page, `print_heat` the same for a terminal. Positive is
blue, negative orange (kept apart by every common kind of colour blindness), and the sign is written
too, so that no meaning rests on colour alone.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tppo.console import print_rows
from tppo.evaluation.heat_style import CSS
from tppo.evaluation.page import page
from tppo.store.jsonl import write_text

CATEGORIES = ("none", "irrelevant", "relevant")


@dataclass(frozen=True)
class HeatRow:
    """One answer, token by token."""

    id: str
    prompt: str
    tokens: list[str]
    """The text of every token; "" for one without characters, such as EOS."""
    rewards: list[float]
    categories: list[int]
    """0 none, 1 irrelevant, 2 relevant."""
    advantages: list[float] | None
    targets: list[str]

    def __post_init__(self) -> None:
        for name in ("rewards", "categories", "advantages"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(
                    f"{name} of row {self.id!r} had {len(values)} entries, "
                    f"expected one a token, {len(self.tokens)}"
                )
        if not set(self.categories) <= {0, 1, 2}:
            raise ValueError(f"categories of row {self.id!r} were {self.categories}, expected 0-2")


@dataclass(frozen=True)
class _Scale:
    """The largest absolute reward and advantage on the page: the full colour."""

    reward: float
    advantage: float

    @classmethod
    def of(cls, rows: Sequence[HeatRow]) -> _Scale:
        return cls(
            _largest(value for row in rows for value in row.rewards),
            _largest(value for row in rows for value in row.advantages or ()),
        )


@dataclass(frozen=True)
class _Summary:
    """The figures of one answer, or of all; `relevant` is a share of the labelled tokens."""

    tokens: int
    reward: float
    relevant: float
    advantage: float

    @classmethod
    def of(cls, rows: Sequence[HeatRow]) -> _Summary:
        categories = [category for row in rows for category in row.categories]
        labelled = [category == 2 for category in categories if category]
        return cls(
            len(categories),
            _mean([value for row in rows for value in row.rewards]),
            _mean([float(relevant) for relevant in labelled]),
            _mean([value for row in rows for value in row.advantages or ()]),
        )

    def cells(self) -> list[str]:
        """Tokens, mean reward, share of relevant tokens, mean advantage, as text."""
        share = "–" if math.isnan(self.relevant) else f"{100 * self.relevant:.0f} %"
        return [str(self.tokens), _signed(self.reward), share, _signed(self.advantage)]


HEADINGS = ("Tokens", "Mean reward", "Relevant", "Mean advantage")


def write_heat(
    path: str | os.PathLike[str], rows: Sequence[HeatRow], title: str = "Token heat map"
) -> None:
    """Write the heat map of some answers as one HTML file that loads nothing from elsewhere."""
    write_text(path, heat_html(rows, title))


def heat_html(rows: Sequence[HeatRow], title: str = "Token heat map") -> str:
    """The HTML page: a summary table, a legend, a card for every answer."""
    scale = _Scale.of(rows)
    advantages = any(row.advantages is not None for row in rows)
    cards = "\n".join(_card(index, row, scale) for index, row in enumerate(rows))
    body = f"""<header>
<h1>{_html(title)}</h1>
<p>Every token of an answer with what it was paid: token-level PPO (Ouyang et al., EMNLP 2025).</p>
</header>
{_switch() if advantages else ""}
<main>
{_legend(scale, advantages)}
{_summary_table(rows)}
{cards}
</main>"""
    return page(_visible(title), CSS, body)


def print_heat(
    rows: Sequence[HeatRow], console: Console | None = None, title: str = "Token heat map"
) -> None:
    """Print the heat map of some answers: colours where the terminal has them, signs everywhere."""
    console = console or Console()
    table = Table("Answer", *HEADINGS, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    shown = [(_visible(row.id), _Summary.of([row]).cells()) for row in rows]
    print_rows(console, table, [*shown, ("all", _Summary.of(rows).cells())], total=True)
    scale = _Scale.of(rows)
    for row in rows:
        console.print(Text.assemble((_visible(row.id), "bold"), "  true: "), end="")
        console.print(Text(" · ".join(map(_visible, row.targets))), style="italic")
        console.print(_terminal_tokens(row, scale), "", sep="\n")


def _terminal_tokens(row: HeatRow, scale: _Scale) -> Text:
    """The answer on its background of colours; a small sign follows every rewarded token."""
    text = Text("  ")
    for token, reward in zip(row.tokens, row.rewards, strict=True):
        strength = _strength(reward, scale.reward)
        red, green, blue = (44, 110, 190) if reward > 0 else (190, 90, 10)
        style = f"white on rgb({red},{green},{blue})" if strength > 0.5 else ""
        if 0 < strength <= 0.5:
            style = "bright_blue underline" if reward > 0 else "yellow underline"
        text.append(_visible(token.strip("\n")) or ("" if token else "∎"), style)
        text.append({1: "⁺", -1: "⁻"}.get(_sign(reward), ""))
        text.append("\n  " if "\n" in token else "")
    return text


def _switch() -> str:
    """Two radio buttons that choose what is shown; the style sheet does the rest."""
    return """<input type="radio" name="show" id="show-reward" checked>
<label for="show-reward">Reward</label>
<input type="radio" name="show" id="show-advantage">
<label for="show-advantage">Advantage</label>"""


def _legend(scale: _Scale, advantages: bool) -> str:
    lines = [("reward", scale.reward), ("advantage", scale.advantage)][: 2 if advantages else 1]
    ends = "".join(
        f'<span class="scale {name}-only">{_signed(-top)}<i class="ramp"></i>{_signed(top)}'
        f" {name}</span>"
        for name, top in lines
    )
    marks = "".join(
        f'<span><b class="mark">{mark}</b> {name}</span>'
        for mark, name in zip(_MARKS[1:], CATEGORIES[1:], strict=True)
    )
    return f'<p class="legend">{ends}<span class="marks">{marks}</span></p>'


def _summary_table(rows: Sequence[HeatRow]) -> str:
    head = "".join(f'<th scope="col">{heading}</th>' for heading in ("Answer", *HEADINGS))
    body = "".join(
        f'<tr><th scope="row"><a href="#answer-{index}">{_html(row.id)}</a></th>'
        f"{_cells(_Summary.of([row]))}</tr>\n"
        for index, row in enumerate(rows)
    )
    total = f'<tr><th scope="row">all {len(rows)}</th>{_cells(_Summary.of(rows))}</tr>'
    return f"""<div class="scroll"><table>
<caption>Summary</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
<tfoot>{total}</tfoot>
</table></div>"""


def _cells(summary: _Summary) -> str:
    return "".join(f"<td>{cell}</td>" for cell in summary.cells())


def _card(index: int, row: HeatRow, scale: _Scale) -> str:
    targets = "".join(f"<li>{_html(target)}</li>" for target in row.targets)
    lines = "\n".join(
        f'<ol class="tokens">{"".join(line)}</ol>' for line in _token_lines(row, scale)
    )
    prompt = _html(row.prompt, keep="\n")
    return f"""<article id="answer-{index}" aria-labelledby="title-{index}">
<h2 id="title-{index}">{_html(row.id)}</h2>
<h3>Answer</h3>
{lines}
<h3>True next queries</h3>
<ul class="targets">{targets}</ul>
<details><summary>Prompt</summary><pre>{prompt}</pre></details>
</article>"""


def _token_lines(row: HeatRow, scale: _Scale) -> Iterator[list[str]]:
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


def _token(row: HeatRow, position: int, scale: _Scale) -> str:
    text, reward = row.tokens[position], row.rewards[position]
    category = row.categories[position]
    advantage = None if row.advantages is None else row.advantages[position]
    shown = _visible(text) if text else "∎"
    title = f"token {position + 1}: {shown}, reward {_signed(reward)}, {CATEGORIES[category]}"
    style = f"--r:{_strength(reward, scale.reward):.2f}"
    mark = f"<b>{_MARKS[category]}</b>" if category else ""
    classes = f"t r{_sign(reward)}"
    figures = f'<span class="reward-only">{_signed(reward)}</span>'
    if advantage is not None:
        title += f", advantage {_signed(advantage)}"
        style += f";--a:{_strength(advantage, scale.advantage):.2f}"
        classes += f" a{_sign(advantage)}"
        figures += f'<span class="advantage-only">{_signed(advantage)}</span>'
    return (
        f'<li class="{classes}" style="{style}" title="{escape(title)}" '
        f'aria-label="{escape(title)}"><bdi>{escape(shown)}</bdi>'
        f'<small class="figures" aria-hidden="true">{mark}{figures}</small></li>'
    )


def _html(text: str, keep: str = "") -> str:
    return escape(_visible(text, keep))


def _visible(text: str, keep: str = "") -> str:
    """The text with a visible sign for each character that has none, or that would act on others.

    A joiner inside an emoji stays; control characters and changes of direction do not act.
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


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _signed(value: float) -> str:
    """`+0.50`, `−0.50`, `0.00`; a dash for what is no number."""
    if not math.isfinite(value):
        return "–"
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def _strength(value: float, largest: float) -> float:
    return min(1.0, abs(value) / largest) if math.isfinite(value) and largest > 0 else 0.0


def _largest(values: Iterator[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
