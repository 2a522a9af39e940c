"""verl from the index against `tppo_kernels.integrations.verl`."""

import asyncio
import os
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import files, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import verl
import verl.utils.torch_functional as verl_F
from _verl_stock import CASES, MODES, STOCK, batch_of, cases, compare, config_of, near
from tensordict import TensorDict
from verl.experimental.reward_loop.reward_manager import naive
from verl.trainer.ppo import core_algos, ray_trainer
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.utils import losses

from tppo_kernels.integrations import verl as ours


@pytest.fixture(autouse=True)
def patched():
    ours.patch()
    yield
    ours.unpatch()


def test_the_environment_holds_the_version_that_it_is_named_for():
    assert verl.__version__ == version("verl") == "0.9.1"


def test_gae_equals_verls():
    for case, mask, g in cases():
        x = torch.randn(2, *mask.shape, generator=g)
        factors = [(1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0)][case % 4]
        # `1 - mask` of a bool is an error in verl
        whole = mask.long() if mask.dtype == torch.bool else mask
        stock, truth = STOCK.gae(*x, whole, *factors), STOCK.gae(*x.double(), whole, *factors)
        found = core_algos.compute_gae_advantage_return(*x, mask, *factors)
        for results in zip(found, stock, truth, strict=True):
            near(*results, mask)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_valid_tokens_raise_verls_errors(n):
    rewards, values = torch.randn(2, 2, 5)
    mask = torch.zeros(2, 5, dtype=torch.int64)
    mask[0, :n] = 1
    with pytest.raises(ValueError) as stock:
        STOCK.gae(rewards, values, mask, 1.0, 0.95)
    for call in (lambda: core_algos.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95),
                 lambda: verl_F.masked_whiten(values, mask)):
        with pytest.raises(ValueError) as found:
            call()
        assert str(found.value) == str(stock.value)


def test_whitening_equals_verls():
    for case, mask, g in cases():
        x, shift = 3 * torch.randn(mask.shape, generator=g) + case % 5, case % 2 == 0
        near(verl_F.masked_whiten(x, mask, shift_mean=shift), STOCK.whiten(x, mask, shift),
             STOCK.whiten(x.double(), mask, shift), mask)


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_loss_its_gradient_and_its_metrics_equal_verls(mode):
    tokens = clipped = 0
    for case, mask, g in cases():
        if case % len(MODES) != MODES.index(mode) and case % 3:
            continue
        old = -2 * torch.rand(mask.shape, generator=g)
        new = old + 0.5 * torch.randn(mask.shape, generator=g) * (40 if case % 50 == 0 else 1)
        advantages = torch.randn(mask.shape, generator=g)
        weights = torch.rand(mask.shape, generator=g) if case % 4 == 0 else None
        results = []
        for function, dtype in ((STOCK.policy, torch.float32), (STOCK.policy, torch.float64),
                                (core_algos.get_policy_loss_fn("vanilla"), torch.float32),
                                (core_algos.get_policy_loss_fn("tppo"), torch.float32)):
            leaf = new.to(dtype, copy=True).requires_grad_()
            loss, metrics = function(
                old_log_prob=old.to(dtype), log_prob=leaf, advantages=advantages.to(dtype),
                response_mask=mask, loss_agg_mode=mode,
                config=config_of(case, batch_of(case, mask)), rollout_is_weights=weights)
            loss.backward()
            results.append((loss.detach(), leaf.grad, metrics))
        stock, truth, *found = results
        assert found[0][2].keys() == stock[2].keys() < found[1][2].keys()
        for loss, grad, metrics in found:
            near(loss, stock[0], truth[0])
            near(grad, stock[1], truth[1])
            for name, value in stock[2].items():
                near(metrics[name], value, truth[2][name])
        tokens += int(mask.sum())
        clipped += stock[2]["actor/pg_clipfrac"] * int(mask.sum())
    assert 0.1 < clipped / tokens < 0.9


@pytest.mark.parametrize("mode", MODES)
def test_the_value_loss_its_gradient_and_its_fraction_equal_verls(mode):
    for case, mask, g in cases():
        if case % len(MODES) != MODES.index(mode) and case % 3:
            continue
        returns, values = torch.randn(2, *mask.shape, generator=g)
        new = values + 0.5 * torch.randn(mask.shape, generator=g)
        results = []
        for function, dtype in ((losses.compute_value_loss, torch.float32),
                                (STOCK.value, torch.float32), (STOCK.value, torch.float64)):
            leaf = new.to(dtype, copy=True).requires_grad_()
            loss, fraction = function(
                vpreds=leaf, returns=returns.to(dtype), values=values.to(dtype),
                response_mask=mask, cliprange_value=0.3, loss_agg_mode=mode,
                **batch_of(case, mask))
            loss.backward()
            results.append((loss.detach(), leaf.grad, fraction))
        for triple in zip(*results, strict=True):
            near(*triple)


