"""What a labelling model may answer: mutated replies, and answers whose verdicts are known.

A hostile answer gives a judgement only where a list of exactly these verdicts stands in it, found
here by trying every bracket; whatever stands around known verdicts, they are read back as they are,
and reach the characters of their words. A message about a reply quotes nothing of its body.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

from guided import REFUSED, Target, Wrong
from texts import hostile_text, hostile_words

from tppo.labels.endpoint.config import EndpointConfig
from tppo.labels.endpoint.prompt import BadAnswer, Judgement, parse
from tppo.labels.endpoint.replies import Trouble, completion_text, outcome, reply_of
from tppo.labels.words import fold, map_labels, word_spans

WORDS, SENTENCE = "WORD_SEQUENCE_JUDGEMENTS", "ACROSS_QUERY_JUDGEMENTS"
RESPONSES = (
    "trail shoes\nwide boots",
    "don't 3.5 t-shirt",
    "\u4eac\u90fd \u65c5\u884c\n\u0e19\u0e31",
    "a",
    "",
    "e\u0301 \U0001f469\u200d\U0001f467 x x",
    "sea sea food",
)
SECRET = "velvetaardvark"  # of a user's history, which a server may repeat
CONFIG = EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m", api_key_env=None)


def documents(text: str, opening: str) -> Iterator[Any]:
    """Every JSON value that begins at such a bracket, also inside others."""
    decoder = json.JSONDecoder()
    for at, character in enumerate(text):
        if character == opening:
            try:
                yield decoder.raw_decode(text, at)[0]
            except (ValueError, RecursionError):
                continue


def listed(value: Any) -> list[tuple[str, int]] | None:
    """The verdicts of a list of them."""
    found = []
    for item in value if isinstance(value, list) else [None]:
        if not isinstance(item, dict) or not isinstance(item.get("word"), str):
            return None
        label = item.get("label")
        if isinstance(label, bool) or not isinstance(label, int | float) or label not in (0, 1):
            return None
        if fold(item["word"]):
            found.append((item["word"], int(label)))
    return found


def check_judgement(found: Judgement, text: str, response: str, template: str) -> None:
    """A judgement stands in the text as it is, and is of the words of the response."""
    verdicts = [(word.word, word.label) for word in found.words]
    labels = [value["label"] for value in documents(text, "{") if "label" in value]
    if found.sentence not in (0, 1) or found.sentence not in labels:
        raise Wrong(f"sentence {found.sentence} of {text!r}")
    if template == "sentence":
        return
    if verdicts not in [listed(value) for value in documents(text, "[")]:
        raise Wrong(f"verdicts {verdicts} do not stand in {text!r}")
    got, wanted = (fold(x).replace(" ", "") for x in (" ".join(w for w, _ in verdicts), response))
    if got != wanted:
        raise Wrong(f"verdicts {verdicts} are not of {response!r}")


def hostile_answer(data: bytes) -> str | None:
    way = data[0] if data else 0
    text = (
        data[1:].decode("utf-8", "surrogatepass" if way & 1 else "replace")
        if not (way & 1)
        else data[1:].decode("utf-8", "surrogateescape")
    )
    template = "sentence" if way & 2 else "words"
    response = RESPONSES[(way >> 3) % len(RESPONSES)]
    try:
        found = parse(text, response, template, cut=bool(way & 4))  # type: ignore[arg-type]
    except BadAnswer as error:
        if not str(error).strip():
            raise Wrong("an error without a reason") from error
        return REFUSED
    check_judgement(found, text, response, template)
    return None


def answer_examples() -> list[bytes]:
    found = []
    for number, response in enumerate(RESPONSES):
        words = [
            {"word": response[a:b], "label": (a + number) % 2} for a, b in word_spans(response)
        ]
        tagged = (
            f"<think>hm [1] {{}}</think>Sure:\n<{WORDS}>\n{json.dumps(words)}\n</{WORDS}>\n"
            f'<{SENTENCE}>\n{{"label": 1}}\n</{SENTENCE}>'
        )
        whole = json.dumps({WORDS: words, SENTENCE: {"label": 0}}, ensure_ascii=False)
        for way, text in ((0, tagged), (4, tagged), (0, f"```json\n{whole}\n```"), (2, tagged)):
            found.append(bytes([way + 8 * number]) + text.encode())
    return found


def known_verdicts(data: bytes) -> None:
    """Verdicts of every word of a hostile text, in one of the forms that models write."""
    rng = random.Random(data)
    response = "\n".join(hostile_text(rng) for _ in range(rng.choice((1, 1, 2, 3))))
    spans = word_spans(response)
    labels = [rng.randrange(2) for _ in spans]
    verdicts = [(response[a:b], label) for (a, b), label in zip(spans, labels, strict=True)]
    sentence = rng.randrange(2)
    text = written(rng, verdicts, sentence)
    try:
        found = parse(text, response)
    except BadAnswer as error:
        raise Wrong(f"{error}: {response!r} with {verdicts} in {text!r}") from error
    got = [(word.word, word.label) for word in found.words], found.sentence
    if got != (verdicts, sentence):
        raise Wrong(f"was {got}, expected {verdicts}, {sentence}")
    characters = map_labels(response, verdicts, [(i, i + 1) for i in range(len(response))])
    for (start, _), label in zip(spans, labels, strict=True):
        if characters[start] != 1 + label:
            raise Wrong(f"{response!r}: category {characters[start]} at {start}, label {label}")
    inside = {i for a, b in spans for i in range(a, b)}
    if any(category for i, category in enumerate(characters) if i not in inside):
        raise Wrong(f"{response!r}: a category outside of {spans}: {characters}")


def written(rng: random.Random, verdicts: list[tuple[str, int]], sentence: int) -> str:
    """Verdicts as a model may write them: other cases, commas, prose, fences, drafts, thoughts."""
    rows: list[dict[str, Any]] = [
        {"word": word, "label": float(label) if rng.random() < 0.1 else label}
        for word, label in verdicts
    ]
    plain = json.dumps(rows, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    verdict = json.dumps({"label": sentence})
    draft = json.dumps([{"word": "draft", "label": 1}])
    before = rng.choice(
        (
            "",
            "Sure.\n",
            "<think>I [see] {it}</think>",
            f"<{WORDS}>{draft}</{WORDS}>",
            "\ufeff",
            "{not json} [1, 2] ",
        )
    )
    kind = rng.randrange(4)
    if kind == 0:
        return f"{before}<{WORDS}>{plain}</{WORDS}> and <{SENTENCE}>{verdict}</{SENTENCE}>"
    if kind == 1:
        return (
            f"{before}<{WORDS}>\n```json\n{plain}\n```\n</{WORDS}>\n<{SENTENCE}>"
            f"```{verdict}```</{SENTENCE}>\nDone [1]."
        )
    whole = f'{{"{WORDS}": {plain}, "{SENTENCE}": {verdict}}}'
    return whole if kind == 2 else f"{before}```json\n{whole}\n``` {rng.choice(hostile_words())}"


def codes(value: Any) -> Iterator[str]:
    """The texts that a body has for the code or the type of an error."""
    if isinstance(value, dict):
        yield from (value[k] for k in ("code", "type") if isinstance(value.get(k), str))
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from codes(inner)


def is_plain(code: str) -> bool:
    """Whether a code is one name without digits, which a message may show: never a sentence."""
    name = code.replace("-", "_").replace(".", "_")
    return len(code) <= 60 and code.isascii() and name.isidentifier()


def http_reply(data: bytes) -> str | None:
    way = data[0] if data else 0
    status = (200, 200, 200, 400, 401, 402, 404, 413, 422, 429, 500, 503)[way % 12]
    headers = {
        "retry-after": ("", "3", "-1", "nan", "1e400", "Wed, 21 Oct 2026 07:28:00 GMT", "x" * 50)[
            way % 7
        ],
        "location": f"http://[{SECRET}",
    }
    reply = reply_of(status, headers, data[1:])
    response = RESPONSES[way % len(RESPONSES)]
    found = outcome(reply, CONFIG, response, schema=bool(way & 1))
    other = completion_text(reply, CONFIG)
    if isinstance(other, tuple) and not (isinstance(other[0], str) and isinstance(other[1], str)):
        raise Wrong(f"a text and why it ended: {other}")
    for trouble in (found, other):
        if isinstance(trouble, Trouble):
            if not trouble.reason.strip():
                raise Wrong(f"no reason: {trouble}")
            quoted = trouble.reason
            for code in filter(is_plain, codes(reply.body)):
                quoted = quoted.replace(code, "")
            if SECRET in quoted.lower() and trouble.form.name != "unsound":
                raise Wrong(f"the message quotes the body: {trouble.reason}")
            if trouble.wait_s is not None and not trouble.wait_s > 0:
                raise Wrong(f"a wait of {trouble.wait_s}")
    if isinstance(found, Trouble):
        return REFUSED
    content = json.loads(data[1:])["choices"][0]["message"]["content"]
    parts = content if isinstance(content, list) else [{"text": content}]
    text = "".join(
        part["text"]
        for part in parts
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    )
    check_judgement(found, text, response, "words")
    return None


def reply_examples() -> list[bytes]:
    found = []
    for number, answer in enumerate(answer_examples()[::3]):
        message = {"role": "assistant", "content": answer[1:].decode(), "refusal": None}
        way = answer[0] >> 3
        body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}
        listed_parts = {**message, "content": [{"type": "text", "text": message["content"]}]}
        found.append(bytes([way]) + json.dumps(body).encode())
        found.append(
            bytes([way])
            + json.dumps(
                {"choices": [{"message": listed_parts, "finish_reason": "length"}]}
            ).encode()
        )
        error = {
            "code": f"{SECRET} said",
            "type": "invalid_request_error",
            "param": "temperature",
            "message": f"{SECRET} max_tokens",
            "innererror": {"code": "content_filter"},
        }
        found.append(bytes([3 + number]) + json.dumps({"error": error}).encode())
        found.append(
            bytes([3 + number])
            + json.dumps({"detail": [{"loc": ["body", "response_format"], "msg": SECRET}]}).encode()
        )
    return found


_READ = ("tppo/labels/",)
TARGETS = [
    Target(
        "label parser, hostile answers",
        hostile_answer,
        120_000,
        answer_examples,
        _READ,
        (
            f"<{WORDS}>".encode(),
            f"</{WORDS}>".encode(),
            f"<{SENTENCE}>".encode(),
            b"</think>",
            b"```",
            b'{"label": 1}',
            b'"label"',
        ),
    ),
    Target("label parser, known verdicts", known_verdicts, 60_000),
    Target(
        "replies over HTTP",
        http_reply,
        80_000,
        reply_examples,
        _READ,
        (b'"error"', b'"choices"', b'"finish_reason"', b'"content_filter"', SECRET.encode()),
    ),
]
