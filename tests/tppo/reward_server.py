"""A server of a token reward model that speaks what vLLM speaks: models, tokenize, pooling."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from tppo.models.load import load_reward_model
from tppo.models.own_tokens import load_own_tokenizer


class RewardServer:
    """Serves the folder of a reward model; `spoil(request, reply)` may give another reply.

    It gives (status, headers, body), or None for a connection that breaks off.
    """

    def __init__(self, folder, spoil=None, *, port=0, longest=256, names=("rm",)):
        self.model = load_reward_model(folder, torch.device("cpu"))
        self.tokenizer = load_own_tokenizer(folder)
        self.spoil = spoil or (lambda request, reply: reply)
        self.longest, self.names, self.requests = longest, names, []
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                outer.connections += 1
                super().setup()

            def do_GET(self):
                self.answer(outer.models() if self.path == "/v1/models" else error(404))

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, request, self.headers.get("Authorization")))
                made = {"/tokenize": outer.tokenize, "/pooling": outer.pooling}.get(self.path)
                self.answer(outer.spoil(request, made(request) if made else error(404)))

            def answer(self, reply):
                status, headers, body = reply or (200, {}, {})
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data if reply else b"")
                self.close_connection = reply is None or self.close_connection

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def models(self):
        data = [{"id": name, "object": "model", "max_model_len": self.longest}
                for name in self.names]  # fmt: skip
        return 200, {}, {"object": "list", "data": data}

    def tokenize(self, request):
        ids = self.tokenizer.encode(request["prompt"], add_special_tokens=False)
        return 200, {}, {"count": len(ids), "max_model_len": self.longest, "tokens": ids}

    @torch.no_grad()
    def pooling(self, request):
        assert request["task"] == "token_classify" and request["use_activation"] is False
        if request["model"] not in self.names:
            return error(404, "NotFoundError")
        data = []
        for i, ids in enumerate(request["input"]):
            if len(ids) > self.longest:
                return error(400, "BadRequestError", "input_tokens")
            logits = self.model(input_ids=torch.tensor([ids])).logits[0]  # [L, 3]
            data.append({"index": i, "object": "pooling", "data": encoded(logits)})
        return 200, {}, {"object": "list", "model": request["model"], "data": data}


def encoded(table):
    """Numbers as vLLM sends them: base64 of float32."""
    return base64.b64encode(table.float().numpy().astype("<f4").tobytes()).decode()


def decoded(text, classes=3):
    """[L, C]"""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).view(
        -1, classes).clone()


def error(status, kind="NotFoundError", param=None):
    """A reply as vLLM's are where something is wrong."""
    told = {"message": "the words of a user", "type": kind, "param": param, "code": status}
    return status, {}, {"error": told}
