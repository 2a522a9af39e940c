"""OpenAI batch files: what goes out, what comes in, and that nothing is asked twice."""

import json

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")
pytest.importorskip("pydantic", reason="pydantic is not installed: pip install tppo-kernels[label]")

from test_label_openai import (  # noqa: E402
    BAD_ANSWERS,
    KEY,
    RIGHT,
    answer,
    completion,
    environment,  # noqa: F401
    item,
    judge,
    label,
    serving,
)

from tppo.cli import main  # noqa: E402
from tppo.labels.endpoint.batch import export_batch, import_batch  # noqa: E402
from tppo.labels.endpoint.live import EndpointConfig, EndpointError  # noqa: E402
from tppo.store.jsonl import DataError, write_jsonl  # noqa: E402
from tppo.store.run_folder import RunFolder  # noqa: E402

NO_SERVER = EndpointConfig("", "judge-1", max_dropped=1.0)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def output(key, body, status=200):
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "batch_req_1", "custom_id": key, "response": response, "error": None}


def answered(requests, reply=judge):
    return [output(row["custom_id"], completion(reply(row["body"]))) for row in requests]


def test_a_batch_goes_out_and_comes_back_and_nothing_is_asked_live(tmp_path):
    cache, items = tmp_path / "cache.jsonl", [item(n, response=f"red hat {n}") for n in range(4)]
    items.append(item(9, response="red hat 0"))  # a content that is there already
    with serving(lambda request, number: judge(request)) as server:
        live = EndpointConfig(server.url, "judge-1", "TPPO_TEST_KEY")
        first = label(items[:1], live, cache)
        assert export_batch(items, NO_SERVER, cache, tmp_path / "out.jsonl") == 3
        requests = rows(tmp_path / "out.jsonl")
        for row in requests:
            assert set(row) == {"custom_id", "method", "url", "body"}
            assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
        assert len({row["custom_id"] for row in requests}) == 3
        write_jsonl(tmp_path / "in.jsonl", answered(requests)[::-1])
        counts = import_batch(items, NO_SERVER, cache, tmp_path / "in.jsonl")
        assert counts == {"imported": 3}
        run = label(items, live, cache)
        assert run.dropped == [] and len(server.requests) == 1
        assert run.labels[0] == first.labels[0]
        asked = label(items, live, tmp_path / "other.jsonl")  # the same by live answers
        assert asked == run
        # Live the schema names the words too, which not every batch service takes.
        live, batch = ([{**body, "response_format": None} for body in bodies] for bodies in
                       (server.requests[1:], [row["body"] for row in requests]))  # fmt: skip
        assert all(body in live for body in batch)
        assert "prefixItems" not in json.dumps(requests)
    assert export_batch(items, NO_SERVER, cache, tmp_path / "out.jsonl") == 0
    assert import_batch(items, NO_SERVER, cache, tmp_path / "in.jsonl") == {"known": 3}
    assert KEY not in (tmp_path / "out.jsonl").read_text()


BODIES = {name: bad for name, (bad, _) in BAD_ANSWERS.items() if not isinstance(bad, tuple)}


@pytest.mark.parametrize("text", BODIES.values(), ids=BODIES)
def test_an_answer_is_checked_like_a_live_one(tmp_path, text, capsys):
    cache, items = tmp_path / "cache.jsonl", [item()]
    export_batch(items, NO_SERVER, cache, tmp_path / "out.jsonl")
    (request,) = rows(tmp_path / "out.jsonl")
    write_jsonl(tmp_path / "in.jsonl", answered([request], lambda body: text))
    assert import_batch(items, NO_SERVER, cache, tmp_path / "in.jsonl") == {"dropped": 1}
    assert "1 dropped; the first dropped: " in capsys.readouterr().err
    assert export_batch(items, NO_SERVER, cache, tmp_path / "out.jsonl") == 1


