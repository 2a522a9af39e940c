"""Pairs compared by hand: who is asked what, what is kept, what is refused, and the terminal."""

import json
import os
import pty
import subprocess
import sys

import pytest
from test_hand import HOSTILE, ME, call, served, session

from tppo.labels.config import HandConfig
from tppo.labels.hand import HandPairs, Preferred
from tppo.labels.journal import Without
from tppo.stages.answer_pairs import AnswerPair
from tppo.stages.answers import Answer
from tppo.stages.hand.forms import PairForm
from tppo.stages.hand.pairs import PairDesk, side_of

TEXTS = ["red shoes\ntrail running shoes", "海鲜上海\nred 鞋", "אבג דהו\nshoes, red"]


def pair_of(i, texts=TEXTS):
    one, two = (Answer(f"s{i}#{k}", f"s{i}", [1], [2, k], "eos", texts[(i + k) % len(texts)])
                for k in (0, 1))  # fmt: skip
    return AnswerPair(f"s{i}~0", one, two, (1, 1))


def pair_desk_of(path, n=60, texts=TEXTS, seed=0, **config):
    pairs = [pair_of(i, texts) for i in range(n)]
    return PairDesk(pairs, lambda pair: session(int(pair.first.session[1:])), HandPairs(path),
                    HandConfig(**config), seed)  # fmt: skip


def prefer(desk, side="left", client="a", annotator="me"):
    item = desk.next(client, annotator)
    desk.judge(client, annotator, item.id, side)
    return item


def test_what_is_better_is_kept_with_the_side_on_which_it_stood(tmp_path):
    desk = pair_desk_of(tmp_path / "pairs.jsonl")
    items = [prefer(desk, side) for side in ("left", "right", "equal") * 6]
    again = list(HandPairs(tmp_path / "pairs.jsonl"))
    assert [said.id for said in again] == [item.id for item in items]
    for said, item, side in zip(again, items, ("left", "right", "equal") * 6, strict=True):
        assert said.responses == (item.pair.first.text, item.pair.second.text)
        assert said.left == item.left and side_of(said) == side and said.seconds >= 0
        if side != "equal":
            assert said.responses[said.better] == item.sides()[side == "right"]
    assert {said.better for said in again} == {0, 1, None}
    assert {said.guidance for said in again} == {desk.config.pair_guidance}


def test_sides_are_drawn_for_each_pair_and_person_and_stay(tmp_path):
    desk = pair_desk_of(tmp_path / "pairs.jsonl", n=400, pairs=402)
    lefts = {item.id: item.left for item in (prefer(desk) for _ in range(400))}
    assert 160 < sum(lefts.values()) < 240  # 4 standard deviations
    hers = {item.id: item.left for item in (prefer(desk, annotator="anna") for _ in range(10))}
    assert 0 < sum(lefts[id] != left for id, left in hers.items()) < 10
    item, said = desk.undo("a", "anna")
    assert item.left == said.left == desk.next("a", "anna").left


def test_pairs_are_shared_out_and_the_first_ten_are_for_everyone(tmp_path):
    desk = pair_desk_of(tmp_path / "pairs.jsonl", pairs=30)
    mine = [prefer(desk).id for _ in range(12)]
    one, two = desk.next("a", "me"), desk.next("b", "me")
    assert one.id != two.id and desk.next("a", "me").id == one.id
    hers = [prefer(desk, client="x", annotator="anna").id for _ in range(12)]
    assert hers[:10] == mine[:10] and not set(hers[10:]) & {*mine, one.id, two.id}
    assert desk.progress()["annotators"] == {"me": 12, "anna": 12} and desk.count() == 14
    desk.skip("a", "me", one.id)
    prefer(desk, client="b")
    undone, _ = desk.undo("b", "me")
    assert undone.id == two.id
    left = [prefer(desk, client="b").id for _ in range(16)]
    assert one.id not in left and desk.next("b", "me") is None
    assert HandPairs(tmp_path / "pairs.jsonl").get("me", two.id) is not None


def test_pairs_that_look_the_same_or_say_nothing_are_not_asked(tmp_path):
    assert pair_desk_of(tmp_path / "a.jsonl", texts=["red shoes", "red  shoes\n"]).drawn == []
    assert pair_desk_of(tmp_path / "a.jsonl", texts=["red shoes", " \n"]).drawn == []
    first, second = (pair_desk_of(tmp_path / "a.jsonl", seed=seed).drawn for seed in (0, 1))
    assert sorted(first) == sorted(second) != first
    assert [pair.id for pair in first] != [pair.id for pair in second]


