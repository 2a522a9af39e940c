"""The heat map: what stands in the page, and that a real browser shows it."""

import os
import re

import pytest
from pages import DARK, HOSTILE, RGB, Page, browse, contrast, find_chromium, loads_and_runs_nothing
from pages import probed as probed_page
from rich.console import Console

from tppo.evaluation.heat import HeatRow, heat_html, print_heat

ROWS = [
    HeatRow(
        "u1/0",
        "search: boots\nnext 2:\n",
        ["red", " shoes", "\n", " h", "at", ""],
        [0.5, 0.25, 0.0, -0.5, -0.5, 0.0],
        [2, 2, 0, 1, 1, 0],
        [1.0, -2.0, 0.5, -0.25, 0.0, 0.125],
        ["red shoes", "socks"],
        "sft",
        [0.5, 0.0, -0.75, 0.25, 0.25, 0.0],
        {"relevance": 0, "words": 0.5},
    ),
    HeatRow(
        HOSTILE,
        f"search: {HOSTILE}</pre></script>\n&lt; \u202e\x00",
        [HOSTILE, "</li>", "&amp;", '"', "\u202e", "👩\u200d💻", "café", "\t"],
        [-0.1, 0.1, float("nan"), float("inf"), 0.0, 0.001, -0.001, 0.2],
        [1, 2, 0, 0, 0, 2, 1, 0],
        None,
        [HOSTILE],
        HOSTILE,
    ),
]


def test_every_token_says_what_it_is():
    page = Page(heat_html(ROWS, "A title"))
    titles = [attributes["title"] for attributes in page.all("li") if "title" in attributes]
    assert titles[:6] == [
        "token 1: red, reward +0.50, relevant, value +0.50, advantage +1.00",
        "token 2:  shoes, reward +0.25, relevant, value 0.00, advantage −2.00",
        "token 3: ⏎, reward 0.00, none, value −0.75, advantage +0.50",
        "token 4:  h, reward −0.50, irrelevant, value +0.25, advantage −0.25",
        "token 5: at, reward −0.50, irrelevant, value +0.25, advantage 0.00",
        "token 6: ∎, reward 0.00, none, value 0.00, advantage +0.12",
    ]
    assert titles[6] == f"token 1: {HOSTILE}, reward −0.10, irrelevant"
    assert titles[8:11] == [
        "token 3: &amp;, reward –, none",
        'token 4: ", reward –, none',
        "token 5: \\u202e, reward 0.00, none",
    ]
    assert titles[11].startswith("token 6: 👩\u200d💻, reward 0.00")
    for attributes in page.all("li"):
        assert attributes.get("aria-label") == attributes.get("title")


def test_colour_strength_and_sign_follow_the_values():
    page = Page(heat_html(ROWS[:1]))
    tokens = [attributes for attributes in page.all("li") if "title" in attributes]
    assert [token["class"] for token in tokens] == [
        "t r1 v1 a1",
        "t word r1 v0 a-1",  # a gap stands before it, and its text in the middle of its box
        "t r0 v-1 a1",
        "t word r-1 v1 a-1",
        "t r-1 v1 a0",
        "t r0 v0 a1",
    ]
    assert tokens[0]["style"] == "--r:1.00;--v:0.67;--a:0.50"
    assert tokens[1]["style"] == "--r:0.50;--v:0.00;--a:1.00"
    assert len(page.all("ol", **{"class": "tokens"})) == 2  # a line for each query


def test_the_page_loads_nothing_and_runs_nothing():
    text = heat_html(ROWS, f"T {HOSTILE}")
    page = loads_and_runs_nothing(text)
    assert page.held_by("h1") == [f"T {HOSTILE}"]
    assert HOSTILE in "".join(page.held_by("pre"))
    assert "\u202e" not in text and "\x00" not in text


def row(name, tokens, rewards, categories):
    return HeatRow("u1", "p", tokens, rewards, categories, None, ["a"], name)


def test_the_summary_compares_those_that_answered():
    rows = [
        row("SFT", ["a", "b"], [0.5, -0.5], [2, 1]),
        row("TPPO", ["a", "b", ""], [0.5, 0.25, 0.0], [2, 2, 0]),
        row("SFT", ["c"], [-0.5], [1]),
        row("TPPO", ["c"], [0.5], [2]),
    ]
    page = Page(heat_html(rows))
    # SFT: -.5 over three tokens and two answers, one of three is relevant
    assert page.held_by("td") == [
        "3", "−0.17", "−0.25", "33 %", "4", "+0.31", "+0.62", "100 %",
        "+1", "+0.48", "+0.88", "+67 points",
    ]  # fmt: skip
    assert page.held_by("th")[-3:] == ["SFT", "TPPO", "TPPO less SFT"]
    assert len(page.all("article")) == 1  # four answers to one question stand side by side


