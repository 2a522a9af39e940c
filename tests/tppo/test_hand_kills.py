"""Killed at random moments while somebody labels: nothing but what is on the screen is missing.

A process that serves the page is killed while a script labels over HTTP as the page does.  Here 3
times over 30 answers and a bare server; with TPPO_TEST_FULL=1 also 20 times over 200 answers of a
run, with `tppo label` and the model that it trains in the background.
"""

import http.client
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest

from tppo.labels.hand import HandLabels, HandPairs

SERVE = """
import sys
sys.path[:0] = {path!r}
import pathlib
import {module} as tests
from tppo.stages.hand.server import LabelServer
file = pathlib.Path({file!r})
form = {form}
with LabelServer(form, 0) as server:
    print("open", server.address, flush=True)
    server.serve_forever(0.02)
"""
FORMS = {
    "words": ("test_hand", "tests.WordForm(tests.desk_of(file, n=400, answers=30), 0.6)"),
    "pairs": ("test_hand_pairs", "tests.PairForm(tests.pair_desk_of(file, n=400, pairs=30))"),
}


class Person:
    """Labels at one server until it is dead or says that nothing is left; what was answered by
    200 is `kept`, what was sent last and got no reply may be or not.
    """

    def __init__(self, address, client):
        parts = urlsplit(address)
        self.port, self.key = parts.port, parse_qs(parts.query)["key"][0]
        self.client, self.kept, self.pending, self.done = client, {}, None, False

    def ask(self, path, **body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            raw = json.dumps({"client": self.client, "annotator": "me", **body})
            connection.request("POST", path, raw, {"Content-Type": "application/json",
                                                   "X-Tppo-Key": self.key})  # fmt: skip
            reply = connection.getresponse()
            found = json.loads(reply.read())
            assert reply.status == 200, found
            return found
        finally:
            connection.close()

    def label(self, rng):
        item = self.ask("/next")["item"]
        while item is not None:
            if "texts" in item:
                said = {"words": [rng.choice((0, 1)) for _ in item["texts"]],
                        "sentence": rng.choice((0, 1))}  # fmt: skip
            else:
                said = {"better": rng.choice(("left", "right", "equal"))}
            self.pending = item["id"]
            found = self.ask("/label", id=item["id"], **said)
            self.kept[item["id"]], self.pending = said, None
            item = found["item"]
        self.done = True

    def work(self, rng):
        try:
            self.label(rng)
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            pass  # it is dead


def killed(command, journal, kills, rng, spell, env=None):
    """Label until it is done, and kill the server `kills` times on the way; checks after each."""
    kept, killed_at = {}, []
    for number in range(kills + 1):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, env=env)  # fmt: skip
        said = []
        for line in process.stdout:
            said.append(line)
            if address := re.search(r"open (http://127\S+)", line):
                break
        else:
            raise AssertionError("".join(said))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        person = Person(address[1], f"tab {number}")
        worker = threading.Thread(target=person.work, args=(random.Random(number),), daemon=True)
        worker.start()
        if number < kills:
            # Not before it has kept something, or nothing would be proved.
            while not person.kept and worker.is_alive():
                time.sleep(0.001)
            time.sleep(rng.random() * spell)
            process.kill()
            killed_at.append(len(kept) + len(person.kept))
        worker.join(300)
        assert not kept.keys() & person.kept.keys()  # what is kept is not asked again
        kept |= person.kept
        on_disk = {found.id: found for found in journal()}
        assert kept.keys() <= on_disk.keys()
        for id, said_of in person.kept.items():
            found = on_disk[id]
            if "words" in said_of:
                assert [*found.words] == said_of["words"] and found.sentence == said_of["sentence"]
            else:
                assert (found.better is None) == (said_of["better"] == "equal")
        beyond = on_disk.keys() - kept.keys()
        assert len(beyond) <= 1 and beyond <= {person.pending}  # sent, and no reply came
        kept |= dict.fromkeys(beyond)
    assert person.done
    if process.poll() is None:
        person.ask("/finish")
        process.wait(600)
    return kept, killed_at


@pytest.mark.parametrize("kind", ["words", "pairs"])
def test_three_kills_over_thirty_answers_lose_nothing_that_was_kept(tmp_path, kind):
    module, form = FORMS[kind]
    file = tmp_path / "hand.jsonl"
    code = SERVE.format(path=[p for p in sys.path if p], file=str(file), module=module, form=form)
    journal = {"words": HandLabels, "pairs": HandPairs}[kind]
    kept, killed_at = killed([sys.executable, "-c", code], lambda: journal(file), 3,
                             random.Random(0), 0.02)  # fmt: skip
    assert len(kept) == 30 and killed_at == sorted(killed_at)


@pytest.mark.skipif(os.environ.get("TPPO_TEST_FULL") != "1", reason="minutes: make test-full")
def test_twenty_kills_over_two_hundred_answers_of_a_run_lose_nothing_that_was_kept(tmp_path):
    out = tmp_path / "run"
    sizes = ["--sessions.train-users", "120", "--sessions.heldout-users", "8",
             "--sessions.test-users", "8", "--sessions.transfer-users", "1",
             "--scratch.hidden-size", "32", "--scratch.intermediate-size", "32",
             "--scratch.vocab-size", "400", "--scratch.layers", "1", "--sft.max-steps", "40",
             "--generate.samples", "400", "--out", str(out)]  # fmt: skip
    tppo = [sys.executable, "-m", "tppo"]
    for name in ("data", "sft", "generate"):
        subprocess.run([*tppo, name, *sizes], check=True, capture_output=True, timeout=600)
    command = [*tppo, "label", "--out", str(out), "--label.labeller", "hand",
               "--label.hand.answers", "200", "--label.hand.no-browser", *sizes]  # fmt: skip
    kept, killed_at = killed(command, lambda: HandLabels(out / "hand-labels.jsonl"), 20,
                             random.Random(0), 0.1)  # fmt: skip
    assert len(kept) == 200 and len(killed_at) == 20 and killed_at[-1] < 200
    labels = [json.loads(line) for line in (out / "label/labels.jsonl").read_text().splitlines()]
    assert {label["id"] for label in labels} == kept.keys()
