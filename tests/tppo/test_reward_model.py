"""The token reward model: it learns, its figures are right, its guards fire."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.methods.config import RewardModelConfig
from tppo.methods.reward_model import (
    GuardError,
    LabelledAnswer,
    PolicyTokens,
    area_under_curve,
    check_auc,
    check_trunk_gradients,
    evaluate_reward_model,
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
    assert "WARNING" in out and "Only 31 sessions" in out
