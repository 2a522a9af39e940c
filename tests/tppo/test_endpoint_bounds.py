"""A reply of any size costs bounded memory, and one sentence: plain, packed, without an end."""

import asyncio
import gzip
import json
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")

from tppo.labels.endpoint.config import NO_KEY, EndpointConfig  # noqa: E402
from tppo.labels.endpoint.http import (  # noqa: E402
    MOST_BYTES,
    exchange,
    exchange_json,
    new_client,
    new_http,
)
from tppo.labels.endpoint.replies import object_of, outcome  # noqa: E402

GIGABYTE, PACKED = 1 << 30, 1 << 27
MOST_MEMORY = 6 * MOST_BYTES  # what is read, as bytes, text and JSON; and nothing of a gigabyte
SAID = "the reply has more than 8 MB, or is compressed otherwise than by gzip although it was "


class Large(BaseHTTPRequestHandler):
    """Replies as the path of a request begins: a gigabyte, or what is unpacked to 128 MB."""

    protocol_version = "HTTP/1.1"
    bomb = b""

    def do_POST(self):
        self.server.encodings.append(self.headers.get("Accept-Encoding"))
        self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.split("/")[1]
        try:
            self.send_response(500 if kind == "error" else 200)
            if kind == "fits":
                body = json.dumps({"data": "x" * (MOST_BYTES - 12)}).encode()
                assert len(body) == MOST_BYTES
                self.headed({"Content-Length": str(len(body))}, body)
            elif kind in ("packed", "cut", "no-gzip"):  # though it was not asked for
                body = gzip.compress(json.dumps({"data": "x" * 5_000_000}).encode())
                body = {"packed": body, "cut": body[:-9], "no-gzip": b"{}" * 9}[kind]
                length = str(len(body))
                self.headed({"Content-Encoding": "gzip", "Content-Length": length}, body)
            elif kind in ("gzip", "zstd"):
                size = str(len(self.bomb))
                self.headed({"Content-Encoding": kind, "Content-Length": size}, self.bomb)
            else:
                length = {} if kind == "chunked" else {"Content-Length": str(GIGABYTE)}
                self.headed(length or {"Transfer-Encoding": "chunked"}, b"")
                part = b" " * (1 << 20)
                framed = b"100000\r\n" + part + b"\r\n" if kind == "chunked" else part
                for _ in range(GIGABYTE >> 20):
                    self.wfile.write(framed)
                    self.server.sent += len(part)
        except OSError:
            self.close_connection = True  # the client has had enough

    do_GET = do_POST

    def headed(self, headers, body):
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Deserted(ThreadingHTTPServer):
    """Its clients go away in the middle of a reply."""

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, address)


@pytest.fixture(scope="module")
def large():
    Large.bomb = gzip.compress(bytes(PACKED), 1)
    server = Deserted(("127.0.0.1", 0), Large)
    server.daemon_threads, server.sent, server.encodings = True, 0, []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def asked(server, kind, chat):
    """The reply to one request, its configuration, and the memory that reading it took."""
    config = EndpointConfig(base_url=f"http://127.0.0.1:{server.server_port}/{kind}/v1",
                            model="m", timeout_s=60.0)  # fmt: skip

    async def once():
        client = new_client(config, NO_KEY) if chat else new_http(config)
        try:
            if chat:
                request = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
                return await exchange(client, request)
            return await exchange_json(client, f"{config.base_url}/pooling", NO_KEY, {})
        finally:
            await (client.close() if chat else client.aclose())

    new_http(config)  # what is imported on the way is not the reply's
    tracemalloc.start()
    try:
        found = asyncio.run(once())
        return found, config, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("chat", [True, False], ids=["a chat completion", "class logits"])
@pytest.mark.parametrize("kind", ["long", "chunked", "error", "gzip", "zstd"])
def test_a_gigabyte_is_left_where_it_is(large, kind, chat):
    large.sent = 0
    reply, config, peak = asked(large, kind, chat)
    assert reply.failure == "too large" and peak < MOST_MEMORY
    found = outcome(reply, config, "a") if chat else object_of(reply, config)
    assert found.reason.startswith(SAID) and config.base_url in found.reason
    assert found.form.first == found.form.later == "drop"  # asked again it would be as large
    assert large.sent < GIGABYTE // 4 and set(large.encodings) == {"identity"}


def test_what_fits_is_read_whole(large):
    reply, _, peak = asked(large, "fits", False)
    assert reply.status == 200 and len(reply.body["data"]) == MOST_BYTES - 12
    assert peak < MOST_MEMORY


def test_what_is_packed_unasked_was_paid_and_counts(large):
    reply, _, peak = asked(large, "packed", False)
    assert reply.status == 200 and len(reply.body["data"]) == 5_000_000 and peak < MOST_MEMORY
    assert asked(large, "cut", False)[0].failure == "broken"
    assert asked(large, "no-gzip", True)[0].failure == "broken"
