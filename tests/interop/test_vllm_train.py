"""A training whose answers vLLM samples: from the command line, from Python, killed and resumed."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import tppo
from tppo.cli import main
from tppo.models.guards import GuardError
from tppo.models.rollout import engine

TINY = {
    "sessions": {"train_users": 60, "heldout_users": 6, "test_users": 6, "transfer_users": 4},
    "scratch": {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 400, "heads": 2},
    "sft": {"max_steps": 20, "eval_every": 10},
    "generate": {"samples": 64, "max_new_tokens": 16},
    "reward_model": {"epochs": 1, "min_auc": 0.0},
    "ppo": {"steps": 3, "batch_size": 8, "minibatch_size": 8, "eval_every": 2, "min_format": 0.0,
            "max_kl": 100.0, "responses_per_prompt": 2, "without_signal": True},
}  # fmt: skip
STAGES = ("data", "sft", "generate", "label", "map", "train-rm", "train")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of stages up to `train`, its policy trained with vLLM's answers."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    before = torch.get_num_threads()
    for stage in STAGES:
        rollout = ["--rollout", "vllm"] if stage == "train" else []
        main([stage, "--out", str(folder / "out"), "--config", str(folder / "tiny.yaml"),
              "--threads", "1", *rollout])
    torch.set_num_threads(before)
    return folder / "out"


def test_the_command_trains_with_the_engine_and_reports_its_drift(trained):
    rows = [json.loads(line) for line in (trained / "train/metrics.jsonl").open()]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["rollout/logprob_drift_mean"] <= row["rollout/logprob_drift_max"] < 1e-4
        assert abs(row["val/ratio"] - 1) < 0.5
    assert rows[0]["policy/updates"] > 0
    one, other = (load_file(trained / name / "model/model.safetensors")
                  for name in ("sft", "train"))  # fmt: skip
    assert any(not torch.equal(one[name], other[name]) for name in other)
    manifest = json.loads((trained / "train/manifest.json").read_text())
    assert manifest["config"]["rollout"] == "vllm"
    assert "rollout" not in json.loads((trained / "generate/manifest.json").read_text())["config"]


SCRIPT = """
import os, signal, sys
import torch
import tppo

torch.set_num_threads(1)
out, model, kill = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def reward(prompts, completions):
    global calls
    calls += 1
    if calls == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(text)) / 10 for text in completions]

if __name__ == "__main__":
    tppo.PPOTrainer(
        model, reward=reward, prompts=["one two", "three four five", "six", "seven eight"] * 4,
        config=tppo.PPOConfig(steps=4, batch_size=4, responses_per_prompt=2, minibatch_size=8,
                              checkpoint_every=1, lr=1e-3, critic_lr=1e-3),
        generate=tppo.GenerateConfig(max_new_tokens=12), out=out, device="cpu",
        rollout=tppo.VLLMConfig(), lora=tppo.AdapterConfig(rank=int(sys.argv[4])),
    ).train()
"""


@pytest.mark.parametrize("rank, file", [(4, "adapter_model"), (0, "model")])
def test_a_killed_training_goes_on_to_the_same_weights(trained, tmp_path, rank, file):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(out, kill):
        return subprocess.run([sys.executable, script, tmp_path / out, trained / "sft/model",
                               str(kill), str(rank)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True)  # fmt: skip

    whole = run("whole", 0)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert run("killed", 3).returncode == -signal.SIGKILL
    again = run("killed", 0)
    assert again.returncode == 0, again.stderr[-2000:]
    weights = [load_file(tmp_path / name / f"train/model/{file}.safetensors")
               for name in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 4
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    before = {} if rank else load_file(trained / "sft/model/model.safetensors")
    moved = [name for name, tensor in weights[0].items()
             if ("lora_B" in name and tensor.any()) or not tensor.equal(before.get(name, tensor))]
    assert len(moved) > 4


def test_a_run_with_others_weights_in_the_engine_stops_with_the_sentence(
    trained, tmp_path, monkeypatch
):
    def reward(prompts, completions):
        return [float(len(text)) for text in completions]

    trainer = tppo.PPOTrainer(
        trained / "sft/model", reward=reward, prompts=["one two", "three"] * 4, device="cpu",
        config=tppo.PPOConfig(steps=3, batch_size=4, responses_per_prompt=2, minibatch_size=8,
                              lr=0.03, critic_lr=1e-3),
        generate=tppo.GenerateConfig(max_new_tokens=8), out=tmp_path, rollout="vllm",
    )  # fmt: skip
    given, hand_over = [], engine.VLLMEngine.hand_over

    def once(self, model):
        if not given:
            hand_over(self, model)
        given.append(self)

    monkeypatch.setattr(engine.VLLMEngine, "hand_over", once)
    with pytest.raises(GuardError, match="vLLM was given all weights, and has others"):
        trainer.train()
    assert len(given) == 2 and not (tmp_path / "train/report.json").exists()
