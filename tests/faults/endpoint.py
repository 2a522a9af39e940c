"""An OpenAI-compatible endpoint in a process of its own, which may be killed and started again.

It writes down every question before it answers, by the key that the cache of labels has for it.
A path begins with the name of the run folder that asks: `http://127.0.0.1:PORT/run-7/v1`.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tppo.store.jsonl import is_as_written

UP = 120  # seconds, against a hang only


def verdict(content):
    """The same for the same content, and of both kinds, whatever an untrained model writes."""
    (data,) = [json.loads(line) for line in content.split("\n") if line.startswith('{"history"')]
    words = " ".join(data.get("returned_queries", ())).split()
    judged = [{"word": word, "label": zlib.crc32(word.encode()) & 1} for word in words]
    whole = {"label": zlib.crc32(content.encode()) & 1}
    return json.dumps({"WORD_SEQUENCE_JUDGEMENTS": judged, "ACROSS_QUERY_JUDGEMENTS": whole})


class Handler(BaseHTTPRequestHandler):
    """Answers chat completions."""

    protocol_version = "HTTP/1.1"
    folder, lock, pause_s = Path(), threading.Lock(), 0.0

    def do_POST(self):
        """A question: written down, answered."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = asked["messages"][0]["content"]
        of = [asked["model"], asked.get("temperature"), content]
        key = hashlib.sha256(json.dumps(of).encode()).hexdigest()
        with self.lock, open(self.folder / self.path.split("/")[1], "a") as file:
            file.write(key + "\n")
        time.sleep(self.pause_s)
        message = {"role": "assistant", "content": verdict(content)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"],
                 "choices": [choice]}  # fmt: skip
        data = json.dumps(reply).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # who asked is dead

    def log_message(self, *arguments):
        """Nothing."""


class Endpoint(ThreadingHTTPServer):
    """Says nothing of a client that was killed while it asked."""

    def handle_error(self, request, address):
        """Nothing."""


def serve(folder, port, pause_s):
    """Answer until the process is ended."""
    Handler.folder, Handler.pause_s = Path(folder), float(pause_s)
    Endpoint(("127.0.0.1", int(port)), Handler).serve_forever()


class Server:
    """The process, and what it was asked."""

    def __init__(self, folder, pause_s=0.0):
        self.folder, self.pause_s = Path(folder), pause_s
        self.folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        """Start it, at the port that it had before."""
        command = [sys.executable, __file__, str(self.folder), str(self.port), str(self.pause_s)]
        self.process, end = subprocess.Popen(command), time.monotonic() + UP
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, "no endpoint"
                time.sleep(0.01)

    def kill(self):
        """As a machine that fails ends it."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """End it."""
        self.process.terminate()
        self.process.wait()

    def asked(self, folder):
        """The keys that a run folder has asked for, in order."""
        path = self.folder / Path(folder).name
        return path.read_text().split() if path.exists() else []


def kept(cache, whole=False):
    """The keys of which a cache of judgements has the answer, or the ids of which a journal of
    what people said has: a line that was cut has none, and none that has changed since, which is
    asked again.  whole: the lines themselves.
    """
    found = []
    for line in Path(cache).read_bytes().split(b"\n") if Path(cache).exists() else ():
        try:
            row = json.loads(line)
            key = row["key"] if "key" in row else row["id"]
        except (ValueError, KeyError):
            continue
        if is_as_written(line):
            found.append(line if whole else key)
    return found


if __name__ == "__main__":
    serve(*sys.argv[1:])