@pytest.mark.parametrize("mode", MODES)
def test_agg_loss_and_its_gradient_equal_verls(mode):
    for case, mask, g in cases():
        if case % len(MODES) == MODES.index(mode) or case % 3 == 0:
            batch = batch_of(case, mask)
            compare(lambda x, m=mask, b=batch: STOCK.agg(x, m, mode, **b),
                    lambda x, m=mask, b=batch: losses.agg_loss(x, m, mode, **b),
                    [torch.randn(mask.shape, generator=g)])


def test_kl_penalty_and_its_gradient_equal_verls():
    kinds = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+"]
    for case, mask, g in cases():
        kind = kinds[case % len(kinds)]
        compare(lambda a, b, k=kind: STOCK.kl(a, b, k),
                lambda a, b, k=kind: losses.kl_penalty(logprob=a, ref_logprob=b, kl_penalty=k),
                list((1, 8)[case % 2] * torch.randn(2, *mask.shape, generator=g)))
    with pytest.raises(NotImplementedError):
        core_algos.kl_penalty(torch.zeros(1), torch.zeros(1), "full")


@pytest.mark.parametrize("arguments", [
    dict(loss_agg_mode="mean-of-means"), dict(loss_agg_mode="token-mean", dp_size=2),
    dict(loss_agg_mode="seq-mean-token-sum", dp_size=2)])
def test_what_verl_refuses_is_refused_with_its_words(arguments):
    x = torch.randn(3, 2, 5)
    said = []
    for function in (STOCK.value, core_algos.compute_value_loss):
        with pytest.raises(ValueError) as caught:
            function(*x, torch.ones(2, 5), 0.2, **arguments)
        said.append(str(caught.value))
    assert said[0] == said[1]
    config = config_of(0, {k: v for k, v in arguments.items() if k == "dp_size"})
    with pytest.raises(ValueError, match="tppo: loss_agg_mode is"):
        core_algos.get_policy_loss_fn("tppo")(*x, torch.ones(2, 5), arguments["loss_agg_mode"],
                                              config)


def test_a_micro_batch_without_a_token_gives_no_nan():
    """verl divides 0 by 0."""
    x, mask = torch.randn(3, 2, 5), torch.zeros(2, 5, dtype=torch.bool)
    assert STOCK.value(*x, mask, 0.2)[0].isnan()
    assert core_algos.compute_value_loss(*x, mask, 0.2)[0] == 0


def test_logprobs_and_entropy_equal_verls():
    for case in range(CASES):
        g = torch.Generator().manual_seed(case)
        shape = [(7, 33), (2, 5, 33), (1, 1, 2), (3, 1000)][case % 4]
        logits = torch.randn(shape, generator=g) * (1, 5)[case % 2]
        labels = torch.randint(0, shape[-1], shape[:-1], generator=g)
        compare(partial(STOCK.logprobs, labels=labels),
                partial(verl_F.logprobs_from_logits, labels=labels), [logits])
        compare(STOCK.entropy, verl_F.entropy_from_logits, [logits])
        compare(lambda x: STOCK.entropy(x.flatten(0, -2)),
                lambda x: verl_F.entropy_from_logits_with_chunking(x.flatten(0, -2), 4), [logits])


def test_the_fused_head_equals_verls():
    for case in range(CASES):
        g = torch.Generator().manual_seed(case)
        shape = [(7, 16), (2, 5, 16), (1, 16)][case % 3]
        hidden, weight = torch.randn(shape, generator=g), torch.randn(50, 16, generator=g)
        rest = (torch.randint(0, 50, shape[:-1], generator=g), (1.0, 0.7)[case % 2])
        layer = FusedLinearForPPO(chunk_size=3)

        def plain(h, w, rest=rest):  # verl's function computes in fp32 whatever it is given
            logits = h @ w.T / rest[1]
            return STOCK.logprobs(logits, rest[0]), STOCK.entropy(logits)

        def stock(h, w, rest=rest, layer=layer, plain=plain):
            return plain(h, w) if h.dtype == torch.float64 else STOCK.fused(layer, h, w, *rest)

        # torch's own gradients of this are 1.5e-6 off in fp32, ours 2.7e-6: products twice
        compare(stock, lambda h, w, rest=rest, layer=layer: layer(h, w, *rest), [hidden, weight],
                bound=3e-6)
    assert FusedLinearForPPO.forward is ours.fused_linear_forward


