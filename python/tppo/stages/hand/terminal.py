"""Labels by hand in the terminal, with the keys of the page."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tppo.errors import DataError
from tppo.evaluation.page import visible
from tppo.stages.hand.asking import Asking
from tppo.stages.hand.desk import Item, whole
from tppo.stages.hand.forms import WordForm
from tppo.stopping import Stopped

CLIENT = "terminal"
KEYS = {b"\x1b[A": "up", b"\x1b[B": "down", b"\x1b[C": "right", b"\x1b[D": "left",
        b"\x1bOA": "up", b"\x1bOB": "down", b"\x1bOC": "right", b"\x1bOD": "left",
        b"\r": "enter", b"\n": "enter", b" ": " "}  # fmt: skip
HELP = (
    "1, 0: wanted, not wanted, and on to the next word   Space: turn round   arrows: another word\n"
    "+, -: the whole query is wanted, is not wanted   a: turn the answer as a whole round\n"
    "Enter: keep, and the next   u: take the last one back   s: leave out   q: stop labelling"
)
CLEAR, INVERSE, PLAIN = "\x1b[2J\x1b[H", "\x1b[7m", "\x1b[0m"
MARKS = {1: "\u2713", 0: "\u2717", -1: "?"}


Keys = Iterator[str]


def label_in_terminal(form: WordForm) -> None:
    """Ask until enough is labelled or the person ends it.

    Errors: DataError where standard input is no terminal.
    """
    in_terminal(lambda keys: _Asker(form, keys).run())


def in_terminal(ask: Callable[[Keys], None]) -> None:
    """Ask by keys; the terminal is as before behind it.

    Errors: DataError where standard input is no terminal.
    """
    if not sys.stdin.isatty():
        raise DataError("--label.hand.terminal was given and the standard input is no terminal, "
                        "expected one; without it a page in the browser asks")  # fmt: skip
    try:
        with _keys() as keys:
            ask(keys)
    except Stopped as stop:
        raise Stopped(stop.signum, "what was judged is kept") from None


@contextmanager
def _keys() -> Iterator[Keys]:
    """The keys that are pressed, one by one; the terminal is as before behind the block."""
    import termios  # there is none on Windows
    import tty

    place = sys.stdin.fileno()
    before = termios.tcgetattr(place)

    def pressed() -> Keys:
        while data := os.read(place, 64):  # several where somebody is quick
            while data:
                size = 3 if data[:1] == b"\x1b" else 1
                yield KEYS.get(data[:size]) or data[:size].decode("utf-8", "replace")
                data = data[size:]

    try:
        tty.setcbreak(place)
        yield pressed()
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)


class _Asker:
    """One person at a terminal."""

    def __init__(self, form: WordForm, keys: Keys) -> None:
        self.form, self.desk, self.keys = form, form.desk, keys
        self.me, self.note = form.desk.config.annotator, ""

    def run(self) -> None:
        """Show answers and take what is pressed."""
        item, words, given = self._next()
        place = 0
        while item is not None:
            texts = self.form.shown(item)
            sentence = whole(words, self.form.threshold) if given is None else given
            self._draw(texts, words, place, sentence)
            key = next(self.keys, "q")
            self.note = ""
            line = _line_of(texts["lines"], place)
            if key in "10":
                words[place] = int(key)
                place = min(place + 1, len(words) - 1)
            elif key in "+-":
                for i in line:
                    words[i] = int(key == "+")
                place = min(line[-1] + 1, len(words) - 1)
            elif key == " ":
                words[place] = int(words[place] != 1)
            elif key in ("left", "right"):
                place = max(0, min(len(words) - 1, place + (1 if key == "right" else -1)))
            elif key in ("up", "down"):
                place = _other_line(texts["lines"], place, 1 if key == "down" else -1)
            elif key == "a":
                given = 1 - sentence
            elif key == "q":
                return
            elif key in ("enter", "s", "u"):
                item, words, given = self._act(key, item, words, given, sentence)
                place = 0

    def _act(
        self, key: str, item: Item, words: list[int], given: int | None, sentence: int
    ) -> tuple[Item | None, list[int], int | None]:
        """What is on the screen after Enter, s or u."""
        id = item.answer.id
        try:
            if key == "enter":
                self.desk.judge(CLIENT, self.me, id, words, sentence)
            elif key == "s":
                self.desk.skip(CLIENT, self.me, id)
            else:
                found = self.desk.undo(CLIENT, self.me)
                if found is None:
                    raise ValueError("there is nothing of yours to take back")
                return found[0], list(found[1].words), found[1].sentence
        except ValueError as error:
            self.note = str(error)
            return item, words, given
        return self._next()

    def _next(self) -> tuple[Item | None, list[int], int | None]:
        item = self.desk.next(CLIENT, self.me)
        n = 0 if item is None else len(self.form.shown(item)["texts"])
        return item, [-1] * n, None

    def _draw(self, texts: dict[str, Any], words: list[int], place: int, sentence: int) -> None:
        lines = lines_above(self.desk, texts)
        for number, line in enumerate(texts["lines"], 1):
            pieces = [visible(part["text"]) if part["word"] is None
                      else _word(visible(part["text"]), words[part["word"]], part["word"] == place)
                      for part in line]  # fmt: skip
            lines.append(f"  {number}  " + " ".join(pieces))
        verdict = "wanted" if sentence else "not wanted"
        lines += ["", f"  The answer as a whole: {verdict}", "", HELP, self.note]
        print(CLEAR + "\n".join(lines), flush=True)


def lines_above(desk: Asking[Any, Any], texts: dict[str, Any]) -> list[str]:
    """What stands above the answers: how far the work is, by what is judged, the history."""
    progress = desk.progress()
    lines = [f"{progress['labelled']} of {progress['wanted']}. {desk.guidance}"]
    if (agreed := progress.get("agreement")) is not None:
        lines.append(f"A model of your labels agrees with you on {agreed['share']:.0%} of "
                     f"{agreed['words']} words that it did not learn from.")  # fmt: skip
    lines.append("")
    lines += [f"  {visible(line)}" for line in texts["history"]]
    lines += [f"  (next in truth: {visible(line)})" for line in texts["targets"] or ()]
    return [*lines, ""]


def _word(text: str, value: int, here: bool) -> str:
    drawn = f"{MARKS[value]}{text}"
    return f"{INVERSE}{drawn}{PLAIN}" if here else drawn


def _words_of(lines: list[list[dict[str, Any]]]) -> list[list[int]]:
    found = [[part["word"] for part in line if part["word"] is not None] for line in lines]
    return [line for line in found if line]


def _line_of(lines: list[list[dict[str, Any]]], place: int) -> list[int]:
    return next(line for line in _words_of(lines) if place in line)


def _other_line(lines: list[list[dict[str, Any]]], place: int, by: int) -> int:
    found = _words_of(lines)
    here = next(i for i, line in enumerate(found) if place in line)
    return found[max(0, min(len(found) - 1, here + by))][0]