def test_failed_requests_and_lines_of_others_are_counted(tmp_path, capsys):
    cache, items = tmp_path / "cache.jsonl", [item(n, response=f"red {n}") for n in range(6)]
    export_batch(items, NO_SERVER, cache, tmp_path / "out.jsonl")
    good, busy, failed, cut, odd, empty = rows(tmp_path / "out.jsonl")
    lines = [
        output(busy["custom_id"], {"error": {"message": KEY}}, 429),
        {"custom_id": failed["custom_id"], "response": None, "error": {"message": KEY}},
        output(cut["custom_id"], completion(answer(RIGHT), "length")),
        output(odd["custom_id"], ["x"]),
        output(empty["custom_id"], {"choices": []}),
        output("somebody else's", completion("x")),
        *answered([good, good]),
    ]
    write_jsonl(tmp_path / "in.jsonl", lines)
    counts = import_batch(items, NO_SERVER, cache, tmp_path / "in.jsonl")
    assert counts == {"dropped": 5, "foreign": 1, "imported": 1, "known": 1}
    shown = capsys.readouterr().err
    assert "the first dropped: HTTP 429" in shown and KEY not in shown
    assert len(cache.read_text().splitlines()) == 1


STRICT = EndpointConfig("", "judge-1")


def batch(tmp_path, plays, reply):
    """The items of a batch and its answers, with `reply(n, key)` in place of some of them."""
    items = [item(n, response=f"red hat {n}") for n in range(40)]
    export_batch(items, STRICT, tmp_path / "cache.jsonl", tmp_path / "out.jsonl")
    lines = answered(rows(tmp_path / "out.jsonl"))
    for n in plays:
        lines[n] = reply(n, lines[n]["custom_id"])
    write_jsonl(tmp_path / "in.jsonl", lines)
    return items


def coded(status, code):
    return lambda n, key: output(key, {"error": {"message": KEY, "code": code}}, status)


@pytest.mark.parametrize(
    ("lost", "reply", "message"),
    [
        (1, coded(402, None), "HTTP 402: .*no credit left"),
        (2, coded(429, "insufficient_quota"), r"HTTP 429 \(insufficient_quota\): .*no credit left"),
        (1, coded(200, "insufficient_quota"), "error insufficient_quota: .*no credit left"),
        (40, coded(401, None), "HTTP 401: the key"),
        (3, coded(401, None), "3 of 40 items got no label, more than the 5 % .*HTTP 401"),
        (3, coded(400, "unsupported_parameter"), r"3 of 40 .*HTTP 400 \(unsupported_parameter"),
        (3, lambda n, key: output(key, {"choices": None}), "3 of 40 .*not a chat completion"),
        (3, lambda n, key: output(key, completion(None, "length")), "3 of 40 .*raise .*max-tokens"),
        (3, lambda n, key: {"custom_id": key, "response": None,
                            "error": {"code": "batch_expired", "message": KEY}},
         "3 of 40 .*error batch_expired: no answer of a batch file"),
    ],
)  # fmt: skip
def test_a_batch_file_is_read_by_the_same_table(tmp_path, lost, reply, message):
    """What was answered is kept, the command fails, and the next export holds the rest."""
    items, cache = batch(tmp_path, range(lost), reply), tmp_path / "cache.jsonl"
    with pytest.raises(EndpointError, match=message) as error:
        import_batch(items, STRICT, cache, tmp_path / "in.jsonl")
    assert KEY not in str(error.value) and "--export-batch writes the rest" in str(error.value)
    assert export_batch(items, STRICT, cache, tmp_path / "out.jsonl") == lost


