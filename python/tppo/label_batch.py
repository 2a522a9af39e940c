"""Labels by OpenAI batch files: requests out, answers in, through the cache of the live endpoint.

A request's `custom_id` is the cache key, so that answers may come in any order, in several files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tppo.fingerprints import Fingerprints
from tppo.jsonl import DataError, is_text, read_jsonl, write_jsonl
from tppo.label_cache import Work, chat_request, judgement_in
from tppo.label_config import EndpointConfig, check, need_libraries
from tppo.label_prompt import BadAnswer, LabelItem, prompt, response_format
from tppo.mapping import fold
from tppo.progress import say, track

MOST_REQUESTS = 50_000  # of one file, at OpenAI


def export_batch(
    items: Iterable[LabelItem], config: EndpointConfig, cache: Path, path: str | os.PathLike[str]
) -> int:
    """Write a request for every item that the cache lacks, each content once; returns their number.

    Errors: ImportError without the libraries; ValueError for a configuration that cannot work.
    """
    counts: Counter[str] = Counter()
    write_jsonl(path, _requests(items, config, _work(config, cache), counts))
    count = counts["requests"]
    say(f"{path}: {count} requests; {counts['known']} answers are in the cache already")
    if count > MOST_REQUESTS:
        say(f"OpenAI takes {MOST_REQUESTS:,} requests a file: split it by lines before it is sent")
    return count


def _requests(
    items: Iterable[LabelItem], config: EndpointConfig, work: Work, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    seen = Fingerprints()
    for item in items:
        key = work.key(item)
        if not fold(item.response) or not seen.add(key):
            continue
        if work.get(key) is not None:
            counts["known"] += 1
            continue
        counts["requests"] += 1
        message = {"role": "user", "content": prompt(item, config.template)}
        yield {
            "custom_id": key,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                **chat_request(config, [message]),
                "response_format": response_format(config.template),
            },
        }


def import_batch(
    items: Iterable[LabelItem], config: EndpointConfig, cache: Path, path: str | os.PathLike[str]
) -> Counter[str]:
    """Put every valid answer of a batch's output or error file into the cache; counts by outcome.

    An answer is checked like one of the live endpoint. The counts: "imported", "known" (in the
    cache before), "foreign" (of no item), "dropped" (no valid answer).

    Errors: DataError naming the line that is no line of such a file, and for a file of which no
    answer belongs to an item; what came before stays in the cache.
    """
    work = _work(config, cache)
    responses = {work.key(item): item.response for item in items if fold(item.response)}
    counts: Counter[str] = Counter()
    reason = ""
    for line in track(read_jsonl(path), "import"):
        key = line.get("custom_id", is_text, "the id of a request")
        response = line.get("response", lambda v: isinstance(v, dict), "an object", default=None)
        if key not in responses:
            counts["foreign"] += 1
        elif work.get(key) is not None:
            counts["known"] += 1
        else:
            try:
                judgement = judgement_in(_body(response), responses[key], config.template)
            except BadAnswer as error:
                counts["dropped"] += 1
                reason = reason or f"; the first dropped: {error}"
            else:
                work.finish(key, judgement)
                counts["imported"] += 1
    if set(counts) == {"foreign"}:
        raise DataError(
            f"{path}: none of its {counts['foreign']} answers belongs to an answer of this run "
            f"asked of model {config.model!r} at temperature {config.temperature}"
        )
    say(f"{path}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}{reason}")
    return counts


def _work(config: EndpointConfig, cache: Path) -> Work:
    need_libraries()
    check(config)
    return Work(config, cache)


def _body(response: dict[str, Any] | None) -> Any:
    """The chat completion of a line. No error text goes on: it may quote the key."""
    if response is None:
        raise BadAnswer("the request failed")
    status = response.get("status_code")
    if status != 200:
        raise BadAnswer(f"HTTP {status}" if type(status) is int else "no status_code of 200")
    return response.get("body")
