"""Judges apart from the labeller: the latent intent, the true next query, overlap of words."""

import json
import math
from dataclasses import replace

import pytest
from judged import answers_of, score_answers
from sacrebleu.metrics import BLEU

from tppo.errors import DataError
from tppo.evaluation.intent import IntentJudge, intent_figures
from tppo.evaluation.judge import RuleJudge, judge_answers
from tppo.evaluation.overlap import bleu, rouge_l, self_bleu
from tppo.evaluation.ranking import NextQueryJudge, rank_figures
from tppo.labels.rule import label_by_rule
from tppo.sessions.config import SessionsConfig
from tppo.sessions.prompts import prompt_text
from tppo.sessions.session import Session, read_sessions, write_sessions
from tppo.sessions.synthetic import NEEDS, PARTS, POPULAR, generate_sessions

SESSION = Session(
    "s", "u", "made", (), (), ("tent gravio cheap quiet",),
    (("topic", "tent"), ("brand", "gravio"), ("need", "quiet")),
)  # fmt: skip


def intent_of(text, session=SESSION):
    return {name: value for name, (value,) in intent_figures([session], [text]).items()}


@pytest.mark.parametrize(
    ("text", "best", "parts", "queries"),
    [  # (topic, brand, need)
        ("cheap Tent GRAVIO quiet", 1.0, (1, 1, 1), 1.0),
        ("tent gravio\nquiet lamp", 2 / 3, (1, 1, 1), (2 / 3 + 1 / 3) / 2),
        ("tent altara quiet\ntoday weather", 2 / 3, (1, 0, 1), (2 / 3) / 2),
        ("tent lamp gravio altara quiet compact", 0.0, (0, 0, 0), 0.0),  # lists of words name none
        ("tent gravio quiet\nquiet gravio tent", 1.0, (1, 1, 1), 0.5),  # the second is a repeat
        ("tents gravios", 0.0, (0, 0, 0), 0.0),
        ("", 0.0, (0, 0, 0), 0.0),
    ],
)
def test_what_an_answer_recovers_of_the_latent_intent(text, best, parts, queries):
    found = intent_of(text)
    assert found["intent"] == pytest.approx(best)
    assert tuple(found[f"intent_{part}"] for part in PARTS) == parts
    assert found["intent_queries"] == pytest.approx(queries)


def test_the_intent_judge_needs_generated_sessions():
    judge = IntentJudge()
    found = judge(answers_of([SESSION], ["tent gravio quiet"], ["eos"]))
    assert list(found)[0] == "intent" and found["format"] == [True]
    with pytest.raises(DataError, match="session 's' has the latent intent {}, expected one with "
                       "topic, brand, need: only generated"):  # fmt: skip
        judge(answers_of([replace(SESSION, intent=())], ["tent"], ["eos"]))


@pytest.fixture(scope="module")
def generated():
    config = SessionsConfig(train_users=60, heldout_users=5, test_users=40, transfer_users=5)
    return generate_sessions(config, 3)


def test_generated_sessions_carry_their_intent_through_a_file(generated, tmp_path):
    path = tmp_path / "s.jsonl"
    write_sessions(path, generated.train)
    assert read_sessions(path) == generated.train
    row = json.loads(path.read_text().splitlines()[0])
    assert row["latent_intent"] == dict(generated.train[0].intent)
    assert row["latent_intent"].keys() == PARTS.keys()
    words = {word for query in POPULAR for word in query.split()}
    assert not any(words & part for part in PARTS.values())
    # The intent says what the targets say: a true answer recovers it, another user's seldom does.
    texts = ["\n".join(session.targets) for session in generated.test]
    own = intent_figures(generated.test, texts)["intent"]
    others = intent_figures(generated.test, texts[1:] + texts[:1])["intent"]
    assert sum(own) / len(own) > 0.9 and sum(others) / len(others) < 0.5


@pytest.mark.parametrize("given", ["tent", ["tent"], {"topic": 1}, {"topic": " "}])
def test_an_intent_that_is_none_is_named_with_its_line(given, tmp_path):
    row = {"id": "a", "user": "u", "source": "x", "history": [], "targets": ["q"]}
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(row | {"latent_intent": given}))
    with pytest.raises(DataError, match="line 1.*'latent_intent'.*expected an object of texts"):
        read_sessions(path)


