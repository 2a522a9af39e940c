"""A model behind an endpoint as the judge, against a real HTTP server on this machine."""

import json
from dataclasses import replace

import pytest
from judged import answers_of

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")

from test_label_openai import (  # noqa: E402, F401  # environment is a fixture
    answer,
    environment,
    judge,
    serving,
)

from tppo.config import Config  # noqa: E402
from tppo.errors import DataError  # noqa: E402
from tppo.evaluation.config import EvalConfig  # noqa: E402
from tppo.evaluation.endpoint import EndpointJudge  # noqa: E402
from tppo.evaluation.judge import judge_answers  # noqa: E402
from tppo.labels.endpoint.config import EndpointConfig  # noqa: E402
from tppo.labels.endpoint.live import EndpointError  # noqa: E402
from tppo.sessions.session import Event, Session  # noqa: E402
from tppo.stages.judges import chosen_judge, judge_named  # noqa: E402

SESSIONS = [
    Session(f"s{i}", f"u{i}", "made", ("likes red",), (Event("search", f"boots {i}"),), targets)
    for i, targets in enumerate([("red shoes", "blue hat"), ("green tea",), ("cap",)])
]


def config(server, **changes):
    settings = {"timeout_s": 30.0, "max_retries": 0, "api_key_env": "TPPO_TEST_KEY"}
    return EndpointConfig(base_url=server.url, model="judge-2", **settings | changes)


def data_of(request):
    lines = request["messages"][0]["content"].split("\n")
    return json.loads(next(line for line in lines if line.startswith('{"history"')))


def share(queries, true):
    truth = " ".join(true).split()
    words = " ".join(queries).split()
    return sum(word in truth for word in words) / max(len(words), 1)


def honest(request, number):
    """Judges words, or prefers the list with the larger share of true words, else the first."""
    data = data_of(request)
    if "first_queries" not in data:
        return judge(request)
    true = data["true_queries"]
    better = share(data["second_queries"], true) > share(data["first_queries"], true)
    return answer([], sentence=int(better)).split("</WORD_SEQUENCE_JUDGEMENTS>\n")[1]


def test_an_endpoint_judges_and_is_asked_once(tmp_path):
    answers = answers_of(SESSIONS, ["red shoes\nhat", "coffee", ""], ["eos", "length", "eos"])
    with serving(honest) as server:
        own = EndpointJudge(config(server), tmp_path / "cache.jsonl")
        assert own.name == "judge-2"
        found = own(answers)
        assert found == {
            "relevance": [1, 1, 0.0], "words": [1.0, 0.0, 0.0], "format": [True, False, False],
        }  # fmt: skip
        assert len(server.requests) == 2  # an answer without words is not asked for
        histories = {tuple(data["true_queries"]): data["history"]
                     for data in map(data_of, server.requests)}  # fmt: skip
        assert histories["red shoes", "blue hat"] == ["profile: likes red", "search: boots 0"]
        assert EndpointJudge(config(server), tmp_path / "cache.jsonl")(answers) == found
        assert len(server.requests) == 2
        assert judge_answers(own, answers)["relevance"] == pytest.approx(2 / 3)


def test_the_answer_alone_can_be_judged(tmp_path):
    def reply(request, number):
        assert "WORD_SEQUENCE" not in request["messages"][0]["content"]
        return '<ACROSS_QUERY_JUDGEMENTS>{"label": 1}</ACROSS_QUERY_JUDGEMENTS>'

    with serving(reply) as server:
        own = EndpointJudge(config(server, template="sentence"), tmp_path / "cache.jsonl")
        found = own(answers_of(SESSIONS[:1], ["x"], ["eos"]))
    assert found == {"relevance": [1], "format": [False]}


ONE = ["red shoes", "coffee", "cap"]
OTHER = ["coffee", "green tea", "CAP"]


