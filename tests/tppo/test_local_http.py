"""A client of a local server costs bounded memory, time and threads, and is told what is wrong."""

import json
import socket
import threading
import time
import tracemalloc

import pytest

from tppo.stages import local_http
from tppo.stages.local_http import MOST_BYTES, LocalHandler, LocalServer

MEGABYTE = bytes(1 << 20)


class Echo(LocalHandler):
    """Says what it was sent."""

    timeout = 0.6

    def get(self, path):
        self.send_json(200, {"path": path})

    def post(self, path):
        self.send_json(200, {"got": 1 / self.body()["number"]})


@pytest.fixture
def server(capfd):
    yield from serving()
    assert "Traceback" not in capfd.readouterr().err


def serving():
    with LocalServer(0, Echo) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


class Client:
    """A connection on which bytes are sent as they are."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self.host = f"Host: 127.0.0.1:{server.port}\r\n"

    def ask(self, line, headers="", body=b""):
        self.socket.sendall(f"{line} HTTP/1.1\r\n{self.host}{headers}\r\n".encode() + body)
        return self

    def post(self, length, body=b"", more=""):
        kind = "Content-Type: application/json\r\n"
        return self.ask("POST /", f"{kind}Content-Length: {length}\r\n{more}", body)

    def replies(self):
        """(status, JSON) of all there are until the server closes the connection."""
        with self.socket, self.socket.makefile("rb") as file:
            found = []
            while line := file.readline():
                length = 0
                while (header := file.readline().strip()):
                    name, _, value = header.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                found.append((int(line.split()[1]), json.loads(file.read(length))))
            return found

    def refused(self):
        ((status, body),) = self.replies()
        return status, body["error"]["message"]


def test_a_body_that_is_too_large_is_heard_out_and_answered(server):
    """Whoever sends 64 MB has sent them when the reply is read; nothing of them is kept."""
    tracemalloc.start()
    try:
        client = Client(server).post(64 << 20)
        for _ in range(64):
            client.socket.sendall(MEGABYTE)
        assert client.refused() == (
            413, f"the body has {64 << 20} bytes, expected at most {MOST_BYTES}")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length, status", [
    (10**12, 411), (10**11, 413), (-1, 411), ("", 411), ("1_0", 411), ("\u0665", 411),
    ("0x5", 411), ("9" * 60_000, 411),
])  # fmt: skip
def test_a_length_that_cannot_be_is_refused_before_anything_is_read(server, length, status):
    client = Client(server).post(length)
    client.socket.shutdown(socket.SHUT_WR)
    assert client.refused()[0] == status


def test_chunks_are_refused(server):
    client = Client(server).ask("POST /", "Content-Type: application/json\r\n"
                                "Transfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n")
    client.socket.shutdown(socket.SHUT_WR)
    assert client.refused() == (411, "the body comes in chunks, expected its Content-Length")


def test_a_client_that_stops_or_trickles_is_told_in_time(server):
    silent = Client(server).post(10, b"{")
    trickling = Client(server).post(1000)
    start = time.monotonic()

    def trickle():
        try:
            while True:
                trickling.socket.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        assert silent.refused() == (408, "1 of 10 bytes came within 0.6 s")
        file = trickling.socket.makefile("rb")
        assert file.readline() == b"HTTP/1.1 408 Request Timeout\r\n"
        file.close()
        assert time.monotonic() - start < 30
    finally:
        trickling.socket.close()
        thread.join()


def test_half_a_body_is_none(server):
    """{} of {"steps": 1} would be another request."""
    client = Client(server).post(12, b"{}")
    client.socket.shutdown(socket.SHUT_WR)
    assert client.refused() == (400, "the body ended after 2 of 12 bytes")


def test_json_that_is_deep_or_long_is_answered(server):
    for body, said in ((b"[" * 500_000, "the body is no JSON: "),
                       (b"9" * 10_000, "the body is no JSON: ")):  # fmt: skip
        client = Client(server).post(len(body), body)
        client.socket.shutdown(socket.SHUT_WR)
        status, message = client.refused()
        assert status == 400 and message.startswith(said)


def test_a_path_that_is_none_and_a_long_one_are_answered(server):
    for path, status in (("http://[::1", 400), ("/" + "x" * 70_000, 414)):
        client = Client(server).ask(f"GET {path}")
        client.socket.shutdown(socket.SHUT_WR)
        assert client.refused()[0] == status


def test_the_body_of_a_get_is_no_request_of_its_own(server):
    inside = f"GET /inside HTTP/1.1\r\n{Client(server).host}\r\n".encode()
    client = Client(server).ask("GET /", f"content-length: {len(inside)}\r\n", inside)
    assert client.replies() == [(200, {"path": "/"})]


def test_too_many_connections_are_told_and_give_their_places_back(server, monkeypatch):
    monkeypatch.setattr(local_http, "MOST_CLIENTS", 2)
    idle = [Client(server) for _ in range(2)]
    for client in idle:
        client.ask("GET /")
        client.socket.recv(10)  # it has its place
    status, said = Client(server).refused()
    assert status == 503 and " connections are open" in said
    for client in idle:
        client.socket.close()
    for _ in range(200):
        client = Client(server).ask("GET /", "Connection: close\r\n")
        if client.replies()[0][0] == 200:
            break
        time.sleep(0.02)
    else:
        raise AssertionError("the places of those that are gone are not given back")


def test_a_signal_behind_the_start_of_a_thread_gives_its_place_back_once(monkeypatch, capfd):
    """A signal raises wherever the main thread is: here between the start of the thread of a
    connection, which gives its place back, and the next line.
    """
    real, failed = local_http.ThreadingHTTPServer.process_request, []

    def signalled(self, request, address):
        real(self, request, address)
        raise KeyboardInterrupt

    monkeypatch.setattr(local_http.ThreadingHTTPServer, "process_request", signalled)
    monkeypatch.setattr(threading, "excepthook", failed.append)
    before = {*threading.enumerate()}
    with LocalServer(0, Echo) as server:
        for _ in range(20):
            client = Client(server).ask("GET /", "Connection: close\r\n")
            with pytest.raises(KeyboardInterrupt):
                server.handle_request()
            client.socket.close()
        for thread in {*threading.enumerate()} - before:
            thread.join(60)
        assert not failed and not server.clients
    assert "Traceback" not in capfd.readouterr().err


def test_a_fault_of_the_server_itself_is_answered_and_shown(capfd):
    for server in serving():
        body = b'{"number": 0}'
        assert Client(server).post(len(body), body).refused() == (
            500, "the server failed: ZeroDivisionError")
        body = b'{"number": 2}'
        reply = Client(server).post(len(body), body, "Connection: close\r\n").replies()
        assert reply == [(200, {"got": 0.5})]
    assert "ZeroDivisionError: division by zero" in capfd.readouterr().err
