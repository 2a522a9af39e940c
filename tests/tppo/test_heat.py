"""The heat map: what stands in the page, and that a real browser shows it."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tppo.evaluation.heat import HeatRow, heat_html, print_heat, write_heat

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"

ROWS = [
    HeatRow(
        "u1/0",
        "search: boots\nnext 2:\n",
        ["red", " shoes", "\n", " h", "at", ""],
        [0.5, 0.25, 0.0, -0.5, -0.5, 0.0],
        [2, 2, 0, 1, 1, 0],
        [1.0, -2.0, 0.5, -0.25, 0.0, 0.125],
        ["red shoes", "socks"],
    ),
    HeatRow(
        HOSTILE,
        f"search: {HOSTILE}</pre></script>\n&lt; \u202e\x00",
        [HOSTILE, "</li>", "&amp;", '"', "\u202e", "👩\u200d💻", "café", "\t"],
        [-0.1, 0.1, float("nan"), float("inf"), 0.0, 0.001, -0.001, 0.2],
        [1, 2, 0, 0, 0, 2, 1, 0],
        None,
        [HOSTILE],
    ),
]


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), what they hold, and whether they close."""

    VOID = {"meta", "input", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))

    def all(self, tag, **wanted):
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and wanted.items() <= attributes.items()
        ]

    def held_by(self, tag):
        return [data for path, data in self.texts if path and path[-1] == tag]


def test_every_token_says_what_it_is():
    page = Page(heat_html(ROWS, "A title"))
    titles = [attributes["title"] for attributes in page.all("li") if "title" in attributes]
    assert titles[:6] == [
        "token 1: red, reward +0.50, relevant, advantage +1.00",
        "token 2:  shoes, reward +0.25, relevant, advantage −2.00",
        "token 3: ⏎, reward 0.00, none, advantage +0.50",
        "token 4:  h, reward −0.50, irrelevant, advantage −0.25",
        "token 5: at, reward −0.50, irrelevant, advantage 0.00",
        "token 6: ∎, reward 0.00, none, advantage +0.12",
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
        "t r1 a1",
        "t r1 a-1",
        "t r0 a1",
        "t r-1 a-1",
        "t r-1 a0",
        "t r0 a1",
    ]
    assert tokens[0]["style"] == "--r:1.00;--a:0.50"
    assert tokens[1]["style"] == "--r:0.50;--a:1.00"
    assert len(page.all("ol", **{"class": "tokens"})) == 2  # a line for each query


def test_the_page_loads_nothing_and_runs_nothing():
    text = heat_html(ROWS, f"T {HOSTILE}")
    page = Page(text)
    assert not page.all("script") and not page.all("img") and not page.all("link")
    addresses = [a.get("src", a.get("href", "#")) for _, a in page.elements]
    assert all(address.startswith("#") for address in addresses)
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert "url(" not in text and "@import" not in text and "http" not in text.split("<style>")[1]
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert page.held_by("h1") == [f"T {HOSTILE}"]
    assert HOSTILE in "".join(page.held_by("pre"))
    assert "\u202e" not in text and "\x00" not in text


def test_the_summary_counts():
    page = Page(heat_html(ROWS))
    cells = page.held_by("td")
    # mean reward (.5 + .25 - 1) / 6, two of four labelled tokens relevant, mean advantage -.625 / 6
    assert cells[:4] == ["6", "−0.04", "50 %", "−0.10"]
    assert cells[4:8] == ["8", "+0.03", "50 %", "–"]
    assert cells[8:12] == ["14", "0.00", "50 %", "−0.10"]
    for attributes in page.all("a"):
        assert page.all("article", id=attributes["href"].removeprefix("#"))


def test_no_switch_without_advantages_and_no_rows_at_all():
    assert not Page(heat_html(ROWS[1:])).all("input")
    assert len(Page(heat_html(ROWS)).all("input")) == 2
    assert Page(heat_html([])).held_by("td") == ["0", "–", "–", "–"]


