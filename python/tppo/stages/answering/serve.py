"""The trained model behind HTTP: OpenAI's chat/completions and completions, and a page to try it.

It listens on the loopback address alone and takes no request that names another host, or that a
page of another origin makes: a page of the web must not use the model through its reader's browser.
One thread runs the model, so requests are answered one after another.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from tppo.errors import DataError
from tppo.models.guards import GuardError
from tppo.progress import say
from tppo.stages.answering.answerer import Answer, Answerer
from tppo.stages.answering.openai_form import (
    CHAT,
    TEXT,
    Refused,
    Request,
    chunks,
    read_request,
    reply,
)
from tppo.stages.answering.page import POLICY, answer_page
from tppo.stopping import Stopped
from tppo.store.jsonl import plain

ADDRESS = "127.0.0.1"
MOST_BYTES = 1 << 20  # of a request
SLOW_S = 60.0  # a client that sends or takes nothing for so long is left


class Server(ThreadingHTTPServer):
    """An HTTP server over one model; `port` is the one that it listens on."""

    daemon_threads = True

    def __init__(self, model: Answerer, port: int, name: str) -> None:
        # torch counts threads for each thread that calls it.
        threads = torch.get_num_threads()
        self.worker = ThreadPoolExecutor(1, initializer=partial(torch.set_num_threads, threads))
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise DataError(f"--port was {port}, which cannot be had ({error.strerror}), expected "
                            "a free one; 0 takes any") from None  # fmt: skip
        self.model, self.name, self.port = model, name, self.server_address[1]
        self.asked = 0

    def answer(self, request: Request) -> list[list[Answer]]:
        """The answers to a request, when those before it are done."""
        return self.worker.submit(self._answer, request).result()

    def _answer(self, request: Request) -> list[list[Answer]]:
        self.asked += 1
        return self.model.answers(
            request.asked,
            several=request.several,
            queries=request.queries,
            temperature=request.temperature,
            seed=self.asked if request.seed is None else request.seed,
            max_new_tokens=request.max_new_tokens,
        )

    def server_close(self) -> None:
        """Closes the socket and ends the thread of the model."""
        super().server_close()
        self.worker.shutdown(cancel_futures=True)


def listen(model: Answerer, port: int, name: str) -> None:
    """Answer requests until a signal comes."""
    with Server(model, port, name) as server:
        say(f"tppo serve: http://{ADDRESS}:{server.port} is the page, http://{ADDRESS}:"
            f"{server.port}/v1 the endpoint of the model {name!r}; Ctrl-C ends")  # fmt: skip
        try:
            server.serve_forever(poll_interval=0.2)
        except Stopped as stop:
            raise Stopped(stop.signum, "requests under way are not answered") from None


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tppo", ""
    timeout = SLOW_S

    def do_GET(self) -> None:
        """The page, and the list of models."""
        self._guarded(self._get)

    def do_POST(self) -> None:
        """A completion."""
        self._guarded(self._post)

    def _guarded(self, answer: Any) -> None:
        try:
            self._check_origin()
            answer()
        except Refused as error:
            self.close_connection = True  # what is left of its body is not read
            self._send_json(error.status, error.body())
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True

    def _check_origin(self) -> None:
        host = (self.headers.get("Host") or "").lower()
        own = {f"{name}:{self.server.port}" for name in (ADDRESS, "localhost")}
        if host not in own:
            raise Refused(403, f"the request is for the host {host!r}, expected {ADDRESS}:"
                          f"{self.server.port}", code="host_refused")  # fmt: skip
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{name}" for name in own}:
            raise Refused(403, f"the request comes from a page of {origin!r}, expected the page of "
                          "this server, or a program", code="origin_refused")  # fmt: skip

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            model = self.server.model
            page = answer_page(self.server.name, model.recipe, model.reward is not None)
            self._send(200, page.encode(), "text/html; charset=utf-8")
        elif path == "/v1/models":
            self._send_json(200, {"object": "list", "data": [self._model()]})
        elif re.fullmatch(r"/v1/models/[^/]+", path):
            if unquote(path.rpartition("/")[2]) != self.server.name:
                raise Refused(404, f"no such model, expected {self.server.name!r}",
                              code="model_not_found")  # fmt: skip
            self._send_json(200, self._model())
        elif path in (CHAT, TEXT):
            raise Refused(405, f"{path} takes POST")
        else:
            raise self._nothing_at(path)

    def _model(self) -> dict[str, Any]:
        return {"id": self.server.name, "object": "model", "created": 0, "owned_by": "tppo"}

    def _nothing_at(self, path: str) -> Refused:
        return Refused(404, f"nothing at {path!r}, expected /, /v1/models, {CHAT} or {TEXT}")

    def _post(self) -> None:
        path = urlsplit(self.path).path
        if path not in (CHAT, TEXT):
            raise self._nothing_at(path)
        server = self.server
        request = read_request(path, self._body(), server.model.recipe, server.name)
        try:
            found = server.answer(request)
        except DataError as error:
            field = "messages" if path == CHAT else "prompt"
            raise Refused(400, str(error), field) from None
        except GuardError as error:
            raise Refused(400, str(error), "temperature") from None
        except RuntimeError as error:  # such as memory that is used up: the next one may succeed
            say(f"tppo serve: a request failed: {error}")
            raise Refused(500, f"the model failed: {error}") from None
        whole = reply(path, request, found, server.name)
        if request.stream:
            self._send_stream(chunks(path, whole))
        else:
            self._send_json(200, whole)

    def _body(self) -> Any:
        """The JSON of the request.  Errors: Refused naming what it is not."""
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "the body comes in chunks, expected its Content-Length")
        kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another origin cannot send unasked
            raise Refused(415, f"Content-Type was {kind!r}, expected application/json")
        length = self.headers.get("Content-Length") or ""
        if not re.fullmatch(r"[0-9]{1,12}", length):
            raise Refused(411, f"Content-Length was {length!r}, expected the number of bytes")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"the body has {length} bytes, expected at most {MOST_BYTES}")
        raw = self.rfile.read(int(length))
        try:
            return json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON: {error}") from None

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(plain(value)).encode(), "application/json")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself, such as a method that there is not."""
        self.close_connection = True
        self._send_json(code, Refused(code, message or "the request cannot be read").body())

    def _send_stream(self, pieces: list[dict[str, Any]]) -> None:
        lines = [f"data: {json.dumps(plain(piece))}\n\n" for piece in pieces]
        self._send(200, "".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a history is nobody else's business, not even a log's."""
