"""A headless Chromium that a test drives by its own protocol, over two pipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The protocol's pipes are descriptors 3 and 4 of the browser.
_AS_3_AND_4 = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3]]
for place, pipe in zip((3, 4), pipes):
    os.dup2(pipe, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
WAIT_S = 60.0  # for anything, in a machine that has other work


def chromium() -> str | None:
    """A Chromium that starts; some systems have only a stub that asks to install one."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None or subprocess.run([path, "--version"], capture_output=True).returncode:
        return None
    return path


class Browser:
    """One page of a browser."""

    def __init__(self, reader: int, writer: int) -> None:
        self.replies: dict[int, Any] = {}
        self.events: list[Any] = []
        self.changed = threading.Condition()
        self.count, self.writer, self.session = 0, writer, None
        self.thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self.thread.start()

    def _read(self, reader: int) -> None:
        rest = b""
        while data := os.read(reader, 1 << 16):
            *messages, rest = (rest + data).split(b"\0")
            with self.changed:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self.replies[message["id"]] = message
                    else:
                        self.events.append(message)
                self.changed.notify_all()

    def send(self, method: str, **params: Any) -> Any:
        """The result of a command of the protocol."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        with self.changed:
            assert self.changed.wait_for(lambda: message["id"] in self.replies, WAIT_S), method
            reply = self.replies.pop(message["id"])
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def attach(self) -> None:
        """Takes the one page that is open."""
        (page, *_) = [target for target in self.send("Target.getTargets")["targetInfos"]
                      if target["type"] == "page"]  # fmt: skip
        found = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def open(
        self, address: str, *, width: int = 1400, height: int = 900, dark: bool = False
    ) -> None:
        """Loads an address in a window of a size, in light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        loaded = len(self.named("Page.loadEventFired"))
        self.send("Page.navigate", url=address)
        with self.changed:
            assert self.changed.wait_for(
                lambda: len(self._named("Page.loadEventFired")) > loaded, WAIT_S
            )

    def _named(self, method: str) -> list[Any]:
        return [event["params"] for event in self.events if event["method"] == method]

    def named(self, method: str) -> list[Any]:
        """The events of a kind so far."""
        with self.changed:
            return self._named(method)

    def run(self, expression: str) -> Any:
        """The value of JavaScript in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                          awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until JavaScript in the page is true."""
        end = time.monotonic() + WAIT_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition}: {self.run('document.body.innerText')}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Types into what has the focus, and presses Enter."""
        self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                      windowsVirtualKeyCode=13)  # fmt: skip

    def picture(self, path: Path) -> None:
        """Writes what is seen, the whole page, as PNG or, by the file's name, as small WebP."""
        kind = {"format": "webp", "quality": 60} if path.suffix == ".webp" else {}
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True, **kind)
        path.write_bytes(b64decode(found["data"]))

    def asked_for(self) -> set[str]:
        """The addresses of every request that the pages made."""
        return {event["request"]["url"] for event in self.named("Network.requestWillBeSent")}

    def complaints(self) -> list[str]:
        """What the browser has logged as an error, and what scripts did not catch."""
        logged = [e["entry"]["text"] for e in self.named("Log.entryAdded")
                  if e["entry"]["level"] == "error"]  # fmt: skip
        return logged + [str(e) for e in self.named("Runtime.exceptionThrown")]


@contextmanager
def browser(program: str, folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`, ended with the block."""
    to_it, our_end = os.pipe()
    from_it, its_end = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-pipe",
             f"--user-data-dir={folder / 'profile'}", "about:blank"]  # fmt: skip
    command = [sys.executable, "-c", _AS_3_AND_4, str(to_it), str(its_end), program, *flags]
    process = subprocess.Popen(command, pass_fds=(to_it, its_end), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(to_it)
    os.close(its_end)
    made = Browser(from_it, our_end)
    try:
        made.attach()
        yield made
    finally:
        process.terminate()
        process.wait(WAIT_S)
        made.thread.join(WAIT_S)
        os.close(our_end)
        os.close(from_it)