@pytest.fixture
def server(tmp_path):
    with served(PairForm(pair_desk_of(tmp_path / "pairs.jsonl", pairs=3))) as made:
        yield made


def test_the_page_is_told_both_sides_and_keeps_one(server):
    found = call(server, "/next", ME)[1]["item"]
    pair = server.form.desk.next("a", "me")
    assert found["sides"] == [text.split("\n") for text in pair.sides()]
    assert found["history"][-1] == f"click: {HOSTILE}" and found["targets"] is None
    status, after = call(server, "/label", ME | {"id": found["id"], "better": "right"})
    assert status == 200 and after["progress"]["labelled"] == 1
    status, again = call(server, "/undo", ME)
    assert again["item"] == found and again["better"] == "right"
    assert list(server.form.desk.labels) == []


@pytest.mark.parametrize(("change", "status"), [
    ({"X_Tppo_Key": None}, 403), ({"X_Tppo_Key": "wrong"}, 403), ({"Host": "evil.example"}, 403),
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Content_Type": "text/plain"}, 415),
    ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
])  # fmt: skip
@pytest.mark.parametrize("path", ["/next", "/label", "/skip", "/undo", "/guidance", "/finish"])
def test_a_stranger_is_refused_at_every_door(server, path, change, status):
    id = server.form.desk.next("a", "me").id
    found = call(server, path, ME | {"id": id, "better": "left", "text": "x"}, **change)
    assert found[0] == status and "query" not in json.dumps(found[1])
    assert list(server.form.desk.labels) == [] and server.thread.is_alive()
    assert server.form.desk.guidance == server.form.desk.config.pair_guidance


@pytest.mark.parametrize(("body", "problem"), [
    ({"better": "both"}, "better was 'both', expected left, right or equal"),
    ({"better": 1}, "better was 1"), ({}, "better was None"),
    ({"better": "left", "id": "zz"}, "on the screen"),
])  # fmt: skip
def test_a_verdict_that_does_not_fit_is_refused(server, body, problem):
    id = call(server, "/next", ME)[1]["item"]["id"]
    status, found = call(server, "/label", ME | {"id": id} | body)
    assert status == 400 and problem in found["error"]["message"]
    assert list(server.form.desk.labels) == []


def test_the_truth_is_shown_only_if_it_is_asked_for(tmp_path):
    with served(PairForm(pair_desk_of(tmp_path / "a.jsonl", show_targets=True))) as server:
        assert call(server, "/next", ME)[1]["item"]["targets"] == ["red shoes", HOSTILE]


AT_TERMINAL = """
import sys
sys.path[:0] = {path!r}
import pathlib
import test_hand_pairs as tests
from tppo.stages.hand.terminal_pairs import compare_in_terminal
compare_in_terminal(tests.PairForm(tests.pair_desk_of(pathlib.Path({file!r}), pairs=3)))
"""


def test_somebody_compares_in_a_terminal(tmp_path):
    file = tmp_path / "pairs.jsonl"
    code = AT_TERMINAL.format(path=[p for p in sys.path if p], file=str(file))
    ours, its = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=its, stdout=its, stderr=its)
    os.close(its)
    seen = b""
    while b"q: stop comparing" not in seen:  # what is typed before is thrown away
        seen += os.read(ours, 4096)
    os.write(ours, b"u10u\x1b[C2")  # nothing to take back; one of each, the second anew
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the program has ended
            break
        seen += data
        if not data:
            break
    assert process.wait(60) == 0
    os.close(ours)
    assert [side_of(said) for said in HandPairs(file)] == ["left", "right", "right"]
    text = seen.decode()
    assert "nothing of yours to take back" in text and "You had said: equal." in text
    assert "\\u202e" in text and "\u202e" not in text


def test_a_journal_of_pairs_passes_over_a_cut_line(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    journal = HandPairs(file)
    for i in range(3):
        journal.add(Preferred(f"s{i}~0", "me", ("a", "b"), None, 1, "g", 1.0))
    journal.add(Without("s0~0", "me", "skipped"))
    file.write_bytes(file.read_bytes()[:-5])
    assert [said.id for said in HandPairs(file)] == ["s0~0", "s1~0", "s2~0"]
    assert "1 damaged line" in capsys.readouterr().err
