"""The map stage: labels of words become categories of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from tppo.errors import DataError
from tppo.labels.label import Label, iter_labels
from tppo.labels.queries import SEPARATOR
from tppo.labels.words import map_labels
from tppo.models.tokenizer import token_offsets
from tppo.progress import track
from tppo.stages.answers import Answer, answer_of
from tppo.stages.artifacts import ANSWERS, CATEGORIES, LABELS, QUERY_LENGTHS
from tppo.stages.run import Run
from tppo.store.jsonl import write_json, write_jsonl
from tppo.store.line_index import LineIndex


def map_to_tokens(run: Run) -> None:
    """Word labels to token categories, and the median length of a query in tokens."""
    generated = run.path(ANSWERS)
    with run.stage("map") as out, LineIndex(generated, answer_of) as answers:
        lengths: Counter[int] = Counter()
        labels = _with_words(track(iter_labels(run.path(LABELS)), "map"))
        write_jsonl(
            out / CATEGORIES.name,
            (_map_one(run, item, answers.get(item.id), lengths) for item in labels),
        )
        queries = lengths.total()
        ordered = (n for n in sorted(lengths) for _ in range(lengths[n]))
        median = next(islice(ordered, queries // 2, None), 1)
        write_json(out / QUERY_LENGTHS.name, {"median_query_tokens": median, "queries": queries})


def _with_words(labels: Iterable[Label]) -> Iterator[Label]:
    """The labels; raises DataError where none of them is of a word."""
    found = False
    for item in labels:
        found = found or bool(item.words)
        yield item
    if not found:
        raise DataError(
            "no word has a label, expected some: a token reward model needs labels of words "
            "(--label.endpoint.template words)"
        )


def _map_one(
    run: Run, item: Label, answer: Answer | None, lengths: Counter[int]
) -> dict[str, object]:
    """Token categories of one answer; counts the tokens of each of its queries."""
    if answer is None:
        raise DataError(f"label {item.id!r}: no generated answer has this id")
    text, offsets = token_offsets(run.tokenizer, answer.response_ids, run.eos_ids)
    if text != item.response:
        raise DataError(f"label {item.id!r}: its response {item.response!r} is not {text!r}")
    start = 0
    for line in text.split(SEPARATOR):
        end = start + len(line)
        if line.strip():
            lengths[sum(a < end and b > start for a, b in offsets)] += 1
        start = end + len(SEPARATOR)
    return {
        "id": item.id,
        "categories": map_labels(text, item.words, offsets),
        "sentence": item.sentence + 1,
    }