def test_half_precision_log_probs_are_nearer_to_the_truth_than_verls():
    logits = (4 * torch.randn(6, 3000)).bfloat16()
    labels = torch.randint(0, 3000, (6,))
    truth = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert (verl_F.logprobs_from_logits(logits, labels) - truth).abs().max() < 1e-5
    assert (STOCK.logprobs(logits, labels) - truth).abs().max() > 5e-3


def data_of(response_mask, lengths=None):
    b, t = response_mask.shape
    written = response_mask if lengths is None else torch.arange(t) < torch.tensor(lengths)[:, None]
    attention = torch.cat((torch.ones(b, 3, dtype=torch.int64), written.long()), 1)
    return SimpleNamespace(batch=TensorDict({
        "prompts": torch.ones(b, 3, dtype=torch.int64), "attention_mask": attention,
        "responses": torch.ones(b, t, dtype=torch.int64), "response_mask": response_mask.long()},
        batch_size=b))


def test_scores_of_samples_stand_where_verl_puts_them():
    data = data_of(torch.arange(5) < torch.tensor([[5], [2]]))
    assemble = naive.NaiveRewardManager.assemble_rm_scores
    for scores in ([0.5, 2.0], [1, 2], list(np.array([0.5, 2.0])), list(torch.tensor([0.5, 2.0]))):
        assert torch.equal(assemble(data, scores), STOCK.scores(data, scores))
    empty = data_of(torch.arange(5) < torch.tensor([[5], [0]]))
    assert torch.equal(assemble(empty, [np.float64(0.5), 2.0]), STOCK.scores(empty, [0.5, 2.0]))


def test_scores_of_tokens_stand_at_their_tokens():
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0]])
    data = data_of(mask.bool(), lengths=[4, 3, 2])
    assemble = naive.NaiveRewardManager.assemble_rm_scores
    # of the second sample's three tokens a tool wrote the middle one; the third has one number
    found = assemble(data, [[1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 1.0], 7.0])
    assert found.tolist() == [[1, 2, 3, 4, 0], [0.75, 0, 1, 0, 0], [0, 7, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"sample 1 has rewards of shape \[2\].*each of the 3"):
        assemble(data, [[1.0, 2.0, 3.0, 4.0], [0.5, 1.0], 7.0])


def test_scores_of_tokens_and_of_samples_in_one_batch():
    """Each reward at its token, or at the last one before it that the policy wrote; numbers as verl
    puts them."""
    for _, mask, g in cases():
        mask = mask.bool()
        written = torch.maximum(mask, torch.rand(mask.shape, generator=g) < 0.3)
        lengths = [int(row.nonzero()[-1]) + 1 if row.any() else 0 for row in written]
        data, scores, expected = data_of(mask, lengths), [], torch.zeros(mask.shape)
        for i, n in enumerate(lengths):
            policy = mask[i].nonzero().flatten().tolist()
            rewards = torch.randint(-8, 9, (n,), generator=g) / 8  # whose sums are exact
            rewards[:policy[0] if policy else 0] = 0  # the policy begins a response
            of_tokens = i == 0 or bool(torch.rand((), generator=g) < 0.7)
            scores.append(rewards.tolist() if of_tokens else float(rewards.sum()))
            paid = enumerate(rewards.tolist()) if of_tokens else [(n - 1, scores[-1])] if n else ()
            for t, reward in paid if policy else ():
                if reward:
                    expected[i, max(p for p in policy if p <= t)] += reward
        found = naive.NaiveRewardManager.assemble_rm_scores(data, scores)
        assert torch.equal(found, expected)
        if all(mask[i, n - 1] for i, n in enumerate(lengths)):
            totals = [float(torch.tensor(x).sum()) for x in scores]
            assert torch.equal(naive.NaiveRewardManager.assemble_rm_scores(data, totals),
                               STOCK.scores(data, totals))


def test_a_reward_function_that_gives_a_number_a_token_reaches_the_batch():
    """Through verl's own naive manager: what it gives for a sample is what it puts together."""
    def rewards(data_source, solution_str, ground_truth, extra_info):
        return {"score": [0.1 * len(word) for word in solution_str.split()]}

    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join("ab"[:int(i)] for i in ids))
    manager = naive.NaiveRewardManager.__new__(naive.NaiveRewardManager)
    manager.tokenizer, manager.compute_score = tokenizer, rewards
    manager.is_async_reward_score, manager.reward_router_address = False, None
    data = verl.DataProto.from_dict(
        tensors=dict(prompts=torch.ones(1, 2, dtype=torch.int64),
                     responses=torch.tensor([[2, 1, 0, 0]]),
                     response_mask=torch.tensor([[1, 1, 0, 0]]),
                     attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]])),
        non_tensors=dict(data_source=["x"], reward_model=[{"ground_truth": ""}], extra_info=[{}]))

    async def run():
        manager.loop = asyncio.get_running_loop()
        return await manager.run_single(data)

    score = asyncio.run(run())["reward_score"]
    found = naive.NaiveRewardManager.assemble_rm_scores(data, [score])
    assert found.tolist() == [pytest.approx([0.2, 0.1, 0, 0])]


