"""The pages on a log of one's own and on labels by hand: their commands, session and pictures."""

import re
import shlex
from pathlib import Path

import pytest

from tppo.cli import main
from tppo.commands import _parse

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("your-own-log.md", "label-by-hand.md")


def commands(page):
    """The commands in the blocks of a page."""
    lines, kind = [], None  # kind: of the block that a line is in
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("```"):
            kind = line[3:] or "bash" if kind is None else None
        elif kind == "bash":
            lines.append(line)
    for line in lines:
        if line.startswith("tppo "):
            yield shlex.split(line.partition(" (or")[0].replace(" ...", " x"), comments=True)[1:]


@pytest.mark.parametrize("page", PAGES)
def test_the_flags_of_the_commands_are_taken(page):
    found = list(commands(page))
    assert len(found) >= 5
    for command, *rest in found:
        if [command, *rest][:2] not in (["data", "inspect"], ["answer", "--out"]):
            _parse(command, rest)  # ends the process where a flag is not one
    with pytest.raises(SystemExit):
        _parse("prefer", ["--label.hand.pair", "3"])


def test_the_session_of_the_page_is_read_as_it_says(tmp_path, capsys):
    text = (DOCS / "your-own-log.md").read_text()
    (line,) = [line for line in text.splitlines() if '"targets"' in line]
    (tmp_path / "log.jsonl").write_text(line + "\n")
    first = next(commands("your-own-log.md"))
    assert first == ["data", "inspect", "log.jsonl"]
    main([*first[:2], str(tmp_path / "log.jsonl")])
    shown = capsys.readouterr().out
    assert "repeat last query" in shown and "waterproof jacket review" in shown


def test_pictures_are_small_and_all_are_shown():
    shown = {name for page in DOCS.glob("*.md")
             for name in re.findall(r"\]\(pictures/([^)]*)\)", page.read_text())}  # fmt: skip
    there = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    assert shown == there.keys() and max(there.values()) < 60_000
