"""The sentence reward model: one score an answer, from labels of whole answers or from pairs."""

import math
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_door import model  # noqa: F401  # a fixture
from test_shared_prefix import CPU, EOS, PAD, models

from tppo.methods.config import PPOConfig, RewardModelConfig
from tppo.methods.reward_model import LabelledAnswer
from tppo.methods.sentence_model import (
    Pair,
    SentenceReader,
    bernoulli_loss,
    evaluate_sentence_model,
    pair_loss,
    train_sentence_model,
)
from tppo.models.batch import Batch
from tppo.models.guards import GuardError
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward

CONFIG = RewardModelConfig(epochs=6, batch_size=16, lr=1e-2)
GOOD, BAD = 7, 8  # the token that decides whether an answer is relevant


def new_reader(pooling="last", **changes):
    """A sentence model over the trunk of a small policy with large weights."""
    torch.manual_seed(1)
    policy = models()[0].policy
    return SentenceReader(SentenceModel(policy.model, 16, pooling), PAD, **changes)


def answer(g, kind):
    """Six random tokens with the deciding one among them, and an end."""
    ids = torch.randint(9, 24, (int(torch.randint(2, 6, (1,), generator=g)),), generator=g).tolist()
    ids.insert(int(torch.randint(0, len(ids) + 1, (1,), generator=g)), kind)
    return [*ids, EOS]


def labelled(n, seed):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        ids = answer(g, GOOD if i % 2 else BAD)
        rows.append(LabelledAnswer([5, 6, i % 3 + 9], ids, [0] * len(ids), 1 + i % 2))
    return rows


def paired(n, seed):
    g = torch.Generator().manual_seed(seed)
    return [Pair([5, 6, i % 3 + 9], answer(g, GOOD), answer(g, BAD)) for i in range(n)]


def one_by_one(reader, row):
    """The score of an answer alone, from the trunk's states and the head, by the formula."""
    scorer = reader.model
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    with torch.no_grad():
        states = scorer.trunk(input_ids=ids).last_hidden_state[0].double()
        own = states[len(row.prompt_ids) :]  # [T, D]
        pooled = own[-1] if scorer.pooling == "last" else own.mean(0)
        weight, bias = scorer.head.weight[0].double(), scorer.head.bias[0].double()
        return (pooled @ weight + bias).item()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("prefix", ["shared", "dense"])
def test_scores_and_what_they_pay(pooling, prefix):
    reader = new_reader(pooling, prefix=prefix)
    rows = sorted(labelled(12, 0), key=lambda row: row.prompt_ids)
    scores = reader.scores(rows, size=5)
    slow = [one_by_one(reader, row) for row in rows]
    assert scores.tolist() == pytest.approx(slow, abs=1e-5) and scores.std() > 0.01
    batch = reader.batch(rows)
    for max_tokens in (65_536, 20):
        reward = SentenceModelReward(reader.model, scale=3.0, max_tokens=max_tokens)
        rewards = reward(batch, None).rewards
        for row, score, paid in zip(rows, slow, rewards.tolist(), strict=True):
            last = len(row.response_ids) - 1
            wanted = [0.0] * len(paid)
            wanted[last] = 3 * (1 / (1 + math.exp(-score)) - 0.5)
            assert paid == pytest.approx(wanted, abs=1e-5)
    by_score = SentenceModelReward(reader.model, mode="score", scale=2.0)(batch, None).rewards
    assert by_score.sum(1).tolist() == pytest.approx([2 * s for s in slow], abs=1e-5)


def test_a_score_that_is_not_finite_pays_nan():
    reader = new_reader()
    torch.nn.init.constant_(reader.model.head.bias, math.inf)
    paid = SentenceModelReward(reader.model)(Batch([[5]], [[9, EOS]], PAD, CPU), None).rewards
    assert paid[0, 0] == 0 and paid[0, 1].isnan()


