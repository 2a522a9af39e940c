"""Items without a label: what the label stage records, asks again, and refuses to finish."""

import errno
import json
import os
import shutil
import time
from dataclasses import replace

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")

from test_label_batch import answered_run, rows  # noqa: E402
from test_label_openai import environment, judge, serving, slots  # noqa: E402, F401

from tppo import cli
from tppo.labels.endpoint import cache
from tppo.labels.endpoint.cache import Work  # noqa: E402
from tppo.labels.endpoint.config import EndpointConfig  # noqa: E402
from tppo.labels.endpoint.prompt import Judgement, Word  # noqa: E402
from tppo.stages.artifacts import LABELS  # noqa: E402
from tppo.stages.registry import REGISTRY  # noqa: E402
from tppo.store.run_folder import RunFolder  # noqa: E402

COUNT = 40


def read_labels(run):
    """In place of the stage map: it only reads the labels."""
    with run.stage("map") as out:
        shutil.copy(run.path(LABELS), out)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder with COUNT generated answers; `tppo run` in it labels, and reads the labels."""
    out = tmp_path / "run"
    answered_run(out, COUNT)
    with RunFolder(out).stage("sft") as work:
        (work / "model").mkdir()
        (work / "model" / "weights").write_text("x")
    for name, stage in REGISTRY.items():
        monkeypatch.setitem(REGISTRY, name, replace(stage, in_run=name in ("label", "map")))
    monkeypatch.setitem(
        REGISTRY, "map", replace(REGISTRY["map"], function=read_labels, outputs=())
    )
    return out


def test_a_bit_that_flips_in_the_cache_is_noticed(tmp_path):
    """A label that became the other one was given out as what the endpoint had said."""
    config, path = EndpointConfig(model="m"), tmp_path / "cache.jsonl"
    judgement = Judgement([Word("red", 0), Word("shoes", 1)], 1)
    Work(config, path).finish("k", judgement)
    raw = path.read_bytes()
    for place in range(len(raw) - 1):
        for bit in (1, 4):
            flipped = raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]
            path.write_bytes(flipped)
            found = Work(config, path).get("k")
            assert found is None or (found.words, found.sentence) == (judgement.words, 1), flipped
    unsummed = json.loads(raw)
    del unsummed["sum"]  # as an earlier version wrote it
    path.write_text(json.dumps(unsummed) + "\n")
    assert Work(config, path).get("k").words == judgement.words


def run(command, folder, server, *flags):
    cli.main([
        command, "--out", str(folder), "--label.labeller", "endpoint",
        "--label.endpoint.base-url", server.url, "--label.endpoint.model", "judge-1",
        "--label.endpoint.api-key-env", "TPPO_TEST_KEY", "--label.endpoint.max-retries", "0",
        *flags,
    ])  # fmt: skip


def number_of(request):
    return int(slots(request)["returned_queries"][0].split()[-1])


def sick(*lost, status=503):
    """A server that answers all but some items."""
    body = {"error": {"code": "overloaded"}}
    return lambda request, n: (status, {}, body) if number_of(request) in lost else judge(request)


def healthy(request, number):
    return judge(request)


@pytest.mark.parametrize("command", ["run", "label"])
def test_above_the_share_the_stage_is_not_finished_and_the_next_call_completes_it(
    folder, command, capsys
):
    lost = [n for n in range(COUNT) if n % 4]
    with serving(sick(*lost)) as server:
        with pytest.raises(SystemExit, match=r"tppo .*30 of 40 items got no label, more than the 5 "
                           r"% of .*max-dropped.*HTTP 503 \(overloaded\)") as ended:  # fmt: skip
            run(command, folder, server)
        assert isinstance(ended.value.code, str)  # exit code 1
        assert not (folder / "label").exists() and len(rows(folder / "label-cache.jsonl")) == 10
        record = rows(folder / "label-lost.jsonl")
        assert [row["id"] for row in record] == [f"s#{n}" for n in lost]
        assert {row["by"] for row in record} == {"endpoint"}
        asked, server.reply = len(server.requests), healthy
        run(command, folder, server)
        assert sorted(map(number_of, server.requests[asked:])) == lost
    assert len(rows(folder / "label/labels.jsonl")) == COUNT
    assert not (folder / "label-lost.jsonl").exists()


def test_below_the_share_the_stage_finishes_and_the_next_run_asks_the_lost_again(folder, capsys):
    labels, lost = folder / "label/labels.jsonl", folder / "label-lost.jsonl"
    with serving(sick(7, 9)) as server:
        run("run", folder, server)
        said = capsys.readouterr().err
        assert "the endpoint lost 2 items" in said and "next `tppo run` asks" in said
        assert len(rows(labels)) == 38 and [row["id"] for row in rows(lost)] == ["s#7", "s#9"]
        before, asked = labels.read_bytes(), len(server.requests)
        run("run", folder, server)  # as sick as before: asked, and nothing changes
        assert len(server.requests) == asked + 2 and labels.read_bytes() == before
        assert len(rows(lost)) == 2 and "map: finished before" in capsys.readouterr().err
        server.reply = sick(*range(COUNT), status=401)  # the endpoint as a whole
        run("run", folder, server)
        said = capsys.readouterr().err
        assert "its labels stay as they were: HTTP 401" in said and "map: finished before" in said
        assert labels.read_bytes() == before and len(rows(lost)) == 2
        asked, server.reply = len(server.requests), sick(9)
        run("run", folder, server)
        assert sorted(map(number_of, server.requests[asked:])) == [7, 9]
        assert len(rows(labels)) == 39 and [row["id"] for row in rows(lost)] == ["s#9"]
        assert "map: runs again, because input" in capsys.readouterr().err
        assert (folder / "map/labels.jsonl").read_bytes() == labels.read_bytes()
        server.reply = healthy
        run("run", folder, server)
        assert len(rows(labels)) == COUNT and not lost.exists()
        asked = len(server.requests)
        run("run", folder, server)
        assert "label: finished before, skipped" in capsys.readouterr().err
        assert len(server.requests) == asked


def test_a_finished_run_needs_no_key_for_the_lost(folder, capsys, monkeypatch):
    with serving(sick(7)) as server:
        run("run", folder, server)
        monkeypatch.delenv("TPPO_TEST_KEY")
        run("run", folder, server)
    assert "stay as they were: environment variable TPPO_TEST_KEY was" in capsys.readouterr().err
    assert len(rows(folder / "label/labels.jsonl")) == 39


def test_the_share_is_a_flag_in_percent_or_as_a_number(folder):
    with serving(sick(*range(20, 30))) as server:
        for share in ("24.9%", "0.24"):
            with pytest.raises(SystemExit, match="10 of 40 items got no label"):
                run("run", folder, server, "--label.endpoint.max-dropped", share)
        run("run", folder, server, "--label.endpoint.max-dropped", "25%")
        assert len(rows(folder / "label/labels.jsonl")) == 30
        with pytest.raises(SystemExit):
            run("run", folder, server, "--label.endpoint.max-dropped", "130%")


def test_what_a_filter_or_the_judge_lost_does_not_open_a_finished_stage(folder, capsys):
    """A filter's refusals are not counted; an answer without a judgement is, and stays as it is."""
    flagged = {"error": {"code": "content_filter"}}

    def reply(request, number):
        n = number_of(request)
        return (400, {}, flagged) if n < 10 else "no" if n < 12 else judge(request)

    with serving(reply) as server:
        run("run", folder, server)
        record = rows(folder / "label-lost.jsonl")
        assert [row["by"] for row in record] == ["item"] * 10 + ["judge"] * 2
        asked = len(server.requests)
        run("run", folder, server)
        assert len(server.requests) == asked
    assert "finished before, skipped" in capsys.readouterr().err