def test_verls_trainer_and_its_losses_reach_ours():
    """The advantages as its driver computes them, and the losses as its workers do."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(12) < torch.tensor([[12], [5], [9], [2]])).long()
    tensors = dict(token_level_rewards=torch.randn(4, 12, generator=g), response_mask=mask,
                   values=torch.randn(4, 12, generator=g))
    out = []
    for use in (ours.patch, ours.unpatch):
        use()
        data = verl.DataProto.from_dict(tensors={k: v.clone() for k, v in tensors.items()})
        out.append(ray_trainer.compute_advantage(data, "gae", gamma=1.0, lam=0.95, config={}).batch)
        assert (core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is ours.compute_gae_advantage_return
                ) is (use is ours.patch)
        assert (losses.compute_value_loss is ours.compute_value_loss) is (use is ours.patch)
    near(out[0]["advantages"], out[1]["advantages"], out[1]["advantages"], mask)
    assert out[0]["advantages"][mask == 0].eq(0).all()
    assert "tppo" not in core_algos.POLICY_LOSS_REGISTRY


# verl's own tests of these functions, which its wheel brings
OWN = ["tests/trainer/ppo/test_core_algos_on_cpu.py",
       "tests/trainer/ppo/test_loss_aggregation_on_cpu.py",
       "tests/trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
       "tests/trainer/ppo/test_value_loss_normalization_on_cpu.py",
       "tests/trainer/ppo/test_rollout_corr_integration.py",
       "tests/trainer/test_multi_trajectories_advantage_on_cpu.py"]
COUNTS = """
import functools, sys
import pytest
from tppo_kernels.integrations import verl as ours
import verl.trainer.ppo.core_algos
ours.CPU_ELEMENTS = dict.fromkeys(ours.CPU_ELEMENTS, 0)  # these batches are small
calls = {}
def counted(f):
    @functools.wraps(f)
    def call(*args, **kwargs):
        calls[f.__name__] = calls.get(f.__name__, 0) + 1
        return f(*args, **kwargs)
    return call
made = {}
for name, f in list(ours._OURS.items()):
    ours._OURS[name] = made.setdefault(id(f), counted(f))
if sys.argv[1] == "patched":
    ours.patch()
code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", sys.argv[2], *sys.argv[3:]])
print("CALLS", calls)
sys.exit(code)
"""


@pytest.mark.slow
def test_verls_own_tests_pass_stock_and_patched(tmp_path):
    own = [f.locate() for f in files("verl") if str(f) in OWN]
    assert len(own) == len(OWN)
    for path in own:  # apart from packages that are called `tests` too
        (tmp_path / Path(path).name).write_text(Path(path).read_text())
    totals = {}
    environ = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    for how in ("stock", "patched"):
        done = subprocess.run([sys.executable, "-c", COUNTS, how, str(tmp_path), str(tmp_path)],
                              cwd=tmp_path, capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        totals[how] = re.search(r"\d+ passed", done.stdout)[0]
        calls = next(x for x in done.stdout.splitlines() if x.startswith("CALLS"))
        print(how, totals[how], calls)
        assert ("compute_gae_advantage_return" in calls) is (how == "patched")
        assert ("compute_value_loss" in calls) is (how == "patched")
    assert totals["stock"] == totals["patched"]
