"""Which answers are labelled: those of which a reward model is unsure, or those of the policy."""

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from tppo.errors import DataError
from tppo.labels.choice import most_doubtful
from tppo.labels.rule import label_by_rule
from tppo.methods.config import RewardModelConfig
from tppo.methods.doubt import answer_doubts
from tppo.methods.reward_model import LabelledAnswer, PolicyTokens
from tppo.stages.artifacts import TEST_SESSIONS
from tppo.stages.study import rounds
from tppo.stages.study.arms import train_arm
from tppo.stages.study.config import PAPER, ROUND, Arm, Cell, Noise, Part, StudyConfig
from tppo.stages.study.figures import Curve, added, all_figures
from tppo.stages.study.material import Material
from tppo.stages.study.presets import POLICY, PRESETS, UNSURE
from tppo.stages.study.reward_models import chosen_first, make_reward_model, word_model_of
from tppo.stages.study.statistics import Interval
from tppo.stages.study.tables import tables


def test_the_most_doubtful_are_chosen_and_no_user_twice_before_each_once():
    doubts, users = [0.1, 0.9, 0.8, 0.7, 0.2, 0.6], ["a", "b", "b", "b", "c", "a"]
    assert most_doubtful(doubts, users, 3) == [1, 5, 4]
    assert most_doubtful(doubts, users, 5) == [1, 5, 4, 2, 0]
    assert most_doubtful(doubts, users, 6) == [1, 5, 4, 2, 0, 3]
    assert most_doubtful(doubts, range(6), 3) == [1, 2, 3] and most_doubtful([], [], 0) == []
    with pytest.raises(ValueError, match="n was 7, expected at most the 6 answers"):
        most_doubtful(doubts, users, 7)


def test_a_user_with_labels_comes_behind_those_with_fewer():
    doubts, users = [0.1, 0.9, 0.8, 0.7, 0.2, 0.6], ["a", "b", "b", "b", "c", "a"]
    assert most_doubtful(doubts, users, 3, {"b": 1, "z": 9}) == [5, 4, 1]
    assert most_doubtful(doubts, users, 1, {"a": 1, "b": 2, "c": 3}) == [5]
    assert most_doubtful(doubts, users, 1, {"a": 2, "b": 2, "c": 2}) == [1]


class Known:
    """A reader whose class logits are known: token t of a response is its id's row of a table."""

    prefix = "shared"
    table = torch.tensor([[9.0, 0.0, 0.0], [0.0, 2.0, 2.0], [5.0, -3.0, 1.0], [0.0, 40.0, -40.0]])

    def __call__(self, prompts, responses):
        width = max(map(len, responses))
        mask = torch.tensor([[t < len(ids) for t in range(width)] for ids in responses])
        ids = torch.tensor([[*ids, *[1] * (width - len(ids))] for ids in responses])
        return self.table[ids], mask


def test_doubt_is_the_mean_entropy_of_relevant_or_not_over_an_answer_s_own_tokens():
    def entropy(p):
        return -sum(q * math.log(q) for q in (p, 1 - p) if q)

    answers = [LabelledAnswer([1], ids, (), 0) for ids in ([0], [1, 2, 3], [3, 3], [2])]
    found = answer_doubts(Known(), answers, RewardModelConfig(batch_size=3))
    p = math.e**1 / (math.e**1 + math.e**-3)
    expected = [math.log(2), (math.log(2) + entropy(p)) / 3, 0.0, entropy(p)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    study = replace(PRESETS["seconds"](), reward_updates=6)
    made = Material(tmp_path_factory.mktemp("study"), study, 3, 0)
    made.make()
    return made


CLEAN = Noise()


def cell_of(arm, answers=45, noise=CLEAN):
    return Cell(arm, answers, noise, steps=3, step_answers=8)


@pytest.mark.parametrize("noise", (PAPER,))
def test_after_a_first_round_those_are_labelled_that_its_model_is_least_sure_of(material, noise):
    pool = material.pool
    chosen = chosen_first(material, cell_of(UNSURE, noise=noise))
    assert chosen[:ROUND] == pool[:ROUND] and len({a.id for a, _ in chosen}) == len(chosen) == 45
    model = word_model_of(material, pool[:ROUND], noise)
    run = material.run
    reader = PolicyTokens(model, run.tokenizer.pad_token_id)
    unread = [LabelledAnswer(a.prompt_ids, a.response_ids, (), 0) for a, _ in pool[ROUND:]]
    doubts = answer_doubts(reader, unread, run.config.reward_model)
    assert len(set(doubts)) > 15
    bound = sorted(doubts, reverse=True)[19]
    of = {a.id: doubt for (a, _), doubt in zip(pool[ROUND:], doubts, strict=True)}
    assert min(of[a.id] for a, _ in chosen[ROUND:]) == bound  # each answer is of another user
    assert chosen[ROUND:] != pool[ROUND:45]


def test_answers_of_the_policy_are_labelled_while_it_trains_and_pay_from_then_on(
    material, monkeypatch
):
    seen = []

    class Watched(rounds.Rounds):
        def before(self, step, trainer):
            super().before(step, trainer)
            weights = trainer.reward.reward.model.model.state_dict()  # behind the form's cost
            seen.append((step, list(self.pairs), {k: v.clone() for k, v in weights.items()}))

    monkeypatch.setattr("tppo.stages.study.arms.Rounds", Watched)
    cell = cell_of(POLICY)
    assert cell.later_rounds == {2: 45} and cell.labelled_first == ROUND
    make_reward_model(material, cell)
    found = train_arm(material, cell)
    (_, first, before), (_, later, after), (_, last, kept) = seen
    assert first == material.pool[:ROUND] == later[:ROUND] and last == later and len(later) == 45
    same_users = material.pool[ROUND:45]
    sessions = {session.id: session for session in material.sessions}
    for (old, _), (own, label) in zip(same_users, later[ROUND:], strict=True):
        assert own.session == old.session and own.prompt_ids == old.prompt_ids
        assert label == label_by_rule(own.id, own.text, sessions[own.session].targets, 0.6)
    texts = [{pair[0].text for pair in pairs} for pairs in (same_users, later[ROUND:])]
    assert len(texts[0] & texts[1]) < 3  # the SFT model's are others
    # It is paid by what was trained of all of them, and rated by it in the end.
    trained = word_model_of(material, later, cell.noise).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(after[name], trained[name]) for name in trained)
    assert all(torch.equal(after[name], kept[name]) for name in kept)
    assert len(found["scores"]) == material.study.fresh_answers and len(found["curve"]) == 2


