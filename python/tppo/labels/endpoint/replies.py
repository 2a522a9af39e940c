"""Which form of reply a reply is: the judgement in it, or its row of the table and the message.

A message names the status of a reply, its error's `code` where that is a plain name, and the
parameter of the request that was refused; it never quotes the body, which may repeat users'
histories or the key.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tppo.labels.endpoint.config import EndpointConfig, origin
from tppo.labels.endpoint.forms import BY_CODE, BY_STATUS, FORM, PARAMETERS, SPECIFIC, Form
from tppo.labels.endpoint.prompt import BadAnswer, Judgement, parse
from tppo.labels.endpoint.proxy import proxy_for

V1_HINT = " (should the base URL end in /v1?)"


@dataclass(frozen=True)
class Reply:
    """What came back for one request."""

    status: int | None = None
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    failure: Literal["", "slow", "broken", "unreachable", "garbled", "unanswered",
                     "too large"] = ""  # fmt: skip
    """The form of a reply that is no HTTP response, or none that can be read."""


@dataclass(frozen=True)
class Trouble:
    """A reply that gives no label: its form, and the message for the user."""

    form: Form
    reason: str
    wait_s: float | None = None
    """How long the server asks to wait."""
    text: str = ""
    """The answer, where there is one to be sent back."""


def reply_of(status: int, headers: Mapping[str, str], content: bytes) -> Reply:
    """The reply in an HTTP response."""
    try:
        return Reply(status, json.loads(content), headers)
    except (ValueError, RecursionError):
        return Reply(status, None, headers, "garbled" if status == 200 else "")


def outcome(
    reply: Reply, config: EndpointConfig, response: str, schema: bool = False
) -> Judgement | Trouble:
    """The judgement of an answer in a reply, or why there is none.

    schema: whether a JSON schema was asked for.
    """
    if reply.failure:
        return _trouble(FORM[reply.failure], reply, config)
    error = _error(reply.body)
    if reply.status == 200:
        choice = _choice(reply.body)
        text = _text(choice)
        if choice and text and text.strip():
            found = _read(text, choice, config, response)
            if error is None or isinstance(found, Judgement):
                return found
        elif error is None and choice is not None:
            return _trouble(_form_without_text(choice), reply, config)
    return _trouble(_form(reply.status, error or {}, schema), reply, config, error or {})


def completion_text(reply: Reply, config: EndpointConfig) -> tuple[str, str] | Trouble:
    """The text of a chat completion and why it ended, or why there is none.

    The text of a model that wrote nothing is empty; one that was refused is a trouble.
    """
    if reply.failure:
        return _trouble(FORM[reply.failure], reply, config)
    error = _error(reply.body)
    choice = _choice(reply.body) if reply.status == 200 and error is None else None
    if choice is None:
        return _trouble(_form(reply.status, error or {}, False), reply, config, error or {})
    text = _text(choice) or ""
    if not text and (form := _form_without_text(choice)).name == "moderated":
        return _trouble(form, reply, config)
    return text, str(choice.get("finish_reason"))


def object_of(reply: Reply, config: EndpointConfig) -> dict[str, Any] | Trouble:
    """The JSON object of a reply to another request than for a chat, or why there is none."""
    if reply.failure and reply.failure != "garbled":
        return _trouble(FORM[reply.failure], reply, config)
    error = _error(reply.body)
    if reply.status == 200 and error is None:
        if isinstance(reply.body, dict):
            return reply.body
        return Trouble(FORM["garbled"], f"the reply of {config.base_url} is no JSON object")
    return _trouble(_form(reply.status, error or {}, False), reply, config, error or {})


def _read(
    text: str, choice: dict[str, Any], config: EndpointConfig, response: str
) -> Judgement | Trouble:
    """The judgement in a text; of a cut one, only where it was whole before the cut."""
    cut = choice.get("finish_reason") == "length"
    try:
        return parse(text, response, config.template, cut=cut)
    except BadAnswer as error:
        if cut:
            return Trouble(FORM["cut"], FORM["cut"].advice)
        if choice.get("finish_reason") == "content_filter":
            return Trouble(FORM["moderated"], FORM["moderated"].advice)
        return Trouble(FORM["unsound"], str(error), text=text)


def _choice(body: Any) -> dict[str, Any] | None:
    """The first choice of a chat completion, if it holds a message."""
    choices = body.get("choices") if isinstance(body, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) and isinstance(first.get("message"), dict) else None


_TEXT = ("text", "output_text")


def _text(choice: dict[str, Any] | None) -> str | None:
    """The text of a message: as it stands, or its text parts joined; thoughts are left out."""
    content = choice["message"].get("content") if choice else None
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        texts = [part.get("text") for part in parts if part.get("type", "text") in _TEXT]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


def _form_without_text(choice: dict[str, Any]) -> Form:
    finish, message = choice.get("finish_reason"), choice["message"]
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    refused = any(isinstance(part, dict) and part.get("type") == "refusal" for part in parts)
    if finish == "content_filter" or message.get("refusal") or refused:
        return FORM["moderated"]
    return FORM["cut"] if finish == "length" else FORM["blank"]


def _error(body: Any) -> dict[str, Any] | None:
    """The error of a body, in one of the shapes that servers give it."""
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict):
        return None
    if body.get("object") == "error":
        return body
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    for holder in (body, first if isinstance(first, dict) else {}):
        error = holder.get("error")
        if isinstance(error, dict) and error:
            return error
        if isinstance(error, str) and error:
            return {"message": error}
    detail = body.get("detail")  # of FastAPI
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        place = detail[0].get("loc")
        parts = [part for part in place if isinstance(part, str)] if isinstance(place, list) else []
        named = [part for part in parts if part in PARAMETERS]
        return {"param": named[0] if named else None, "message": detail[0].get("msg")}
    return {"message": detail} if isinstance(detail, str) else None


def _form(status: int | None, error: dict[str, Any], schema: bool) -> Form:
    """The row of an error, by its code where that is more precise than the status, else by that."""
    inner = error.get("innererror")
    given = [error.get(name) for name in ("code", "type", "status")]
    given += [inner.get("code")] if isinstance(inner, dict) else []
    codes = [str(code).lower() for code in given if isinstance(code, (str, int))]
    rows = [BY_CODE[code] for code in codes if code in BY_CODE]
    for row in rows:
        if row.name in SPECIFIC:
            return row
    details = error.get("metadata")
    if isinstance(details, dict) and ("flagged_input" in details or "reasons" in details):
        return FORM["moderated"]
    numbers = [int(code) for code in codes if re.fullmatch("[1-5][0-9][0-9]", code)]
    if status in (200, None):
        known = [BY_STATUS[number] for number in numbers if number in BY_STATUS] + rows
        row = known[0] if known else FORM["garbled" if status else "unanswered"]
    else:
        row = BY_STATUS.get(status or 0, FORM["other"])
    if row.name == "request" and schema and parameter(error) in (None, "response_format"):
        return FORM["schema"]
    return row


def parameter(error: dict[str, Any]) -> str | None:
    """Which of the request's parameters an error is about, if it names one."""
    param = error.get("param")
    first = re.split(r"[.\[]", param)[0] if isinstance(param, str) else None
    if first in PARAMETERS:
        return first
    message = error.get("message")
    optional = "|".join(name for name in PARAMETERS if "_" in name or name == "temperature")
    found = re.search(rf"\b({optional})\b", message if isinstance(message, str) else "")
    return found[1] if found else None


