"""Pictures of the pages for labelling by hand, in a real browser, to be looked at.

    python tests/tppo/hand_pictures.py [--out build/hand-pictures]     make hand-pictures
    python tests/tppo/hand_pictures.py --docs                          the two of docs/pictures

Words and pairs at 1400 and 390 px, light and dark, with help open, with texts from right to left,
in scripts without spaces, and hostile ones.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import Browser, browser, chromium
from test_hand import HOSTILE, served

from tppo.labels.config import HandConfig
from tppo.labels.hand import HandLabels, HandPairs
from tppo.labels.words import word_spans
from tppo.sessions.session import Event, Session
from tppo.stages.answer_pairs import AnswerPair
from tppo.stages.answers import Answer
from tppo.stages.hand.desk import Desk
from tppo.stages.hand.forms import PairForm, WordForm
from tppo.stages.hand.pairs import PairDesk

DOCS = Path(__file__).parents[2] / "docs/pictures"
HISTORY = [
    ("search", "running shoes"), ("click", "Trail running shoes for wet ground, size 42"),
    ("search", "waterproof trail shoes"), ("search", "gaiters for trail running"),
    ("click", "The ten best gaiters of this year"),
]  # fmt: skip
ANSWERS = {
    "plain": ["trail running shoes waterproof\nrunning gaiters size 42\nred evening dress",
              "waterproof socks running\ntrail shoes sale\nmountain running race calendar"],
    "right-to-left": ["נעלי ריצה אדומות\nנעלי ריצה, מידה 42\nshoes for running",
                      "أحذية الجري الحمراء\nجوارب مقاومة للماء"],
    "no-spaces": ["海鲜上海餐厅推荐\n上海外滩附近的海鲜\n東京のラーメン屋",
                  "รองเท้าวิ่งเทรล\nถุงเท้ากันน้ำ"],
    "hostile": [f"{HOSTILE}\x00\x1b[2J\n{'long' * 40}\nbuy", f"{'y' * 5000}\n<b>bold</b>"],
}  # fmt: skip


class Teacher:
    """A model of the labels so far that has learnt something."""

    learnt = 20

    def learn(self, judged: object) -> None:
        """Nothing more."""

    def foretell(self, id: str) -> tuple[float, ...]:
        """Of so many words."""
        return (0.9, 0.8, 0.9, 0.7, 0.2, 0.9, 0.8, 0.9) * 15

    def doubt(self, id: str) -> float:
        """The same of all."""
        return 0.5


def main(out: Path) -> int:
    """Draw them all."""
    program = chromium()
    assert program is not None, "no chromium is installed"
    out.mkdir(parents=True, exist_ok=True)
    profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # it still writes at its end
    with profile as folder, browser(program, Path(folder)) as page:
        if out == DOCS:
            for form in ("words", "pairs"):
                picture(page, form, "plain", out / f"{form}.webp", width=1000, height=560)
            return 0
        for kind in ANSWERS:
            for width in (1400, 390):
                for dark in (False, True):
                    if kind != "plain" and dark == (width == 1400):
                        continue  # the others once wide and light, once narrow and dark
                    shade = "dark" if dark else "light"
                    for form in ("words", "pairs"):
                        file = out / f"{form}-{kind}-{width}-{shade}.png"
                        picture(page, form, kind, file, width=width, dark=dark)
                        print(file)
    return 0


def picture(
    page: Browser, form: str, kind: str, file: Path, *, width: int, height: int = 900,
    dark: bool = False,
) -> None:
    """One page, a part of its words judged; of plain texts with help open beside."""
    with tempfile.TemporaryDirectory() as folder:
        made = words_of(kind, Path(folder)) if form == "words" else pairs_of(kind, Path(folder))
        with served(made) as server:
            page.open(server.address, width=width, height=height, dark=dark)
            page.wait("item && !busy")
            if form == "words":
                page.run("set([0, 1, 2], 1); set([3], 0); go(4)")
            page.picture(file)
            if kind == "plain" and not dark and file.suffix == ".png":
                page.run("help()")
                page.picture(file.with_stem(f"{file.stem}-help"))


def session_of(kind: str) -> Session:
    """A history of some length, with a hostile event where texts are."""
    events = HISTORY + ([("click", HOSTILE), ("search", "z" * 10_000)] if kind == "hostile" else [])
    history = tuple(Event(type, text) for type, text in events)  # type: ignore[arg-type]
    return Session("s", "u", "test", ("lives in Oslo",), history, ("trail shoes", "gaiters"))


def words_of(kind: str, folder: Path) -> WordForm:
    """A desk where thirty answers are judged, and a model agrees on some words."""
    texts = ANSWERS[kind]
    answers = [Answer(f"s{i}#0", "s", [1], [2], "eos", texts[0]) for i in range(60)]
    desk = Desk(answers, lambda answer: session_of(kind), HandLabels(folder / "a.jsonl"),
                HandConfig(), 0)  # fmt: skip
    desk.taught_by(Teacher())
    for _ in range(30):
        item = desk.next("a", "me")
        assert item is not None
        count = len(word_spans(item.answer.text))
        desk.judge("a", "me", item.id, [1, 0, 1] * 40 if count == 120 else [1] * count, 1)
    desk.model_changed()
    progress = desk.progress()
    desk.progress = lambda: progress | {"seconds": 11.0}  # type: ignore[method-assign]
    return WordForm(desk, 0.6)


def pairs_of(kind: str, folder: Path) -> PairForm:
    """A desk with one pair."""
    one, two = (Answer(f"s#{k}", "s", [1], [2, k], "eos", ANSWERS[kind][k]) for k in (0, 1))
    desk = PairDesk([AnswerPair("s~0", one, two, (1, 1))], lambda pair: session_of(kind),
                    HandPairs(folder / "a.jsonl"), HandConfig(), 0)  # fmt: skip
    return PairForm(desk)


if __name__ == "__main__":
    given = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "build/hand-pictures"
    sys.exit(main(DOCS if "--docs" in sys.argv else Path(given)))
