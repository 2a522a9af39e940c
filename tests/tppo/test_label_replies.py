"""Every form of reply of the table, played by a real HTTP server on this machine."""

import gzip
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")

from test_label_openai import (  # noqa: E402
    KEY,
    RIGHT,
    answer,
    as_object,
    completion,
    config,
    environment,  # noqa: F401
    item,
    judge,
    label,
    serving,
    slots,
)

from tppo.labels.endpoint import ask as label_ask  # noqa: E402
from tppo.labels.endpoint import live as label_openai
from tppo.labels.endpoint.config import EndpointConfig, without_key  # noqa: E402
from tppo.labels.endpoint.forms import FORMS, table  # noqa: E402
from tppo.labels.endpoint.live import Dropped, EndpointError  # noqa: E402
from tppo.labels.endpoint.prompt import BadAnswer, parse  # noqa: E402
from tppo.labels.endpoint.replies import Reply, Trouble, outcome  # noqa: E402

ROOT = Path(__file__).parent.parent.parent


def test_the_documentation_shows_the_table_that_decides():
    text = (ROOT / "docs/labelling-endpoints.md").read_text()
    assert text.partition("<!-- table -->\n")[2].partition("<!-- end of table -->")[0] == table()


def error(status, code=None, **fields):
    """An error whose text holds what must never be shown."""
    return status, {}, {"error": {"message": f"secret history {KEY}", "code": code, **fields}}


def ended(request, finish, content=None, **fields):
    body = completion(content, finish)
    body["choices"][0]["message"].update(fields)
    return 200, {}, body


def parts(request):
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": answer([("x", 1)])}]}
    half = len(judge(request)) // 2
    texts = [judge(request)[:half], judge(request)[half:]]
    return ended(request, "stop", [thought, *({"type": "text", "text": t} for t in texts)])


def once(first, then=judge):
    """A play whose first reply differs from the later ones."""
    return lambda request, tries: first(request) if tries == 1 else then(request)


def always(reply):
    return lambda request, tries: reply(request)


def half(request):
    """Half a verdict, after which the provider behind the endpoint failed."""
    status, headers, body = ended(request, "error", judge(request)[:50])
    body["choices"][0]["error"] = {"code": 502, "message": KEY}
    return status, headers, body


def cut_off(request):
    return "cut off"


LIMIT = {"Retry-After": "0.05"}
OK = ("labelled", 1)
PLAYS = {  # form -> what the server plays, (who loses the item, requests it costs at 2 retries)
    "verdict": [
        (always(judge), OK),
        (always(lambda r: f"Sure:\n```\n{judge(r)}\n```\nAnything else?"), OK),
        (always(lambda r: "\ufeff" + judge(r)), OK),
        (always(lambda r: "<think>well\n" + judge(r)), OK),
        (always(lambda r: judge(r).replace(": 1", ": 1.0").replace(": 0", ": 0.0")), OK),
        (always(parts), OK),
        (always(lambda r: ended(r, "length", judge(r) + "\nAnd also")), OK),
    ],
    "unsound": [(once(lambda r: "no"), ("labelled", 2)), (always(lambda r: "no"), ("judge", 2))],
    "cut": [
        (always(lambda r: ended(r, "length")), ("judge", 1)),
        (always(lambda r: ended(r, "length", "<think>" + judge(r))), ("judge", 1)),
    ],
    "blank": [(always(lambda r: ended(r, "stop", " ")), ("judge", 1))],
    "moderated": [
        (always(lambda r: ended(r, "stop", None, refusal="no")), ("item", 1)),
        (always(lambda r: ended(r, "content_filter", "I")), ("item", 1)),
        (always(lambda r: error(400, "content_filter")), ("item", 1)),
        (always(lambda r: error(403, 403, metadata={"reasons": ["x"]})), ("item", 1)),
    ],
    "too long": [
        (always(lambda r: error(400, "context_length_exceeded")), ("judge", 1)),
        (always(lambda r: error(413)), ("judge", 1)),
    ],
    "key": [
        (once(lambda r: error(401, "invalid_api_key")), ("labelled", 2)),
        (always(lambda r: error(401)), ("endpoint", 3)),
    ],
    "forbidden": [(always(lambda r: error(403)), ("endpoint", 1))],
    "nowhere": [(always(lambda r: error(404)), ("endpoint", 1))],
    "request": [
        (always(lambda r: error(400)), ("endpoint", 1)),
        (always(lambda r: (200, {}, {"error": {"code": 400}})), ("endpoint", 1)),
    ],
    "busy": [
        (once(lambda r: (429, LIMIT, {})), ("labelled", 2)),
        (once(lambda r: error(200, 429)), ("labelled", 2)),
        (once(lambda r: error(200, "rate_limit_exceeded")), ("labelled", 2)),
        (always(lambda r: error(503)), ("endpoint", 3)),
        (always(lambda r: (200, {}, {"choices": [{"error": {"code": 502}}]})), ("endpoint", 3)),
        (once(half), ("labelled", 2)),
    ],
    "slow": [(once(lambda r: time.sleep(2.5) or judge(r)), ("labelled", 2))],
    "broken": [(once(cut_off), ("labelled", 2)), (always(cut_off), ("endpoint", 3))],
    "garbled": [
        (once(lambda r: (200, {}, {"choices": None})), ("labelled", 2)),
        (always(lambda r: (200, {}, b"<html>")), ("endpoint", 3)),
    ],
    "too large": [
        (always(lambda r: (200, {"Content-Encoding": "zstd"}, gzip.compress(b"{}"))),
         ("endpoint", 1)),
    ],
    "other": [(always(lambda r: error(418)), ("endpoint", 1))],
}
ELSEWHERE = {"quota", "redirect", "wait", "schema", "unreachable", "no words", "unanswered"}


