"""Nothing that the verl adapter installs is slower than verl's own, on a CPU."""

from types import SimpleNamespace

import pytest
import torch
import verl.utils.torch_functional as verl_F
from _speed import compared, with_backward
from _verl_stock import SMALLEST, STOCK, config_of
from tensordict import TensorDict
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo import core_algos
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from tppo_kernels.integrations import verl as ours

GAE = 50  # times as fast as verl's loop


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    monkeypatch.setattr(ours, "CPU_ELEMENTS", SMALLEST)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take processor time
    ours.patch()
    yield
    ours.unpatch()
    torch.set_num_threads(threads)


def scored(b, t):
    """A batch, and a number for each of its samples."""
    ones = torch.ones(b, t, dtype=torch.int64)
    data = TensorDict({"prompts": ones, "responses": ones, "response_mask": ones,
                       "attention_mask": torch.ones(b, 2 * t, dtype=torch.int64)}, batch_size=b)
    return SimpleNamespace(batch=data), [0.5] * b


def installed(b, t, rows, v):
    """Each function that is installed: verl's, ours, and what both get."""
    x = torch.randn(4, b, t)
    mask = (torch.arange(t) < torch.randint(2, t, (b, 1))).long()
    config, logits = config_of(1, {}), torch.randn(rows, v)
    labels, hidden, weight = (torch.randint(0, v, (rows,)), torch.randn(rows, 64),
                              torch.randn(v, 64))
    new, layer = x[1], FusedLinearForPPO()
    policy = core_algos.compute_policy_loss_vanilla
    made = {
        "compute_gae_advantage_return": (STOCK.gae, core_algos.compute_gae_advantage_return, [],
                                         (x[0], new, mask, 1.0, 0.95)),
        "compute_policy_loss_vanilla": (STOCK.policy, policy, [new],
                                        (x[0], new, x[2], mask, "token-mean", config)),
        "tppo_policy_loss": (STOCK.policy, core_algos.get_policy_loss_fn("tppo"), [new],
                             (x[0], new, x[2], mask, "token-mean", config)),
        "compute_value_loss": (STOCK.value, core_algos.compute_value_loss, [new],
                               (new, x[0], x[2], mask, 0.2)),
        "kl_penalty": (STOCK.kl, core_algos.kl_penalty, [new], (new, x[0], "low_var_kl")),
        "masked_whiten": (STOCK.whiten, verl_F.masked_whiten, [], (x[0], mask)),
        "logprobs_from_logits": (STOCK.logprobs, verl_F.logprobs_from_logits, [logits],
                                 (logits, labels)),
        "entropy_from_logits": (STOCK.entropy, verl_F.entropy_from_logits, [logits], (logits,)),
        "entropy_from_logits_with_chunking": (
            STOCK.chunked, verl_F.entropy_from_logits_with_chunking, [logits], (logits,)),
        "fused_linear_forward": (STOCK.fused, type(layer).forward, [hidden, weight],
                                 (layer, hidden, weight, labels)),
        "assemble_rm_scores": (STOCK.scores, RewardManagerBase.assemble_rm_scores, [],
                               scored(b, t)),
    }
    for mode in ours.MODES:  # a mask of bool is what verl's workers give
        made[f"agg_loss {mode}"] = (STOCK.agg, core_algos.agg_loss, [new],
                                    (new, mask.bool(), mode))
        made[f"agg_loss {mode} int64"] = (STOCK.agg, core_algos.agg_loss, [new], (new, mask, mode))
    for kind in ("kl", "abs", "mse", "k3+"):
        made[f"kl_penalty {kind}"] = (STOCK.kl, core_algos.kl_penalty, [new], (new, x[0], kind))
    return made


SIZES = {"64 x 2048": (64, 2048, 256, 32000), "8 x 256": (8, 256, 64, 1000)}
FUNCTIONS = sorted(installed(2, 3, 2, 5)) if ours.patch() is None else []
ours.unpatch()


def test_the_table_has_every_function_that_is_installed():
    names = {getattr(f, "__func__", f).__name__ for f in ours._OURS.values()}
    assert names | {"assemble_rm_scores"} == {name.split()[0] for name in FUNCTIONS}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_slower_than_verls(capsys, name, size):
    theirs, mine, leaves, args = installed(*SIZES[size])[name]

    def call(function):
        def of(*given):
            taken = iter(given)
            found = function(*(next(taken) if any(x is leaf for leaf in leaves) else x
                               for x in args))
            return found[0] if "policy" in name else found  # beside its metrics
        return with_backward(of, *leaves)

    where = next((x for x in args if torch.is_tensor(x) and x.dtype == torch.int64), None)
    times = compared(capsys, f"{name}, {size}", call(theirs), call(mine), close=1e-4,
                     where=where if "gae" in name or "whiten" in name else None)
    if "gae" in name and size == "64 x 2048":
        assert times >= GAE
