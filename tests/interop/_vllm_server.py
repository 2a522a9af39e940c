"""A vLLM server in a process group of its own, to be asked, killed and started again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

UP_WITHIN_S = 1_200  # only against a hang: on two idle cores it is up within a minute


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class VLLMServer:
    """`python -m vllm.entrypoints.openai.api_server` over a folder, up when this is made."""

    def __init__(self, folder, log, *flags, port=0, wait=True):
        self.port, self.log = port or free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                   "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # of engines in the tests' own process
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
                   "--host", "127.0.0.1", "--port", self.port, "--enforce-eager",
                   "--dtype", "float32", *flags]  # fmt: skip
        with open(log, "ab") as file:
            self.process = subprocess.Popen(list(map(str, command)), env=environ, stdout=file,
                                            stderr=file, start_new_session=True)  # fmt: skip
        if wait:
            self.wait()

    def wait(self):
        end = time.monotonic() + UP_WITHIN_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.kill()
        raise AssertionError(f"no server within {UP_WITHIN_S} s: {self.log.read_text()[-3000:]}")

    def kill(self, how=signal.SIGKILL):
        """Ends the server and the processes that it has started, by their group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
        self.process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def metric(self, name):
        """The sum of a counter of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            text = reply.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? ([0-9.e+]+)$", text, re.M)
        assert found, f"/metrics has no {name}"
        return sum(map(float, found))

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.loads(reply.read())


class Between:
    """Passes requests on to a server as they are, and keeps them with their replies.

    refuses: takes the body of a request; where it is true the server is not asked, and the reply is
    HTTP 400, as of a server that does not know `response_format`.
    """

    def __init__(self, url, refuses=lambda body: False):
        kept = self.kept = []  # (the request, the status of the reply, the reply)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                data = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(data)
                status, reply = self.passed_on(data, body)
                kept.append((body, status, json.loads(reply)))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def passed_on(self, data, body):
                if refuses(body):
                    told = {"message": "response_format is not supported",
                            "type": "BadRequestError", "code": 400}  # fmt: skip
                    return 400, json.dumps({"error": told}).encode()
                request = urllib.request.Request(url + self.path, data,
                                                 {"Content-Type": "application/json"})  # fmt: skip
                try:
                    with urllib.request.urlopen(request, timeout=600) as reply:
                        return reply.status, reply.read()
                except urllib.error.HTTPError as error:
                    return error.code, error.read()

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def texts(self):
        """What the server's model wrote in reply to each request without a form, by its first
        message; the newest last."""
        found = {}
        for body, status, reply in self.kept:
            if status == 200 and "response_format" not in body:
                text = reply["choices"][0]["message"]["content"]
                found.setdefault(body["messages"][0]["content"], []).append(text or "")
        return found

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