def test_all_forms_in_one_run_give_the_labels_that_a_person_expects(tmp_path):
    """200 items, 8 in flight; then a run with a healthy server asks for the rest, once each."""
    assert set(PLAYS) | ELSEWHERE == {form.name for form in FORMS}
    plays = [play for form in PLAYS.values() for play in form]
    items = [item(n, response=f"red hat {n}") for n in range(200)]
    # The first items are answered; each play comes twice, far apart.
    played = {20 + 2 * i: play for i, play in enumerate(plays + plays)}
    asked = Counter()

    def reply(request, number):
        n = int(slots(request)["returned_queries"][0].split()[-1])
        with server.lock:
            asked[n] += 1
            tries = asked[n]
        return played[n][0](request, tries) if n in played else judge(request)

    def end(request, number):
        said = reply(request, number)
        with server.lock:
            (server.cutting.add if said == "cut off" else server.cutting.discard)(str(request))
        return said

    cache = tmp_path / "cache.jsonl"
    with serving(end) as server:
        server.cutting, server.cut = set(), lambda request: str(request) in server.cutting
        settings = config(server, timeout_s=2.0)
        run = label(items, settings, cache)
        lost = {f"s{n}": by for n, (_, (by, _)) in played.items() if by != "labelled"}
        assert {each.id: each.by for each in run.dropped} == lost and len(lost) == 42
        right = {f"s{n}": (("red", 1), ("hat", 0), (str(n), 0)) for n in range(200)}
        assert {each.id: each.words for each in run.labels} == {
            id: words for id, words in right.items() if id not in lost
        }
        assert asked == {n: played[n][1][1] if n in played else 1 for n in range(200)}
        shown = " ".join(each.reason for each in run.dropped)
        assert "secret" not in shown and KEY[:8] not in shown

        asked.clear()
        server.cut = lambda request: False
        server.reply = lambda request, number: reply(request, number) and judge(request)
        again = label(items, settings, cache)
        assert again.dropped == [] and {each.id: each.words for each in again.labels} == right
        assert asked == {int(id[1:]): 1 for id in lost}


STOPS = {
    "402": (error(402), r"HTTP 402 from .*no credit left: top it up"),
    "quota": (error(429, "insufficient_quota"), r"HTTP 429 \(insufficient_quota\) from .*top it"),
    "200 quota": (error(200, None, type="insufficient_quota"), "error insufficient_quota from"),
    "choice": ((200, {}, {"choices": [{"error": {"code": 402}}]}), "error 402 from .*no credit"),
    "redirect": ((307, {"Location": "https://Other.example/v1?k=1"}, {}),
                 r"HTTP 307 from .*redirection from http://127.0.0.1:\d+ to https://other.example "
                 "is not followed"),
    "wait": ((429, {"Retry-After": "9999"}, {}), r"asks to wait 9999 s, .* 300 s \(--label.endpoi"),
}  # fmt: skip


