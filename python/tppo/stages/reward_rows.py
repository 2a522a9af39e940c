"""The labelled answers as the reward model reads them: tokens, a class for each, one for the whole.

Twins are labelled answers with one query repeated; see `repeating_twin`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tppo.labels.label import iter_labels, read_labels
from tppo.labels.queries import parse_answer
from tppo.labels.twins import Twin, repeating_twin
from tppo.labels.words import map_labels, token_categories
from tppo.methods.reward_model import NOT_LABELLED, LabelledAnswer
from tppo.models.own_tokens import OwnTokens
from tppo.models.tokenizer import decode, token_offsets
from tppo.sessions.prompts import encode_answer
from tppo.stages.answers import Answer
from tppo.stages.artifacts import CATEGORIES, LABELS
from tppo.stages.run import Run
from tppo.store.jsonl import is_text, read_jsonl


def policy_rows(run: Run) -> dict[str, list[LabelledAnswer]]:
    """The labelled answers of every session in the policy's tokens."""
    answers = {answer.id: answer for answer in run.iter_answers()}
    labellers = {item.id: item.labeller for item in iter_labels(run.path(LABELS))}
    rows: dict[str, list[LabelledAnswer]] = {}
    for line in read_jsonl(run.path(CATEGORIES)):
        id = line.get("id", is_text, "a text")
        answer = answers[id]
        categories = line.get("categories", lambda v: isinstance(v, list), "a list")
        sentence = line.get("sentence", lambda v: v in (1, 2), "1 or 2")
        rows.setdefault(answer.session, []).append(
            LabelledAnswer(
                answer.prompt_ids, answer.response_ids, categories, sentence, labellers[id]
            )
        )
    return rows


def check_sessions(run: Run) -> set[str]:
    """The sessions with an answer that was drawn to be held out."""
    checks = {item.id for item in iter_labels(run.path(LABELS)) if item.check}
    return {answer.session for answer in run.iter_answers() if answer.id in checks}


def without_label(run: Run) -> list[LabelledAnswer]:
    """The answers that nobody has labelled: no class at any token, and none of the whole that
    would count.
    """
    known = {item.id for item in iter_labels(run.path(LABELS))}
    return [LabelledAnswer(a.prompt_ids, a.response_ids, [NOT_LABELLED] * len(a.response_ids), 1)
            for a in run.iter_answers() if a.id not in known]  # fmt: skip


def _twins(run: Run) -> Iterator[tuple[Answer, Twin, str]]:
    """Labelled answers with one query repeated, a share of them all, and who labelled them."""
    answers = {answer.id: answer for answer in run.iter_answers()}
    share, rng = run.config.reward_model.repeated_share, random.Random(f"{run.seed}/twins")
    for item in iter_labels(run.path(LABELS)):
        if rng.random() < share:
            twin = repeating_twin(item, run.config.label.sentence_threshold, rng)
            if twin is not None:
                yield answers[item.id], twin, item.labeller


def policy_twins(run: Run) -> dict[str, list[LabelledAnswer]]:
    """The twins of every session in the policy's tokens."""
    rows: dict[str, list[LabelledAnswer]] = {}
    longest = max(len(answer.response_ids) for answer in run.iter_answers())
    for answer, twin, labeller in _twins(run):
        ids = encode_answer(run.tokenizer, parse_answer(twin.text))[:longest]
        text, offsets = token_offsets(run.tokenizer, ids)
        if twin.text.startswith(text):  # else the tokenizer cannot spell what the policy can
            rows.setdefault(answer.session, []).append(
                LabelledAnswer(
                    answer.prompt_ids, ids, token_categories(twin.categories, offsets),
                    twin.sentence + 1, labeller,
                )
            )  # fmt: skip
    return rows


def own_rows(run: Run, reader: OwnTokens) -> dict[str, list[LabelledAnswer]]:
    """The same in the reward model's own tokens: word labels mapped onto those."""
    answers = {answer.id: answer for answer in run.iter_answers()}
    labels = read_labels(run.path(LABELS))
    readings = reader.read(
        [decode(run.tokenizer, answers[item.id].prompt_ids) for item in labels],
        [item.response for item in labels],
    )
    rows: dict[str, list[LabelledAnswer]] = {}
    for item, (prompt, response, offsets) in zip(labels, readings, strict=True):
        categories = map_labels(item.response, item.words, offsets)
        rows.setdefault(answers[item.id].session, []).append(
            LabelledAnswer(prompt, response, categories, item.sentence + 1, item.labeller)
        )
    return rows


def own_twins(run: Run, reader: OwnTokens) -> dict[str, list[LabelledAnswer]]:
    """The twins of every session in the reward model's own tokens."""
    twins = list(_twins(run))
    readings = reader.read(
        [decode(run.tokenizer, answer.prompt_ids) for answer, *_ in twins],
        [twin.text for _, twin, _ in twins],
    )
    rows: dict[str, list[LabelledAnswer]] = {}
    for (answer, twin, labeller), (prompt, response, offsets) in zip(twins, readings, strict=True):
        categories = token_categories(twin.categories, offsets)
        rows.setdefault(answer.session, []).append(
            LabelledAnswer(prompt, response, categories, twin.sentence + 1, labeller)
        )
    return rows