def test_a_damaged_record_means_asking_again_and_the_rule_leaves_none(folder, capsys):
    with serving(sick(7)) as server:
        run("run", folder, server)
        (folder / "label-lost.jsonl").write_text('{"id": ')
        server.reply = healthy
        run("run", folder, server)
        assert "label-lost.jsonl: line 1: not JSON" in capsys.readouterr().err
        assert len(rows(folder / "label/labels.jsonl")) == COUNT
        server.reply = sick(7)
        (folder / "label-cache.jsonl").unlink()
        run("label", folder, server)
        assert (folder / "label-lost.jsonl").exists()
        run("run", folder, server, "--label.labeller", "rule")
    assert not (folder / "label-lost.jsonl").exists()
    assert json.loads((folder / "label/labels.jsonl").read_text().split("\n")[0])


def test_where_an_answer_cannot_be_kept_nothing_more_is_asked(folder, monkeypatch):
    """The first answer is the last to come: all others were asked before the error had its turn."""
    real, kept = cache.append_line, []

    def full(path, entry):
        if len(kept) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        kept.append(entry)
        return real(path, entry)

    def slow_first(request, number):
        if number_of(request) == 0:
            time.sleep(1)
        return judge(request)

    monkeypatch.setattr(cache, "append_line", full)
    with serving(slow_first) as server:
        with pytest.raises(SystemExit, match="No space left on device"):
            run("label", folder, server, "--label.endpoint.concurrency", "4")
        assert len(kept) == 4 and len(server.requests) <= 4 + 4
        monkeypatch.setattr(cache, "append_line", real)
        asked, server.reply = len(server.requests), healthy
        run("label", folder, server)
        assert len(server.requests) - asked == COUNT - 4
