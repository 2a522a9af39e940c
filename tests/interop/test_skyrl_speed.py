"""Nothing that the SkyRL adapter installs or registers is slower than SkyRL's own, on a CPU."""

import pytest
import torch
from _speed import compared, with_backward
from skyrl.backends.skyrl_train.utils import ppo_utils, torch_utils
from skyrl.train.config import AlgorithmConfig

from tppo_kernels.integrations import skyrl

SIZES = {"64 x 2048": (64, 2048, 256, 32000), "8 x 256": (8, 256, 64, 1000)}
LOSS, CRITIC = AlgorithmConfig(), AlgorithmConfig(value_clip=0.2)
NO_DUAL_CLIP = AlgorithmConfig(clip_ratio_c=None)
STOCK = {name: getattr(module, name) for module, names in (
    (ppo_utils, ("compute_gae_advantage_return", "masked_whiten", "ppo_policy_loss",
                 "ppo_critic_loss")), (torch_utils, ("logprobs_from_logits",))) for name in names}


def installed(b, t, rows, v):
    """Of each function: SkyRL's, ours, the leaves of both, and the mask of their valid slots."""
    mask = (torch.arange(t) < torch.randint(2, t, (b, 1))).float()
    x = torch.randn(3, b, t) * mask  # SkyRL's GAE takes steps on padding too: here they add 0
    logits, labels = torch.randn(rows, v), torch.randint(0, v, (rows,))

    def gae(f):
        return lambda: f(x[0], x[1], mask, gamma=1.0, lambd=0.95)

    def policy(f, config):
        return lambda new: f(new, x[0], x[2] / x[2].numel(), config, mask)[0]

    found = {
        "compute_gae_advantage_return": (gae, []),
        "masked_whiten": (lambda f: lambda: f(x[0], mask), []),
        "ppo_policy_loss": (lambda f: policy(f, LOSS), [x[1]]),
        "ppo_critic_loss": (lambda f: lambda new: f(new, x[0], x[2], CRITIC, mask)[0], [x[1]]),
        "logprobs_from_logits": (lambda f: lambda given: f(given, labels), [logits])}
    pairs = {name: (make(STOCK[name]), make(getattr(skyrl, name)), leaves)
             for name, (make, leaves) in found.items()}
    pairs["tppo_gae"] = gae(STOCK["compute_gae_advantage_return"]), gae(skyrl.token_gae), []
    pairs["tppo"] = (policy(STOCK["ppo_policy_loss"], LOSS),
                     policy(skyrl.token_policy_loss, NO_DUAL_CLIP), [x[1]])
    return pairs, mask


def test_the_table_has_every_function_that_is_installed():
    names = {name.partition(":")[2] for name in skyrl._PART.ours if "[" not in name}
    assert {*names, skyrl.GAE, skyrl.LOSS} == installed(2, 3, 2, 5)[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(installed(2, 3, 2, 5)[0]))
def test_nothing_is_slower_than_skyrls(capsys, name, size):
    torch.manual_seed(0)
    pairs, mask = installed(*SIZES[size])
    theirs, mine, leaves = pairs[name]
    ratio = compared(capsys, f"{name}, {size}{', with backward' if leaves else ''}",
                     with_backward(theirs, *leaves), with_backward(mine, *leaves), where=mask)
    if "gae" in name and size == "64 x 2048":
        assert ratio > 20  # measured: 30 to 100
