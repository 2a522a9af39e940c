"""From labels by hand to a reward model: with other labels beside them, apart and in one run."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pages import Page

from tppo.cli import main
from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.evaluation.judge import spoken
from tppo.evaluation.table import judge_line
from tppo.labels.agreement import pairwise
from tppo.labels.config import HandConfig, LabelConfig
from tppo.labels.hand import HandLabels, Judged
from tppo.labels.label import read_labels
from tppo.labels.rule import label_by_rule
from tppo.labels.words import word_spans
from tppo.methods import reward_model as methods
from tppo.methods.auc import area_under_curve
from tppo.methods.config import RewardModelConfig, SFTConfig
from tppo.methods.reward_model import (
    LabelledAnswer,
    _losses,
    rate_tokens,
    train_reward_model,
    weighed,
)
from tppo.models.config import GenerateConfig, ScratchConfig
from tppo.sessions.config import SessionsConfig
from tppo.stages import reward_curve, reward_model
from tppo.stages.hand.stage import journal_of
from tppo.stages.label import compare_labels, label_answers
from tppo.stages.report.found import read_folder
from tppo.stages.report.reward_model import reward_model as drawn
from tppo.stages.run import Run
from tppo.store import checkpoint
from tppo.store.jsonl import SUM, read_json

SETTINGS = fill_defaults(
    Config(
        sessions=SessionsConfig(train_users=60, heldout_users=8, test_users=8, transfer_users=4),
        scratch=ScratchConfig(hidden_size=16, intermediate_size=16, vocab_size=300, heads=2),
        sft=SFTConfig(max_steps=2, eval_every=2),
        generate=GenerateConfig(samples=48, max_new_tokens=8),
        reward_model=RewardModelConfig(epochs=1),
    ),
    pretrained=False,
)  # fmt: skip


def by_hand(rest=None, answers=12, hand_weight=1.0, **other):
    """Settings of a run that is labelled by hand."""
    label = LabelConfig(labeller="hand", hand=HandConfig(answers=answers, rest=rest, **other))
    weighing = replace(SETTINGS.reward_model, hand_weight=hand_weight)
    return replace(SETTINGS, label=label, reward_model=weighing)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "out"
    for stage in ("data", "sft", "generate"):
        Run(out, SETTINGS).perform(stage)
    return out


@pytest.fixture
def out(generated, tmp_path):
    return shutil.copytree(generated, tmp_path / "out")


def answers_of(run):
    """The generated answers that have words, with the true labels."""
    targets = {session.id: session.targets for session in run.sessions("train")}
    found = [(a, label_by_rule(a.id, a.text, targets[a.session], 0.6)) for a in run.iter_answers()]
    return [(answer, label) for answer, label in found if label.words]


def judged(answer, label, annotator="me", kind="random", wrong=0):
    """A judgement as the rule has it, but for the first words."""
    words = [value ^ (i < wrong) for i, (_, value) in enumerate(label.words)]
    return Judged(answer.id, annotator, answer.text, tuple(words), label.sentence, kind, "g", 1.0)


def judge(run, n, annotator="me", checks=0, wrong=0):
    """A journal of the last n answers, of which the first are the check."""
    given = answers_of(run)[-n:]
    journal = HandLabels(journal_of(run))
    for i, (answer, label) in enumerate(given):
        kind = "check" if i < checks else "random"
        journal.add(judged(answer, label, annotator, kind, wrong))
    return given


# --- labels of two sources


def test_labels_by_hand_stand_before_those_of_the_rule_and_each_is_counted(out, capsys):
    run = Run(out, by_hand("rule"))
    given = judge(run, 12, checks=3, wrong=1)
    run.perform("label")
    labels, everything = read_labels(out / "label/labels.jsonl"), answers_of(run)
    assert [label.id for label in labels[:12]] == [answer.id for answer, _ in given]
    assert [label.labeller for label in labels] == ["hand:me"] * 12 + ["rule"] * (len(labels) - 12)
    assert sorted(label.id for label in labels) == sorted(answer.id for answer, _ in everything)
    assert [label.check for label in labels] == [True] * 3 + [False] * (len(labels) - 3)
    for label, (_, true) in zip(labels, given, strict=False):
        assert label.words[0][1] == 1 - true.words[0][1] and label.words[1:] == true.words[1:]
    report = read_json(out / "label/report.json")
    assert {name: part["answers"] for name, part in report["sources"].items()} == {
        "hand:me": 12, "rule": len(labels) - 12,
    }  # fmt: skip
    (pair,) = report["agreement"]
    words = sum(len(label.words) for _, label in given)
    assert (pair["one"], pair["two"], pair["result"]["answers"]) == ("hand:me", "rule", 12)
    assert pair["result"]["words"]["agreement"] == pytest.approx(1 - 12 / words)
    told = " ".join(capsys.readouterr().err.split())
    assert "12 by me by hand (" in told and f"{len(labels) - 12} by the rule (" in told
    assert "me by hand and the rule both judged 12 answers" in told


def test_the_order_of_labelling_makes_no_difference(out, tmp_path):
    """The rule first and then a person, or the other way round, or the last answer first, as after
    a line of the journal was damaged and asked again: the same labels.
    """
    other = shutil.copytree(out, tmp_path / "other")
    by_rule = replace(SETTINGS, label=LabelConfig())
    Run(out, by_rule).perform("label")
    assert {label.labeller for label in read_labels(out / "label/labels.jsonl")} == {"rule"}
    judge(Run(out, by_hand("rule")), 12)
    judge(Run(other, by_hand()), 12)
    Run(other, by_hand()).perform("label")
    assert len(read_labels(other / "label/labels.jsonl")) == 12  # nobody else was asked for
    for folder in (out, other):
        run = Run(folder, by_hand("rule"))
        assert not run.done("label")  # who labels has changed
        run.perform("label")
        assert run.done("label") and not Run(folder, by_hand()).done("label")
        journal = journal_of(run)
        journal.write_text("".join(reversed(journal.read_text().splitlines(keepends=True))))
    run.perform("label")
    one, two = ((folder / "label/labels.jsonl").read_bytes() for folder in (out, other))
    assert one == two


def test_the_rest_of_what_nobody_labels_by_hand_is_refused():
    with pytest.raises(ValueError, match="hand.rest, labeller were 'rule', 'endpoint', expected"):
        LabelConfig(labeller="endpoint", hand=HandConfig(rest="rule"))


def test_who_judged_an_answer_first_stands_and_the_second_is_compared(out):
    run = Run(out, by_hand())
    judge(run, 12, annotator="anna", wrong=1)
    judge(run, 8)
    run.perform("label")
    report = read_json(out / "label/report.json")
    assert list(report["sources"]) == ["hand:anna"]
    (pair,) = report["agreement"]
    assert (pair["one"], pair["two"], pair["result"]["answers"]) == ("hand:anna", "hand:me", 8)
    assert pair["result"]["words"]["agreement"] < 1


def test_nobody_is_asked_again_where_an_endpoint_alone_has_lost_labels(out):
    """A person who ended before all were judged was shown the page again by the next `tppo run`."""
    run = Run(out, by_hand("rule", answers=40, terminal=True))
    judge(run, 12)
    with pytest.raises(DataError, match="standard input is no terminal"):
        run.perform("label")
    label_answers(run, ask=False)
    assert read_json(out / "label/report.json")["sources"]["hand:me"]["answers"] == 12


def test_an_endpoint_labels_what_nobody_judged(out, monkeypatch):
    pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")
    from test_label_openai import KEY, serving
    from test_label_openai import judge as honest

    monkeypatch.setenv("TPPO_TEST_KEY", KEY)
    judge(Run(out, by_hand()), 12, wrong=1)
    with serving(lambda request, _: honest(request)) as server:
        settings = by_hand("endpoint")
        endpoint = replace(settings.label.endpoint, base_url=server.url, model="judge",
                           api_key_env="TPPO_TEST_KEY")  # fmt: skip
        run = Run(out, replace(settings, label=replace(settings.label, endpoint=endpoint)))
        run.perform("label")
        asked = len(server.requests)
    report = read_json(out / "label/report.json")
    assert list(report["sources"]) == ["hand:me", "judge"] and asked > 12
    assert report["agreement"][0]["result"]["answers"] == 12
    assert report["agreement"][0]["result"]["words"]["agreement"] < 1


# --- the journal and the labels of a run


def test_what_was_judged_before_a_kill_of_the_stage_needs_no_second_asking(out):
    run = Run(out, by_hand())
    judge(run, 12)
    code = (
        "import os, signal, sys\n"
        f"sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "import pathlib, test_hand_labels as t\n"
        "import tppo.stages.label as stage\n"
        "def killed(path, labels):\n"
        "    path.write_text(next(iter(labels)).id)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "stage.write_labels = killed\n"
        f"t.Run(pathlib.Path({str(out)!r}), t.by_hand()).perform('label')\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not run.done("label")
    run.perform("label")
    assert len(read_labels(out / "label/labels.jsonl")) == 12


def test_judgements_of_answers_that_were_generated_anew_are_asked_again(out, capsys):
    run = Run(out, by_hand(answers=4, terminal=True))
    given = judge(run, 4)
    changed = given[0][0].id
    path = out / "generate/answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    stale = HandLabels(journal_of(run))
    texts = {row["id"]: "other words" if row["id"] == changed else row["text"] for row in rows}
    assert stale.keep(texts) == 1 and stale.keep(texts) == 0
    assert [found.id for found in stale] == [answer.id for answer, _ in given[1:]]
    assert ("me", changed) not in stale  # it is asked again
    assert len(list(HandLabels(journal_of(run)))) == 4  # the file keeps what was said
    said = [json.loads(line) for line in journal_of(run).read_text().splitlines()]
    for line in said:
        del line[SUM]  # written by hand
    said[0] |= {"response": "red shoes", "words": [1, 0]}
    journal_of(run).write_text("".join(json.dumps(line) + "\n" for line in said))
    with pytest.raises(DataError, match="standard input is no terminal"):  # a fourth is asked for
        run.perform("label")
    assert "1 judgements in" in capsys.readouterr().err


def test_a_journal_of_an_older_form_is_read_and_its_damage_is_named(tmp_path, capsys):
    path = tmp_path / "hand-labels.jsonl"
    row = {"id": "a", "annotator": "me", "response": "red shoes", "words": [1, 0], "sentence": 1,
           "kind": "random", "guidance": "g", "seconds": 1.0}  # fmt: skip
    newer = row | {"id": "b", "foretold": [0.5, 0.5], "later": {"field": 1}}
    lacking = {key: value for key, value in row.items() if key != "kind"} | {"id": "c"}
    path.write_text("".join(json.dumps(line) + "\n" for line in (row, newer, lacking)))
    assert [found.id for found in HandLabels(path)] == ["a", "b"]
    assert "1 damaged lines are passed over, the first is line 3" in capsys.readouterr().err


def test_two_tabs_of_one_person_leave_one_judgement_of_an_answer(tmp_path):
    from test_hand import desk_of

    desk = desk_of(tmp_path / "hand.jsonl")
    first = desk.next("a", "me")
    desk.clients["a"].asked -= 1_000.0  # the tab is left alone, and another one gets its answer
    assert desk.next("b", "me").answer == first.answer
    words = [1] * len(word_spans(first.answer.text))
    desk.judge("b", "me", first.answer.id, words, 1)
    with pytest.raises(ValueError, match="expected that of the answer on the screen; reload it"):
        desk.judge("a", "me", first.answer.id, words, 0)
    desk.undo("a", "me")
    desk.judge("a", "me", first.answer.id, words, 0)
    (found,) = HandLabels(tmp_path / "hand.jsonl")
    assert found.sentence == 0 and desk.count() == 1


# --- agreement, by a command


def test_the_agreement_of_people_and_of_a_run_is_printed_from_its_files(out, capsys):
    run = Run(out, replace(SETTINGS, label=LabelConfig()))
    run.perform("label")
    given = judge(run, 10, wrong=1)
    judge(run, 6, annotator="anna")
    words = [sum(len(label.words) for _, label in part) for part in (given, given[-6:])]
    path = journal_of(run)
    path.write_bytes(b'{"id": "cut off\n' + path.read_bytes())
    main(["label", "--out", str(out), "--agreement", str(journal_of(run))])
    told = capsys.readouterr().out
    blocks = told.split("kappa")
    assert "the rule and me by hand" in blocks[0] and "the rule and anna by hand" in blocks[1]
    assert "me by hand and anna by hand" in blocks[2]
    shares = [1 - 10 / words[0], 1.0, 1 - 6 / words[1]]
    assert f"{words[0]:>8}{shares[0]:>11.2%}" in blocks[1]
    assert f"{words[1]:>8}{1:>11.2%}" in blocks[2]
    assert f"{words[1]:>8}{shares[2]:>11.2%}" in blocks[3]


def test_a_journal_that_nobody_else_has_judged_has_no_agreement(out):
    run = Run(out, by_hand())
    judge(run, 12)
    run.perform("label")
    with pytest.raises(DataError, match="no answer in it was judged by a second labeller"):
        compare_labels(run, journal_of(run))


def test_a_name_is_text_wherever_it_is_shown(out, capsys):
    name = "<b>[red]/~\x1b[31m"
    run = Run(out, by_hand("rule"))
    judge(run, 12, annotator=name, checks=3)
    for stage in ("label", "map", "train-rm"):
        run.perform(stage)
    assert "\x1b" not in capsys.readouterr().err
    page = drawn(read_folder(out))
    assert "<b>" not in page and "&lt;b&gt;[red]/~\\u001b[31m by hand" in page
    assert "\x1b" not in spoken(f"hand:{name}")


# --- the reward model


def rows(n, labeller="rule", tokens=6):
    draw = torch.Generator().manual_seed(n)
    made = []
    for _ in range(n):
        ids = torch.randint(3, 32, (2, tokens), generator=draw).tolist()
        classes = torch.randint(1, 3, (tokens,), generator=draw).tolist()
        made.append(LabelledAnswer(ids[0], ids[1], classes, classes[0], labeller))
    return made


def test_a_weight_does_what_as_many_copies_do():
    one, two = rows(2)
    config = RewardModelConfig(balance=1e9)
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradient(answers, at):
        x = logits.clone().requires_grad_()
        mask = torch.ones(len(answers), 6, dtype=torch.bool)
        losses = _losses(x[at], mask, answers, config, 0)
        losses[0].backward()
        return losses[0].item(), x.grad

    _, copies = gradient([one, one, one, two], [0, 0, 0, 1])
    value, weights = gradient(weighed([one, two], [3.0, 1.0]), [0, 1])
    torch.testing.assert_close(weights, copies)
    plain, alike = gradient([one, two], [0, 1])
    assert value == plain  # the losses are told without weights
    assert not torch.allclose(alike, weights)
    same, equal = gradient(weighed([one, two], [2.0, 2.0]), [0, 1])
    assert same == plain and torch.equal(equal, alike)  # one source alone: no weight


def test_labels_by_hand_weigh_as_is_said_and_no_others():
    train = {"a": rows(1, "hand:me"), "b": rows(1), "c": rows(2, "hand:anna")}
    config = RewardModelConfig(hand_weight=4.0)
    parts = reward_curve.split_labelled(train, {}, ["a", "b", "c", "d"][:3], set(), config)
    assert parts.held == ["a"]
    weights = [row.weight for row in parts.training()]
    assert weights == pytest.approx([1 / 3, 4 / 3, 4 / 3])
    assert [row.labeller for row in parts.training(0)] == ["rule"]


def test_the_check_is_held_out_unless_it_is_most_of_all():
    given = {name: rows(1) for name in "abcdefghij"}
    config = RewardModelConfig(heldout_share=0.1)
    parts = reward_curve.split_labelled(given, {}, list("jihgfedcba"), set("ceg"), config)
    assert parts.held == list("gec") and parts.train == list("jihfdba")
    parts = reward_curve.split_labelled(given, {}, list("abcdefghij"), set("abcdefgh"), config)
    assert parts.held == list("abcde")


def test_a_reward_model_tells_its_sources_apart_and_what_fewer_labels_gave(
    out, capsys, monkeypatch
):
    monkeypatch.setattr(reward_curve, "FIRST", 8)
    run = Run(out, by_hand("rule", answers=20, hand_weight=4.0))
    judge(run, 20, checks=6, wrong=1)
    for stage in ("label", "map", "train-rm"):
        run.perform(stage)
    report = read_json(out / "train-rm/report.json")
    assert report["labeller"] == ["hand:me", "rule"]
    sources = report["sources"]
    assert sources["hand:me"]["answers"] == 20 and sources["hand:me"]["heldout"] >= 6
    assert sum(part["answers"] for part in sources.values()) == report["answers"]
    curve = report["curve"]
    assert [row["by_hand"] for row in curve] == [0, 8, 14]
    assert {row["others"] for row in curve} == {sources["rule"]["answers"]}
    own = sources["hand:me"]
    assert curve[-1]["auc"] == own["auc"] and curve[-1]["auc_interval"] == own["auc_interval"]
    assert curve[0]["more"] == pytest.approx(own["auc"] - curve[0]["auc"])
    low, high = curve[0]["more_interval"]
    assert low <= curve[0]["more"] <= high
    told = " ".join(capsys.readouterr().err.split())
    assert "20 answers labelled by me by hand, 6 held out: AUC" in told
    assert "what fewer labels by hand gave" in told and f"{curve[1]['auc']:.3f}" in told

    page = Page(drawn(read_folder(out)))
    shown = {attributes["data-source"].partition("#")[2]: text for attributes, text in page.data}
    assert shown["/curve/1/by_hand"] == "8" and shown["/sources/hand:me/answers"] == "20"
    assert shown["/curve/1/auc"] == f"{100 * curve[1]['auc']:.1f} %"
    ends = [shown[f"/curve/0/more_interval/{k}"] for k in (0, 1)]
    assert ends == [f"{100 * low:.1f} %", f"{100 * high:.1f} %"]

    # The row of 8 is a model of those 8 and the rule's labels, and of nothing else.
    _, _, reader = reward_model._new_reader(run)
    parts = reward_model._split(run, reader)
    some = parts.training(8)
    assert sum(row.labeller == "hand:me" for row in some) <= 2 * 8  # each with a twin
    train_reward_model(reader, some, reward_curve.passes(run.config.reward_model, some), seed=0)
    held = [i for i, row in enumerate(parts.heldout) if row.labeller == "hand:me"]
    rated = rate_tokens(reader, parts.heldout, run.config.reward_model)[0].of(held)
    assert area_under_curve(rated.score, rated.relevant) == pytest.approx(curve[1]["auc"])

    monkeypatch.setattr(reward_curve, "REFITS_BELOW", 30)
    found = reward_curve.learning_curve(parts, rated, None, run.config.reward_model, 0, out)
    assert found == [] and "no learning curve of" in capsys.readouterr().err


def test_refits_of_the_learning_curve_go_on_where_they_were(out, capsys, monkeypatch):
    """Killed in the second of two: the first is not trained again, the second from its step on."""
    for name, value in (("EVERY_S", 0.0), ("LAST_S", 0.0), ("WRITING", float("inf"))):
        monkeypatch.setattr(checkpoint, name, value)
    monkeypatch.setattr(reward_curve, "FIRST", 8)
    real, calls, last = methods._backward, [], [10**6]

    def backward(*given):
        calls.append(1)
        if len(calls) == last[0]:
            raise RuntimeError("killed")
        return real(*given)

    monkeypatch.setattr(methods, "_backward", backward)
    run = Run(out, replace(by_hand("rule", answers=20), reward_model=replace(
        SETTINGS.reward_model, batch_size=8)))  # fmt: skip
    judge(run, 20, checks=6, wrong=1)
    for stage in ("label", "map", "train-rm"):
        run.perform(stage)
    whole, report = len(calls), read_json(out / "train-rm/report.json")
    assert [row["by_hand"] for row in report["curve"]] == [0, 8, 14]
    shutil.rmtree(out / "train-rm")
    calls.clear()
    last[0] = whole - 1
    with pytest.raises(RuntimeError, match="killed"):
        run.perform("train-rm")
    calls.clear()
    capsys.readouterr()
    run.perform("train-rm")
    assert "train-rm, learning curve: resumes after refit 1 of 2" in capsys.readouterr().err
    assert len(calls) == 3  # the last step of the whole, and the two that were left of the refit
    assert read_json(out / "train-rm/report.json") == report
    assert not list(out.rglob("checkpoints"))


def test_two_who_labelled_are_both_named_where_answers_are_judged():
    line = judge_line({"labeller": ["hand:me", "rule"], "judge": "rule", "threshold": 0.6}, "x")
    assert "judged by the rule (which also labelled, with me by hand, the reward" in line
    line = judge_line({"labeller": ["hand:me", "gpt"], "judge": "rule", "threshold": 0.6}, "x")
    assert "(not by me by hand and gpt, which labelled the reward model's data)" in line
    assert pairwise([]) == []
