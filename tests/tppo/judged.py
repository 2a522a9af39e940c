"""Answers of a few sessions, written down by hand, as the closing table judges them."""

from __future__ import annotations

from tppo.evaluation.judge import SESSION, RuleJudge, judge_answers
from tppo.evaluation.metrics import text_figures
from tppo.rewards import Answers

END = 0


def answers_of(sessions, texts, finish, prompts=()):
    """Answers with these texts; of their tokens only the last one counts here."""
    ids = [[1, END] if reason == "eos" else [1] for reason in finish]
    columns = {SESSION: sessions}
    answers = Answers(prompts, ids, columns, None, [END], range(len(texts)))
    vars(answers)["texts"] = list(texts)
    return answers


def score_answers(sessions, texts, finish, threshold):
    """The figures of a row of the closing table that need no model, judged by the rule."""
    judge = RuleJudge(threshold)
    figures = judge_answers(judge, answers_of(sessions, texts, finish))
    return figures | text_figures(sessions, texts)