def test_the_users_who_judge_change_nothing_of_what_is_trained(material, tmp_path):
    """Other test users, with other true queries: all that is kept of an arm is the same, but for
    what they themselves say.
    """
    cell = replace(cell_of(Arm(), 30), steps=1)
    make_reward_model(material, cell)
    out = tmp_path / material.run.out.name
    shutil.copytree(material.run.out, out)
    for start in out.glob("start-*"):
        start.unlink()
    other = copy.copy(material)
    other.run = replace(material.run, out=out)
    for name in ("seeded", "judges", "train", "labelled", "sessions"):
        vars(other).pop(name, None)
    test = out / TEST_SESSIONS.path
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    rows = [row | {"targets": ["red shoes"]} for row in rows[::-1]]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own, others = train_arm(material, cell), train_arm(other, cell)
    assert own["curve"] != others["curve"]
    for found in (own, others):
        del found["curve"], found["seconds"]
    assert own == others and own["sampled"] and own["scores"]


def test_a_model_of_random_answers_is_shared_and_chosen_ones_have_their_own():
    names = {arm: cell_of(arm).reward_model for arm in (Arm(), UNSURE, POLICY)}
    assert len(set(names.values())) == 3
    assert names[POLICY] == cell_of(Arm(), ROUND).reward_model


@pytest.mark.parametrize("wrong", (
    {"labels": "sentences", "paid": "end"}, {"labels": "pairs"}, {"layer": 2},
    {"algorithm": "ppo++"}, {"method": "best-of-n", "responses_per_prompt": 2},
))  # fmt: skip
def test_choosing_is_for_token_models_and_plain_ppo(wrong):
    with pytest.raises(DataError, match="chosen was 'unsure' in arm 'token', expected 'random'"):
        Arm(chosen="unsure", **wrong)
    with pytest.raises(DataError, match="steps was 3, expected at least the 4 rounds"):
        Part("choice", (POLICY,), (100,), steps=3)
    endpoint = replace(PRESETS["seconds"]().settings.label, labeller="endpoint")
    settings = replace(PRESETS["seconds"]().settings, label=endpoint)
    with pytest.raises(DataError, match="labeller was 'endpoint', expected rule with arm 'of the"):
        replace(PRESETS["seconds"](), settings=settings)


def test_what_chosen_answers_add_is_paired_and_as_many_at_random_is_told():
    draws = torch.tensor([[0.4, 0.5, 0.6], [0.3, 0.4, 0.5]]).double().numpy()
    first = Curve([25, 50, 100], [Interval(y, y, y) for y in (0.4, 0.5, 0.6)], draws)
    chosen = Curve([50, 100], [Interval(y, y, y) for y in (0.6, 0.7)], draws[:, 1:] + 0.1)
    fifty, hundred = added(chosen, first)
    assert fifty["more"] == pytest.approx((0.1, 0.1, 0.1))  # every draw is of both
    assert fifty["like"].value == pytest.approx(100) and hundred["like"].value == math.inf
    assert fifty["answers"] == 50 and fifty["smallest"] == 25


def test_choice_has_tables_of_its_own():
    from test_study import outcome

    parts = PRESETS["scarce"]().parts
    study = StudyConfig(tuple(replace(part, seeds=(3,)) for part in parts))
    shares = {"at random": 0.5, "unsure": 0.6, "of the policy": 0.4}
    found = [outcome(cell, shares[cell.arm.name], True) for cell in study.cells()]
    for one in found:
        if not one.cell.steps:
            one.found["curve"].clear()
    figures = all_figures(study, found) | {"label_cost": None}
    clean, more, *noisy, after, added_, last, _ = tables(figures)
    assert clean.title == "Which answers are labelled: 3 queries, clean labels, 1 seed"
    assert [row[0] for row in clean.rows] == ["25", "50", "100", "200", "400"]
    assert clean.rows[0][2] == "" and len(more.head) == 4 and "relevance" in after.note
    assert len(noisy) == 2 and all("8.8% of words" in table.title for table in (*noisy, last))
    assert [row[:2] for row in added_.rows] == [
        [arm, n] for arm in ("unsure", "of the policy") for n in ("50", "100")
    ]
    assert added_.rows[0][4].startswith(".10 (.0") and added_.rows[0][5].startswith("more (")
    assert added_.rows[3][4].startswith("-.10 (-") and added_.rows[3][5].startswith("<= 50 (50")
