"""A person who labels by hand: opens the page that a command offers, and judges over HTTP as the
page does, by the same verdict on the same question always.
"""

import http.client
import json
import os
import re
import signal
import threading
import time
import zlib
from urllib.parse import parse_qs, urlsplit

TRIES = 3  # of a key that the page says was not kept; then Ctrl-C
SLOW_S = 120  # for a reply, against a hang only


def verdict(item):
    """What is said of a question that is on the screen."""
    if "sides" in item:
        return {"better": ("left", "right", "equal")[zlib.crc32(item["id"].encode()) % 3]}
    words = [zlib.crc32(text.encode()) & 1 for text in item["texts"]]
    return {"words": words, "sentence": zlib.crc32(item["id"].encode()) & 1}


class Person:
    """Who labels in one run folder, by however many processes."""

    def __init__(self):
        self.sent = []  # what was judged, by its id, in order
        self.kept = []  # of these, those that were acknowledged
        self.seat = None

    def sit_down(self, process, log):
        """Wait for the address of the page, and label until all is done or the process dead."""
        self.seat = threading.Thread(target=self._work, args=(process, log), daemon=True)
        self.seat.start()

    def left(self):
        """Wait until nothing is under way any more, behind the end of the process."""
        if self.seat is not None:
            self.seat.join(SLOW_S)

    def _work(self, process, log):
        while process.is_alive():
            said = log.read_text(errors="replace") if log.exists() else ""
            if found := re.search(r"open (http://127\S+) in", said):
                break
            time.sleep(0.01)
        else:
            return
        try:
            if not self._label(_Page(found[1])):
                os.kill(process.pid, signal.SIGINT)
        except (OSError, http.client.HTTPException, ValueError):
            pass  # it is dead

    def _label(self, page):
        """Whether every key was taken in the end."""
        item = page.ask("/next")[1]["item"]
        while item is not None:
            for _ in range(TRIES):
                self.sent.append(item["id"])
                status, found = page.ask("/label", id=item["id"], **verdict(item))
                if status == 200:
                    break
            else:
                return False
            self.kept.append(item["id"])
            item = found["item"]
        page.ask("/finish")
        return True


class _Page:
    """The page at an address."""

    def __init__(self, address):
        parts = urlsplit(address)
        self.port, self.key = parts.port, parse_qs(parts.query)["key"][0]

    def ask(self, path, **body):
        """The status of a reply, and its JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SLOW_S)
        try:
            raw = json.dumps({"client": "tab", "annotator": "me", **body})
            connection.request("POST", path, raw, {"Content-Type": "application/json",
                                                   "X-Tppo-Key": self.key})  # fmt: skip
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()