@pytest.mark.parametrize(("stop", "message"), STOPS.values(), ids=STOPS)
def test_a_reply_that_concerns_all_stops_at_once_and_what_was_paid_is_kept(tmp_path, stop, message):
    """With 8 requests in flight: those that are on their way are the last."""
    items = [item(n, response=f"red hat {n}") for n in range(60)]
    with serving(lambda r, number: stop if number >= 30 else judge(r)) as server:
        with pytest.raises(EndpointError, match=message) as raised:
            label(items, config(server), tmp_path / "cache.jsonl")
        assert "secret" not in str(raised.value) and "k=1" not in str(raised.value)
        asked = len(server.requests)
        assert 30 <= asked <= 37
        assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 29
        server.reply = lambda request, number: judge(request)
        assert len(label(items, config(server), tmp_path / "cache.jsonl").labels) == 60
        assert len(server.requests) == asked + 31


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_history_goes_where_a_redirection_points(tmp_path, status):
    with serving(lambda request, number: judge(request)) as other:
        target = {"Location": f"{other.url}/chat/completions"}
        with serving(lambda request, number: (status, target, {})) as server:
            with pytest.raises(EndpointError) as raised:
                label([item()], config(server), tmp_path / "cache.jsonl")
            assert other.requests == [] and len(server.requests) == 1
            for host in (server, other):
                assert host.url.removesuffix("/v1") in str(raised.value)


@pytest.mark.parametrize(("status", "requests"), [(401, 3), (403, 1), (404, 1)])
def test_a_refusal_of_one_item_of_40_costs_that_item(tmp_path, status, requests):
    items = [item(n, response=f"red hat {n}") for n in range(40)]

    def reply(request, number):
        return error(status) if "red hat 20" in str(slots(request)) else judge(request)

    with serving(reply) as server:
        run = label(items, config(server, max_dropped=0.05), tmp_path / "cache.jsonl")
        assert len(run.labels) == 39
        assert run.dropped[0].id == "s20" and run.dropped[0].by == "endpoint"
        assert len(server.requests) == 39 + requests


def test_flagged_items_that_come_before_any_answer_blame_no_key(tmp_path):
    """Refusals are quick and answers are slow, or have to be asked for again: what was begun
    decides. In a second run only refused items are left; the first one's answers stand for the key.
    """
    items = [item(n, response=f"red hat {n}") for n in range(40)]
    asked = Counter()

    def reply(request, number):
        n = int(slots(request)["returned_queries"][0].split()[-1])
        with server.lock:
            asked[n] += 1
        if n < 4:
            return error(403)
        if n < 8 and asked[n] == 1:
            return 429, {"Retry-After": "0.3"}, {}
        time.sleep(0.2 if n < 12 else 0)
        return judge(request)

    with serving(reply) as server:
        run = label(items, config(server, max_dropped=0.1), tmp_path / "cache.jsonl")
        assert len(run.labels) == 36 and len(server.requests) == 44
        assert label(items, config(server, max_dropped=0.1), tmp_path / "cache.jsonl") == run
        assert len(server.requests) == 48


@pytest.mark.parametrize(
    ("refused", "options", "remedy"),
    [
        ("max_tokens", {"max_completion_tokens": 99}, "max-completion-tokens N sends its newer"),
        ("max_tokens", {"max_tokens": None}, "max-tokens None leaves it out"),
        ("temperature", {"temperature": None}, "temperature None leaves it out"),
    ],
)
@pytest.mark.parametrize("shape", ["param", "message", "detail"])
def test_a_refused_parameter_is_named_and_stops_after_a_few(
    tmp_path, refused, options, remedy, shape
):
    bodies = {
        "param": {"error": {"param": refused, "code": "unsupported_parameter"}},
        "message": {"error": {"message": f"'{refused}' is not supported; KEY {KEY}", "code": None}},
        "detail": {"detail": [{"loc": ["body", refused], "msg": KEY}]},
    }
    items = [item(n, response=f"red hat {n}") for n in range(28)]
    with serving(
        lambda r, number: (400, {}, bodies[shape]) if refused in r else judge(r)
    ) as server:
        with pytest.raises(EndpointError, match=r"first \d+ items all failed: HTTP") as raised:
            label(items, config(server), tmp_path / "cache.jsonl")
        assert f"the model refuses {refused}" in str(raised.value) and remedy in str(raised.value)
        assert len(server.requests) <= 10 and KEY not in str(raised.value)
        run = label(items, config(server, **options), tmp_path / "cache.jsonl")
        assert len(run.labels) == 28
        assert server.requests[-1].get("max_completion_tokens") == options.get(
            "max_completion_tokens"
        )


