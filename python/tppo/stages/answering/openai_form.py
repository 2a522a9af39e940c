"""Requests and replies in the form of OpenAI's API, which its clients know.

A reply has, beside OpenAI's fields, what only a token reward model knows: `reward` and `category`
of each token in `logprobs`, and of each choice under `tppo` the queries and the answer's reward.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tppo.errors import DataError, short
from tppo.stages.answering.answerer import Answer
from tppo.stages.answering.histories import Asked, asked, of_messages
from tppo.stages.answering.recipe import Recipe
from tppo.stages.local_http import Refused
from tppo.store.jsonl import plain

MOST = 64  # answers to one request
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Request(NamedTuple):
    """What a client asks for."""

    asked: list[Asked]
    several: int
    queries: int | None
    temperature: float | None
    seed: int | None
    max_new_tokens: int | None
    logprobs: bool
    stream: bool


def read_request(path: str, body: Any, recipe: Recipe, name: str) -> Request:
    """The request that a POST to `path` makes.

    Errors: Refused naming the field, what it was and what was expected.
    """
    if not isinstance(body, dict):
        raise Refused(400, f"the body was {short(body)}, expected a JSON object")
    if body.get("model") not in (None, name):
        raise Refused(404, f"the model {short(body['model'])} does not exist here, expected "
                      f"{name!r}", "model", "model_not_found")  # fmt: skip
    for field in ("tools", "functions"):
        if body.get(field):
            raise Refused(400, f"{field} was given, expected none: the model calls nothing", field)
    if body.get("stop") or body.get("echo"):
        field = "stop" if body.get("stop") else "echo"
        raise Refused(400, f"{field} was {short(body[field])}, expected none: an answer ends where "
                      "the model ends it", field)  # fmt: skip
    try:
        questions = _asked(path, body, recipe)
    except DataError as error:
        raise Refused(400, str(error), "messages" if path == CHAT else "prompt") from None
    several = _whole(body, "n", MOST) or 1
    if several * len(questions) > MOST:
        raise Refused(400, f"{several * len(questions)} answers were asked for, expected at most "
                      f"{MOST} a request", "n")  # fmt: skip
    cap = _whole(body, "max_completion_tokens", 10**6) or _whole(body, "max_tokens", 10**6)
    logprobs = body.get("logprobs")
    return Request(
        questions, several, _whole(body, "queries", 999), _number(body, "temperature"),
        _whole(body, "seed", 2**63 - 1, 0), cap, logprobs is not None and logprobs is not False,
        _flag(body, "stream"),
    )  # fmt: skip


def _asked(path: str, body: Mapping[str, Any], recipe: Recipe) -> list[Asked]:
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise DataError(f"messages was {short(messages)}, expected a list of messages")
        return [of_messages(messages, recipe, "messages")]
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise DataError(f"prompt was {short(prompt)}, expected a text or a list of texts")
    return [asked(one, recipe, f"prompt {i}") for i, one in enumerate(prompts)]


def _whole(body: Mapping[str, Any], name: str, most: int, least: int = 1) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise Refused(400, f"{name} was {short(value)}, expected a whole number from {least} to "
                      f"{most}", name)  # fmt: skip
    return value


def _number(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= 2:
        raise Refused(400, f"{name} was {short(value)}, expected a number from 0 to 2", name)
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name} was {short(value)}, expected true or false", name)
    return bool(value)


def reply(
    path: str, request: Request, found: Sequence[Sequence[Answer]], name: str
) -> dict[str, Any]:
    """The JSON of the answers to a request."""
    choice = _chat_choice if path == CHAT else _text_choice
    answers = [answer for of_one in found for answer in of_one]
    choices = [choice(i, answer, request.logprobs) for i, answer in enumerate(answers)]
    read = sum(of_one[0].prompt_tokens for of_one in found)
    written = sum(len(answer.tokens) for answer in answers)
    kind = "chat.completion" if path == CHAT else "text_completion"
    return {
        "id": f"{'chatcmpl' if path == CHAT else 'cmpl'}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
        "choices": choices,
        "usage": {"prompt_tokens": read, "completion_tokens": written,
                  "total_tokens": read + written},
    }  # fmt: skip


def _tppo(answer: Answer) -> dict[str, Any]:
    return {"queries": plain(answer.queries), "logprob": answer.logprob, "reward": answer.reward}


def _finish(answer: Answer) -> str:
    return "stop" if answer.finish == "eos" else "length"


def _chat_choice(index: int, answer: Answer, logprobs: bool) -> dict[str, Any]:
    content = [
        {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode()),
         "top_logprobs": [], "reward": token.reward, "category": token.category}
        for token in answer.tokens
    ]  # fmt: skip
    return {
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "finish_reason": _finish(answer),
        "logprobs": {"content": content, "refusal": None} if logprobs else None,
        "tppo": _tppo(answer),
    }


def _text_choice(index: int, answer: Answer, logprobs: bool) -> dict[str, Any]:
    offsets, at = [], 0
    for token in answer.tokens:
        offsets.append(at)
        at += len(token.text)
    found = {
        "tokens": [token.text for token in answer.tokens],
        "token_logprobs": [token.logprob for token in answer.tokens],
        "top_logprobs": None,
        "text_offset": offsets,
        "rewards": [token.reward for token in answer.tokens],
        "categories": [token.category for token in answer.tokens],
    }
    return {
        "index": index,
        "text": answer.text,
        "finish_reason": _finish(answer),
        "logprobs": found if logprobs else None,
        "tppo": _tppo(answer),
    }


def chunks(path: str, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A reply as the pieces of a stream: each answer is one, because it is there at once."""
    head = {key: whole[key] for key in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk" if path == CHAT else "text_completion"
    found = []
    for choice in whole["choices"]:
        piece = {key: choice[key] for key in ("index", "logprobs")}
        if path == CHAT:
            delta = {"role": "assistant", "content": choice["message"]["content"]}
            found.append(head | {"choices": [piece | {"delta": delta, "finish_reason": None}]})
            end = {"index": choice["index"], "delta": {}, "logprobs": None}
        else:
            found.append(head | {"choices": [piece | {"text": choice["text"],
                                                      "finish_reason": None}]})  # fmt: skip
            end = {"index": choice["index"], "text": "", "logprobs": None}
        end["finish_reason"] = choice["finish_reason"]
        found.append(head | {"choices": [end]})
    return found
