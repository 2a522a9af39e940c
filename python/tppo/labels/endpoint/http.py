"""HTTP to an endpoint: a client without redirections, the proxy of the environment, one exchange.

A reply is read as it comes and left behind `MOST_BYTES`, which count unpacked: a few bytes of one
that is compressed, which is not asked for, may stand for gigabytes.

Nothing is tried again in here: the table of forms.py decides what a reply means.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import zlib
from typing import TYPE_CHECKING, Any, Literal

from tppo.labels.endpoint.config import NO_KEY, EndpointConfig, check_port
from tppo.labels.endpoint.proxy import proxy_for
from tppo.labels.endpoint.replies import Reply, reply_of

if TYPE_CHECKING:
    import openai

MOST_BYTES = 8 << 20  # of a reply: an answer has thousands, class logits of a request 16 a token
ENCODING, PLAIN, GZIP = "content-encoding", "identity", ("gzip", "x-gzip")
OF_TRANSFER = {ENCODING, "content-length", "transfer-encoding"}  # not of the whole content


def new_client(config: EndpointConfig, key: str) -> openai.AsyncOpenAI:
    """A client that sends what it is given once and to `base_url` alone.

    Raises ValueError for a proxy variable that cannot be used, naming it.
    """
    import openai

    return openai.AsyncOpenAI(
        api_key=key,
        base_url=config.base_url,
        timeout=config.timeout_s,
        max_retries=0,
        http_client=new_http(config),
    )


def new_http(config: EndpointConfig) -> Any:
    """A client for requests of any kind, which follows no redirection and reads a reply of at most
    `MOST_BYTES`.  Errors: `new_client`.
    """
    import openai

    # httpx or its successor, whichever this release of openai is built on.
    package = openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
    http: Any = importlib.import_module(package)

    class TooLarge(http.TransportError):
        """A reply that is not read to its end."""

    class Limited(openai.DefaultAsyncHttpxClient):
        """Its time limit is for a whole try; the usual one starts again with every byte."""

        async def send(self, request: Any, **options: Any) -> Any:
            whole = self._whole(request, **options | {"stream": True})
            try:
                return await asyncio.wait_for(whole, config.timeout_s)
            except asyncio.TimeoutError:
                raise http.ReadTimeout("the whole reply took too long") from None

        async def _whole(self, request: Any, **options: Any) -> Any:
            reply = await super().send(request, **options)
            content = bytearray()
            try:
                packed = reply.headers.get(ENCODING, PLAIN).strip().lower() or PLAIN
                if packed not in (PLAIN, *GZIP):
                    raise TooLarge("the reply is compressed in another way")
                unpack = zlib.decompressobj(zlib.MAX_WBITS | 16) if packed in GZIP else None
                async for part in reply.aiter_raw():
                    room = MOST_BYTES + 1 - len(content)
                    content += unpack.decompress(part, room) if unpack else part
                    if len(content) > MOST_BYTES:
                        raise TooLarge("the reply goes on")
                if unpack and not unpack.eof:
                    raise http.RemoteProtocolError("the reply was cut")
            except zlib.error:
                raise http.RemoteProtocolError("the reply is no gzip") from None
            finally:
                await reply.aclose()
            headers = [(k, v) for k, v in reply.headers.multi_items() if k not in OF_TRANSFER]
            return http.Response(reply.status_code, headers=headers, content=bytes(content),
                                 request=request)  # fmt: skip

    return Limited(
        follow_redirects=False, transport=_transport(http, config), timeout=config.timeout_s,
        headers={"Accept-Encoding": PLAIN},
    )  # fmt: skip


def _transport(http: Any, config: EndpointConfig) -> Any:
    """The transport, through the one proxy that the environment has for this address."""
    limits = http.Limits(max_keepalive_connections=config.concurrency)
    name, proxy = proxy_for(config.base_url)
    if proxy is None:
        return http.AsyncHTTPTransport(limits=limits)
    remedy = f"correct {name}, or exempt the endpoint's host in NO_PROXY"
    check_port(proxy, f"environment variable {name} is no address of a proxy")
    try:
        return http.AsyncHTTPTransport(limits=limits, proxy=proxy)
    except ImportError:
        raise ValueError(
            f"environment variable {name} is a SOCKS proxy, which needs socksio: "
            f"pip install socksio; or {remedy}"
        ) from None
    except Exception as error:  # InvalidURL, ValueError: their own text may quote a password
        raise ValueError(
            f"environment variable {name} is no address of a proxy ({type(error).__name__}), "
            f"expected http://HOST:PORT: {remedy}"
        ) from None


async def exchange(client: openai.AsyncOpenAI, request: dict[str, Any]) -> Reply:
    """Send one request; whatever comes back is a reply."""
    import openai

    create: Any = client.chat.completions.with_raw_response.create
    try:
        raw = await create(**request)
        return reply_of(raw.status_code, raw.headers, raw.content)
    except openai.APITimeoutError:
        return Reply(failure="slow")
    except openai.APIConnectionError as error:
        # By name: httpx's classes, or those of whatever openai is built on.
        return Reply(failure=_failure(type(error.__cause__).__name__))
    except openai.APIStatusError as error:
        return reply_of(error.status_code, error.response.headers, error.response.content)
    except (openai.OpenAIError, ValueError, RecursionError):
        return Reply(failure="garbled")


async def exchange_json(client: Any, url: str, key: str, body: dict[str, Any] | None) -> Reply:
    """Send a JSON object, or ask for what is at an address where there is none to be sent.

    client: of `new_http`.
    """
    headers = {} if key == NO_KEY else {"Authorization": f"Bearer {key}"}
    try:
        raw = await (client.get(url, headers=headers) if body is None
                     else client.post(url, json=body, headers=headers))  # fmt: skip
    except Exception as error:  # by name: httpx's classes, or those of its successor
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if "TimeoutException" in kinds:
            return Reply(failure="slow")
        if "TransportError" not in kinds:
            raise
        return Reply(failure=_failure(kinds[0]))
    return reply_of(raw.status_code, raw.headers, raw.content)


def _failure(kind: str) -> Literal["too large", "unreachable", "broken"]:
    """The form of a reply of which there is an error of this class alone."""
    if kind == "TooLarge":
        return "too large"
    return "unreachable" if re.search("Connect|Proxy", kind) else "broken"
