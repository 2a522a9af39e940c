"""Labels by hand: the journal, who is asked what, what is refused, and the terminal."""

import http.client
import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tppo.errors import DataError
from tppo.labels.config import HandConfig
from tppo.labels.hand import HandLabels, Judged
from tppo.labels.journal import Without
from tppo.labels.words import word_spans
from tppo.sessions.session import Event, Session
from tppo.stages.answers import Answer
from tppo.stages.hand.desk import CHECK, FIRST, Desk, drawn
from tppo.stages.hand.forms import WordForm
from tppo.stages.hand.server import LabelServer
from tppo.stages.hand.terminal import label_in_terminal

HOSTILE = "<img src=x onerror=\"document.title='pwned'\"></script>\u202e"
TEXTS = ["red shoes\ntrail running shoes\nbuy", "海鲜上海\nred 鞋", "אבג דהו\nshoes, red"]


MORE = ()  # events of every history, for a test that wants others


def session(number):
    history = (Event("search", f"query {number}"), *MORE, Event("click", HOSTILE))
    return Session(f"s{number}", f"u{number % 40}", "test", (), history, ("red shoes", HOSTILE))


def answers(n=120, texts=TEXTS):
    return [Answer(f"s{i}#0", f"s{i}", [1], [2], "eos", texts[i % len(texts)]) for i in range(n)]


def session_of(answer):
    return session(int(answer.session[1:]))


def desk_of(path, texts=TEXTS, n=120, **config):
    return Desk(answers(n, texts), session_of, HandLabels(path), HandConfig(**config), 0)


def judge(desk, client="a", annotator="me", by=lambda word: int("red" in word)):
    """Judge what is next, every word by a rule; its item."""
    item = desk.next(client, annotator)
    text = item.answer.text
    words = [by(text[a:b]) for a, b in word_spans(text)]
    desk.judge(client, annotator, item.answer.id, words, 1)
    return item


def test_a_bit_that_flips_in_a_journal_is_noticed(tmp_path):
    """A 0 that became a 1 was somebody's word."""
    journal = HandLabels(tmp_path / "labels.jsonl")
    journal.add(Judged("a", "me", "red shoes", (0, 1), 1, "random", "g", 1.0))
    (line,), raw = [*journal], journal.path.read_bytes()
    for place in range(len(raw) - 1):
        for bit in (1, 4):
            flipped = raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]
            journal.path.write_bytes(flipped)
            assert [*HandLabels(journal.path)] in ([], [line]), flipped
    unsummed = json.loads(raw)
    del unsummed["sum"]  # as an earlier version wrote it
    journal.path.write_text(json.dumps(unsummed) + "\n")
    assert [*HandLabels(journal.path)] == [line]


class Told:
    """A teacher who has learnt and is unsure of one answer alone."""

    def __init__(self, unsure):
        self.unsure, self.learnt, self.given = unsure, 20, []

    def learn(self, judged):
        self.given = list(judged)

    def foretell(self, id):
        return (0.5, 0.6) * 3 if id == self.unsure else (0.99, 0.01) * 3  # at least 6 words

    def doubt(self, id):
        return 0.68 if id == self.unsure else 0.05


# --- the journal


def judged(id="a", annotator="me", words=(1, -1), **other):
    given = {"kind": "random", "guidance": "g", "seconds": 1.5, "sentence": 1} | other
    return Judged(id, annotator, "red shoes", words, **given)


def test_a_journal_reads_what_it_wrote_and_what_was_taken_back(tmp_path):
    path = tmp_path / "hand.jsonl"
    labels = HandLabels(path)
    entries = [judged(), judged("b", foretold=(0.25, 0.75)), judged(words=(0, 0)),
               Without("b", "me", "undone"), Without("c", "me", "skipped")]  # fmt: skip
    for entry in entries:
        labels.add(entry)
    again = HandLabels(path)
    assert list(again) == list(labels) == [judged(words=(0, 0))]
    assert ("me", "c") in again and ("me", "b") not in again and ("you", "a") not in again
    (label,) = [found.label() for found in again]
    assert (label.words, label.labeller) == ((("red", 0), ("shoes", 0)), "hand:me")
    assert judged().label().words == (("red", 1), ("shoes", -1))


