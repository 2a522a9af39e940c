"""The whole loop on real sessions, labelled over HTTP: to the closing table, and nothing twice."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")
pytest.importorskip("pydantic", reason="pydantic is not installed: pip install tppo-kernels[label]")

from test_label_openai import answer, environment, serving, slots  # noqa: E402, F401

from tppo.cli import main  # noqa: E402
from tppo.labels.rule import label_by_rule  # noqa: E402
from tppo.stages.registry import REGISTRY  # noqa: E402

SMALL = {
    "scratch": {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 400, "max_length": 280},
    "sft": {"max_steps": 6, "eval_every": 3, "decay_steps": 6},
    "generate": {"samples": 40, "max_new_tokens": 24},
    "reward_model": {"epochs": 1},
    "ppo": {"steps": 1, "batch_size": 16, "minibatch_size": 8, "min_format": 0.0, "max_kl": 100.0,
            "without_signal": True},
    "eval": {"temperatures": [1.0], "heat_users": 2},
}
STAGES = [name for name, stage in REGISTRY.items() if stage.in_run]


def by_rule(request, number):
    """A labeller that knows the rule; it sees no more than the message says."""
    data = slots(request)
    response = "\n".join(data["returned_queries"])
    said = label_by_rule("", response, data["true_queries"], 0.6)
    return answer(said.words, said.sentence)


FULL = os.environ.get("TPPO_TEST_FULL") == "1"


@pytest.fixture(params=["sim4ia_sessions", *["ikat_turns"] * FULL])
def flags(request, tmp_path):
    """The flags of a small run on a file of real sessions, but for the server."""
    folder = os.environ.get("TPPO_SESSIONS")
    if not folder:
        pytest.skip("TPPO_SESSIONS names no folder of real sessions")
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(SMALL))
    data = str(Path(folder) / f"{request.param}.jsonl")
    return [
        "--data", data, "--out", str(tmp_path / "out"), "--config", str(config),
        "--label.labeller", "endpoint", "--label.endpoint.model", "judge",
        "--label.endpoint.api-key-env", "TPPO_TEST_KEY", "--label.endpoint.concurrency", "3",
    ]  # fmt: skip


def test_a_run_labelled_over_http_and_what_a_repetition_sends(flags, tmp_path, capsys):
    out = tmp_path / "out"
    with serving(by_rule) as server:
        flags += ["--label.endpoint.base-url", server.url]
        main(["run", *flags])
        result = json.loads((out / "result.json").read_text())
        assert result["tppo"]["users"] >= 4 and 0 <= result["tppo"]["relevance"] <= 1
        answers = rows(out / "generate" / "answers.jsonl")
        labels = rows(out / "label" / "labels.jsonl")
        with_words = [row for row in answers if any(map(str.isalnum, row["text"]))]
        first: dict = {}
        for n, row in enumerate(answers):  # those to one session are asked one after another
            first.setdefault(row["session"], n)
        with_words.sort(key=lambda row: first[row["session"]])
        assert [row["id"] for row in labels] == [row["id"] for row in with_words]
        assert {row["labeller"] for row in labels} == {"judge"}
        asked = len(server.requests)
        assert 1 < asked <= len(answers)  # equal questions are asked once

        said(capsys)
        main(["run", *flags])
        assert said(capsys).count("finished before, skipped") == len(STAGES)
        for stage in ("train-rm", "label"):  # a later stage; the labels themselves
            kept = (out / "label" / "labels.jsonl").read_bytes()
            shutil.rmtree(out / stage)
            main(["run", *flags])
            assert (out / "label" / "labels.jsonl").read_bytes() == kept
        assert len(server.requests) == asked
        assert said(capsys).count("map: finished before, skipped") == 2
        killed_while_labelling(out, tmp_path / "killed", flags, server)

        server.reply = lambda request, number: '{"ACROSS_QUERY_JUDGEMENTS": {"label": 1}}'
        main(["label", *flags, "--label.endpoint.template", "sentence"])
        assert {(row["sentence"], *row["words"]) for row in rows(out / "label/labels.jsonl")} == {
            (1,)
        }  # fmt: skip
        with pytest.raises(SystemExit, match="no word has a label, expected some"):
            main(["map", *flags])


def killed_while_labelling(finished, out, flags, server):
    """kill -9 in the middle of the stage: the next run asks for what is missing, and no more."""
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("label", "label-cache.jsonl"))
    flags = [*flags, "--out", str(out)]
    total, cache = len(rows(finished / "label-cache.jsonl")), out / "label-cache.jsonl"
    reached, release, before = threading.Event(), threading.Event(), len(server.requests)

    def halting(request, number):
        if number > before + total // 2:
            reached.set()
            release.wait(60)
        return by_rule(request, number)

    server.reply = halting
    process = subprocess.Popen([sys.executable, "-m", "tppo", "label", *flags])
    assert reached.wait(90)
    while not cache.exists() or len(rows(cache)) < total // 2 - 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = len(rows(cache))
    server.reply = by_rule
    release.set()
    sent = len(server.requests)
    assert not (out / "label").exists()
    main(["run", *flags])
    assert len(server.requests) - sent == total - kept > 0
    for file in ("label/labels.jsonl", "map/categories.jsonl"):
        assert (out / file).read_bytes() == (finished / file).read_bytes()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(capsys):
    return capsys.readouterr().err