@pytest.mark.parametrize(
    ("lost", "reply", "counts"),
    [
        (2, coded(403, None), {"imported": 38, "dropped": 2}),
        (9, coded(400, "content_filter"), {"imported": 31, "dropped": 9}),
        (1, lambda n, key: output(key, completion([{"type": "text", "text": answer(
            [("red", 1), ("hat", 0), ("0", 0)])}])), {"imported": 40}),
        (1, lambda n, key: output(key, completion(answer(
            [("red", 1), ("hat", 0), ("0", 0)]), "length")), {"imported": 40}),
    ],
)  # fmt: skip
def test_a_few_losses_of_a_batch_are_told_and_no_error(tmp_path, lost, reply, counts):
    items = batch(tmp_path, range(lost), reply)
    assert import_batch(items, STRICT, tmp_path / "cache.jsonl", tmp_path / "in.jsonl") == counts


def test_a_batch_may_leave_parameters_out(tmp_path):
    settings = EndpointConfig("", "judge-1", schema=False, temperature=None,
                              max_completion_tokens=99)  # fmt: skip
    export_batch([item()], settings, tmp_path / "cache.jsonl", tmp_path / "out.jsonl")
    (row,) = rows(tmp_path / "out.jsonl")
    assert set(row["body"]) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x"}', "line 1: field 'custom_id': missing"),
        ('{"custom_id": "x", "response": 3}', "line 1: field 'response': was 3"),
        ('{"custom_id": ', "line 1: not JSON"),
        (json.dumps(output("x", {})), "none of its 1 answers belongs .* of model 'judge-1'"),
        ("", "empty"),
    ],
)
def test_a_file_that_is_no_answer_to_this_run_is_named(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        import_batch([item()], NO_SERVER, tmp_path / "cache.jsonl", tmp_path / "in.jsonl")


def test_a_batch_needs_the_name_of_a_model(tmp_path):
    with pytest.raises(ValueError, match="model was ''"):
        export_batch([], EndpointConfig(), tmp_path / "cache.jsonl", tmp_path / "out.jsonl")


def answered_run(out, count):
    """A run folder whose model gave so many answers to one session."""
    history = [{"type": "search", "text": "boots"}]
    session = {"id": "s", "user": "u", "source": "x", "history": history, "targets": ["red shoes"]}
    ids = {"session": "s", "prompt_ids": [1], "response_ids": [1], "finish": "eos"}
    texts = [{"id": f"s#{n}", "text": f"red hat {n}", **ids} for n in range(count)]
    for stage, file, lines in (("data", "train", [session]), ("generate", "answers", texts)):
        with RunFolder(out).stage(stage) as work:
            write_jsonl(work / f"{file}.jsonl", lines)


def test_the_flags_of_the_label_command(tmp_path, capsys, monkeypatch):
    """Export, import, label without a server, and agreement, all by the command line."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder, batch, back = tmp_path / "run", tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    with pytest.raises(SystemExit, match="train.jsonl: no such file; run `tppo data --out"):
        main(["label", "--out", str(folder), "--export-batch", str(batch)])
    answered_run(folder, 3)
    flags = ["--out", str(folder), "--label.labeller", "endpoint"]
    flags += ["--label.endpoint.model", "judge-1"]
    main(["label", *flags, "--export-batch", str(batch)])
    assert len(rows(batch)) == 3 and not (folder / "label").exists()
    write_jsonl(back, answered(rows(batch)))
    main(["label", "--out", str(folder), "--import-batch", str(back)])
    with pytest.raises(SystemExit, match="labels.jsonl: no such file; run `tppo label --out"):
        main(["label", "--out", str(folder), "--agreement", str(back)])
    main(["label", "--out", str(folder)])
    labels = folder / "label" / "labels.jsonl"
    assert [row["labeller"] for row in rows(labels)] == ["judge-1"] * 3
    capsys.readouterr()
    main(["label", "--out", str(folder), "--agreement", str(labels)])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[1] == ["words", "9", "100.00%", "70.1-100.0", "1.000"]  # 9 / (9 + 1.96^2)
    both = ["--agreement", str(labels), "--export-batch", str(batch)]
    with pytest.raises(SystemExit, match="agreement, export_batch were given, expected one"):
        main(["label", "--out", str(folder), *both])
