"""The stage prefer, by which people compare pairs of answers, and SER from labels by hand."""

import json
import shutil
import time
from collections import Counter
from dataclasses import replace

import pytest
from test_ser_run import TINY

from tppo.config import fill_defaults
from tppo.errors import DataError
from tppo.labels.config import HandConfig, LabelConfig
from tppo.labels.hand import HandLabels, HandPairs, Preferred
from tppo.labels.label import read_labels, write_labels
from tppo.labels.words import word_spans
from tppo.methods.config import SERConfig
from tppo.stages import prefer as stage
from tppo.stages.answer_pairs import answer_pairs
from tppo.stages.hand import stage as hand_stage
from tppo.stages.preferences import read_preferences
from tppo.stages.run import Run
from tppo.store.jsonl import read_json, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("prefer") / "run")
    for name in ("data", "sft", "generate", "label", "map"):
        run.perform(name)
    return run.out


def run_of(out, hand=None, labeller="rule", **ser):
    label = LabelConfig(labeller=labeller, hand=hand or HandConfig())
    config = replace(TINY, label=label, ser=SERConfig(**ser))
    return Run(out=out, config=fill_defaults(config, pretrained=False))


def somebody(monkeypatch, verdict, annotator="me", n=1000):
    """Who compares instead of a page: `verdict(item)` gives a side."""
    def ask(desk):
        for _ in range(n):
            item = desk.next("t", annotator)
            if item is None:
                return
            desk.judge("t", annotator, item.id, verdict(item))

    monkeypatch.setattr(stage, "_ask", ask)


def longer(item):
    """The side with more letters."""
    left, right = map(len, item.sides())
    return "equal" if left == right else "left" if left > right else "right"


def test_ser_begins_with_pairs_by_hand_and_no_label_of_an_answer(prepared, monkeypatch, capsys):
    somebody(monkeypatch, longer)
    run = run_of(prepared, HandConfig(pairs=40), tau_delta=0.01, rounds=1, min_share=0.01)
    run.perform("prefer")
    assert run.done("prefer") and "on the left was better" in capsys.readouterr().err
    rows = [line.values for line in read_jsonl(prepared / "prefer/pairs.jsonl")]
    equal = [line.values for line in read_jsonl(prepared / "prefer/equal.jsonl")]
    assert len(rows) + len(equal) == 40 and len(rows) > 20
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert {row["labeller"] for row in rows} == {"hand:me"}
    run.perform("ser")
    report = read_json(prepared / "ser/report.json")
    sessions = {row["id"].split("~")[0] for row in rows}
    held = max(1, round(0.1 * len(sessions)))
    assert report["heldout"] == held and report["seed"] == len(rows) - held  # all that people said
    there = answer_pairs([prepared / "generate/answers.jsonl"])  # of 120 sessions, but equal ones
    assert 100 < len(there) <= 120 and report["pool"] == len(there) - 40
    assert report["rounds"][1]["kept"] > 0 and report["rounds"][1]["kept_accuracy"] is None
    assert "the seed is what people have said of pairs" in capsys.readouterr().err
    pairs = read_preferences(prepared / "prefer/pairs.jsonl")  # `tppo ser --pairs`, `tppo pit`
    assert len(pairs) == len(rows) and all(pair.labelled for pair in pairs)


def test_what_was_said_is_kept_where_the_stage_is_repeated_and_people_are_compared(
    prepared, monkeypatch, capsys
):
    path = prepared / "hand-pairs.jsonl"
    path.unlink(missing_ok=True)
    somebody(monkeypatch, longer, n=12)
    run_of(prepared, HandConfig(pairs=12)).perform("prefer")
    before = path.read_bytes()
    somebody(monkeypatch, lambda item: "left", "anna", n=10)
    run_of(prepared, HandConfig(pairs=13)).perform("prefer")
    assert path.read_bytes().startswith(before)
    said = capsys.readouterr().err
    assert "anna and me say the same" in said and "people disagree" in said
    rows = [line.values for name in ("pairs", "equal")
            if (prepared / f"prefer/{name}.jsonl").exists()
            for line in read_jsonl(prepared / f"prefer/{name}.jsonl")]  # fmt: skip
    order = [pair.id for pair in answer_pairs([prepared / "generate/answers.jsonl"])]
    by_place = sorted(read_jsonl(prepared / "prefer/pairs.jsonl"),
                      key=lambda line: order.index(line.values["id"]))  # fmt: skip
    assert [line.number for line in by_place] == [*range(1, len(by_place) + 1)]
    both = [row for row in rows if row["labeller"] == "hand:me, hand:anna"]
    of = {said.id: said for said in HandPairs(path) if said.annotator == "anna"}
    mine = {said.id: said for said in HandPairs(path) if said.annotator == "me"}
    assert len(both) == 10
    for row in both:
        alike = of[row["id"]].better == mine[row["id"]].better
        assert ("chosen" in row) == (alike and of[row["id"]].better is not None)