def test_neither_the_rule_nor_the_prompt_knows_the_intent(generated):
    """Poisoned intents change nothing of what labels, what is read, and what the rule judges."""
    text = "tent gravio quiet\ntoday weather radar map"
    for session in generated.test[:10]:
        word = next(need for need in NEEDS if need != dict(session.intent)["need"])
        other = replace(session, intent=(("topic", "tent"), ("brand", "gravio"), ("need", word)))
        assert other != session and prompt_text(other) == prompt_text(session)
        labels = [label_by_rule("x", text, s.targets, 0.6) for s in (session, other)]
        assert labels[0] == labels[1]
        judged = [RuleJudge(0.6)(answers_of([s], [text], ["eos"])) for s in (session, other)]
        assert judged[0] == judged[1]
        assert intent_of(text, session) != intent_of(text, other)


def rank(targets, text):
    return {name: value for name, (value,) in rank_figures([targets], [text]).items()}


def test_ranks_of_true_next_queries_by_hand():
    found = rank(["red shoes", "blue hat", "cap"], "coffee\nSHOES red\nred shoes\nblue hat")
    assert found["mrr"] == 0.5  # the words in another order count, a repetition does not
    assert (found["recall_at_1"], found["recall_at_3"], found["recall_at_10"]) == pytest.approx(
        (0, 1 / 3, 2 / 3)
    )
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert found["ndcg"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal)


@pytest.mark.parametrize(
    ("targets", "text", "mrr", "ndcg", "all_of_them"),
    [
        (["a b"], "a b", 1, 1, 1),
        (["a b", "b a"], "a b", 1, 1, 1),  # two true queries that are one
        (["a b"], "a\nb", 0, 0, 0),
        (["a"], "", 0, 0, 0),
        (["?!"], "?!", 0, 0, 0),  # nothing that could be compared
        (["東京ホテル"], "東京 ホテル", 1, 1, 1),
    ],
)
def test_ranks_at_the_edges(targets, text, mrr, ndcg, all_of_them):
    found = rank(targets, text)
    assert (found["mrr"], found["ndcg"], found["recall_at_10"]) == (mrr, ndcg, all_of_them)


def test_the_next_query_judge_compares_by_the_reciprocal_rank():
    sessions = [SESSION, replace(SESSION, targets=("a", "b"))]
    found = judge_answers(NextQueryJudge(), answers_of(sessions, ["x", "a\nb"], ["eos", "eos"]))
    assert found["mrr"] == 0.5 and "mrr_interval" in found and found["format"] == 1.0
    assert found["ndcg"] == 0.5


def test_rouge_l_by_hand():
    # Lin (2004), section 3.1: "police killed the gunman" against two candidates, with beta 1
    assert rouge_l("police kill the gunman", "police killed the gunman") == 75.0
    assert rouge_l("the gunman kill police", "police killed the gunman") == 50.0
    assert rouge_l("A b", "a B c d") == pytest.approx(100 * 2 * 2 / 6)
    assert rouge_l("a\nb", "a b") == 100.0 and rouge_l("", "a") == rouge_l("?", "?") == 0.0


def test_bleu_by_hand():
    # Papineni et al. (2002): of "the" seven times two count; higher orders have no match
    assert bleu(["the the the the the the the"], ["the cat is on the mat"]) == 0.0
    # 1-grams 5/6, 2-grams 3/5, 3-grams 1/4 and no 4-gram of 3 alone; here 4-grams 1/3 too
    found = bleu(["a b c d x f"], ["a b c d e f"])
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert bleu(["A, b\nc d"], ["a b c d e"]) == pytest.approx(100 * math.exp(1 - 5 / 4))


TEXTS = ["a b c d e", "a b c d", "x a b c d e f", "x x y z a b c", "p q", ""]


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_self_bleu_is_sacrebleus_against_all_other_answers(n):
    texts = TEXTS[:n]
    metric = BLEU(tokenize="none", force=True, smooth_method="none")
    others = [[text for j, text in enumerate(texts) if j != i] for i in range(n)]
    truth = metric.corpus_score(texts, [list(stream) for stream in zip(*others, strict=True)])
    assert self_bleu(texts) == pytest.approx(truth.score)
    assert self_bleu(["a b c d"] * 3) == pytest.approx(100)
    assert self_bleu(["a b c d"]) == self_bleu([]) == 0.0


def test_the_closing_rows_hold_the_new_figures():
    figures = score_answers([SESSION] * 2, ["tent gravio cheap quiet", "x y"], ["eos", "eos"], 0.6)
    assert figures["mrr"] == figures["ndcg"] == figures["recall_at_1"] == 0.5
    assert figures["rouge_l"] == 50.0 and figures["bleu"] > 0 and figures["self_bleu"] == 0.0
    assert figures["intent"] == figures["intent_brand"] == 0.5
    without = score_answers([replace(SESSION, intent=())], ["tent"], ["eos"], 0.6)
    assert "intent" not in without and without["mrr"] == 0.0