def test_a_request_refused_without_a_reason_costs_no_second_request_once_the_schema_works(tmp_path):
    items = [item(n, response=f"red hat {n}") for n in range(28)]
    with serving(lambda r, number: error(400) if number > 4 else judge(r)) as server:
        run = label(items, config(server, concurrency=1), tmp_path / "cache.jsonl")
        assert len(run.dropped) == 24 and len(server.requests) == 28


def test_the_wait_that_a_server_asks_for_holds_for_everybody(tmp_path, monkeypatch, capsys):
    """In milliseconds, in seconds or as a date; meanwhile nobody sends."""
    monkeypatch.setattr(label_ask, "LONG_WAIT_S", 0.4)
    date = "%a, %d %b %Y %H:%M:%S GMT"
    for kind in ("retry-after-ms", "Retry-After", date):
        sent = []

        def reply(request, number, kind=kind, sent=sent):
            sent.append(time.monotonic())
            if len(sent) != 5:
                return judge(request)
            if kind == date:
                return 429, {"Retry-After": time.strftime(date, time.gmtime(time.time() + 2))}, {}
            return 429, {kind: "500" if kind.endswith("ms") else "0.5"}, {}

        with serving(reply) as server:
            items = [item(n, response=f"red hat {n}") for n in range(12)]
            cache = tmp_path / f"{kind[:5]}.jsonl"
            assert len(label(items, config(server, concurrency=2), cache).labels) == 12
            waits = sorted(b - a for a, b in zip(sent, sent[1:], strict=False))
            assert len(sent) == 13 and waits[-1] > 0.45
            assert capsys.readouterr().err.count("labelling: the server asks to wait ") == 1
    with serving(lambda request, number: (429, {"Retry-After": "2"}, {})) as server:
        with pytest.raises(EndpointError, match="asks to wait 2 s, the limit is 1 s"):
            label([item()], config(server, max_wait_s=1.0), tmp_path / "wait.jsonl")
        assert len(server.requests) == 1


def test_the_share_of_lost_items_ends_the_run_and_is_a_flag(tmp_path):
    items = [item(n, response=f"red hat {n}") for n in range(40)]

    def reply(request, number):
        n = int(slots(request)["returned_queries"][0].split()[-1])
        return error(503) if n % 13 == 12 else judge(request)  # 3 of 40

    cache = tmp_path / "cache.jsonl"
    with serving(reply) as server:
        few = config(server, max_retries=0)
        assert EndpointConfig().max_dropped == 0.05
        with pytest.raises(EndpointError, match="3 of 40 items got no label, more than the 5 %"):
            label(items, config(server, max_retries=0, max_dropped=0.05), cache)
        assert len(server.requests) == 40
        assert [each.id for each in label(items, few, cache).dropped] == ["s12", "s25", "s38"]
        limit = config(server, max_retries=0, max_dropped=3 / 40)
        assert len(label(items, limit, cache).labels) == 37


def test_an_outage_in_the_middle_ends_the_run_before_everything_was_asked(tmp_path):
    items = [item(n, response=f"red hat {n}") for n in range(300)]
    with serving(lambda r, number: error(503) if number > 50 else judge(r)) as server:
        settings = config(server, max_retries=0, max_dropped=0.05)
        # The 20 in a row begin after the newest judgement, which may come after the first losses.
        with pytest.raises(EndpointError, match="2[0-7] of 300 items got no label.*HTTP 503"):
            list(label_openai.label(items, settings, tmp_path / "cache.jsonl", 300))
        assert 70 <= len(server.requests) <= 85


@pytest.mark.parametrize(
    ("path", "hint"),
    [("", r"path \(should the base URL end in /v1\?\)"), ("/v1", "path, or no model 'judge-1'")],
)
def test_a_path_that_is_not_there_asks_for_v1(tmp_path, path, hint):
    with serving(lambda request, number: judge(request)) as server:
        server.handle = lambda *arguments: (404, {}, b"{}")
        settings = EndpointConfig(server.url.removesuffix("/v1") + path, "judge-1", "TPPO_TEST_KEY")
        with pytest.raises(EndpointError, match=f"HTTP 404 from .*no such .*{hint}"):
            label([item()], settings, tmp_path / "cache.jsonl")