def test_pairs_of_answers_that_are_gone_are_left_out_and_said(prepared, monkeypatch, capsys):
    path = prepared / "hand-pairs.jsonl"
    path.unlink(missing_ok=True)
    HandPairs(path).add(Preferred("s0~0", "me", ("old", "older"), 1, 0, "g", 1.0))
    somebody(monkeypatch, longer)
    run_of(prepared, HandConfig(pairs=5)).perform("prefer")
    assert "1 judgements in" in capsys.readouterr().err
    assert len([*read_jsonl(prepared / "prefer/pairs.jsonl")]) == 5  # as many as were asked for
    assert not (prepared / "prefer/equal.jsonl").exists()
    (said,) = [found for found in HandPairs(path) if found.id == "s0~0"]  # is on the disk still
    assert said.responses == ("old", "older")
    path.unlink()
    somebody(monkeypatch, longer, n=0)
    with pytest.raises(DataError, match="no pair is compared, expected one or more"):
        run_of(prepared, HandConfig(pairs=6)).perform("prefer")


def test_one_answer_to_each_history_makes_no_pair(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run")
    monkeypatch.setattr(Run, "paths", lambda self, artifact: [tmp_path / "generate/answers.jsonl"])
    monkeypatch.setattr(stage, "answer_pairs", lambda paths: [])
    monkeypatch.setattr(Run, "inputs", lambda self, name: [])
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/data/train.jsonl").write_text("")
    with pytest.raises(DataError, match="no session has two answers .*tppo generate --round 2"):
        run.perform("prefer")


def test_ser_begins_with_words_by_hand_and_labels_the_rest(prepared, monkeypatch):
    """Of 240 answers 30 have labels by hand: they are the seed, but for a tenth; 210 the pool."""
    run = run_of(prepared, labels="words", tau_token=0.5, rounds=1)
    labels = read_labels(prepared / "label/labels.jsonl")
    rows = [line.values for line in read_jsonl(prepared / "map/categories.jsonl")]
    try:
        chosen = {label.id for label in labels[:30]}
        by_hand = [replace(label, labeller="hand:me") for label in labels[:30]]
        write_labels(prepared / "label/labels.jsonl", by_hand)
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["id"] in chosen)
        (prepared / "map/categories.jsonl").write_text(kept)
        monkeypatch.setattr(type(run.folder), "verify", lambda self, path: None)
        run.perform("ser")
        report = read_json(prepared / "ser/report.json")
        sessions = len({id.split("#")[0] for id in chosen})
        assert report["heldout"] >= round(0.1 * sessions) and report["pool"] == 210
        assert report["seed"] + report["heldout"] >= 30  # and answers with a query repeated
        assert report["rounds"][1]["kept"] > 0 and report["all_labels"] is None
    finally:
        write_labels(prepared / "label/labels.jsonl", labels)


@pytest.mark.parametrize("suggestions", [True, False])
def test_without_suggestions_no_model_is_trained_and_all_answers_are_drawn(
    prepared, tmp_path, monkeypatch, suggestions
):
    out = shutil.copytree(prepared, tmp_path / "run")
    teachers = []

    def ask(form, port, what, browser):
        desk = form.desk
        for n in range(27):
            end = time.monotonic() + 60
            while suggestions and n == 25 and not desk.teacher.learnt and time.monotonic() < end:
                time.sleep(0.02)
            item = desk.next("t", "me")
            count = len(word_spans(item.answer.text))
            desk.judge("t", "me", item.id, [i % 2 for i in range(count)], 1)
        teachers.append(desk.teacher)

    monkeypatch.setattr(hand_stage, "label_in_browser", ask)
    run_of(out, HandConfig(answers=27, suggestions=suggestions), "hand").perform("label")
    kinds = Counter(found.kind for found in HandLabels(out / "hand-labels.jsonl"))
    assert kinds == {"check": 10, "random": 15} | (
        {"chosen": 2} if suggestions else {"random": 17})  # fmt: skip
    assert (teachers[0] is not None) == suggestions