def _trouble(
    form: Form, reply: Reply, config: EndpointConfig, error: Mapping[str, Any] = {}
) -> Trouble:
    """The message for the user, made of our own words and the code of the error alone."""
    name = parameter(dict(error))
    remedy = PARAMETERS.get(name or "", "")
    proxy, _ = proxy_for(config.base_url) if form.name == "unreachable" else ("", None)
    slots = {
        "variable": config.api_key_env or "no variable (api_key_env is None)",
        "model": config.model,
        "base_url": config.base_url,
        "timeout": config.timeout_s,
        "parameter": f"the model refuses {name}{': ' + remedy if remedy else ''}" if name else "",
        "v1": "" if "/v1" in config.base_url or not config.base_url
        else V1_HINT,
        "proxy": f" through the proxy of {proxy}" if proxy else "",
        "here": origin(config.base_url),
        "there": origin(reply.headers.get("location") or "", config.base_url),
    }  # fmt: skip
    advice = "" if form.name == "wait" else form.advice.format(**slots)
    code = _shown(error.get("code") or error.get("type"))
    parts = [] if reply.status in (None, 200) else [f"HTTP {reply.status}"]
    if code and code != str(reply.status):
        parts.append(f"error {code}" if not parts else f"({code})")
    if parts and config.base_url:
        parts.append(f"from {config.base_url}")
    reason = " ".join(parts)
    reason = f"{reason}: {advice}" if reason and advice else reason or advice
    return Trouble(form, reason or form.name, retry_after(reply.headers))


def too_long_a_wait(trouble: Trouble, config: EndpointConfig) -> Trouble:
    """What becomes of a reply whose server asks to wait above the limit."""
    advice = FORM["wait"].advice.format(wait=trouble.wait_s, limit=config.max_wait_s)
    return Trouble(FORM["wait"], f"{trouble.reason}: {advice}")


def _shown(code: Any) -> str:
    """An error's code where it is a plain name or a number; free text may hold anything."""
    text = str(code) if isinstance(code, (str, int)) else ""
    plain = len(text) <= 60 and re.fullmatch(r"[A-Za-z]+([._-][A-Za-z]+)*|[0-9]{3,5}", text)
    return text if plain else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds for which a server asks to wait, from either header and either form."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if seconds > 0 and not math.isnan(seconds):
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = date.timestamp() - time.time()
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
    return seconds if seconds > 0 else None
