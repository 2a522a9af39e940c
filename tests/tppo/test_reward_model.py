"""The token reward model: it learns, its figures are right, its guards fire."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.methods.auc import (
    DRAWS,
    Rated,
    area_under_curve,
    auc_interval,
    check_auc,
    drawn_aucs,
)
from tppo.methods.config import RewardModelConfig
from tppo.methods.reward_model import (
    GuardError,
    LabelledAnswer,
    PolicyTokens,
    check_trunk_gradients,
    enough_passes,
    evaluate_reward_model,
    figures_of,
    rate_tokens,
    train_reward_model,
)
from tppo.models.load import load_reward_model

CONFIG = RewardModelConfig(epochs=3, batch_size=16, lr=3e-3)


@pytest.fixture
def sft_folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def answers(n, seed):
    """A token is relevant if its id is even; ids below 4 are of no word.

    Only the state *at* a token can know it: the state before it leaves the AUC at a half.
    """
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        prompt = torch.randint(4, 12, (3,), generator=rng).tolist()
        length = int(torch.randint(3, 9, (), generator=rng))
        response = torch.randint(2, 12, (length,), generator=rng).tolist()
        labels = [0 if i < 4 else 2 if i % 2 == 0 else 1 for i in response]
        rows.append(LabelledAnswer(prompt, response, labels, 1 + (labels.count(2) > 1)))
    return rows


def test_it_starts_from_the_sft_trunk_and_learns(sft_folder):
    model = load_reward_model(sft_folder, torch.device("cpu"))
    trunk = LlamaForCausalLM.from_pretrained(sft_folder).model.state_dict()
    assert all(torch.equal(trunk[k], v) for k, v in model.base_model.state_dict().items())
    reader = PolicyTokens(model, pad_id=0)
    before = evaluate_reward_model(reader, answers(64, 1), CONFIG)
    history = train_reward_model(reader, answers(800, 0), CONFIG, seed=0)
    after = evaluate_reward_model(reader, answers(64, 1), CONFIG)
    assert history[-1]["loss"] < history[0]["loss"]
    assert after["auc"] > 0.95 and before["auc"] < 0.8 and after["accuracy"] > before["accuracy"]
    assert evaluate_reward_model(reader, [], CONFIG)["auc"] is None  # no answer could be repeated


def test_two_runs_are_bitwise_equal(sft_folder):
    def run():
        torch.manual_seed(0)
        model = load_reward_model(sft_folder, torch.device("cpu"))
        history = train_reward_model(PolicyTokens(model, 0), answers(64, 0), CONFIG, seed=0)
        return history, model.state_dict()

    (history, one), (again, two) = run(), run()
    assert history == again and all(torch.equal(one[name], two[name]) for name in one)


def test_a_frozen_trunk_stops_training(sft_folder):
    model = load_reward_model(sft_folder, torch.device("cpu"))
    model.base_model.requires_grad_(False)
    with pytest.raises(GuardError, match="frozen"):
        train_reward_model(PolicyTokens(model, 0), answers(32, 0), CONFIG, seed=0)


def test_a_trunk_whose_gradients_are_zero_stops_training(sft_folder):
    model = load_reward_model(sft_folder, torch.device("cpu"))
    for parameter in model.base_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(GuardError, match="zero"):
        check_trunk_gradients(model)


def test_auc_equals_the_share_of_ordered_pairs():
    score = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2, 0.4])
    positive = torch.tensor([False, True, False, True, False, True])
    pairs = [
        float(p > n) + 0.5 * float(p == n) for p in score[positive] for n in score[~positive]
    ]
    assert area_under_curve(score, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_curve(score, torch.ones(6, dtype=torch.bool)) is None


def test_a_low_auc_stops_before_ppo():
    config = RewardModelConfig()
    check_auc({"auc": 0.81, "sessions": 5000}, config)
    with pytest.raises(GuardError, match=r"AUC is 0.640, expected at least 0.8"):
        check_auc({"auc": 0.64, "sessions": 5000}, config)
    with pytest.raises(GuardError, match="all alike"):
        check_auc({"auc": None, "sessions": 5000}, config)


def test_a_small_file_only_warns_and_says_why(capsys):
    check_auc({"auc": 0.64, "sessions": 31}, RewardModelConfig())
    out = capsys.readouterr().err
    assert "WARNING" in out and "Only 31 sessions" in out and "too few of them are held out" in out


def test_with_few_labels_the_interval_of_the_auc_decides(capsys):
    config = RewardModelConfig()
    low = {"auc": 0.64, "auc_interval": (0.52, 0.79), "sessions": 50}
    with pytest.raises(GuardError, match=r"0.640 \(95 % 0.520 to 0.790\), expected at least 0.8"):
        check_auc(low, config)
    check_auc(low | {"auc": 0.9, "auc_interval": (0.79, 1.0)}, config)
    assert capsys.readouterr().err == ""
    check_auc(low | {"auc": 0.77, "auc_interval": (0.6, 0.91)}, config)
    assert "0.770 (95 % 0.600 to 0.910)" in " ".join(capsys.readouterr().err.split())
    check_auc(low | {"auc": None, "auc_interval": None}, config)
    assert "all alike" in capsys.readouterr().err
    with pytest.raises(GuardError, match=r"AUC is 0.770, expected"):  # of many the AUC decides
        check_auc(low | {"auc": 0.77, "auc_interval": (0.7, 0.85), "sessions": 1_000}, config)


def scored(answers, separation, seed):
    """Scores of 9 tokens an answer, of which some answers have higher ones than others."""
    draw = torch.Generator().manual_seed(seed)
    relevant = torch.rand(answers, 9, generator=draw) < torch.rand(answers, 1, generator=draw)
    score = torch.randn(answers, 9, generator=draw) + 0.6 * torch.randn(
        answers, 1, generator=draw
    ) + separation * relevant
    whose = torch.arange(answers)[:, None].expand(answers, 9)
    return Rated(score.flatten(), relevant.flatten(), whose.flatten())


def test_noise_of_ten_held_out_answers_stops_and_good_labels_pass():
    config = RewardModelConfig()

    def stops(separation, seed):
        rated = scored(10, separation, seed)
        auc = area_under_curve(rated.score, rated.relevant)
        report = {"auc": auc, "auc_interval": auc_interval(rated, range(10)), "sessions": 50}
        try:
            check_auc(report, config)
        except GuardError:
            return True
        return False

    assert sum(stops(0.0, seed) for seed in range(20)) >= 19
    assert sum(stops(1.8, seed) for seed in range(20)) == 0  # an AUC of about .87


@pytest.mark.parametrize(("noise", "outcome"), [(0.5, "stops"), (0.0, "passes"), (0.25, "warns")])
def test_fifty_labels_of_which_some_are_wrong(sft_folder, noise, outcome, capsys):
    """Labels that are noise are stopped, good ones pass in silence, and between them a warning."""
    rng, held, given = random.Random(1), 10, answers(50, 2)
    wrong = [
        row._replace(categories=[
            3 - c if c and rng.random() < noise else c for c in row.categories
        ]) for row in given
    ]  # fmt: skip
    reader = PolicyTokens(load_reward_model(sft_folder, torch.device("cpu")), pad_id=0)
    train_reward_model(reader, wrong[held:], enough_passes(CONFIG, 40, updates=60), seed=0)
    rated, confusion = rate_tokens(reader, wrong[:held], CONFIG)
    report = figures_of(rated, confusion) | {"sessions": 50}
    report["auc_interval"] = low, high = auc_interval(rated, range(held))
    assert low < report["auc"] < high or report["auc"] == high == 1
    capsys.readouterr()
    if outcome == "stops":
        with pytest.raises(GuardError, match=r"\(95 % .* to .*\), expected at least 0.8"):
            check_auc(report, RewardModelConfig())
        return
    check_auc(report, RewardModelConfig())
    told = capsys.readouterr().err
    assert ("its interval reaches above that" in told) == (outcome == "warns")


def test_draws_are_of_whole_answers_and_the_same_for_every_model():
    rated = scored(12, 1.0, 3)
    groups = [f"s{i // 2}" for i in range(12)]
    better = rated._replace(score=rated.score + 2.0 * rated.relevant)
    one, two = drawn_aucs([rated, better], groups)
    assert (two > one).all() and len(one) == DRAWS
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(6, (DRAWS, 6), generator=draw)
    for k in (0, 7):  # as if the answers of a draw were read one by one
        parts = [rated.of([2 * i, 2 * i + 1]) for i in picks[k].tolist()]
        score, relevant = (torch.cat([part[at] for part in parts]) for at in (0, 1))
        assert one[k].item() == pytest.approx(area_under_curve(score, relevant))
    low, high = auc_interval(rated, groups)
    assert low < area_under_curve(rated.score, rated.relevant) < high
    by_answer = auc_interval(rated, range(12))
    assert by_answer != (low, high)
    assert auc_interval(scored(4, 1.0, 0), range(4)) is None
    alike = rated._replace(relevant=torch.ones_like(rated.relevant))
    assert auc_interval(alike, groups) is None
