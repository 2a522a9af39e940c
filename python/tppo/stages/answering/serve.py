"""The trained model behind HTTP: OpenAI's chat/completions and completions, and a page to try it.

One thread runs the model, so requests are answered one after another.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import unquote

import torch

from tppo.errors import DataError
from tppo.models.guards import GuardError
from tppo.progress import say
from tppo.stages.answering.answerer import Answer, Answerer
from tppo.stages.answering.openai_form import (
    CHAT,
    TEXT,
    Request,
    chunks,
    read_request,
    reply,
)
from tppo.stages.answering.page import POLICY, answer_page
from tppo.stages.local_http import ADDRESS, LocalHandler, LocalServer, Refused
from tppo.stopping import Stopped
from tppo.store.jsonl import plain


class Server(LocalServer):
    """An HTTP server over one model."""

    def __init__(self, model: Answerer, port: int, name: str) -> None:
        # torch counts threads for each thread that calls it.
        threads = torch.get_num_threads()
        self.worker = ThreadPoolExecutor(1, initializer=partial(torch.set_num_threads, threads))
        super().__init__(port, _Handler)
        self.model, self.name = model, name
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


class _Handler(LocalHandler):
    """One connection."""

    server: Server
    policy = POLICY

    def get(self, path: str) -> None:
        """The page, and the list of models."""
        if path == "/":
            model = self.server.model
            page = answer_page(self.server.name, model.recipe, model.reward is not None)
            self.send(200, page.encode(), "text/html; charset=utf-8")
        elif path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [self._model()]})
        elif re.fullmatch(r"/v1/models/[^/]+", path):
            if unquote(path.rpartition("/")[2]) != self.server.name:
                raise Refused(404, f"no such model, expected {self.server.name!r}",
                              code="model_not_found")  # fmt: skip
            self.send_json(200, self._model())
        elif path in (CHAT, TEXT):
            raise Refused(405, f"{path} takes POST")
        else:
            raise self._nothing_at(path)

    def _model(self) -> dict[str, Any]:
        return {"id": self.server.name, "object": "model", "created": 0, "owned_by": "tppo"}

    def _nothing_at(self, path: str) -> Refused:
        return Refused(404, f"nothing at {path!r}, expected /, /v1/models, {CHAT} or {TEXT}")

    def post(self, path: str) -> None:
        """A completion."""
        if path not in (CHAT, TEXT):
            raise self._nothing_at(path)
        server = self.server
        request = read_request(path, self.body(), server.model.recipe, server.name)
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
            self.send_json(200, whole)

    def _send_stream(self, pieces: list[dict[str, Any]]) -> None:
        lines = [f"data: {json.dumps(plain(piece))}\n\n" for piece in pieces]
        self.send(200, "".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream")
