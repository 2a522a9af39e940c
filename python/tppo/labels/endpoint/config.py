"""Where the labelling model is, how it is asked, and the key, which stays in the environment."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any
from urllib.parse import urljoin, urlsplit

import tyro
from pydantic import BeforeValidator

from tppo.labels.endpoint.prompt import Template
from tppo.labels.hand import BY_HAND
from tppo.settings import Count, Natural, NonNegative, Positive, Share, Text, section

NO_KEY = "no-key"
PIECE = 6  # letters and digits in a row that count as a piece of the key


class NoKey(ValueError):
    """A question has to be asked, and the environment holds no key."""


def _number(text: str) -> float:
    """`5%` or `0.05` as a number."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _of_percent(given: Any) -> Any:
    """`5%` in a file is a share, as it is in a flag; anything else stays what it is."""
    if isinstance(given, str) and given.endswith("%"):
        try:
            return _number(given)
        except ValueError:
            pass
    return given


Allowed = Annotated[
    Share,
    BeforeValidator(_of_percent),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="SHARE|PERCENT%",
        instance_from_str=lambda given: _number(given[0]),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [f"{value:g}"],
    ),
]


@section
class EndpointConfig:
    """An OpenAI-compatible endpoint. Its answers are kept in label-cache.jsonl of the run folder: a
    repeated run sends only what is missing there, a run with another --out asks again."""

    base_url: str = ""
    """Such as http://127.0.0.1:8000/v1."""
    model: str = ""
    """The model's name at the endpoint."""
    api_key_env: Text | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; None for a server that asks for none."""
    concurrency: Count = 8
    """Requests in flight."""
    max_retries: Natural = 5
    """Further tries of a request after 429, 5xx or a time-out, ever longer apart; which replies are
    tried again stands in docs/labelling-endpoints.md."""
    max_wait_s: NonNegative = 300.0
    """The longest wait that the server may ask for (Retry-After), in seconds: above it the run
    stops."""
    max_dropped: Allowed = 0.05
    """Above this share of items lost by endpoint or judge the stage stops unfinished."""
    timeout_s: Positive = 120.0
    """Limit of one try, in seconds."""
    temperature: NonNegative | None = 0.0
    """None leaves it to the server; some models refuse any value."""
    max_tokens: Count | None = 4096
    """Cap of an answer, in tokens, thoughts included; None leaves it to the server."""
    max_completion_tokens: Count | None = None
    """The same under the name that newer models want: given, max_tokens is not sent."""
    schema: bool = True
    """Ask for the form of the answer by a JSON schema too; a server that refuses it is asked
    without, but a batch file cannot be."""
    price_read: NonNegative | None = None
    """Price of a million prompt tokens, in any currency; with both prices the cost is shown."""
    price_written: NonNegative | None = None
    """Price of a million answer tokens."""
    template: Template = "words"
    """Labels of words and answer, or of the answer alone (sentence): those train no token reward
    model, but compare (--agreement) and serve a sentence-level baseline."""


def need_libraries() -> None:
    """Raise ImportError, with what to install, where a library of labelling is missing."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"labelling by an endpoint needs {error.name}: pip install tppo-kernels[label]"
        ) from None


def check(config: EndpointConfig) -> None:
    """Raise ValueError for a configuration with which no request can be made."""
    if not config.model.strip():
        raise ValueError(f"model was {config.model!r}, expected its name at the endpoint")
    if config.model.startswith(BY_HAND):
        raise ValueError(f"model was {config.model!r}, expected another name: {BY_HAND!r} is how "
                         "labels by hand are told from others")  # fmt: skip
    check_key(config)
    prices = (config.price_read, config.price_written)
    if prices.count(None) == 1:
        raise ValueError(
            f"price_read, price_written were {prices[0]}, {prices[1]}, expected both, or none"
        )


def prices(config: EndpointConfig) -> tuple[float, float] | None:
    """Prices of a million tokens read and a million written, where both are known."""
    if config.price_read is None or config.price_written is None:
        return None
    return config.price_read, config.price_written


def check_address(base_url: str) -> None:
    """Raise ValueError for a text that is no address, or an address with a secret in it."""
    if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", base_url):
        shown = re.sub(r"//.*@|[?#].*", "//***", base_url)
        raise ValueError(
            f"base_url was {shown!r}, expected http(s)://HOST/v1 without credentials or a query"
        )
    check_port(base_url, f"base_url was {base_url!r}")


def check_port(address: str, what: str) -> None:
    """Raise ValueError, beginning with `what`, where an address has a port that is none."""
    try:
        urlsplit(address).port  # noqa: B018 (reading it parses it)
    except ValueError:
        raise ValueError(f"{what}, expected a port from 0 to 65535") from None


def origin(url: str, base: str = "") -> str:
    """`https://host:port` of an address, which may be relative to another, and nothing else."""
    try:
        parts = urlsplit(urljoin(base, url))
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        scheme, host, port = "", "", None
    if not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", host):
        return "an address that cannot be read"
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}{f':{port}' if port else ''}"


def check_key(config: EndpointConfig) -> None:
    """Raise ValueError for a key that no HTTP header can hold, naming the character."""
    key = os.environ.get(config.api_key_env or "", "").strip()
    for place, character in enumerate(key, start=1):
        if "!" <= character <= "~":
            continue
        kind = "not ASCII" if character > "~" else "white space or a control character"
        if character in "\r\n":
            kind = "a line break"
        raise ValueError(
            f"environment variable {config.api_key_env}: character {place} of the key is {kind}, "
            "expected printable ASCII alone: was more than the key copied into it?"
        )


def api_key(config: EndpointConfig) -> str:
    """The key, after a check of the address that it is sent to."""
    check_address(config.base_url)
    check_key(config)
    if config.api_key_env is None:
        return NO_KEY
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise NoKey(
            f"environment variable {config.api_key_env} was empty, expected the endpoint's key "
            "(set api_key_env to None for a server that asks for none)"
        )
    return key


def without_key(text: str, key: str) -> str:
    """A text without the key and without pieces of it, however a server spelled them.

    Letters and digits are compared alone and case-folded: servers and the comparison of words drop
    hyphens and change case.
    """
    if not key or key == NO_KEY:
        return text
    secret = "".join(filter(str.isalnum, key)).casefold()
    places = [i for i, character in enumerate(text) if character.isalnum()]
    folded = "".join(text[i].casefold()[:1] for i in places)
    size = min(PIECE, len(secret))
    hidden: list[list[int]] = []  # stretches of `places`, first and last
    for i in range(len(folded) - size + 1 if size else 0):
        if folded[i : i + size] in secret:
            if hidden and i <= hidden[-1][1] + 1:
                hidden[-1][1] = i + size - 1
            else:
                hidden.append([i, i + size - 1])
    for first, last in reversed(hidden):
        text = text[: places[first]] + "***" + text[places[last] + 1 :]
    return text.replace(key, "***")
