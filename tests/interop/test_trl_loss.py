"""TRL's GRPO losses against those of TokenGRPOTrainer: over every option, and over trainings."""

import inspect
import itertools
import re

import pytest
import torch
from _trl_runs import SHORT, logged, made, saved_model, share_of_vowels
from trl import GRPOTrainer

from tppo_kernels.integrations._trl_grpo import LOSS_TYPES
from tppo_kernels.integrations.trl import TokenGRPOTrainer, patch, unpatch

TYPES = tuple(LOSS_TYPES)
REFUSED = {"vespo"}
B, T = 5, 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trainer(model, tmp_path_factory):
    """One whose model is not asked: `losses` gives it log-probs."""
    return made(TokenGRPOTrainer, model, tmp_path_factory.mktemp("out"), beta=0.1,
                epsilon_high=1.5)


def losses(trainer, monkeypatch, inputs, scored):
    """(loss, gradients, metrics) of TRL and of ours, from the same log-probs and entropies."""
    found = []
    for kind in (GRPOTrainer, TokenGRPOTrainer):
        leaves = [x.clone().requires_grad_() for x in scored]
        with monkeypatch.context() as patched:
            patched.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies",
                            lambda *_, leaves=leaves, **__: tuple(leaves))
            trainer._metrics["train"].clear()
            coef = trainer.entropy_coef
            loss = kind._compute_loss(trainer, trainer.model, inputs)
            trainer.entropy_coef, trainer._last_world_entropy = coef, 0.5
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append((loss.detach(), gradients, dict(trainer._metrics["train"])))
    return found


def batch(seed, advantages):
    """Inputs of a loss: an empty answer, one of one token, tokens of tools, others of all."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([T, 0, 1, 3, 5])
    mask = (torch.arange(T) < lengths[:, None]).int()
    new = -3 * torch.rand(B, T, generator=g)
    inputs = {
        "prompt_ids": torch.ones(B, 2, dtype=torch.int64), "prompt_mask": torch.ones(B, 2),
        "completion_ids": torch.ones(B, T, dtype=torch.int64), "completion_mask": mask,
        "advantages": torch.randn(*((B, T) if advantages == "tokens" else (B,)), generator=g),
        "num_items_in_batch": mask.sum() * 2,
        "old_per_token_logps": new + 0.3 * torch.randn(B, T, generator=g),
        "ref_per_token_logps": new + 0.5 * torch.randn(B, T, generator=g),
        # of tokens, or, as under vllm_importance_sampling_mode="sequence_mask", of answers
        "importance_sampling_ratio": 2 * torch.rand(B, 1 if seed % 2 else T, generator=g)}
    if seed % 2:
        inputs["tool_mask"] = (torch.rand(B, T, generator=g) < 0.7).int()
    if seed % 5 == 0:
        del inputs["old_per_token_logps"]
    return inputs, (new, torch.rand(B, T, generator=g), torch.rand((), generator=g))


def test_every_loss_type_of_trl_is_compared_here_or_refused():
    """A type that a new TRL has is noticed: its names stand in the code of its loss."""
    compared = re.findall(r'self\.loss_type (?:==|in) (\[[^]]*\]|"[^"]*")',
                          inspect.getsource(GRPOTrainer._compute_loss))
    assert {n for names in compared for n in re.findall(r'"(\w+)"', names)} == {*TYPES} | REFUSED


OPTIONS = [
    {}, {"importance_sampling_level": "sequence"}, {"delta": 1.6}, {"delta": 1.2},
    {"top_entropy_quantile": 0.6}, {"off_policy_mask_threshold": 0.05},
    {"use_vllm": True, "vllm_importance_sampling_correction": True},
    {"aux_loss_enabled": True, "router_aux_loss_coef": 0.3},
    {"_entropy_bonus_enabled": True, "entropy_coef": 0.2, "top_entropy_quantile": 0.5},
    {"_entropy_bonus_enabled": True, "entropy_coef": 0.2, "use_adaptive_entropy": True},
    {"use_bias_correction_kl": False}, {"current_gradient_accumulation_steps": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
def test_the_loss_its_gradient_and_the_metrics_are_trls(trainer, monkeypatch, options):
    """Every loss type with KL and without, with advantages of answers and of tokens."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    for name, value in options.items():
        owner = trainer.args if hasattr(trainer.args, name) and (
            not hasattr(trainer, name)) else trainer
        monkeypatch.setattr(owner, name, value, raising=False)
        if name == "use_adaptive_entropy":
            monkeypatch.setattr(trainer.args, "entropy_target", 0.7)
            monkeypatch.setattr(trainer, "_last_world_entropy", 0.5, raising=False)
    every = itertools.product(TYPES, (0.0, 0.1), ("answers", "tokens"), range(2 if SHORT else 6))
    for kind, beta, advantages, seed in every:
        monkeypatch.setattr(trainer, "loss_type", kind)
        monkeypatch.setattr(trainer, "beta", beta)
        inputs, scored = batch(seed, advantages)
        theirs, mine = losses(trainer, monkeypatch, inputs, scored)
        where = f"{kind}, beta {beta}, advantages of {advantages}, {seed}"
        scale = max(1.0, float(theirs[0].abs()))
        torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=1e-6 * scale, msg=where)
        for ours, expected in zip(mine[1], theirs[1], strict=True):
            expected = torch.zeros(()) if expected is None else expected
            ours = torch.zeros(()) if ours is None else ours
            torch.testing.assert_close(ours, expected.broadcast_to(ours.shape), rtol=1e-5,
                                       atol=1e-6, msg=lambda m, w=where: f"{w}: {m}")
        assert mine[2].keys() == theirs[2].keys() and mine[2]
        for name in mine[2]:
            assert mine[2][name] == pytest.approx(theirs[2][name], nan_ok=True), (where, name)


