"""ReMax: the greedy answer of a prompt is the baseline of those that are sampled."""

from dataclasses import replace

import pytest
import torch
from test_advantages import EOS, FOUR, GAMMA, KL, LENGTHS, NUMBERS, PAD, check, held, ragged, to_go
from test_advantages import trainer as new_ppo
from test_ppo import GROUPS, folder  # noqa: F401

from tppo.methods.advantages import ReMax
from tppo.methods.greedy import GreedyLast
from tppo.models.rollout import HFRollout, Sampling
from tppo.rewards import Questions

GREEDY = [i for i, n in enumerate(NUMBERS) if n not in NUMBERS[i + 1 :]]  # the last of each prompt
REMAX = replace(FOUR, advantage="remax")


def given(terminal=False):
    """Random input whose greedy rows have no token of the policy."""
    rows, pays, (rewards, none, masks, old, ref, numbers) = ragged(1, terminal)
    own = masks.action.clone()
    own[GREEDY] = False
    pays = [[i not in GREEDY] * n for i, n in enumerate(LENGTHS)]
    masks = masks._replace(policy=own, critic=own, kl=own)
    return rows, pays, (rewards, none, masks, old, ref, numbers)


@pytest.mark.parametrize("terminal", [False, True])
def test_it_is_its_formula(terminal):
    rows, pays, arguments = given(terminal)
    for kl_coef, gamma in ((0.0, 1.0), (KL, GAMMA)):
        returns = to_go(rows, pays, kl_coef, gamma)
        wanted = []
        for i, own in enumerate(returns):
            (greedy,) = (returns[j] for j in GREEDY if NUMBERS[j] == NUMBERS[i])
            wanted.append([0.0 if i in GREEDY else own[t] - held(greedy, t)
                           for t in range(len(own))])  # fmt: skip
        check(ReMax(kl_coef, gamma)(*arguments), wanted)


def test_a_prompt_needs_one_greedy_answer():
    _, _, (*first, masks, old, ref, numbers) = given()
    masks.kl[GREEDY[0]] = masks.action[GREEDY[0]]
    with pytest.raises(ValueError, match="expected one, the greedy one"):
        ReMax(0.0)(*first, masks, old, ref, numbers)


def greedy_by_hand(policy, prompt, cap):
    """The likeliest token each time, from whole forward passes."""
    ids: list[int] = []
    while len(ids) < cap and (not ids or ids[-1] != EOS):
        with torch.no_grad():
            ids.append(policy(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax().item())
    return ids


def test_the_last_answer_of_a_prompt_is_greedy_and_is_not_trained_on(folder):  # noqa: F811
    ppo = new_ppo(folder, REMAX)
    rollout = ppo.sample(GROUPS)
    own = rollout.author
    assert [any(row) for row in own] == [True, True, True, False] * 4
    for i in range(3, 16, 4):
        wanted = greedy_by_hand(ppo.models.policy, GROUPS[i], 8)
        assert rollout.response_ids[i] == wanted
        assert rollout.finish[i] == ("eos" if wanted[-1] == EOS else "length")
    assert any(rollout.response_ids[i] != rollout.response_ids[i - 1] for i in range(3, 16, 4))
    experience, metrics = ppo.score(rollout, ppo.answers(Questions(GROUPS), rollout))
    assert not experience.masks.policy[3::4].any() and experience.rewards[3::4].any()
    scores = experience.rewards.sum(1).unflatten(0, (4, 4))  # [prompts, 4]
    assert metrics["objective/scores"] == pytest.approx(scores[:, :3].mean().item(), abs=1e-6)
    first = experience.advantages[:, 0].unflatten(0, (4, 4))
    torch.testing.assert_close(first[:, :3], scores[:, :3] - scores[:, 3:], atol=1e-5, rtol=0)


def test_forced_beginnings_have_no_greedy_answer(folder):  # noqa: F811
    rollout = GreedyLast(HFRollout(new_ppo(folder, REMAX).models.policy, pad_id=PAD, eos_id=EOS), 4)
    with pytest.raises(ValueError, match="expected None with a greedy baseline"):
        rollout.generate(GROUPS, Sampling(8), [[5]] * 16)
