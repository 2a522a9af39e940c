"""`tppo serve`: an OpenAI-compatible endpoint over a trained model, and its page in a browser."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from browser import browser
from exported import export
from pages import contrast, find_chromium

import tppo
from tppo.cli import main
from tppo.stages.answering.openai_form import CHAT, TEXT
from tppo.stages.answering.page import SCRIPT, answer_page
from tppo.stages.answering.recipe import Recipe
from tppo.stages.answering.serve import Server
from tppo.stages.local_http import MOST_BYTES

HOSTILE = "<img src=x onerror=\"document.title='pwned'\"></script>\u202e"
MESSAGES = [{"role": "user", "content": "red shoes"}, {"role": "assistant", "content": "x\ny"},
            {"role": "user", "content": "click: boots"}]  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="module")
def server(out):
    with Server(tppo.load(out), 0, "a model") as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def call(server, method, path, body=None, **headers):
    """Status, headers and body of a reply; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    sent = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items() if value is not None
    }
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, raw, sent)
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    kind = reply.headers["Content-Type"]
    return reply.status, reply.headers, json.loads(data) if kind == "application/json" else data


def chat(server, **body):
    status, _, found = call(server, "POST", CHAT, {"messages": MESSAGES, **body})
    assert status == 200, found
    return found


def test_a_chat_is_a_history_and_its_completion_the_queries(server):
    found = chat(server, n=2, seed=3, logprobs=True, model="a model")
    expected = server.model.answers([["red shoes", "click: boots"]], several=2, seed=3)[0]
    assert [c["message"]["content"] for c in found["choices"]] == [a.text for a in expected]
    for choice, answer in zip(found["choices"], expected, strict=True):
        tokens = choice["logprobs"]["content"]
        assert [t["token"] for t in tokens] == [t.text for t in answer.tokens]
        assert [t["reward"] for t in tokens] == pytest.approx([t.reward for t in answer.tokens])
        assert [t["logprob"] for t in tokens] == pytest.approx([t.logprob for t in answer.tokens])
        assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[answer.finish]
        assert choice["tppo"]["reward"] == pytest.approx(answer.reward)
    written = sum(len(answer.tokens) for answer in expected)
    assert found["usage"] == {
        "prompt_tokens": expected[0].prompt_tokens, "completion_tokens": written,
        "total_tokens": expected[0].prompt_tokens + written,
    }  # fmt: skip


