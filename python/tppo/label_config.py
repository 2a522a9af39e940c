"""Where the labelling model is, how it is asked, and the key, which stays in the environment."""

from __future__ import annotations

import os
import re

from tppo.label_prompt import Template
from tppo.settings import Count, Natural, NonNegative, Positive, Text, section


@section
class EndpointConfig:
    """An OpenAI-compatible endpoint. Its answers are kept in label-cache.jsonl of the run folder: a
    repeated run sends only what is missing there, a run with another --out asks anew."""

    base_url: str = ""
    """Such as http://127.0.0.1:8000/v1."""
    model: str = ""
    """The model's name at the endpoint."""
    api_key_env: Text | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; None for a server that asks for none."""
    concurrency: Count = 8
    """Requests in flight."""
    max_retries: Natural = 5
    """Further tries of a request after 408, 409, 429, 5xx or a time-out, ever longer apart."""
    timeout_s: Positive = 120.0
    """Limit of one try, in seconds."""
    temperature: NonNegative | None = 0.0
    """None leaves it to the server; some models refuse any value."""
    max_tokens: Count | None = 4096
    """Cap of an answer, in tokens; None leaves it to the server."""
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
    """Raise ValueError for an address that is none, or that holds something secret."""
    if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", base_url):
        shown = re.sub(r"//.*@|[?#].*", "//***", base_url)
        raise ValueError(
            f"base_url was {shown!r}, expected http(s)://HOST/v1 without credentials or a query"
        )


def api_key(config: EndpointConfig) -> str:
    """The key, after a look at the address it goes to."""
    check_address(config.base_url)
    if config.api_key_env is None:
        return "no-key"
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ValueError(
            f"environment variable {config.api_key_env} was empty, expected the endpoint's key "
            "(set api_key_env to None for a server that asks for none)"
        )
    return key