def test_no_switch_without_advantages_and_no_rows_at_all():
    assert not Page(heat_html(ROWS[1:])).all("input")
    assert [x["id"] for x in Page(heat_html(ROWS)).all("input")] == [
        "show-reward", "show-value", "show-advantage"]  # fmt: skip
    assert Page(heat_html([])).held_by("td") == ["0", "–", "–", "–"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rewards", [0.0]), ("categories", [0]), ("advantages", [1.0, 2.0]), ("values", [])],
)
def test_lengths_that_differ_are_named(field, value):
    fields = {**vars(ROWS[0]), field: value}
    with pytest.raises(ValueError, match=rf"{field} of row 'u1/0' had {len(value)} .* token, 6"):
        HeatRow(**fields)
    with pytest.raises(ValueError, match="categories of row 'u1/0' were .*3.*expected 0-2"):
        HeatRow(**{**vars(ROWS[0]), "categories": [0, 0, 0, 0, 0, 3]})


def test_the_terminal_shows_signs_without_colours():
    console = Console(width=160, no_color=True, record=True, file=open(os.devnull, "w"))
    with console.file:
        print_heat(ROWS, console)
        text = console.export_text()
    assert "  red⁺ shoes⁺\n   h⁻at⁻∎\n" in text
    assert "red shoes · socks" in text and "u1/0 sft" in text
    assert HOSTILE in text and "\u202e" not in text and "\x1b" not in text
    assert re.search(r"all sft +│ +6 │ +−0.04 │ +−0.25 │ +50 % ", text)


LOOK = """
function look() {
  return Array.from(document.querySelectorAll(".t"), token => {
    const text = document.createRange(); text.selectNodeContents(token.querySelector("bdi"));
    const box = token.getBoundingClientRect(), inner = text.getBoundingClientRect();
    return {title: token.title, back: rgb(getComputedStyle(token).backgroundColor),
      ink: rgb(getComputedStyle(token).color), shown: token.innerText.split(/\\s*\\n\\s*/),
      off: (inner.left + inner.right - box.left - box.right) / 2,
      inside: token.scrollWidth <= token.clientWidth};
  });
}
const found = {title: document.title, page: rgb(getComputedStyle(document.body).backgroundColor),
  reward: look(), images: document.images.length};
document.querySelector("label[for=show-value]").click();
found.value = look();
document.querySelector("label[for=show-advantage]").click();
found.advantage = look();
found.wide = document.documentElement.scrollWidth > innerWidth;
"""


@pytest.fixture(scope="module")
def chromium():
    return find_chromium()


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_browser_shows_it(chromium, tmp_path, mode):
    flags = ["--window-size=480,900", *([DARK] if mode == "dark" else [])]
    found = probed_page(chromium, tmp_path, heat_html(ROWS, "A title"), RGB + LOOK, *flags)
    assert found["title"] == "A title" and found["images"] == 0 and not found["wide"]
    assert (sum(found["page"]) < 200) == (mode == "dark")
    assert len(found["reward"]) == 14
    assert found["reward"][0]["shown"] == ["red", "✓", "+0.50"]
    assert found["value"][2]["shown"] == ["⏎", "−0.75"]
    assert found["advantage"][1]["shown"] == ["shoes", "✓", "−2.00"]
    for token in found["reward"] + found["value"] + found["advantage"]:
        assert contrast(token["back"], token["ink"]) >= 4.5, token
        assert token["inside"] and abs(token["off"]) < 1, token  # in the middle of its box
    red, shoes, line, hat = (found["reward"][i]["back"] for i in (0, 1, 2, 3))
    assert red[2] > red[0] and hat[0] > hat[2]  # blue pays, orange costs
    assert line[2] - line[0] < shoes[2] - shoes[0] < red[2] - red[0]  # half the reward, less blue
    assert found["advantage"][1]["back"][0] > found["advantage"][1]["back"][2]
    assert found["value"][2]["back"][0] > found["value"][2]["back"][2]


def test_hostile_text_does_nothing_in_a_browser(chromium, tmp_path):
    page = tmp_path / "heat.html"
    page.write_text(heat_html(ROWS, "A title"), encoding="utf-8")
    dom = browse(chromium, page)
    assert "<title>A title</title>" in dom
    assert "<img" not in dom and "<script" not in dom
