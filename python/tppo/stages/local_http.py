"""HTTP for programs and browsers of this machine alone.

A server listens on the loopback address and takes no request that names another host, or that a
page of another origin makes: a page of the web must not use it through its reader's browser.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tppo.errors import DataError
from tppo.store.jsonl import plain

ADDRESS = "127.0.0.1"
MOST_BYTES = 1 << 20  # of a request
MOST_CLIENTS = 128  # connections at once
SLOW_S = 60.0  # for a client to send a body; one that sends or takes nothing for so long is left
REST_S = 5.0  # a client that still sends what was refused is listened to for so long, then cut off


class Refused(Exception):
    """A request that is answered with an error of this status."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None

    def body(self) -> dict[str, Any]:
        """The JSON of the reply, as OpenAI's errors are."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param,
                          "code": self.code}}  # fmt: skip


def _full() -> bytes:
    """The whole reply to a connection that there is no place for."""
    said = f"{MOST_CLIENTS} connections are open, expected a client to close those it has done with"
    body = json.dumps(Refused(503, said).body()).encode()
    return (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


FULL = _full()


class LocalServer(ThreadingHTTPServer):
    """A server on the loopback address; `port` is the one that it listens on.

    Errors: DataError naming `flag` where the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, port: int, handler: type[LocalHandler], flag: str = "--port") -> None:
        try:
            super().__init__((ADDRESS, port), handler)
        except OSError as error:
            raise DataError(f"{flag} was {port}, which cannot be had ({error.strerror}), expected "
                            "a free one; 0 takes any") from None  # fmt: skip
        self.port = self.server_address[1]
        self.clients: set[Any] = set()  # connections that have a place; this thread alone adds some

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, or 503 where there are as many as there may be."""
        if len(self.clients) < MOST_CLIENTS:
            self.clients.add(request)
            try:
                super().process_request(request, client_address)
            except BaseException:  # it has no thread, or a signal came behind the thread's start
                self.clients.discard(request)
                raise
            return
        try:
            request.settimeout(1.0)
            request.sendall(FULL)
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The connection, from its first to its last request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.clients.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What went wrong in the thread of a connection, but for one that the end of the server,
        by a signal, has closed meanwhile.
        """
        if request.fileno() >= 0:
            super().handle_error(request, client_address)


class LocalHandler(BaseHTTPRequestHandler):
    """One connection; `get` and `post` answer what is asked of a path, or raise Refused."""

    server: LocalServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tppo", ""
    timeout = SLOW_S
    policy = "default-src 'none'"
    """The Content-Security-Policy of every reply."""

    def get(self, path: str) -> None:
        """Answers a GET."""
        raise NotImplementedError

    def post(self, path: str) -> None:
        """Answers a POST."""
        raise NotImplementedError

    def handle(self) -> None:
        """All requests of the connection; a client that goes away is no error."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        """A GET of a client that may ask; a body, which has no meaning, is no next request."""
        if {"Content-Length", "Transfer-Encoding"} & {*map(str.title, self.headers)}:
            self.close_connection = True
        self._guarded(self.get)

    def do_POST(self) -> None:
        """A POST of a client that may ask."""
        self._guarded(self.post)

    def _guarded(self, answer: Callable[[str], None]) -> None:
        try:
            self._check_origin()
            answer(self._asked_path())
        except Refused as error:
            self.close_connection = True  # what is left of its body is no request
            self.send_json(error.status, error.body())
            self._hear_out()
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # of this package: whoever waits is told, and so is stderr
            self.close_connection = True
            self.send_json(500, Refused(500, f"the server failed: {type(error).__name__}").body())
            raise

    def _asked_path(self) -> str:
        try:
            return urlsplit(self.path).path
        except ValueError as error:
            raise Refused(400, f"the path was {self.path!r}, which is none: {error}") from None

    def _hear_out(self) -> None:
        """Drop what a client still sends: one whose connection is cut while it sends has no reply.

        Nothing of it is kept.
        """
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + REST_S
            while (left := end - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    return
        except OSError:
            pass

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

    def body(self) -> Any:
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
        raw = self._received(int(length))
        try:
            return json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON: {error}") from None

    def _received(self, length: int) -> bytes:
        """The body.  Errors: Refused where it does not come, or not in time."""
        raw, end = bytearray(), time.monotonic() + self.timeout
        while len(raw) < length:
            try:
                if not (part := self.rfile.read1(length - len(raw))):
                    raise Refused(400, f"the body ended after {len(raw)} of {length} bytes")
            except TimeoutError:
                end = 0.0
            else:
                raw += part
            if len(raw) < length and time.monotonic() > end:
                raise Refused(408, f"{len(raw)} of {length} bytes came within {self.timeout:g} s")
        return bytes(raw)

    def send_json(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(plain(value)).encode(), "application/json")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself, such as a method that there is not."""
        self.close_connection = True
        self.send_json(code, Refused(code, message or "the request cannot be read").body())

    def send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a history is nobody else's business, not even a log's."""