@pytest.mark.parametrize("damage", ["cut", "other", "words"])
def test_a_damaged_line_costs_its_own_answer(tmp_path, damage, capsys):
    path = tmp_path / "hand.jsonl"
    labels = HandLabels(path)
    labels.add(judged())
    labels.add(judged("b"))
    raw = path.read_bytes()
    bad = {"cut": raw[:-9], "other": raw + b'{"id": "z"}\n',
           "words": raw.replace(b'"words": [1, -1]', b'"words": [1]', 1)}[damage]  # fmt: skip
    path.write_bytes(bad)
    again = HandLabels(path)
    assert "1 damaged line" in capsys.readouterr().err
    left = {"cut": ["a"], "other": ["a", "b"], "words": ["b"]}[damage]
    assert [found.id for found in again] == left
    again.add(judged("c"))  # not glued to half a line
    assert [found.id for found in HandLabels(path)] == [*left, "c"]


# --- who is asked what


def test_answers_are_drawn_at_random_and_spread_over_users():
    first = drawn(answers(), session_of, 100, seed=0)
    assert len({session_of(answer).user for answer in first[:25]}) == 25
    assert first[:40] != drawn(answers(), session_of, 100, seed=1)[:40]
    assert [a.id for a in first[:25]] != [a.id for a in answers()[:25]]
    wordless = [answer._replace(text=" \n") for answer in answers(3)]
    assert drawn(wordless, session_of, 100, seed=0) == []


def test_the_first_are_drawn_and_the_check_is_not_learnt_from(tmp_path):
    desk = desk_of(tmp_path / "hand.jsonl", answers=40)
    last = desk.drawn[-1].id
    teacher = Told(last)
    desk.taught_by(teacher)
    kinds = Counter(judge(desk).kind for _ in range(FIRST))
    assert kinds == {"check": CHECK, "random": FIRST - CHECK}
    assert {found.kind for found in teacher.given} == {"random"}
    desk.model_changed()
    figures = desk.progress()["agreement"]
    assert figures["words"] == sum(len(f.words) for f in desk.labels if f.kind == "check")
    assert figures["low"] < figures["share"] < figures["high"] and figures["before"] is None
    users = Counter(session_of(answer).user for answer in desk.drawn)
    chosen = judge(desk)
    assert chosen.kind == "chosen" and users[session(int(last[1:-2])).user] > 1
    assert chosen.foretold == teacher.foretell(chosen.answer.id)
    assert desk.count() == FIRST + 1


def test_the_most_unsure_answer_of_the_users_asked_least_comes_next(tmp_path):
    desk = desk_of(tmp_path / "hand.jsonl", answers=40)
    for _ in range(FIRST):
        judge(desk)
    asked = {session_of(desk._known[found.id]).user for found in desk.labels}
    fresh = [a for a in desk.drawn[FIRST:] if session_of(a).user not in asked]
    desk.taught_by(Told(fresh[-1].id))
    assert desk.next("a", "me").answer == fresh[-1]
    stale = [a for a in desk.drawn[FIRST:] if session_of(a).user in asked]
    other = desk_of(tmp_path / "hand.jsonl", answers=40)
    other.taught_by(Told(stale[-1].id))
    assert other.next("a", "me").answer != stale[-1]


def test_two_tabs_get_other_answers_and_two_people_share_the_check(tmp_path):
    desk = desk_of(tmp_path / "hand.jsonl", answers=60)
    one, two = desk.next("a", "me"), desk.next("b", "me")
    assert one.answer.id != two.answer.id
    assert desk.next("a", "me").answer == one.answer  # the same until it is judged
    for _ in range(FIRST - 2):
        judge(desk, "c")
    judge(desk, "a")
    judge(desk, "b")
    hers = [judge(desk, "x", "anna") for _ in range(CHECK + 3)]
    assert [item.kind for item in hers[:CHECK]] == ["check"] * CHECK
    mine = {found.id for found in desk.labels if found.annotator == "me"}
    assert not mine & {item.answer.id for item in hers[CHECK:]}
    assert desk.progress()["annotators"] == {"me": FIRST, "anna": CHECK + 3}
    assert desk.count() == FIRST + 3