CI = {("grpo", 0.1), ("cispo", 0.0)}


@pytest.mark.parametrize(("kind", "beta"), [
    pytest.param(kind, beta, marks=() if (kind, beta) in CI else pytest.mark.slow)
    for kind in TYPES for beta in (0.0, 0.1)])
def test_fifteen_steps_log_what_trls_log(model, tmp_path, kind, beta):
    """Four updates of each batch, so that ratios leave 1 and losses 0; log-probs ours too."""
    settings = {"loss_type": kind, "beta": beta, "num_iterations": 4}
    if kind == "cispo":
        settings["epsilon_high"] = 1.05
    if kind == "luspo":
        # A sum over the tokens of an answer: with these rewards it is below 1 as the others are.
        # Every ratio of a batch may be clipped; gradients are then rounding, which Adam with an
        # epsilon of 1e-8 makes whole steps of.
        settings |= {"importance_sampling_level": "sequence", "scale_rewards": "none",
                     "reward": share_of_vowels, "adam_epsilon": 1e-3}
    theirs = logged(GRPOTrainer, model, tmp_path / "theirs", **settings)
    patch()
    try:
        mine = logged(TokenGRPOTrainer, model, tmp_path / "mine", **settings)
    finally:
        unpatch()
    assert len(theirs) == len(mine) == 16  # the last one is the training's own
    assert max(abs(line["loss"]) for line in theirs[:15]) > 0.01
    clips = {"cispo": {"cispo_clip_ratio"}, "sapo": set()}.get(kind, {"clip_ratio/region_mean"})
    assert {"entropy", "reward", "reward_std", "frac_reward_zero_std", "grad_norm", *clips,
            "completions/mean_length", *(["kl"] if beta else [])} <= theirs[0].keys()
    losses = [[line["loss"] for line in log[:15]] for log in (theirs, mine)]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    clipped = max((line[name] for line in theirs[:15] for name in clips), default=0.0)
    print(f"{kind}, beta {beta}: losses up to {max(map(abs, losses[0])):.3f}, {apart:.1e} apart, "
          f"{clipped:.2f} clipped")
    for expected, actual in zip(theirs, mine, strict=True):
        assert expected.keys() == actual.keys()
        for name in expected.keys() - {"step_time"}:
            if "runtime" in name or "per_second" in name:
                continue
            bound = 1e-6 if name == "loss" else 1e-5 + 1e-4 * abs(expected[name])
            assert abs(actual[name] - expected[name]) < bound, (name, expected["loss"])