def test_write_is_whole(tmp_path):
    write_heat(tmp_path / "heat.html", ROWS)
    assert os.listdir(tmp_path) == ["heat.html"]
    assert (tmp_path / "heat.html").read_text(encoding="utf-8") == heat_html(ROWS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rewards", [0.0]), ("categories", [0]), ("advantages", [1.0, 2.0])],
)
def test_lengths_that_differ_are_named(field, value):
    fields = {**vars(ROWS[0]), field: value}
    with pytest.raises(ValueError, match=rf"{field} of row 'u1/0' had {len(value)} .* token, 6"):
        HeatRow(**fields)
    with pytest.raises(ValueError, match="categories of row 'u1/0' were .*3.*expected 0-2"):
        HeatRow(**{**vars(ROWS[0]), "categories": [0, 0, 0, 0, 0, 3]})


def test_the_terminal_shows_signs_without_colours():
    console = Console(width=100, no_color=True, record=True, file=open(os.devnull, "w"))
    with console.file:
        print_heat(ROWS, console)
        text = console.export_text()
    assert "  red⁺ shoes⁺\n   h⁻at⁻∎\n" in text
    assert "red shoes · socks" in text
    assert HOSTILE in text and "\u202e" not in text and "\x1b" not in text
    assert re.search(r"all +│ +14 │ +0.00 │ +50 % │ +−0.10", text)


@pytest.fixture(scope="module")
def chromium():
    """A Chromium that starts; some systems have only a stub that asks to install one."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None or subprocess.run([path, "--version"], capture_output=True).returncode:
        pytest.skip("no chromium is installed to open the page in")
    return path


PROBE = """<script>
const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgb(color) {
  context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
  return Array.from(context.getImageData(0, 0, 1, 1).data.slice(0, 3));
}
function look() {
  return Array.from(document.querySelectorAll(".t"), token => ({
    title: token.title, back: rgb(getComputedStyle(token).backgroundColor),
    ink: rgb(getComputedStyle(token).color), shown: token.innerText.split(/\\s*\\n\\s*/),
    inside: token.scrollWidth <= token.clientWidth}));
}
const found = {title: document.title, page: rgb(getComputedStyle(document.body).backgroundColor),
  reward: look(), images: document.images.length};
document.querySelector("label[for=show-advantage]").click();
found.advantage = look();
found.wide = document.documentElement.scrollWidth > innerWidth;
document.body.textContent = JSON.stringify(found);
</script>"""


def browse(chromium, page, *flags):
    """What a headless Chromium makes of a page: its DOM after everything has run."""
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", *flags]
    profile = page.parent / "profile"
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contrast(a, b):
    """WCAG 2's contrast ratio of two sRGB colours."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance([c / 255 for c in a]), luminance([c / 255 for c in b])))[::-1]
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_browser_shows_it(chromium, tmp_path, mode):
    page = tmp_path / "heat.html"
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', heat_html(ROWS)).group()
    probed = heat_html(ROWS, "A title").replace(policy, "").replace("</body>", PROBE + "</body>")
    page.write_text(probed, encoding="utf-8")
    flags = ["--window-size=480,900"]
    flags += ["--blink-settings=preferredColorScheme=0"] if mode == "dark" else []
    dom = browse(chromium, page, *flags)
    body = re.search(r"<body>(.*)</body>", dom, re.DOTALL).group(1)
    found = json.loads(html.unescape(body))
    assert found["title"] == "A title" and found["images"] == 0 and not found["wide"]
    assert (sum(found["page"]) < 200) == (mode == "dark")
    assert len(found["reward"]) == 14
    assert found["reward"][0]["shown"] == ["red", "✓", "+0.50"]
    assert found["advantage"][1]["shown"] == [" shoes", "✓", "−2.00"]
    for token in found["reward"] + found["advantage"]:
        assert contrast(token["back"], token["ink"]) >= 4.5, token
        assert token["inside"], token
    red, shoes, line, hat = (found["reward"][i]["back"] for i in (0, 1, 2, 3))
    assert red[2] > red[0] and hat[0] > hat[2]  # blue pays, orange costs
    assert line[2] - line[0] < shoes[2] - shoes[0] < red[2] - red[0]  # half the reward, less blue
    assert found["advantage"][1]["back"][0] > found["advantage"][1]["back"][2]


def test_hostile_text_does_nothing_in_a_browser(chromium, tmp_path):
    page = tmp_path / "heat.html"
    write_heat(page, ROWS, "A title")
    dom = browse(chromium, page)
    assert "<title>A title</title>" in dom
    assert "<img" not in dom and "<script" not in dom