def test_undo_shows_the_last_one_again_and_a_skipped_answer_does_not_come_back(tmp_path):
    desk = desk_of(tmp_path / "hand.jsonl")
    assert desk.undo("a", "me") is None
    first, second = judge(desk), judge(desk)
    item, before = desk.undo("a", "me")
    assert item.answer == second.answer and before.sentence == 1
    assert desk.next("a", "me").answer == second.answer and desk.count() == 1
    desk.skip("a", "me", second.answer.id)
    seen = {judge(desk).answer.id for _ in range(30)}
    assert not seen & {first.answer.id, second.answer.id}


@pytest.mark.parametrize(("words", "sentence", "problem"), [
    ([1], 1, "expected 6 of"), ([1, 0, 2, 0, 0, 0], 1, "expected 6 of"),
    ([1] * 6, 2, "0 or 1"), ([-1] * 6, 0, "no word was judged"),
])  # fmt: skip
def test_a_verdict_that_does_not_fit_is_refused(tmp_path, words, sentence, problem):
    desk = desk_of(tmp_path / "hand.jsonl", TEXTS[:1])
    item = desk.next("a", "me")
    with pytest.raises(ValueError, match=problem):
        desk.judge("a", "me", item.answer.id, words, sentence)
    with pytest.raises(ValueError, match="expected that of the answer on the screen"):
        desk.judge("b", "me", item.answer.id, [1] * 6, 1)
    assert not (tmp_path / "hand.jsonl").exists()


# --- the server


@contextmanager
def served(form):
    """A server that is asked by its `thread`, ended with the block."""
    with LabelServer(form, 0) as made:
        made.thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
        made.thread.start()
        yield made
        made.shutdown()
        made.thread.join()


@pytest.fixture
def server(tmp_path):
    with served(WordForm(desk_of(tmp_path / "hand.jsonl", answers=4), 0.6)) as made:
        yield made


def call(server, path, body=None, method="POST", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    given = {"Content-Type": "application/json", "X-Tppo-Key": server.key}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {name: value for name, value in given.items() if value is not None}
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, raw if method == "POST" else None, sent)
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    kind = reply.headers["Content-Type"]
    return reply.status, json.loads(data) if kind == "application/json" else data.decode()


ME = {"client": "a", "annotator": "me"}


@pytest.mark.parametrize("change", [
    {"X_Tppo_Key": None}, {"X_Tppo_Key": "wrong"}, {"X_Tppo_Key": "schlüssel"},
    {"Host": "evil.example"}, {"Origin": "http://evil.example"},
    {"Content_Type": "text/plain"},
])  # fmt: skip
def test_a_stranger_is_refused_and_sees_nothing(server, change):
    status, found = call(server, "/next", ME, **change)
    assert status in (403, 415) and "error" in found
    assert "query" not in json.dumps(found)
    status, found = call(server, "/", method="GET", **change)
    assert status == 403 and "key" in json.dumps(found) or "refused" in json.dumps(found)


def test_the_page_opens_with_its_key_alone(server):
    address = server.address.removeprefix(f"http://127.0.0.1:{server.port}")
    status, page = call(server, address, method="GET")
    assert status == 200 and "<h1>" in page and server.key not in page
    assert call(server, "/other", method="GET")[0] == 404
    assert call(server, "/other", {})[0] == 404


@pytest.mark.parametrize(("path", "body", "problem"), [
    ("/next", [], "a JSON object"), ("/next", {"annotator": "me"}, "client was None"),
    ("/next", ME | {"annotator": "x" * 201}, "at most 200"),
    ("/next", ME | {"annotator": "\ud800"}, "UTF-8"),
    ("/label", ME | {"id": "s1#0", "words": [True], "sentence": 1}, "words were"),
    ("/label", ME | {"id": "s1#0", "words": [1], "sentence": None}, "sentence was None"),
    ("/label", ME | {"id": "s1#0", "words": [1], "sentence": 1}, "on the screen"),
    ("/skip", ME | {"id": "zz"}, "on the screen"), ("/undo", ME, "nothing of yours"),
    ("/guidance", ME | {"text": " "}, "text was ' '"), ("/finish", ME, "nothing is judged yet"),
    ("/next", b"{", "no JSON"),
])  # fmt: skip
def test_what_is_wrong_with_a_request_is_named(server, path, body, problem):
    status, found = call(server, path, body)
    assert status == 400 and problem in found["error"]["message"]