def test_losses_are_the_formulas():
    rows, pairs = labelled(6, 3), torch.randn(8, dtype=torch.float64)
    scores = torch.randn(6, dtype=torch.float64)
    slow = 0.0
    for row, s in zip(rows, scores.tolist(), strict=True):
        p = 1 / (1 + math.exp(-s))
        slow -= math.log(p if row.sentence == 2 else 1 - p) / 6
    assert bernoulli_loss(rows)(scores).item() == pytest.approx(slow, abs=1e-12)
    gaps = [(pairs[i] - pairs[i + 1]).item() for i in range(0, 8, 2)]
    slow = sum(math.log(1 + math.exp(-gap)) for gap in gaps) / 4
    assert pair_loss(pairs).item() == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("make", [labelled, paired])
def test_gradients_of_a_batch_in_parts_are_those_of_the_whole(make):
    found = []
    for max_tokens in (65_536, 20):
        reader = new_reader("mean", max_tokens=max_tokens)
        rows = make(8, 5)
        batch = reader.batch(rows)
        assert (len(batch.parts(max_tokens)[0]) > 1) == (max_tokens == 20)
        loss = reader.backward(batch, pair_loss if make is paired else bernoulli_loss(rows))
        found.append((loss, [p.grad.clone() for p in reader.model.parameters()]))
    (whole, one), (in_parts, other) = found
    torch.testing.assert_close(in_parts, whole)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_whole_labels_teach_which_answers_are_relevant(pooling):
    reader = new_reader(pooling)
    rows = train_sentence_model(reader, labelled(320, 1), labelled(80, 2), CONFIG, seed=0)
    assert [row["epoch"] for row in rows] == list(range(len(rows)))
    held = [row["heldout_loss"] for row in rows]
    assert held[0] > 0.6 and min(held) < 0.3
    figures = evaluate_sentence_model(reader, labelled(80, 2))
    assert figures["loss"] == pytest.approx(min(held), abs=1e-6) and figures["auc"] > 0.97
    assert evaluate_sentence_model(reader, labelled(100, 9))["auc"] > 0.95
    again = new_reader(pooling)
    assert train_sentence_model(again, labelled(320, 1), labelled(80, 2), CONFIG, seed=0) == rows


def test_pairs_teach_which_answer_is_better():
    reader = new_reader("mean")
    assert 0.2 < evaluate_sentence_model(reader, paired(100, 9))["accuracy"] < 0.8
    rows = train_sentence_model(reader, paired(160, 1), [], CONFIG, seed=0)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] > rows[-1]["loss"]
    assert evaluate_sentence_model(reader, paired(100, 9))["accuracy"] > 0.95
    auc = evaluate_sentence_model(reader, labelled(100, 9))["auc"]
    assert auc > 0.95, "a score of one answer is of the same scale"


def test_a_spoilt_model_stops():
    reader = new_reader()
    with pytest.raises(ValueError, match="train was empty"):
        train_sentence_model(reader, [], [], CONFIG, seed=0)
    torch.nn.init.constant_(reader.model.head.weight, math.nan)
    with pytest.raises(GuardError, match="sentence model"):
        train_sentence_model(reader, labelled(16, 1), [], CONFIG, seed=0)


def test_the_page_about_baselines_runs_as_it_stands(model):  # noqa: F811
    page = (Path(__file__).parents[2] / "docs/ppo-knobs-and-baselines.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code.replace("path/of/sft/model", str(model)), names)
    assert {"loss", "heldout_loss"} <= names["history"][-1].keys()
    paid = names["reward"](Batch([[5, 6]], [[8, 9, 2]], 0, CPU), None).rewards[0]
    assert paid[:2].tolist() == [0, 0] and 0 < abs(paid[2]) < 1
    settings = {field.name for field in fields(PPOConfig)}
    table = page.split("## Rewards")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
             for name in re.findall("`([a-z_]+)`", row)]  # fmt: skip
    assert len(named) == 9 and settings >= {*named}
    modules = re.findall(r"`(tppo\.(?:methods|rewards)\.[a-z_]+)", page)
    assert len(modules) == 6 and all(map(import_module, modules))