def test_pairs_are_seen_in_both_orders(tmp_path):
    first, second = (answers_of(SESSIONS, texts, ["eos"] * 3) for texts in (ONE, OTHER))
    with serving(honest) as server:
        own = EndpointJudge(config(server), tmp_path / "cache.jsonl")
        assert own.prefers(first, second) == [1, -1, 0]
        shown = [(data["first_queries"], data["second_queries"])
                 for data in map(data_of, server.requests)]  # fmt: skip
        assert all((b, a) in shown for a, b in shown) and len(shown) == 4  # the third is a tie
        assert own.prefers(second, first) == [-1, 1, 0] and len(shown) == len(server.requests)


@pytest.mark.parametrize("always", [0, 1])
def test_a_model_that_always_likes_one_place_finds_only_ties(always, tmp_path):
    def reply(request, number):
        return f'<ACROSS_QUERY_JUDGEMENTS>{{"label": {always}}}</ACROSS_QUERY_JUDGEMENTS>'

    first, second = (answers_of(SESSIONS, texts, ["eos"] * 3) for texts in (ONE, OTHER))
    with serving(reply) as server:
        assert EndpointJudge(config(server), tmp_path / "c").prefers(first, second) == [0, 0, 0]


def test_equal_and_empty_answers_are_decided_unasked(tmp_path):
    first = answers_of(SESSIONS, ["a", "", "?"], ["eos"] * 3)
    second = answers_of(SESSIONS, ["a", "b", ""], ["eos"] * 3)
    with serving(honest) as server:
        own = EndpointJudge(config(server), tmp_path / "c")
        assert own.prefers(first, second) == [0, -1, 0]
        assert own.prefers(second, first) == [0, 1, 0] and not server.requests


def test_lost_verdicts_count_as_nothing_and_are_counted(tmp_path, capsys):
    def reply(request, number):
        lost = data_of(request)["true_queries"] == ["green tea"]
        return (500, {}, {}) if lost else judge(request)

    answers = answers_of(SESSIONS, ["red shoes", "green tea", "cap"], ["eos"] * 3)
    with serving(reply) as server:
        own = EndpointJudge(config(server, max_dropped=0.5), tmp_path / "c")
        assert own(answers)["relevance"] == [1, 0.0, 1]
        assert "judge judge-2: 1 of 3 verdicts are lost and count as nothing" in (
            capsys.readouterr().err
        )
        strict = EndpointJudge(config(server, max_dropped=0.1), tmp_path / "c")
        with pytest.raises(EndpointError, match="judge judge-2: 1 of 3 items .* of --eval."
                           "endpoint.max-dropped"):  # fmt: skip
            strict(answers)


def test_what_cannot_judge_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    def refused(message, **changes):
        settings = {"base_url": "http://127.0.0.1:9/v1", "model": "m"} | changes
        chosen = Config(eval=EvalConfig(judge="endpoint", endpoint=EndpointConfig(**settings)))
        with pytest.raises(DataError, match=message):
            chosen_judge(chosen, tmp_path / "c")

    refused(r"--eval.endpoint.\*: model was ''", model="")
    refused(r"--eval.endpoint.\*: base_url was ''", base_url="")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refused(r"--eval.endpoint.\*: environment variable OPENAI_API_KEY was empty")


def test_a_manifest_knows_what_an_endpoint_was_asked_for_and_not_how_fast():
    asked = EndpointConfig(base_url="http://a/v1", model="m")
    given = EvalConfig(judge="endpoint", endpoint=asked)
    known = judge_named(given)
    assert "m at an endpoint" in known
    for same in ({"base_url": "http://b/v1"}, {"concurrency": 2}, {"timeout_s": 1.0}):
        assert judge_named(replace(given, endpoint=replace(asked, **same))) == known
    for other in ({"model": "n"}, {"template": "sentence"}, {"temperature": None},
                  {"max_tokens": 5}, {"schema": False}):  # fmt: skip
        assert judge_named(replace(given, endpoint=replace(asked, **other))) != known
