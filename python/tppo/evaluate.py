"""Figures of answers against the true next queries, and the closing table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sacrebleu.metrics import CHRF
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.batch import Batch
from tppo.config import Prefix
from tppo.label_rule import label_by_rule, relevance_share
from tppo.mapping import fold
from tppo.model_folder import model_eos_ids
from tppo.models import policy_logprobs
from tppo.prompts import answer_text, has_format, parse_answer
from tppo.rollout import HFRollout, Sampling
from tppo.sessions import Session
from tppo.tokenizer import decode

COLUMNS = {
    "relevance": "relevance",
    "exact_match": "exact",
    "chrf": "chrF",
    "distinct_2": "dist-2",
    "queries_per_answer": "queries",
    "kl": "KL",
    "length": "length",
    "format": "format",
}  # figure -> header of the closing table
SEARCH = "search"  # type of the events whose text is a query


def evaluate_policy(
    model: PreTrainedModel,
    ref: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sessions: Sequence[Session],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    threshold: float,
    prefix: Prefix = "shared",
) -> dict[str, Any]:
    """Sample one answer a session and judge them; KL is against `ref` at temperature 1."""
    pad_id, eos_ids = tokenizer.pad_token_id, model_eos_ids(tokenizer, model)
    engine = HFRollout(
        model, pad_id=pad_id, eos_id=eos_ids, batch_size=batch_size, prefix=prefix
    )
    rollout = engine.generate(prompts, sampling)
    texts = [decode(tokenizer, ids, eos_ids) for ids in rollout.response_ids]
    figures = score_answers(sessions, texts, rollout.finish, threshold)
    batches = (
        Batch(
            rollout.prompt_ids[i : i + batch_size],
            rollout.response_ids[i : i + batch_size],
            pad_id,
            model.device,
            prefix,
        )
        for i in range(0, len(prompts), batch_size)
    )
    kl = _kl(model, ref, batches, sampling.temperature) / len(prompts)
    length = _mean([len(ids) for ids in rollout.response_ids])
    return figures | {"kl": kl, "length": length, "example": texts[0]}


@torch.no_grad()
def _kl(
    model: PreTrainedModel, ref: PreTrainedModel, batches: Iterable[Batch], temperature: float
) -> float:
    """Sum over responses of sum_t log pi_T(y_t) - log ref(y_t), in nats."""
    total = 0.0
    for batch in batches:
        logprobs, _ = policy_logprobs(model, batch, temperature)  # [B, T]
        ref_logprobs, _ = policy_logprobs(ref, batch, 1.0)  # [B, T]
        total += (logprobs - ref_logprobs).sum().item()
    return total


def score_answers(
    sessions: Sequence[Session], texts: Sequence[str], finish: Sequence[str], threshold: float
) -> dict[str, Any]:
    """Figures of one answer a session.

    relevance           share of answers that the rule calls relevant, with its standard error
    words               share of relevant words, mean over answers
    exact_match         share of true next queries that were returned exactly (case-folded)
    exact_match_new     the same over true queries that do not stand in the history
    chrf                of the whole answer against the true queries, 0 to 100
    distinct_2          distinct bigrams over bigrams, within queries, over all answers
    distinct_queries    distinct queries of an answer, mean over answers
    format              share of answers that end by themselves with the right number of queries
    """
    labels = [
        label_by_rule(session.id, text, session.targets, threshold)
        for session, text in zip(sessions, texts, strict=True)
    ]
    relevance = _mean([label.sentence for label in labels])
    queries = [parse_answer(text) for text in texts]
    matches = [
        (fold(target) in set(map(fold, answer)), _in_history(session, target))
        for session, answer in zip(sessions, queries, strict=True)
        for target in session.targets
    ]
    references = [answer_text(session.targets) for session in sessions]
    return {
        "users": len(sessions),
        "relevance": relevance,
        "relevance_se": math.sqrt(relevance * (1 - relevance) / max(len(sessions), 1)),
        "words": _mean([relevance_share([r for _, r in label.words]) for label in labels]),
        "exact_match": _mean([match for match, _ in matches]),
        "exact_match_new": _mean([match for match, seen in matches if not seen]),
        "chrf": CHRF().corpus_score(list(texts), [references]).score,
        "distinct_2": distinct_n([query for answer in queries for query in answer], 2),
        "queries_per_answer": _mean([len(answer) for answer in queries]),
        "distinct_queries": _mean([len(set(map(fold, answer))) for answer in queries]),
        "format": _mean(
            [
                has_format(text, len(session.targets), reason)
                for session, text, reason in zip(sessions, texts, finish, strict=True)
            ]
        ),
    }


def repeat_last_query(session: Session) -> str:
    """The newest search of the history, or its newest event where nothing was searched."""
    searches = [event.text for event in session.history if event.type == SEARCH]
    events = searches or [event.text for event in session.history]
    return events[-1] if events else ""


def distinct_n(queries: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams; 0 without any."""
    grams = [
        tuple(words[i : i + n])
        for words in (query.casefold().split() for query in queries)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def print_table(rows: dict[str, dict[str, Any]], title: str) -> None:
    """The closing table, one row a way to answer; it fits 80 columns."""
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("answers by", no_wrap=True)
    for header in COLUMNS.values():
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(_cell(row, key) for key in COLUMNS))
    Console().print(table)


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if key == "relevance":
        return f"{value:.3f}±{row['relevance_se']:.3f}"
    digits = 1 if key in ("chrf", "length", "kl") else 2 if "queries" in key else 3
    return f"{value:.{digits}f}"


def _in_history(session: Session, query: str) -> bool:
    return fold(query) in {fold(event.text) for event in session.history}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
