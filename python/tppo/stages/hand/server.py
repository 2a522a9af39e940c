"""The page for labelling by hand, served to the browsers of this machine that know its key."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import unicodedata
import webbrowser
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tppo.errors import short
from tppo.labels.hand import Judged
from tppo.labels.words import word_spans
from tppo.progress import say
from tppo.sessions.prompts import history_lines
from tppo.stages.hand.desk import Desk, Item
from tppo.stages.hand.page import POLICY, label_page
from tppo.stages.local_http import ADDRESS, LocalHandler, LocalServer, Refused
from tppo.stopping import Stopped

SHOWN = 2_000  # characters of one event of a history, or of one piece of an answer
HEADER = "X-Tppo-Key"


class LabelServer(LocalServer):
    """The server of one labelling; `address` opens its page."""

    def __init__(self, desk: Desk, port: int, threshold: float) -> None:
        super().__init__(port, _Handler, "--label.hand.port")
        self.desk, self.threshold, self.key = desk, threshold, secrets.token_urlsafe(16)
        self.address = f"http://{ADDRESS}:{self.port}/?key={self.key}"

    def finish(self) -> None:
        """End `serve_forever`, from a thread of a request."""
        threading.Thread(target=self.shutdown, daemon=True).start()


def label_in_browser(desk: Desk, port: int, threshold: float, *, browser: bool) -> None:
    """Serve the page until enough is labelled or the person ends it."""
    with LabelServer(desk, port, threshold) as server:
        say(f"label: open {server.address} in a browser of this machine and judge "
            f"{desk.config.answers} answers ({desk.count()} are judged); each is kept at once, and "
            "Ctrl-C ends without loss")  # fmt: skip
        if browser and has_screen():
            webbrowser.open(server.address)
        try:
            server.serve_forever(poll_interval=0.2)
        except Stopped as stop:
            raise Stopped(stop.signum, "what was judged is kept") from None


def has_screen() -> bool:
    """Whether a browser with windows can be opened; one in the terminal would take it."""
    return sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


class _Handler(LocalHandler):
    """One connection."""

    server: LabelServer
    policy = POLICY

    def get(self, path: str) -> None:
        """The page, for whoever has the key."""
        if path != "/":
            raise Refused(404, f"nothing at {path!r}, expected /")
        given = parse_qs(urlsplit(self.path).query).get("key", [""])[0]
        self._check_key(given, "the address that `tppo label` printed, with its key")
        config = self.server.desk.config
        page = label_page(config.annotator, self.server.desk.guidance)
        self.send(200, page.encode(), "text/html; charset=utf-8")

    def post(self, path: str) -> None:
        """What a person does on the page."""
        acts = {
            "/next": self._next, "/label": self._label, "/undo": self._undo, "/skip": self._skip,
            "/guidance": self._guidance, "/finish": self._finish,
        }  # fmt: skip
        if path not in acts:
            raise Refused(404, f"nothing at {path!r}, expected one of {', '.join(acts)}")
        self._check_key(self.headers.get(HEADER) or "", f"the key of this labelling in {HEADER}")
        body = self.body()
        if not isinstance(body, dict):
            raise Refused(400, f"the body was {short(body)}, expected a JSON object")
        try:
            self.send_json(200, acts[path](_Given(body)))
        except ValueError as error:
            raise Refused(400, str(error)) from None

    def _check_key(self, given: str, expected: str) -> None:
        if not secrets.compare_digest(given.encode(), self.server.key.encode()):
            raise Refused(403, f"the key is missing or wrong, expected {expected}",
                          code="key_refused")  # fmt: skip

    def _next(self, given: _Given) -> dict[str, Any]:
        desk = self.server.desk
        client, annotator = given.person()
        if given.values.get("fresh") is True:
            desk.leave(client)
        return self._shown(desk.next(client, annotator))

    def _label(self, given: _Given) -> dict[str, Any]:
        client, annotator = given.person()
        words, sentence = given.values.get("words"), given.values.get("sentence")
        if not isinstance(words, list) or not all(type(word) is int for word in words):
            raise ValueError(f"words were {short(words)}, expected a list of -1, 0, 1")
        if type(sentence) is not int:
            raise ValueError(f"sentence was {short(sentence)}, expected 0 or 1")
        self.server.desk.judge(client, annotator, given.text("id"), words, sentence)
        return self._next(given)

    def _skip(self, given: _Given) -> dict[str, Any]:
        self.server.desk.skip(*given.person(), given.text("id"))
        return self._next(given)

    def _undo(self, given: _Given) -> dict[str, Any]:
        found = self.server.desk.undo(*given.person())
        if found is None:
            raise ValueError("there is nothing of yours to take back")
        return self._shown(*found)

    def _guidance(self, given: _Given) -> dict[str, Any]:
        self.server.desk.guidance = given.text("text", 2_000)
        return {}

    def _finish(self, given: _Given) -> dict[str, Any]:
        if not self.server.desk.count():
            raise ValueError("nothing is judged yet, expected one answer or more")
        self.server.finish()
        return {}

    def _shown(self, item: Item | None, before: Judged | None = None) -> dict[str, Any]:
        desk = self.server.desk
        found: dict[str, Any] = {"item": None, "progress": desk.progress()}
        if item is not None:
            found["item"] = shown(item, desk.config.show_targets) | {
                "threshold": self.server.threshold
            }
        if before is not None:
            found |= {"words": list(before.words), "sentence": before.sentence}
        return found


class _Given:
    """What a page has sent."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def text(self, name: str, most: int = 200) -> str:
        """A field that is a text.  Errors: ValueError naming it."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip() or len(value) > most:
            raise ValueError(f"{name} was {short(value)}, expected a text of at most {most} "
                             "characters")  # fmt: skip
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} was {short(value)}, expected a text that UTF-8 can hold"
                             ) from None  # fmt: skip
        return value

    def person(self) -> tuple[str, str]:
        """The tab, and who sits before it."""
        return self.text("client"), self.text("annotator").strip()


def shown(item: Item, targets: bool) -> dict[str, Any]:
    """An item as the page draws it: lines of pieces, of which some are words, by number."""
    text = item.answer.text
    lines: list[list[dict[str, Any]]] = [[]]
    end = 0
    spans = word_spans(text)
    for number, (start, stop) in enumerate([*spans, (len(text), len(text))]):
        for turn, between in enumerate(text[end:start].split("\n")):
            if turn:
                lines.append([])
            if between.strip():
                lines[-1].append({"text": _cut(between.strip()), "word": None})
        if start < stop:
            lines[-1].append({"text": _cut(text[start:stop]), "word": number})
        end = stop
    return {
        "id": item.answer.id,
        "history": [_cut(line) for line in history_lines(item.session)],
        "targets": [_cut(line) for line in item.session.targets] if targets else None,
        "lines": [line for line in lines if line],
        "rtl": [_from_right(line) for line in lines if line],
        "texts": [_cut(text[a:b]) for a, b in spans],
    }


def _from_right(line: list[dict[str, Any]]) -> bool:
    """Whether the first letter of a line is of a script that is written from right to left."""
    kinds = (unicodedata.bidirectional(c) for part in line for c in part["text"])
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"


def _cut(text: str) -> str:
    left = len(text) - SHOWN
    return text if left <= 0 else f"{text[:SHOWN]} … ({left:,} more characters)"