KEYS = ("choices", "message", "content", "error", "code", "type", "param", "detail", "loc", "text",
        "finish_reason", "refusal", "object", "status", "innererror", "metadata", "flagged_input")
WORDS = (f"secret {KEY}", "text", "length", "error", "refusal", "insufficient_quota", "401", 429,
         1.5, None, True, "", "max_tokens", 10**30)  # fmt: skip


def any_json(random, depth=0):
    if depth > 5 or random.random() < 0.2:
        return random.choice(WORDS)
    if random.random() < 0.4:
        return [any_json(random, depth + 1) for _ in range(random.randrange(3))]
    return {random.choice(KEYS): any_json(random, depth + 1) for _ in range(random.randrange(4))}


def deep(depth):
    value = "x"
    for _ in range(depth):
        value = {"code": [value]}
    return value


def test_any_body_under_any_status_is_some_form_and_is_not_quoted():
    random, settings = Random(0), EndpointConfig("http://h/v1", "m")
    statuses = (200, 201, 302, 400, 401, 404, 413, 429, 500, 999)
    headers = [{}, {"location": "http://[::1"}, {"location": "//x y/"}, {"retry-after": "inf"},
               {"retry-after": "Mon, 99 Foo"}, {"retry-after": "-1"}, {"retry-after": "nan"}]
    bodies = [any_json(random) for _ in range(4000)]
    bodies += [deep(400), {"error": deep(400)}, {"error": {"code": deep(400), "type": deep(400)}}]
    for number, body in enumerate(bodies):
        reply = Reply(statuses[number % 10], body, headers[number % 7])
        found = outcome(reply, settings, "red hat", schema=number % 2 == 0)
        assert isinstance(found, Trouble) and found.form in FORMS
        assert "secret" not in found.reason and KEY not in found.reason, found.reason
        assert found.form.name == "unsound" or len(found.reason) < 300


WRAPPED = {
    "prose before a fence": "Here is my judgement:\n```json\n{}\n```",
    "prose after a fence": "```json\n{}\n```\nLet me know.",
    "prose around": "My judgement {{as asked}} is {} and that [1] is all {{}}.",
    "a BOM": "\ufeff{}",
    "a thought without end": "<think>\nThe words are clear.\n{}",
    "a draft before": '{{"WORD_SEQUENCE_JUDGEMENTS": [], "ACROSS_QUERY_JUDGEMENTS": {{}}}}\n{}',
    "inside of another": '{{"judgements": {}}}',
    "other JSON behind": '{}\n{{"confidence": 0.5}}',
    "an opening without end": '{{"a": {{"b": {}',
}


@pytest.mark.parametrize("form", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("kind", ["object", "tags", "fences in tags"])
def test_a_sound_verdict_is_taken_from_whatever_stands_around_it(form, kind):
    fenced = answer(RIGHT, 0).replace("[{", "So:\n```json\n[{").replace("}]", "}]\n```")
    verdicts = {"object": as_object(RIGHT, 0), "tags": answer(RIGHT, 0), "fences in tags": fenced}
    judged = parse(form.format(verdicts[kind]), "red shoes\nblue hat")
    assert [(word.word, word.label) for word in judged.words] == RIGHT and judged.sentence == 0


def test_whole_numbers_may_have_a_point_and_nothing_else_counts():
    text = as_object(RIGHT, 1)
    judged = parse(text.replace(": 1", ": 1.0").replace(": 0", ": 0.0"), "red shoes\nblue hat")
    assert [(word.word, word.label) for word in judged.words] == RIGHT
    assert type(judged.sentence) is int and type(judged.words[0].label) is int
    for wrong in ('"1"', "true", "0.5", "1e400", "null", "[1]"):
        with pytest.raises(BadAnswer):
            parse(text.replace('"label": 1', f'"label": {wrong}'), "red shoes\nblue hat")


def test_a_draft_in_a_thought_that_was_cut_is_no_verdict():
    text = "<think>perhaps " + as_object(RIGHT)
    assert parse(text, "red shoes\nblue hat").sentence == 1
    with pytest.raises(BadAnswer, match="cut in its thought"):
        parse(text, "red shoes\nblue hat", cut=True)
    assert parse(text + "</think>" + as_object(RIGHT, 0), "red shoes\nblue hat").sentence == 0


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "{" * 20_000, '[{"' * 20_000])
def test_a_hostile_answer_is_refused_in_time(text):
    started = time.process_time()
    with pytest.raises(BadAnswer):
        parse(text, "red shoes")
    with pytest.raises(BadAnswer):
        parse(answer([]).replace("[]", text), "red shoes")
    assert time.process_time() - started < 5


