"""What tests read pages with: a parser that wants well-formed markup, and a real browser."""

import html
import json
import re
import subprocess
from html.parser import HTMLParser

import pytest
from browser import chromium as installed_chromium

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), what they hold, and whether they close."""

    VOID = {"meta", "input", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.data = []  # attributes and text of every <data>
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "data":
            self.data.append((dict(attributes), ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))
        if self.open and self.open[-1] == "data":
            self.data[-1] = (self.data[-1][0], self.data[-1][1] + data)

    def all(self, tag, **wanted):
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and wanted.items() <= attributes.items()
        ]

    def held_by(self, tag):
        return [data for path, data in self.texts if path and path[-1] == tag]


def loads_and_runs_nothing(text):
    """Whether a page has no script, no handler, and nothing that a browser would fetch."""
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "use"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert not {"src", "srcset", "data", "action", "xlink:href"} & set(attributes), tag
        assert re.match(r"#|\./(?!/)", attributes.get("href", "#")), attributes
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in text and "@import" not in text and "http" not in style
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    return page


def find_chromium():
    """A Chromium that starts; without one the test is skipped."""
    path = installed_chromium()
    if path is None:
        pytest.skip("no chromium is installed to open the page in")
    return path


def browse(chromium, page, *flags):
    """What a headless Chromium makes of a page: its DOM after everything has run."""
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", *flags]
    profile = page.parent / "profile"
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probed(chromium, folder, text, script, *flags):
    """What a script finds in a page that a browser has opened; it leaves it in `found`."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text).group()
    tell = "document.body.textContent = JSON.stringify(found);"
    probe = f"<script>addEventListener('load', () => {{{script}\n{tell}}});</script></body>"
    page = folder / "probed.html"
    page.write_text(text.replace(policy, "").replace("</body>", probe), encoding="utf-8")
    dom = browse(chromium, page, *flags)
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", dom, re.DOTALL).group(1)))


def contrast(a, b):
    """WCAG 2's contrast ratio of two sRGB colours."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance([c / 255 for c in a]), luminance([c / 255 for c in b])))[::-1]
    return (high + 0.05) / (low + 0.05)


DARK = "--blink-settings=preferredColorScheme=0"
RGB = """
const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgb(color) {
  context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
  return Array.from(context.getImageData(0, 0, 1, 1).data.slice(0, 3));
}"""
