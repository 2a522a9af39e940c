"""The reward model in trainers that do not know tppo: the same rewards from the folder alone."""

import json

import pytest
import torch
from _families import tiny

from tppo.models.batch import Batch
from tppo.models.folder import save_weights
from tppo.models.load import load_reward_model
from tppo.models.policy import RewardModel
from tppo.rewards import Answers
from tppo.rewards.token_model import TokenModelReward
from tppo_kernels.integrations._reward_model import TokenRewardModel, deal, gather

CPU = torch.device("cpu")
PROMPTS = [[1, 5, 7], [1, 8, 9, 4, 6, 5], [1, 3], [1, 8, 9, 4, 6, 5]]
RESPONSES = [[5, 9, 2], [8], [7, 7, 4, 11, 2], [3, 2]]
LENGTHS = [1.0, 5.0, 3.5, 0.0]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def folder(request, tmp_path_factory):
    """An exported reward model, of a family that transformers has a classifier for and of another;
    its head is large, so that no two tokens are paid alike."""
    path = tmp_path_factory.mktemp(request.param)
    tiny(request.param).save_pretrained(path / "sft")
    model = load_reward_model(path / "sft", CPU)
    torch.nn.init.normal_(model.score.weight, std=3.0)
    model.config.own_tokens = False
    save_weights(model, path / "rm")
    return path / "rm"


@pytest.mark.parametrize("mode", ["argmax", "expected"])
@pytest.mark.parametrize("max_tokens", [65_536, 8])
def test_rewards_are_those_of_the_trainer(folder, mode, max_tokens):
    own = TokenModelReward(RewardModel(load_reward_model(folder, CPU)), mode=mode,
                           values=(0.1, -0.7, 0.4))
    answers = Answers(prompts=[""] * 4, response_ids=RESPONSES, tokenizer=None, eos_ids=[2],
                      groups=range(4), columns={"suggested_length": LENGTHS})
    expected = own(Batch(PROMPTS, RESPONSES, 0), answers).rewards
    found = TokenRewardModel(folder, mode=mode, values=(0.1, -0.7, 0.4), device="cpu",
                             max_tokens=max_tokens).rewards(PROMPTS, RESPONSES, None, LENGTHS)
    assert [len(row) for row in found] == [len(row) for row in RESPONSES]
    for row, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(row), wanted[:len(row)], rtol=1e-5, atol=1e-6)
    assert len({round(x, 4) for row in found for x in row}) > 3  # the penalty alone makes some


def test_tokens_of_a_tool_are_paid_nothing_and_do_not_count_for_the_length(folder):
    model = TokenRewardModel(folder, mode="expected", values=(1.0, 2.0, 4.0), device="cpu")
    whole = model.rewards(PROMPTS[:1], [[5, 9, 8, 7]], None, None)[0]
    masked = model.rewards(PROMPTS[:1], [[5, 9, 8, 7]], [[1, 0, 0, 1]], None)[0]
    assert masked == pytest.approx([whole[0], 0.0, 0.0, whole[3]], abs=1e-6)
    late = model.rewards(PROMPTS[:1], [[5, 9, 8, 7]], [[1, 0, 0, 1]], [0.0])[0]
    shares = torch.sigmoid(6.0 - 2.0 * torch.tensor([1.0, 2.0]))  # the second token is at 2, not 4
    assert [late[0], late[3]] == pytest.approx([whole[0] * float(shares[0]),
                                                whole[3] * float(shares[1])], rel=1e-5)


def test_an_empty_response_has_no_rewards(folder):
    model = TokenRewardModel(folder, device="cpu")
    assert [len(row) for row in model.rewards([[1], [1, 2]], [[], [3]])] == [0, 1]
    assert model.rewards([], []) == []


def test_bad_input_is_named(folder):
    model = TokenRewardModel(folder, device="cpu")
    size = model.vocabulary
    for given, words in (
            (([[1]], [[2], [3]]), "prompts has 1 rows, expected 2"),
            (([[1]], [[2]], [[1], [1]]), "masks has 2 rows, expected 1"),
            (([[1]], [[2]], [[1, 1]]), r"masks\[0\] has 2 tokens, expected 1"),
            (([[1]], [[2]], None, [1.0, 2.0]), "suggested_lengths has 2 rows"),
            (([[1]], [[size]]), f"row 0 has token {size}, expected ids below {size}")):
        with pytest.raises(ValueError, match=words):
            model.rewards(*given)
    with torch.no_grad():
        next(iter(model.model.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="the reward of response 0 is .*nan"):
        model.rewards([[1]], [[2]])


@pytest.mark.parametrize(("change", "words"), [
    ({"own_tokens": True}, "reads text with a tokenizer of its own"),
    ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, "has 2 classes, expected"),
])
def test_a_folder_of_another_kind_is_refused(folder, change, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(
        {**json.loads((folder / "config.json").read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        TokenRewardModel(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, expected the folder of a reward mod"):
        TokenRewardModel(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, expected a whole reward model"):
        TokenRewardModel(tmp_path)


@pytest.mark.parametrize("hands", [1, 2, 3, 7])
def test_rows_that_are_dealt_come_back_in_their_order(hands):
    numbers = list(range(5))
    shares = deal([numbers, None], hands)
    assert all(share[1] is None for share in shares) and len(shares) == hands
    assert gather([share[0] for share in shares]) == numbers
