"""PPO with LoRA learns as much from vLLM's answers as from transformers': 6 steps, 3 seeds.

    python tests/interop/run.py vllm

runs it with the others; `pytest -s` shows the table.
"""

import json
import math
from statistics import mean, stdev

import pytest
import torch

import tppo
from tppo.cli import main

SEEDS, STEPS = (0, 1, 2), 6
TINY = {
    "sessions": {"train_users": 120, "heldout_users": 12, "test_users": 6, "transfer_users": 4},
    "scratch": {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 400, "heads": 2},
    "sft": {"max_steps": 60, "eval_every": 30},
}  # fmt: skip
PROMPTS = [f"search: {brand} {thing}\nnext 2:\n" for brand in ("altara", "nordic", "cheap", "red")
           for thing in ("boots", "tent", "shoes", "coat")]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that SFT has made, whose next tokens are not all alike."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    for stage in ("data", "sft"):
        main([stage, "--out", str(folder / "out"), "--config", str(folder / "tiny.yaml")])
    return folder / "out" / "sft" / "model"


def vowels(prompts, completions):
    """The share of an answer's characters that are an e or an o."""
    return [sum(map(text.count, "eo")) / max(1, len(text)) for text in completions]


def learned(model, rollout, seed, out, lr=0.002):
    """By how much the mean reward of a step's answers has grown, last two steps over the first."""
    trainer = tppo.PPOTrainer(
        model, reward=vowels, prompts=PROMPTS, device="cpu", seed=seed, out=out, rollout=rollout,
        config=tppo.PPOConfig(steps=STEPS, batch_size=16, responses_per_prompt=16,
                              minibatch_size=32, epochs=2, advantage="grpo", lr=lr, kl_coef=0.0,
                              max_kl=100.0),
        generate=tppo.GenerateConfig(max_new_tokens=16),
        lora=tppo.AdapterConfig(rank=8),
    )  # fmt: skip
    trainer.train()
    scores = [row["objective/scores"] for row in trainer.metrics]
    assert len(scores) == STEPS
    return scores[0], mean(scores[-2:]) - scores[0]


def test_a_policy_improves_as_much_with_either_engine(model, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {rollout: [learned(model, rollout, seed, tmp_path / f"{rollout}-{seed}")
                           for seed in SEEDS] for rollout in ("hf", "vllm")}  # fmt: skip
        still = [learned(model, "hf", seed, tmp_path / f"still-{seed}", lr=1e-12)[1]
                 for seed in SEEDS]  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    gains = {name: [gain for _, gain in rows] for name, rows in found.items()}
    for name, rows in found.items():
        print(f"{name:5s} first step {mean(first for first, _ in rows):.4f}, gain "
              f"{mean(gains[name]):.4f} +- {stdev(gains[name]):.4f}: "
              f"{', '.join(f'{gain:.4f}' for gain in gains[name])}")  # fmt: skip
    print(f"weights that stay: {', '.join(f'{gain:.4f}' for gain in still)}")
    noise = math.hypot(*(stdev(x) / math.sqrt(len(SEEDS)) for x in gains.values()))
    apart = mean(gains["vllm"]) - mean(gains["hf"])
    print(f"apart {apart:+.4f}, standard error {noise:.4f}")
    assert min(gains["hf"] + gains["vllm"]) > 3 * max(map(abs, still))  # learned, in each run
    assert abs(apart) <= 3 * noise
    assert 3 * noise < mean(gains["hf"]) / 2  # else no difference could be seen