def test_the_server_ends_after_its_replies(server, monkeypatch):
    """The process ends with the server, and a reply that is not sent by then is never sent."""
    handler, begun, replies = server.RequestHandlerClass, threading.Event(), []
    send = handler.send

    def slow(self, *reply):
        begun.set()
        time.sleep(0.5)
        send(self, *reply)
        replies.append(self.path)

    item = call(server, "/next", ME)[1]["item"]
    said = {"id": item["id"], "words": [1] * len(item["texts"]), "sentence": 1}
    monkeypatch.setattr(handler, "send", slow)
    with ThreadPoolExecutor() as pool:
        label = pool.submit(call, server, "/label", ME | said)
        assert begun.wait(10)
        finish = pool.submit(call, server, "/finish", ME)
        server.thread.join(30)
        assert not server.thread.is_alive() and sorted(replies) == ["/finish", "/label"]
        assert label.result()[0] == finish.result()[0] == 200


def test_words_are_shown_in_their_lines_and_the_truth_only_if_asked_for(server, tmp_path):
    item = call(server, "/next", ME)[1]["item"]
    text = next(a.text for a in answers() if a.id == item["id"])
    assert item["texts"] == [text[a:b] for a, b in word_spans(text)] and item["targets"] is None
    shown = [[part["text"] for part in line if part["word"] is not None] for line in item["lines"]]
    assert sum(shown, []) == item["texts"] and len(shown) == text.count("\n") + 1
    assert item["history"][-1] == f"click: {HOSTILE}"
    desk = desk_of(tmp_path / "other.jsonl", ["x" * 100_000], 2, show_targets=True)
    with served(WordForm(desk, 0.6)) as long:
        item = call(long, "/next", ME)[1]["item"]
    assert item["targets"] == ["red shoes", HOSTILE]
    assert item["texts"] == ["x" * 2000 + " … (98,000 more characters)"]


def test_a_port_that_is_taken_is_named(server, tmp_path):
    with pytest.raises(DataError, match=f"--label.hand.port was {server.port}, which cannot be"):
        LabelServer(WordForm(desk_of(tmp_path / "x.jsonl"), 0.6), server.port)


# --- the terminal


AT_TERMINAL = """
import sys
sys.path[:0] = {path!r}
import pathlib
import test_hand
from tppo.stages.hand.terminal import label_in_terminal
desk = test_hand.desk_of(pathlib.Path({file!r}), test_hand.TEXTS[:1], answers=3)
label_in_terminal(test_hand.WordForm(desk, 0.6))
"""


def test_somebody_labels_in_a_terminal(tmp_path):
    file = tmp_path / "hand.jsonl"
    code = AT_TERMINAL.format(path=[p for p in sys.path if p], file=str(file))
    ours, its = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=its, stdout=its, stderr=its)
    os.close(its)
    seen = b""

    def until(text):
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 4096)
        seen = seen[seen.index(text) + len(text) :]

    def press(*keys):
        for key in keys:
            os.write(ours, key)
            until(b"q: stop labelling")

    until(b"q: stop labelling")
    press(b"1", b"0", b"\x1b[C", b" ", b"\x1b[B", b"1")  # red shoes / trail running shoes / buy
    press(b"\r")
    press(b"+", b"-", b"a", b"\r", b"u", b"\r")
    press(b"\r")  # no word is judged
    os.write(ours, b"+\r")
    while True:
        try:
            if not os.read(ours, 4096):
                break
        except OSError:  # the program has ended
            break
    assert process.wait(60) == 0
    os.close(ours)
    found = {f.id: (f.words, f.sentence) for f in HandLabels(file)}
    assert [*found.values()] == [
        ((1, 0, -1, 1, -1, 1), 1), ((1, 1, 0, 0, 0, -1), 1), ((1, 1, -1, -1, -1, -1), 1),
    ]  # fmt: skip


def test_a_pipe_is_no_terminal(tmp_path):
    with pytest.raises(DataError, match="standard input is no terminal"):
        label_in_terminal(WordForm(desk_of(tmp_path / "hand.jsonl"), 0.6))