def test_completions_take_one_history_or_several(server):
    status, _, found = call(server, "POST", TEXT, {
        "prompt": ["red shoes\nclick: boots", "socks"], "n": 2, "temperature": 0, "logprobs": 1,
    })  # fmt: skip
    assert status == 200 and [c["index"] for c in found["choices"]] == [0, 1, 2, 3]
    first, again, other, _ = (choice["text"] for choice in found["choices"])
    assert first == again != other
    assert first == chat(server, temperature=0)["choices"][0]["message"]["content"]
    logprobs = found["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["rewards"]) == len(logprobs["text_offset"])


def test_what_the_openai_package_reads(server):
    openai = pytest.importorskip(
        "openai", reason="openai is not installed: pip install tppo-kernels[label]"
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["a model"]
    assert client.models.retrieve("a model").id == "a model"
    ask = {"model": "a model", "messages": MESSAGES, "temperature": 0}
    found = client.chat.completions.create(**ask, n=2, logprobs=True, max_completion_tokens=5)
    assert len(found.choices) == 2 and found.usage.completion_tokens <= 10
    assert found.choices[0].logprobs.content[0].reward is not None
    whole = client.chat.completions.create(**ask).choices[0]
    pieces = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.message.content
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason
    text = client.completions.create(model="a model", prompt="boots", temperature=0, logprobs=0)
    streamed = client.completions.create(model="a model", prompt="boots", temperature=0,
                                         stream=True)  # fmt: skip
    assert "".join(p.choices[0].text for p in streamed) == text.choices[0].text
    with pytest.raises(openai.NotFoundError, match="does not exist here, expected 'a model'"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="n was 65, expected a whole number"):
        client.chat.completions.create(**ask, n=65)


def test_many_clients_at_once_get_what_one_gets(server):
    histories = ["boots", "socks", "red shoes", "hats"] * 2
    alone = [server.model.answers([h], temperature=0.0)[0][0].text for h in histories]

    def one(history):
        body = {"prompt": history, "temperature": 0}
        return call(server, "POST", TEXT, body)[2]["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, histories)) == alone


@pytest.mark.parametrize(("body", "status", "message", "param"), [
    (b"{", 400, "the body is no JSON", None),
    (b"[" * 100_000, 400, "the body is no JSON", None),
    (b'"\xff"', 400, "the body is no JSON", None),
    ([], 400, "expected a JSON object", None),
    ({}, 400, "messages was None, expected a list of messages", "messages"),
    ({"messages": [{"role": "user"}]}, 400, r"messages\[0\] was", "messages"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "history is empty", "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, r"messages\[0\] was", "messages"),
    ({"messages": [{"role": ["user"], "content": {}}]}, 400, r"messages\[0\] was", "messages"),
    (b'{"messages": ' + b'[{"a": ' * 300 + b'1' + b'}]' * 300 + b'}', 400, "was", "messages"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400,
     "temperature was nan", "temperature"),
    ({"messages": MESSAGES, "max_tokens": 10**400}, 400, "max_tokens was 1000", "max_tokens"),
    ({"messages": MESSAGES, "model": "other"}, 404, "expected 'a model'", "model"),
    ({"messages": MESSAGES, "n": 0}, 400, "n was 0, expected a whole number from 1", "n"),
    ({"messages": MESSAGES, "temperature": 3}, 400, "temperature was 3", "temperature"),
    ({"messages": MESSAGES, "temperature": 1e-300}, 400, "far too small", "temperature"),
    ({"messages": MESSAGES, "stream": 1}, 400, "stream was 1, expected true or false", "stream"),
    ({"messages": MESSAGES, "stop": ["x"]}, 400, "stop was", "stop"),
    ({"messages": MESSAGES, "tools": [{}]}, 400, "tools was given, expected none", "tools"),
    ({"messages": MESSAGES, "queries": 900}, 400, "leave no room for a prompt", "messages"),
    ({"messages": [{"role": "user", "content": "a " * 900}]}, 400, "its prompt has", "messages"),
])  # fmt: skip
def test_a_wrong_request_is_refused_as_openai_does(server, body, status, message, param):
    found = call(server, "POST", CHAT, body)
    assert found[0] == status and re.search(message, found[2]["error"]["message"]), found[2]
    assert found[2]["error"]["type"] == "invalid_request_error"
    assert found[2]["error"]["param"] == param
    assert chat(server)["choices"]  # and the next one is answered


@pytest.mark.parametrize(("method", "path", "headers", "status"), [
    ("GET", "/", {"Host": "evil.example"}, 403),
    ("POST", CHAT, {"Host": "evil.example:80"}, 403),
    ("POST", CHAT, {"Origin": "https://evil.example"}, 403),
    ("POST", CHAT, {"Origin": "null"}, 403),
    ("POST", CHAT, {"Content_Type": "text/plain"}, 415),
    ("POST", CHAT, {"Content_Length": str(MOST_BYTES + 1)}, 413),
    ("POST", CHAT, {"Content_Length": "-1"}, 411),
    ("POST", CHAT, {"Transfer_Encoding": "chunked"}, 411),
    ("POST", "/v1/embeddings", {}, 404),
    ("GET", "/../../etc/passwd", {}, 404),
    ("GET", CHAT, {}, 405),
    ("GET", "/v1/models/other", {}, 404),
    ("PUT", CHAT, {}, 501),
    ("OPTIONS", CHAT, {"Origin": "https://evil.example"}, 501),
])  # fmt: skip
def test_requests_of_others_are_refused(server, method, path, headers, status):
    found = call(server, method, path, b"{}" if method in ("POST", "PUT") else None, **headers)
    assert found[0] == status and found[2]["error"]["message"]
    assert "Access-Control-Allow-Origin" not in found[1]


def test_it_listens_on_this_machine_alone_and_a_taken_port_is_said(server, out):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(SystemExit, match=f"--port was {server.port}, which cannot be had"):
        main(["serve", "--out", str(out), "--port", str(server.port)])


def test_the_command_serves_until_ctrl_c(out):
    command = [sys.executable, "-m", "tppo", "serve", "--port", "0", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    found = next(found for line in process.stderr
                 if (found := re.search(r"http://127.0.0.1:(\d+) ", line)))  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "out"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "stopped by Ctrl-C" in process.stderr.read()
    process.stderr.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(find_chromium(), tmp_path_factory.mktemp("browser")) as opened:
        yield opened


SEEN = """(() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = color => { context.clearRect(0, 0, 1, 1); context.fillStyle = color;
    context.fillRect(0, 0, 1, 1); return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)]; };
  return {
    title: document.title, wide: document.documentElement.scrollWidth > innerWidth,
    page: rgb(getComputedStyle(document.body).backgroundColor), images: document.images.length,
    events: [...document.querySelectorAll(".event bdi")].map(e => e.textContent),
    queries: [...document.querySelectorAll("article")].map(
      a => [...a.querySelectorAll(".use bdi")].map(e => e.textContent)),
    tokens: [...document.querySelectorAll("article")].map(a => [...a.querySelectorAll(".t")].map(
      t => ({text: t.querySelector("bdi").textContent, figure: t.querySelector("small").textContent,
             back: rgb(getComputedStyle(t).backgroundColor), ink: rgb(getComputedStyle(t).color),
             small: rgb(getComputedStyle(t.querySelector("small")).color)}))),
    error: document.getElementById("error").textContent};
})()"""
IDLE = "!document.getElementById('answers').hasAttribute('aria-busy')"


def visible(text):
    """A text with the numbers of the characters that have no sign."""
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf") else c
                   for c in text)  # fmt: skip


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_somebody_searches_in_a_browser(server, page, width, dark):
    page.open(f"http://127.0.0.1:{server.port}/", width=width, dark=dark)
    page.run("document.getElementById('several').value = 2; "
             "document.getElementById('temperature').value = 0; "
             "document.getElementById('text').focus()")  # fmt: skip
    page.type("red running shoes")
    page.wait("document.querySelectorAll('article').length == 2")
    found = page.run(SEEN)
    (answer,) = server.model.answers(["red running shoes"], temperature=0.0)[0]
    queries = [visible(query.text) for query in answer.queries]
    assert found["queries"] == [queries] * 2
    assert len(found["tokens"][0]) == len(answer.tokens) and not found["wide"]
    assert (sum(found["page"]) < 200) == dark and found["error"] == ""
    colours = {}
    for shown, token in zip(found["tokens"][0], answer.tokens, strict=True):
        number = re.search(r"[−+]?\d+\.\d\d$", shown["figure"])[0].replace("−", "-")
        assert float(number) == pytest.approx(token.reward, abs=0.005)
        assert min(contrast(shown["back"], shown[c]) for c in ("ink", "small")) >= 4.5, shown
        colours.setdefault((token.reward > 0) - (token.reward < 0), []).append(shown["back"])
    assert {-1, 1} <= colours.keys()  # weights under which both are seen
    assert all(back[2] > back[0] for back in colours[1])  # blue pays
    assert all(back[0] > back[2] for back in colours[-1])  # orange costs
    page.run("document.querySelector('.use').click()")
    page.wait(f"document.querySelectorAll('.event').length == 2 && {IDLE}")
    assert page.run(SEEN)["events"] == ["red running shoes", queries[0]]
    page.run("document.querySelector('.remove').click()")
    assert page.run(SEEN)["events"] == [queries[0]]
    assert page.complaints() == []


def test_what_a_server_refuses_is_shown(server, page):
    page.open(f"http://127.0.0.1:{server.port}/")
    page.run("document.getElementById('text').focus()")
    page.type("boots " * 400)
    page.wait("document.getElementById('error').textContent")
    found = page.run(SEEN)
    assert "its prompt has" in found["error"] and found["queries"] == []


def test_hostile_texts_are_texts_and_nothing_is_asked_for_elsewhere(server, page, out):
    page.open(f"http://127.0.0.1:{server.port}/", width=390)
    page.run("document.getElementById('text').focus()")
    page.type(HOSTILE)
    page.wait(f"document.querySelectorAll('article').length == 1 && {IDLE}")
    found = page.run(SEEN)
    assert found["events"] == [HOSTILE.replace("\u202e", "\\u202e")]
    assert found["title"] == "a model" and found["images"] == 0
    own = f"http://127.0.0.1:{server.port}/"
    assert {address for address in page.asked_for() if not address.startswith(own)} == set()
    recipe = Recipe(events=("</select><script>alert(1)</script>",))
    text = answer_page(HOSTILE, recipe, True)
    assert text.count("<script>") == 1 and "<img" not in text.replace(SCRIPT, "")
