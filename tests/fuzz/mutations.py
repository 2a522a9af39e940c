"""Changed copies of inputs: of their bytes, and of the values in the JSON that they hold."""

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

LONGEST = 1 << 14
RECENT = 24  # inputs that are likelier to be changed than older ones
TEXTS = (
    "",
    " ",
    "a",
    "true",
    "null",
    "\u2028",
    "\ud800",
    "\x00",
    "e\u0301",
    "\u200d",
    "\ufeff",
    "\u202eabc",
    "\U0001f469\u200d\U0001f467",
    "\ufb03",
    "\u0130",
    "\u00df",
    "\u4eac\u90fd",
    "\u0e01\u0e33",
    "1\u00b9",
    "</s>",
    "nan",
    "a" * 300,
    "\u0301",
    "\u1160",
    "\U000e0067",
    "\U0001f1e9",
    "-",
    "'",
    "don't",
    "a\tb",
    "a\nb",
    "\r",
    "\x85",
    "\ufe0f",
    "3,5",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    -(2**31),
    2**63,
    10**30,
    0.5,
    1.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [{}],
    {"": ""},
    ["a"],
    {"text": "a"},
    [["a", 1]],
    1e400,
)
BYTES = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\n",
    b"\r\n",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\",
    b"\\ud800",
    b"\\u0000",
    b"null",
    b"1e999",
    b"-",
    b"\x1f\x8b",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 1500,
    b"\xe2\x80\xa8",
    b"\x85",
    b"#",
    b"&a *a",
    b"'",
)


def changed(rng: random.Random, corpus: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One to four changes of one of the inputs, of which the newest are likelier."""
    recent = rng.random() < 0.5
    data = rng.choice(corpus[-RECENT:] if recent else corpus)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.random()
        if kind < 0.5:
            data = _with_other_value(rng, data)
        elif kind < 0.6:
            data = _spliced(rng, data, rng.choice(corpus))
        elif kind < 0.75 and words:
            data = _inserted(rng, data, rng.choice(words))
        else:
            data = _with_other_bytes(rng, data)
    return data[:LONGEST]


def _inserted(rng: random.Random, data: bytes, piece: bytes) -> bytes:
    at = rng.randint(0, len(data))
    over = rng.choice((0, 0, len(piece), rng.randint(0, 8)))
    return data[:at] + piece + data[at + over :]


def _spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def _with_other_bytes(rng: random.Random, data: bytes) -> bytes:
    at, kind = rng.randint(0, max(0, len(data) - 1)), rng.random()
    if kind < 0.25:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind < 0.45:
        return data[:at] + data[at + rng.choice((1, 1, 2, 8, 40)) :]
    if kind < 0.6:
        end = at + rng.choice((1, 4, 30, 200))
        return data[:end] + data[at:end] * rng.choice((1, 1, 3)) + data[end:]
    if kind < 0.8:
        return _inserted(rng, data, rng.choice(BYTES))
    if kind < 0.9:
        return _inserted(rng, data, rng.choice(TEXTS).encode("utf-8", "surrogatepass"))
    lines = data.split(b"\n")
    line = rng.choice(lines)
    if kind < 0.95:
        lines.insert(rng.randrange(len(lines) + 1), line)
    else:
        lines.remove(line)
    return b"\n".join(lines)


def _with_other_value(rng: random.Random, data: bytes) -> bytes:
    """Another value, another key or another order somewhere in a JSON document of the input."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    start, end = (0, len(lines)) if rng.random() < 0.3 else (at, at + 1)
    text = b"\n".join(lines[start:end])
    opening = min((i for i in (text.find(b"{"), text.find(b"[")) if i >= 0), default=0)
    try:
        value, length = json.JSONDecoder().raw_decode(text[opening:].decode())
        tail = text[opening:].decode()[length:].encode()
        new = json.dumps(
            _replaced(rng, copy.deepcopy(value), value), ensure_ascii=rng.random() < 0.5
        )
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        return _with_other_bytes(rng, data)
    made = new.encode("utf-8", "surrogatepass")
    return b"\n".join([*lines[:start], text[:opening] + made + tail, *lines[end:]])


def _replaced(rng: random.Random, value: Any, whole: Any) -> Any:
    """The document with one node changed, which is found by going down at random."""
    if not isinstance(value, list | dict) or not value or rng.random() < 0.2:
        return _other(rng, value, whole)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            value.insert(at, copy.deepcopy(rng.choice(value)))
        elif rng.random() < 0.15:
            del value[at]
        elif rng.random() < 0.1:
            rng.shuffle(value)
        else:
            value[at] = _replaced(rng, value[at], whole)
        return value
    key = rng.choice(list(value))
    if rng.random() < 0.1:
        del value[key]
    elif rng.random() < 0.1:
        value[rng.choice((*TEXTS, *_keys(whole)))] = value.pop(key)
    else:
        value[key] = _replaced(rng, value[key], whole)
    return value


def _other(rng: random.Random, value: Any, whole: Any) -> Any:
    kind = rng.random()
    if isinstance(value, str) and kind < 0.5:
        at = rng.randint(0, len(value))
        return value[:at] + rng.choice(TEXTS) + value[at + rng.choice((0, 0, 1, 5)) :]
    if kind < 0.25:
        return rng.choice(TEXTS)
    if kind < 0.35:
        return copy.deepcopy(whole)
    if kind < 0.4:
        deep: Any = value
        for _ in range(rng.choice((2, 50, 900))):
            deep = [deep]
        return deep
    return copy.deepcopy(rng.choice(VALUES))


def _keys(value: Any) -> list[str]:
    """All keys of a document."""
    if isinstance(value, dict):
        return [*value, *(key for item in value.values() for key in _keys(item))]
    return [key for item in value for key in _keys(item)] if isinstance(value, list) else []
