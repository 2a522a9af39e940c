"""Where a reward is paid does not matter to a critic that knows what has been earned so far.

Without discount "the total of the token rewards, paid at the last token" differs from the token
rewards by a potential (Ng, Harada, Russell 1999): what is earned before a token moves from the
rewards into the value there.  With

    R_t = 0 for t < T,  R_T = sum_t r_t,        V'_t = V_t + sum_{k<t} r_k

the temporal difference of every token is the same,

    R_t + V'_{t+1} - V'_t = r_t + V_{t+1} - V_t,

and so is every advantage, for any lambda.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo.methods.advantages import GAE, Masks
from tppo.models.batch import Batch
from tppo.rewards import TokenReward
from tppo.rewards.terminal import TerminalReward


def case(seed, lengths):
    """Random rewards, values, KL and values behind cut answers, in double precision."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [B, T]
    rewards, values, old, ref = (
        torch.where(mask, torch.randn(mask.shape, generator=g, dtype=torch.float64), 0.0)
        for _ in range(4)
    )
    after = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    cut = torch.rand(len(lengths), generator=g) < 0.5
    return mask, rewards, values, old, ref, torch.where(cut, after, 0.0)


def paid_before(rewards):
    """sum_{k<t} r_k, [B, T]."""
    return rewards.cumsum(1) - rewards


def advantages(gae, mask, rewards, values, old, ref, after):
    found = gae(rewards, values, Masks(*[mask] * 4), old, ref, range(len(mask)), after)
    return found.advantages, found.returns


CASES = (st.integers(0, 2**20), st.lists(st.integers(1, 12), min_size=1, max_size=6))


@settings(max_examples=60, deadline=None)
@given(*CASES, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_the_total_at_the_end_has_the_same_advantages(seed, lengths, lam, kl_coef, normalize):
    mask, rewards, values, old, ref, after = case(seed, lengths)
    placed = tk.place_rewards(mask, terminal=rewards.sum(1)).rewards
    assert placed.dtype == torch.float64
    moved = values + torch.where(mask, paid_before(rewards), 0.0)
    gae = GAE(kl_coef, lam=lam, normalize=normalize)
    dense, dense_returns = advantages(gae, mask, rewards, values, old, ref, after)
    at_end, returns = advantages(gae, mask, placed, moved, old, ref, after)
    torch.testing.assert_close(at_end, dense, atol=1e-6, rtol=0)
    # The critic's targets differ by the same potential.
    shift = torch.where(mask, paid_before(rewards), 0.0)
    torch.testing.assert_close(returns, dense_returns + shift, atol=1e-6, rtol=0)


def test_the_terminal_reward_of_ppo_in_single_precision():
    """The reward that PPO is given, over a batch, and by the plain recursion."""
    mask, rewards, values, old, ref, after = (
        x.float() if x.is_floating_point() else x for x in case(3, [5, 1, 9, 2])
    )
    batch = Batch([[1]] * 4, [[2] * n for n in mask.sum(1).tolist()], 0)
    paid = TerminalReward(lambda *_: TokenReward(rewards))(batch, None).rewards
    moved = values + torch.where(mask, paid_before(rewards), 0.0)
    for lam in (0.0, 0.5, 0.95, 1.0):
        gae = GAE(0.2, lam=lam, normalize=False)
        dense, _ = advantages(gae, mask, rewards, values, old, ref, after)
        at_end, _ = advantages(gae, mask, paid, moved, old, ref, after)
        torch.testing.assert_close(at_end, dense, atol=1e-5, rtol=0)
        for b, n in enumerate(mask.sum(1).tolist()):
            running, following = 0.0, after[b].item()
            for t in reversed(range(n)):
                reward = rewards[b, t].item() - 0.2 * (old[b, t] - ref[b, t]).item()
                running = reward + following - values[b, t].item() + lam * running
                following = values[b, t].item()
                assert dense[b, t].item() == pytest.approx(running, abs=1e-5)


@pytest.mark.parametrize("broken", ["values", "gamma", "place"])
def test_it_holds_for_no_other_values_discount_or_place(broken):
    mask, rewards, values, old, ref, after = case(7, [6, 4, 8])
    placed = tk.place_rewards(mask, terminal=rewards.sum(1)).rewards
    moved = values + torch.where(mask, paid_before(rewards), 0.0)
    gae = GAE(0.1, gamma=0.9 if broken == "gamma" else 1.0, lam=0.9, normalize=False)
    dense, _ = advantages(gae, mask, rewards, values, old, ref, after)
    if broken == "place":
        placed = placed.roll(-1, 1)
    changed = values if broken == "values" else moved
    other, _ = advantages(gae, mask, placed, changed, old, ref, after)
    assert (other - dense).abs().max() > 0.1
