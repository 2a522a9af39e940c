"""Which engine samples: the one of the settings, and vLLM is loaded by nobody who did not ask."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import tppo
from tppo.config import Config
from tppo.errors import DataError
from tppo.methods.advantages import Masks
from tppo.methods.experience import drift_metrics
from tppo.methods.greedy import GreedyLast
from tppo.models.config import Sampler, VLLMConfig
from tppo.models.rollout import HFRollout, RolloutBatch, Sampling, build, installed
from tppo.stages.registry import REGISTRY, Given

ROOT = Path(__file__).resolve().parents[2]


def model(**options):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, intermediate_size=32,
                                        **(sizes | options)))  # fmt: skip


def built(given, rollout="vllm"):
    return build(given, Sampler(rollout), pad_id=0, eos_id=1)


def test_without_vllm_one_sentence_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(DataError) as found:
        built(model())
    text = str(found.value)
    assert "\n" not in text and text.startswith("--rollout vllm: vllm is not installed")
    assert "tppo-kernels[vllm]" in text and "--rollout hf" in text


def test_what_an_engine_cannot_hold_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: True)
    with pytest.raises(DataError, match="heads have 16 numbers, expected a multiple of 32"):
        built(model(num_attention_heads=4))
    with pytest.raises(DataError, match="MambaForCausalLM has no attention heads, expected a mod"):
        built(MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)))
    with pytest.raises(DataError, match="on cuda:1, expected the first GPU.*CUDA_VISIBLE_DEVICES"):
        built(SimpleNamespace(device=torch.device("cuda:1"), config=LlamaConfig()))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"),
                        ("MASTER_PORT", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match="2 processes of torchrun, expected one"):
        built(model())


def test_transformers_samples_where_nothing_is_said():
    assert Config().sampler == Sampler() and isinstance(built(model(), "hf"), HFRollout)


def test_nobody_imports_vllm_but_the_engine_and_only_when_it_runs():
    found = []
    for path in (ROOT / "python").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if any(name and name.split(".")[0] == "vllm" for name in names):
                found.append(path.name)
                assert node.col_offset, f"{path}: imports vllm where it is imported itself"
    assert set(found) == {"engine.py"}


def test_settings_of_vllm_belong_to_its_rollout():
    with pytest.raises(DataError, match="rollout hf, --vllm.memory-share 0.4, or --rollout vllm"):
        Config(vllm=VLLMConfig(memory_share=0.5))
    for share in (0.0, 1.0, "half"):
        with pytest.raises(DataError, match="memory_share"):
            VLLMConfig(memory_share=share)
    with pytest.raises(DataError, match="rollout was 'vlm', expected 'hf', 'vllm'"):
        tppo.PPOTrainer("nowhere", reward=len, prompts=["a"], rollout="vlm")


def test_a_stage_that_samples_depends_on_the_engine_unless_it_is_the_usual_one():
    for name in ("generate", "train", "eval", "pit", "improve", "ser-train", "baselines"):
        plain, other = (REGISTRY[name].dependencies(Given(config, True, True))
                        for config in (Config(), Config(rollout="vllm")))  # fmt: skip
        assert other == plain | {"rollout": "vllm"} and "rollout" not in plain


def test_the_drift_is_that_of_the_tokens_the_policy_wrote():
    old = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -1.0, -4.0]])
    own = torch.tensor([[True, True, False], [False, True, True]])
    told = [[-1.5, -2.0], [float("nan"), -1.25, -4.0]]
    rollout = RolloutBatch([[1], [1]], [[5, 6], [5, 6, 7]], told, ["eos", "eos"])
    found = drift_metrics(rollout, old, Masks(own, own, own, own).kl)
    assert found == {"rollout/logprob_drift_max": 0.5,
                     "rollout/logprob_drift_mean": pytest.approx(0.75 / 4)}  # fmt: skip
    assert drift_metrics(rollout._replace(logprobs=None), old, own) == {}


def test_a_greedy_baseline_keeps_what_the_engine_told():
    class Engine:
        def generate(self, prompts, sampling, prefixes=None):
            cold = sampling.temperature == 0
            return RolloutBatch([*prompts], [[7 if cold else p[0]] for p in prompts],
                                [[0.0 if cold else -p[0]] for p in prompts],
                                ["length"] * len(prompts))  # fmt: skip

    found = GreedyLast(Engine(), 3).generate([[n] for n in range(6)], Sampling(1))
    assert found.response_ids == [[0], [1], [7], [3], [4], [7]]
    assert found.logprobs == [[-0.0], [-1], [0.0], [-3], [-4], [0.0]]
    assert found.author == [[True], [True], [False], [True], [True], [False]]