FOLDED = KEY.replace("-", "")


@pytest.mark.parametrize("echo", [KEY, KEY.upper(), FOLDED, KEY.replace("-", " "), FOLDED[5:],
                                  KEY[:14], ".".join(FOLDED)])  # fmt: skip
def test_a_key_is_hidden_however_a_server_spells_it(tmp_path, echo):
    """The comparison of words drops hyphens and case, and shows forty characters of what it got."""
    with serving(lambda request, number: answer([(f"my {echo} rest", 1)])) as server:
        run = label([item()], config(server), tmp_path / "cache.jsonl")
    folded = "".join(filter(str.isalnum, run.dropped[0].reason)).lower()
    assert "***" in run.dropped[0].reason
    assert not any(FOLDED[i : i + 6] in folded for i in range(len(FOLDED) - 5))


@pytest.mark.parametrize(("code", "shown"), [
    ("a" * 40 + " b", False),  # once 2 to the 40 ways to split the letters
    ("a-" * 29 + "a", True), ("a" * 60 + " and what a user said", False), ("a" * 61, False),
    ("model_not_loaded", True), ("_a", False), ("12", False), (1234, True),
])  # fmt: skip
def test_a_code_is_shown_where_it_is_one_plain_name(code, shown):
    begin = time.process_time()
    reply = Reply(400, {"error": {"message": "x", "code": code}})
    trouble = outcome(reply, EndpointConfig(base_url="http://a/v1", model="m"), "red", schema=False)
    assert (f"({code})" in trouble.reason) is shown and "user" not in trouble.reason
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("unit", [
    "<WORD_SEQUENCE_JUDGEMENTS>", "{", "{ ", '{"', '{"a": 1} ', '{"a" ', "[{", "```json\n",
    '<WORD_SEQUENCE_JUDGEMENTS>{"', "<WORD_SEQUENCE_JUDGEMENTS>[ </WORD_SEQUENCE_JUDGEMENTS>",
])  # fmt: skip
def test_an_answer_full_of_beginnings_is_read_in_no_time(unit):
    begin = time.process_time()
    with pytest.raises(BadAnswer):
        parse(unit * (250_000 // len(unit)), "red shoes")
    assert time.process_time() - begin < 2  # the time of twice as much was four times this


def test_an_answer_has_a_length_and_a_thought_has_none():
    verdict = '{"WORD_SEQUENCE_JUDGEMENTS": [{"word": "red", "label": 1}], ' \
              '"ACROSS_QUERY_JUDGEMENTS": {"label": 0}}'  # fmt: skip
    for longer in ("", "x" * 200_000):  # longer than the part that is tried first
        assert parse(f"[1 {{ {longer} {verdict} {longer[:9]}", "red").words[0].label == 1
    padded = verdict.replace(" ", " " * 30_000)
    assert parse(f'so {{"{padded}', "red").sentence == 0
    assert parse(f"<think>{'x' * 300_000}</think>{verdict}", "red").sentence == 0
    with pytest.raises(BadAnswer, match="300,158 characters in the answer, expected at most 262,1"):
        parse("x" * (300_158 - len(verdict)) + verdict, "red")


def test_what_is_no_key_is_shown():
    for text in ("HTTP 500 from http://127.0.0.1:8000/v1", "'red' stands where 'hat' was expected"):
        assert without_key(text, KEY) == text
    assert without_key(f"a {KEY}, b", KEY) == "a ***, b"
    assert without_key("x --- y", "---") == "x *** y"


@pytest.mark.parametrize(
    ("key", "what"),
    [("sk-ab\nsk-cd", "character 6 .* a line break"), ("sk-\u00fcber", "character 4 .* not ASCII"),
     ("sk a", "character 3 .* white space"), ("sk-a\u200b", "character 5 .* not ASCII")],
)  # fmt: skip
def test_a_key_that_no_header_can_hold_is_named_before_anything_is_done(
    tmp_path, monkeypatch, key, what
):
    from tppo.cli import main

    monkeypatch.setenv("TPPO_TEST_KEY", key)
    flags = ["--label.labeller", "endpoint", "--label.endpoint.api-key-env", "TPPO_TEST_KEY"]
    with serving(lambda request, number: judge(request)) as server:
        with pytest.raises(ValueError, match=f"variable TPPO_TEST_KEY: {what}") as raised:
            label([item()], config(server), tmp_path / "cache.jsonl")
        with pytest.raises(SystemExit, match=f"variable TPPO_TEST_KEY: {what}") as ended:
            main(["run", "--out", str(tmp_path / "run"), *flags])
        assert not server.requests and not (tmp_path / "run").exists()
    assert key not in str(raised.value) + str(ended.value)
    monkeypatch.setenv("TPPO_TEST_KEY", f" {KEY}\n")  # a line break behind it is a file's
    with serving(lambda request, number: judge(request)) as server:
        assert len(label([item()], config(server), tmp_path / "cache.jsonl").labels) == 1
        assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [("HTTP_PROXY", "http://[::1", "no address of a proxy"),
     ("HTTP_PROXY", "http://127.0.0.1:99999", "no address of a proxy, expected a port from 0 to"),
     ("all_proxy", "http://me:pass1@host:port", "no address of a proxy"),
     ("http_proxy", "gopher://me:pass1@host", "no address of a proxy"),
     ("ALL_PROXY", "socks5://me:pass1@127.0.0.1:1", "SOCKS proxy, which needs socksio")],
)  # fmt: skip
def test_a_proxy_variable_is_named_or_does_not_matter(
    tmp_path, monkeypatch, variable, value, what
):
    if "socks" in value:
        monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(variable, value)
    with serving(lambda request, number: judge(request)) as server:
        with pytest.raises(ValueError, match=f"variable {variable} is .*{what}") as raised:
            label([item()], config(server), tmp_path / "cache.jsonl")
        assert "pass1" not in str(raised.value)
        names = ("127.0.0.1", "x.org,127.0.0.0/8", "*", server.url.split("/")[2])
        for n, name in enumerate(names):
            monkeypatch.setenv("NO_PROXY", name)
            assert len(label([item()], config(server), tmp_path / f"{n}.jsonl").labels) == 1
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.delenv(variable)
        monkeypatch.setenv("HTTPS_PROXY", value)  # of no address that is asked
        assert len(label([item()], config(server), tmp_path / "https.jsonl").labels) == 1


def test_a_proxy_is_used_and_named_where_it_cannot_be_reached(tmp_path, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    settings = EndpointConfig("http://endpoint.invalid/v1", "judge-1", "TPPO_TEST_KEY",
                              max_retries=0)  # fmt: skip
    paths = []
    with serving(lambda request, number: judge(request)) as server:
        usual = server.handle

        def handle(path, headers, request):
            paths.append(path)
            return usual("/v1/chat/completions", headers, request)

        server.handle = handle
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        assert len(label([item()], settings, tmp_path / "cache.jsonl").labels) == 1
    assert paths == ["http://endpoint.invalid/v1/chat/completions"]
    with pytest.raises(EndpointError, match="cannot be reached through the proxy of HTTP_PROXY"):
        label([item()], settings, tmp_path / "other.jsonl")


def test_labels_of_batch_files_alone_need_no_address(tmp_path):
    """The one item that they lack is counted as lost; without any label an address is asked for."""
    items = [item(n, response=f"red hat {n}") for n in range(30)]
    alone = EndpointConfig("", "judge-1", "TPPO_TEST_KEY")
    with pytest.raises(ValueError, match="base_url was ''"):
        list(label_openai.label(items, alone, tmp_path / "cache.jsonl"))
    with serving(lambda request, number: judge(request)) as server:
        label(items[1:], config(server), tmp_path / "cache.jsonl")
    found = list(label_openai.label(items, alone, tmp_path / "cache.jsonl"))
    assert found[0] == Dropped("s0", "no answer of a batch file", "endpoint") and len(found) == 30
    with pytest.raises(EndpointError, match="2 of 31 items got no label"):
        more = [item(99, response="red hat 99"), *items]
        list(label_openai.label(more, alone, tmp_path / "cache.jsonl"))
