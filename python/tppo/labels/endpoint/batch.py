"""Labels by OpenAI batch files: requests out, answers in, through the cache of the live endpoint.

A request's `custom_id` is the cache key, so that answers may come in any order, in several files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tppo.errors import DataError
from tppo.labels.endpoint.ask import EndpointError, too_many
from tppo.labels.endpoint.cache import Work, chat_request
from tppo.labels.endpoint.config import EndpointConfig, check, need_libraries, without_key
from tppo.labels.endpoint.prompt import Judgement, LabelItem, prompt, response_format
from tppo.labels.endpoint.replies import Reply, Trouble, outcome
from tppo.labels.words import fold
from tppo.progress import say, track
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import Line, is_text, read_jsonl, write_jsonl

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
    form = response_format(config.template) if config.schema else None
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
            "body": chat_request(config, [message], form),
        }


def import_batch(
    items: Iterable[LabelItem], config: EndpointConfig, cache: Path, path: str | os.PathLike[str]
) -> Counter[str]:
    """Put every valid answer of a batch's output or error file into the cache; counts by outcome.

    A line is read like a reply of the live endpoint, by the same table, but that nothing is tried
    again: what has no answer is in the next `export_batch`. The counts: "imported", "known" (in the
    cache before), "foreign" (of no item), "dropped" (no valid answer).

    Errors, before which all that was answered is in the cache: DataError naming the line that is no
    line of such a file, and for a file of which no answer belongs to an item; EndpointError for a
    reply that stops a run, and for more lost items than `config.max_dropped` of all allows.
    """
    work = _work(config, cache)
    responses = {work.key(item): item.response for item in items if fold(item.response)}
    counts: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    troubles: dict[str, Trouble] = {}  # by form, the first of each
    for line in track(read_jsonl(path), "import"):
        key = line.get("custom_id", is_text, "the id of a request")
        reply = _reply(line)
        if key not in responses:
            counts["foreign"] += 1
        elif work.get(key) is not None:
            counts["known"] += 1
        else:
            result = outcome(reply, config, responses[key])
            if isinstance(result, Judgement):
                work.finish(key, result)
                counts["imported"] += 1
            else:
                counts["dropped"] += 1
                lost[result.form.by or "endpoint"] += 1
                troubles.setdefault(result.form.name, result)
    if set(counts) == {"foreign"}:
        raise DataError(
            f"{path}: none of its {counts['foreign']} answers belongs to an answer of this run "
            f"asked of model {config.model!r} at temperature {config.temperature}"
        )
    _tell(path, config, counts, troubles)
    _judge_losses(config, lost["endpoint"] + lost["judge"], len(responses), counts, troubles)
    return counts


def _tell(
    path: str | os.PathLike[str],
    config: EndpointConfig,
    counts: Counter[str],
    troubles: dict[str, Trouble],
) -> None:
    """Print what became of the lines."""
    text = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    if troubles:
        text += f"; the first dropped: {_reason(next(iter(troubles.values())), config)}"
    say(f"{path}: {text}")


def _judge_losses(
    config: EndpointConfig,
    lost: int,
    total: int,
    counts: Counter[str],
    troubles: dict[str, Trouble],
) -> None:
    """Raise EndpointError where the table stops a run, or where too many items are lost."""
    answered = bool(counts["imported"] or counts["known"])
    fatal = [each for each in troubles.values() if each.form.action(answered) == "stop"]
    if fatal:
        reason = _reason(fatal[0], config)
    elif lost > config.max_dropped * total:
        counted = [each for each in troubles.values() if each.form.by != "item"]
        reason = too_many(lost, total, config, _reason(counted[0], config))
    else:
        return
    raise EndpointError(f"{reason}; what was answered is kept: --export-batch writes the rest")


def _reason(trouble: Trouble, config: EndpointConfig) -> str:
    return without_key(trouble.reason, os.environ.get(config.api_key_env or "", ""))


def _reply(line: Line) -> Reply:
    """What a line holds: a response, or an error in place of one."""
    response = line.get("response", lambda v: isinstance(v, dict), "an object", default=None)
    if response is None:
        return Reply(None, {"error": line.values.get("error")})
    status = response.get("status_code")
    return Reply(status if type(status) is int else None, response.get("body"))


def _work(config: EndpointConfig, cache: Path) -> Work:
    need_libraries()
    check(config)
    return Work(config, cache)
