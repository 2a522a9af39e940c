"""`tppo init`: questions about a log, and the commented file that it writes."""

import io
import json
import sys
from pathlib import Path

import pytest

from tppo.cli import main
from tppo.commands import _parse
from tppo.flags import flags_of
from tppo.options import Options
from tppo.stages.init import InitOptions
from tppo.store.yaml_file import commented_yaml, read_yaml


def write_log(path, wrong=False):
    rows = [{"id": f"s{i}", "user": f"u{i % 7}", "source": "x",
             "history": [{"type": "search", "text": f"boots {i}"}], "targets": ["socks"]}
            for i in range(20)]  # fmt: skip
    lines = [json.dumps(row) for row in rows] + ["{}"] * wrong
    path.write_text("\n".join(lines) + "\n")
    return path


def init(monkeypatch, capsys, *arguments, stdin="", tty=False):
    class Input(io.StringIO):
        def isatty(self):
            return tty

    monkeypatch.setattr(sys, "stdin", Input(stdin))
    main(["init", *arguments])
    return capsys.readouterr().err


def test_the_answers_become_a_commented_file_that_run_takes(tmp_path, monkeypatch, capsys):
    log, into = write_log(tmp_path / "my log.jsonl", wrong=True), tmp_path / "run.yaml"
    said = init(monkeypatch, capsys, "--into", str(into),
                stdin=f"{log}\n\n\nHuggingFaceTB/SmolLM2-135M\nqwen@http://127.0.0.1:8000/v1\n")
    assert "20 sessions of 7 users, read as sessions; 1 of its rows are wrong, the first:" in said
    assert said.count("? ") >= 5 and "[skip]" in said and f"run --config {into}" in said
    options, _ = _parse("run", ["--config", str(into)])
    assert options.data == log and options.model == Path("HuggingFaceTB/SmolLM2-135M")
    read, label = options.settings.sessions.read, options.settings.label
    assert (read.format, read.on_bad_row) == ("sessions", "skip")
    assert (label.labeller, label.endpoint.model) == ("endpoint", "qwen")
    assert label.endpoint.base_url == "http://127.0.0.1:8000/v1"
    assert options.out == Path("runs/my log")
    lines = into.read_text().splitlines()
    texts = {f"settings.{f.place}": f.text for f in flags_of(Options) for f in [f._replace(
        place=f.place.removeprefix("settings."))]}  # fmt: skip
    place = next(i for i, line in enumerate(lines) if line.strip() == "on_bad_row: skip")
    comment = []
    while lines[place - 1].strip().startswith("#"):
        place -= 1
        comment.insert(0, lines[place].strip().removeprefix("# "))
    assert " ".join(comment) == texts["settings.sessions.read.on_bad_row"]
    assert all(len(line) <= 100 for line in lines[4:])


def test_one_who_labels_by_hand_is_told_how_many_answers(tmp_path, monkeypatch, capsys):
    into = tmp_path / "run.yaml"
    init(monkeypatch, capsys, "--into", str(into), "--data", "none", "--model", "none",
         "--labeller", "hand")  # fmt: skip
    label = _parse("run", ["--config", str(into)])[0].settings.label
    assert (label.labeller, label.hand.answers) == ("hand", 50)
    assert "answers: 50" in into.read_text() and "base_url" not in into.read_text()


def test_flags_answer_without_a_question_and_the_run_begins(tmp_path, monkeypatch, capsys):
    log, into = write_log(tmp_path / "log.jsonl"), tmp_path / "run.yaml"
    said = init(monkeypatch, capsys, "--into", str(into), "--data", str(log), "--format", "auto",
                "--on-bad-row", "stop", "--model", "none", "--labeller", "rule")  # fmt: skip
    assert "?" not in said
    main(["data", "--config", str(into), "--out", str(tmp_path / "out"), "--threads", "1"])
    assert (tmp_path / "out" / "data" / "train.jsonl").exists()


def test_without_a_log_there_are_three_questions_of_generated_sessions(
    tmp_path, monkeypatch, capsys
):
    into = tmp_path / "run.yaml"
    said = init(monkeypatch, capsys, "--into", str(into), stdin="\n\n\n")
    assert said.count("] ") == 3
    values, _ = read_yaml(into)
    assert values["data"] is None and values["settings"]["sessions"]["train_users"] == 12_000
    assert _parse("run", ["--config", str(into)])[0].settings == Options().settings


def test_at_a_terminal_a_wrong_answer_is_asked_again(tmp_path, monkeypatch, capsys):
    log = write_log(tmp_path / "log.jsonl")
    said = init(monkeypatch, capsys, "--into", str(tmp_path / "r.yaml"), tty=True,
                stdin=f"nowhere.tsv\n{log}\n\n\nno model\n\n\n")  # fmt: skip
    assert "--data was 'nowhere.tsv', expected a file that is there" in said
    assert "--model was 'no model', expected a folder" in said


@pytest.mark.parametrize(("arguments", "stdin", "message"), [
    (["--data", "nowhere"], "", "--data was 'nowhere', expected a file that is there, or none"),
    (["--data", "{log}", "--format", "csv"], "", "--format was 'csv', expected auto, sessions"),
    (["--data", "{log}", "--format", "aol"], "", "no row with a query"),
    (["--data", "{log}"], "\n", "--on-bad-row: the input ended before the answer"),
    (["--data", "none", "--model", "nothing here"], "", "--model was 'nothing here'"),
    (["--data", "none", "--model", "none", "--labeller", "gpt"], "", "expected rule, hand, or"),
    (["--data", "none", "--model", "none", "--labeller", "gpt@ftp://x"], "", "base_url was"),
    (["--into", "{log}"], "", "is there already, expected a new file"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, capsys, arguments, stdin, message):
    log = str(write_log(tmp_path / "log.jsonl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        init(monkeypatch, capsys, *(a.replace("{log}", log) for a in arguments), stdin=stdin)
    assert message in str(end.value)
    assert not (tmp_path / "run.yaml").exists()


def test_the_file_holds_what_it_was_given(tmp_path):
    tree = {"a": "x: # y", "b": {"c": None, "d": {"e": 1e-6, "f": [1, 2]}, "g": "é\u0085",
            "h": "word " * 50}}
    lines = commented_yaml(tree, lambda place: f"Of {place}. " * 20)
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    assert read_yaml(tmp_path / "x.yaml")[0] == tree
    assert sum(line.strip().startswith("# Of b.d.e.") for line in lines) >= 1


def test_every_flag_is_a_question():
    assert all(flag.text.endswith((".", "?")) for flag in flags_of(InitOptions))
