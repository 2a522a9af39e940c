"""The pages for labelling by hand, served to the browsers of this machine that know their key."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tppo.errors import short
from tppo.progress import say
from tppo.stages.hand.asking import NotKept
from tppo.stages.hand.forms import Form, Given
from tppo.stages.local_http import ADDRESS, REST_S, LocalHandler, LocalServer, Refused
from tppo.stopping import Stopped

HEADER = "X-Tppo-Key"


class LabelServer(LocalServer):
    """The server of one labelling; `address` opens its page."""

    def __init__(self, form: Form, port: int) -> None:
        super().__init__(port, _Handler, "--label.hand.port")
        self.form, self.key = form, secrets.token_urlsafe(16)
        self.address = f"http://{ADDRESS}:{self.port}/?key={self.key}"
        self._acts, self._changed = 0, threading.Condition()

    @contextmanager
    def act(self) -> Iterator[None]:
        """Around what a person does, with its reply, which `finish` waits for."""
        with self._changed:
            self._acts += 1
        try:
            yield
        finally:
            with self._changed:
                self._acts -= 1
                self._changed.notify_all()

    def finish(self) -> None:
        """End `serve_forever` from the thread of a request, once the replies are sent.

        The process ends with it, and with the process every reply that is not: a page whose answer
        was kept would say that it was not.
        """
        threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._acts, REST_S)
        self.shutdown()


def label_in_browser(form: Form, port: int, what: str, *, browser: bool) -> None:
    """Serve the page until enough is labelled or the person ends it.

    what: is to be done, as "label: judge 50 answers".
    """
    with LabelServer(form, port) as server:
        stage, _, task = what.partition(": ")
        say(f"{stage}: open {server.address} in a browser of this machine and {task} "
            f"({form.desk.count()} are done); each is kept at once, and Ctrl-C ends without loss")
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

    @property
    def policy(self) -> str:  # type: ignore[override]
        """That of the page."""
        return self.server.form.policy

    def get(self, path: str) -> None:
        """The page, for whoever has the key."""
        if path != "/":
            raise Refused(404, f"nothing at {path!r}, expected /")
        given = parse_qs(urlsplit(self.path).query).get("key", [""])[0]
        self._check_key(given, "the address that the command printed, with its key")
        self.send(200, self.server.form.page().encode(), "text/html; charset=utf-8")

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
            with self.server.act():
                self.send_json(200, acts[path](Given(body)))
        except NotKept as error:
            raise Refused(507, str(error)) from None
        except ValueError as error:
            raise Refused(400, str(error)) from None

    def _check_key(self, given: str, expected: str) -> None:
        if not secrets.compare_digest(given.encode(), self.server.key.encode()):
            raise Refused(403, f"the key is missing or wrong, expected {expected}",
                          code="key_refused")  # fmt: skip

    def _next(self, given: Given) -> dict[str, Any]:
        desk = self.server.form.desk
        client, annotator = given.person()
        if given.values.get("fresh") is True:
            desk.leave(client)
        return self._shown(desk.next(client, annotator))

    def _label(self, given: Given) -> dict[str, Any]:
        self.server.form.judge(given)
        return self._next(given)

    def _skip(self, given: Given) -> dict[str, Any]:
        self.server.form.desk.skip(*given.person(), given.text("id"))
        return self._next(given)

    def _undo(self, given: Given) -> dict[str, Any]:
        form = self.server.form
        found = form.desk.undo(*given.person())
        if found is None:
            raise ValueError("there is nothing of yours to take back")
        return self._shown(found[0]) | form.said(found[1])

    def _guidance(self, given: Given) -> dict[str, Any]:
        self.server.form.desk.guidance = given.text("text", 2_000)
        return {}

    def _finish(self, given: Given) -> dict[str, Any]:
        if not self.server.form.desk.count():
            raise ValueError("nothing is judged yet, expected one answer or more")
        self.server.finish()
        return {}

    def _shown(self, item: Any) -> dict[str, Any]:
        form = self.server.form
        return {"item": None if item is None else form.shown(item),
                "progress": form.desk.progress()}  # fmt: skip
