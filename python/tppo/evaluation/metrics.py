"""Figures of a policy's answers: a judge's, and those against the true next queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from sacrebleu.metrics import CHRF
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.evaluation.intent import intent_figures
from tppo.evaluation.judge import Judge, averaged, each_figure
from tppo.evaluation.overlap import bleu, rouge_l, self_bleu
from tppo.evaluation.ranking import rank_figures
from tppo.labels.queries import answer_text, parse_answer, query_text
from tppo.labels.words import fold
from tppo.methods.config import MAX_TOKENS
from tppo.models.batch import Batch
from tppo.models.config import Sampler
from tppo.models.folder import model_eos_ids
from tppo.models.keeper import NOTHING_KEPT, Keeper
from tppo.models.part_size import PartSize
from tppo.models.policy import policy_logprobs
from tppo.models.rollout import Sampling, build
from tppo.rewards import Answers, Questions
from tppo.sessions.session import Session

SEARCH = "search"  # type of the events whose text is a query


class Evaluated(NamedTuple):
    """What `evaluate_policy` finds."""

    figures: dict[str, Any]
    """Means over the answers, as `judge_answers` gives them, with `kl` and `length`."""
    answers: Answers
    each: dict[str, list[float]]
    """The judge's figures of each answer."""


def evaluate_policy(
    model: PreTrainedModel,
    ref: PreTrainedModel,
    questions: Questions,
    judge: Judge,
    sampling: Sampling,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    keeper: Keeper = NOTHING_KEPT,
) -> Evaluated:
    """Sample one answer a question and judge them.

    sampler: who samples them, and how many of them are read at once.
    keeper: has the answers that an earlier process sampled.

    The figures are those of `judge_answers`, with `kl` against `ref` at temperature 1 in nats a
    response and the mean `length` in tokens.
    """
    pad_id, eos_ids = tokenizer.pad_token_id, model_eos_ids(tokenizer, model)
    engine = build(model, sampler, pad_id=pad_id, eos_id=eos_ids)
    rollout = engine.generate(questions.ids, sampling, keeper=keeper)
    answers = Answers(
        questions.prompts, rollout.response_ids, questions.columns, tokenizer, eos_ids,
        range(len(questions)),
    )  # fmt: skip
    each, size = each_figure(judge, answers), sampler.batch_size
    figures = averaged(each, len(questions))
    batches = (
        Batch(
            rollout.prompt_ids[i : i + size],
            rollout.response_ids[i : i + size],
            pad_id,
            model.device,
            sampler.prefix,
        )
        for i in range(0, len(questions), size)
    )
    apart = model is not ref or sampling.temperature != 1.0  # else it is 0, and need not be read
    kl = _kl(model, ref, batches, sampling.temperature) / len(questions) if apart else 0.0
    length = _mean([len(ids) for ids in rollout.response_ids])
    return Evaluated(figures | {"kl": kl, "length": length}, answers, each)


@torch.no_grad()
def _kl(
    model: PreTrainedModel, ref: PreTrainedModel, batches: Iterable[Batch], temperature: float
) -> float:
    """Sum over responses of sum_t log pi_T(y_t) - log ref(y_t), in nats."""

    def apart(part: Batch) -> Tensor:
        logprobs, _ = policy_logprobs(model, part, temperature)  # [B, T]
        ref_logprobs, _ = policy_logprobs(ref, part, 1.0)  # [B, T]
        return logprobs - ref_logprobs

    size = PartSize(MAX_TOKENS, "")
    return sum(size.read(batch, apart).sum().item() for batch in batches)


def text_figures(sessions: Sequence[Session], texts: Sequence[str]) -> dict[str, float]:
    """Figures of one answer a session that need no judge.

    exact_match         share of true next queries that were returned exactly, both folded
    exact_match_new     the same over true queries that do not stand in the history
    mrr, ndcg, recall_at_k  the answer as a ranked list: `rank_figures`
    chrf, bleu, rouge_l  of the whole answer against the true queries, 0 to 100
    self_bleu           of all answers, each against all others, 0 to 100: less is more varied
    distinct_2          distinct bigrams over bigrams, within queries, over all answers
    intent, intent_*    what is recovered of the latent intent, where every session has one:
                        `intent_figures`
    """
    queries = [parse_answer(text) for text in texts]
    matches = [
        (query_text(target) in set(map(query_text, answer)), _in_history(session, target))
        for session, answer in zip(sessions, queries, strict=True)
        for target in session.targets
    ]
    targets = [session.targets for session in sessions]
    references = [answer_text(true) for true in targets]
    known = bool(sessions) and all(session.intent for session in sessions)
    each = rank_figures(targets, texts) | (intent_figures(sessions, texts) if known else {})
    return {
        "exact_match": _mean([match for match, _ in matches]),
        "exact_match_new": _mean([match for match, seen in matches if not seen]),
        "chrf": CHRF().corpus_score(list(texts), [references]).score,
        "bleu": bleu(texts, references),
        "rouge_l": _mean([rouge_l(*pair) for pair in zip(texts, references, strict=True)]),
        "self_bleu": self_bleu(texts),
        "distinct_2": distinct_n([query for answer in queries for query in answer], 2),
        **{name: _mean(values) for name, values in each.items()},
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
