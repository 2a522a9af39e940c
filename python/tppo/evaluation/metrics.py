"""Figures of answers against the true next queries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sacrebleu.metrics import CHRF
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.labels.queries import answer_text, distinct_queries, has_format, parse_answer, query_text
from tppo.labels.rule import label_by_rule, relevance_share
from tppo.labels.shares import wilson
from tppo.labels.words import fold
from tppo.models.batch import Batch
from tppo.models.config import Prefix
from tppo.models.folder import model_eos_ids
from tppo.models.policy import policy_logprobs
from tppo.models.rollout import HFRollout, Sampling
from tppo.models.tokenizer import decode
from tppo.sessions.session import Session

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

    relevance           share of answers that the rule calls relevant, with its standard error and
                        Wilson's 95 % interval
    words               share of relevant words, mean over answers
    exact_match         share of true next queries that were returned exactly, both folded
    exact_match_new     the same over true queries that do not stand in the history
    chrf                of the whole answer against the true queries, 0 to 100
    distinct_2          distinct bigrams over bigrams, within queries, over all answers
    distinct_queries    queries of an answer that repeat no earlier one, mean over answers
    format              share of answers that end by themselves with the right number of distinct
                        queries

    A query that has the words of an earlier one of its answer, in any order, is a repetition: its
    words are irrelevant.
    """
    labels = [
        label_by_rule(session.id, text, session.targets, threshold)
        for session, text in zip(sessions, texts, strict=True)
    ]
    relevance = _mean([label.sentence for label in labels])
    queries = [parse_answer(text) for text in texts]
    matches = [
        (query_text(target) in set(map(query_text, answer)), _in_history(session, target))
        for session, answer in zip(sessions, queries, strict=True)
        for target in session.targets
    ]
    references = [answer_text(session.targets) for session in sessions]
    return {
        "users": len(sessions),
        "relevance": relevance,
        "relevance_se": math.sqrt(relevance * (1 - relevance) / max(len(sessions), 1)),
        "relevance_interval": list(wilson(relevance, len(sessions))),
        "words": _mean([relevance_share([r for _, r in label.words]) for label in labels]),
        "exact_match": _mean([match for match, _ in matches]),
        "exact_match_new": _mean([match for match, seen in matches if not seen]),
        "chrf": CHRF().corpus_score(list(texts), [references]).score,
        "distinct_2": distinct_n([query for answer in queries for query in answer], 2),
        "queries_per_answer": _mean([len(answer) for answer in queries]),
        "distinct_queries": _mean([distinct_queries(text) for text in texts]),
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
        for words in (fold(query).split() for query in queries)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def _in_history(session: Session, query: str) -> bool:
    return query_text(query) in {query_text(event.text) for event in session.history}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
