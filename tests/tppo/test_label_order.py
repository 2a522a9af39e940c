"""How answers are asked: those to one history together, and by a schema that names their words."""

import json
import os
from itertools import groupby, pairwise

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")

from test_label_openai import completion, config, environment, item, judge, label, serving, slots  # noqa: E402, F401

from tppo.cli import main  # noqa: E402
from tppo.errors import DataError  # noqa: E402
from tppo.store.line_groups import grouped_lines  # noqa: E402

TINY = {
    "sessions": {"train_users": 10, "heldout_users": 3, "test_users": 3, "transfer_users": 0},
    "scratch": {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 400, "heads": 2},
    "sft": {"max_steps": 4, "eval_every": 4, "batch_size": 8},
    "generate": {"samples": 40, "max_new_tokens": 16, "samples_per_session": 4},
}


def key(line):
    return line.get("k", lambda value: isinstance(value, str), "a text")


def test_lines_come_in_groups_and_keep_their_numbers(tmp_path):
    file = tmp_path / "lines.jsonl"
    rows = [("b", 1), ("a", 2), ("b", 3), ("c", 4), ("a", 5)]
    texts = [json.dumps({"k": k, "n": n}, ensure_ascii=False) for k, n in rows]
    file.write_text("\n\n".join(texts))  # with blank lines, without a last LF
    found = [(line.values["n"], line.number) for line in grouped_lines(file, key)]
    assert found == [(1, 1), (3, 5), (2, 3), (5, 9), (4, 7)]
    file.write_text(file.read_text() + '\n{"n": 6}\n')
    with pytest.raises(DataError, match="line 10: field 'k': missing"):
        list(grouped_lines(file, key))


def test_answers_to_one_history_follow_each_other_and_share_their_beginning(tmp_path):
    settings, out = tmp_path / "tiny.json", tmp_path / "out"
    settings.write_text(json.dumps(TINY))
    for stage in ("data", "sft", "generate"):
        main([stage, "--out", str(out), "--config", str(settings)])
    with serving(lambda request, number: judge(request)) as server:
        main(["label", "--out", str(out), "--config", str(settings), "--label.labeller", "endpoint",
              "--label.endpoint.model", "judge", "--label.endpoint.base-url", server.url,
              "--label.endpoint.api-key-env", "None", "--label.endpoint.concurrency", "1",
              "--label.endpoint.max-dropped", "1"])  # fmt: skip
    answers = [json.loads(line)["session"] for line in
               (out / "generate/answers.jsonl").read_text().splitlines()]  # fmt: skip
    assert len(list(groupby(answers))) == len(answers)  # in the file they do not
    texts = [request["messages"][0]["content"] for request in server.requests]
    histories = [tuple(slots(request)["history"]) for request in server.requests]
    assert len(list(groupby(histories))) == len(set(histories)) < len(histories) / 2
    for (one, first), (other, second) in pairwise(zip(histories, texts, strict=True)):
        common = len(os.path.commonprefix([first, second]))
        where = len(first) - len(first.partition('"returned_queries"')[2])
        assert common >= (where if one == other else first.index('{"history"'))
        assert common > 0.7 * len(first)


def test_a_server_that_cannot_be_told_the_words_is_asked_for_the_form_alone(tmp_path, capsys):
    """Also where several requests are on their way when it refuses the first of them."""

    def reply(request, number):
        schema = json.dumps(request["response_format"])
        refused = 400, {}, {"error": {"message": "unsupported keyword"}}
        return refused if "prefixItems" in schema else judge(request)

    with serving(reply) as server:
        items = [item(n, response=f"red hat {n}") for n in range(12)]
        run = label(items, config(server, concurrency=4), tmp_path / "cache.jsonl")
        assert len(run.labels) == 12 and len(server.requests) <= 12 + 4
    told = capsys.readouterr().err
    assert told.count("refuses a JSON schema that names the words") == 1
    assert "asked without" not in told


def test_the_schema_names_the_words_of_the_answer(tmp_path):
    with serving(lambda request, number: judge(request)) as server:
        label([item(response="red t-shirt, \u6771\u4eac\nblue hat")], config(server),
              tmp_path / "c.jsonl")  # fmt: skip
        schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    words = schema["properties"]["WORD_SEQUENCE_JUDGEMENTS"]
    assert words["minItems"] == words["maxItems"] == 5 and words["items"] is False
    assert [one["properties"]["word"]["enum"] for one in words["prefixItems"]] == [
        ["red"], ["t-shirt"], ["\u6771\u4eac"], ["blue"], ["hat"]]  # fmt: skip


def test_a_server_that_refuses_schemas_is_known_by_answers_that_are_no_judgements_too(
    tmp_path, capsys
):
    """A model that rambles until it is cut has answered all the same: asked without, it is said."""
    refused, cut = (400, {}, {}), (200, {}, completion("let me think", "length"))
    with serving(lambda r, n: refused if "response_format" in r else cut) as server:
        items = [item(n, response=f"red hat {n}") for n in range(6)]
        run = label(items, config(server, concurrency=1, max_dropped=1.0), tmp_path / "c.jsonl")
        assert len(run.dropped) == 6 and len(server.requests) == 2 + 6
    assert capsys.readouterr().err.count("refuses a JSON schema: from now on asked without") == 1
