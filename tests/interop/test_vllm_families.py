"""Families of models in vLLM, all weights and adapters, given twice; an engine that sleeps."""

import pytest
import torch
from _vllm import EOS, PAD, SIZE, adapted, assert_greedy_alike, engines, move, prompts, tiny
from _weights import enlarged
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tppo.errors import DataError
from tppo.models.guards import GuardError
from tppo.models.rollout import Sampling

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": SIZE,
         "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": EOS,
         "pad_token_id": PAD}  # fmt: skip
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": False}),
    "mistral": (MistralForCausalLM, MistralConfig, {"tie_word_embeddings": False}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 64}),
}


def new(family):
    kind, config, options = FAMILIES[family]
    torch.manual_seed(1)
    return enlarged(kind(config(**SIZES, **options)), 0.12).eval()


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_weights_of_a_family(family, lora):
    model = adapted(new(family)) if lora else new(family)
    hf, vllm = engines(model)
    asked, greedy = prompts(8, seed=8), Sampling(10, 0.0)
    try:
        for step in range(2):
            one, other = hf.generate(asked, greedy), vllm.generate(asked, greedy)
            assert not assert_greedy_alike(model, asked, one.response_ids, other.response_ids)
            assert vllm.drift < 1e-4
            move(model, step)
    finally:
        vllm.close()


@pytest.mark.parametrize("kind, config", [
    (GPTNeoForCausalLM, GPTNeoConfig(hidden_size=64, num_layers=2, num_heads=2,
                                     attention_types=[[["global", "local"], 1]])),
    (BioGptForCausalLM, BioGptConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=96)),
])  # fmt: skip
def test_a_model_that_vllm_does_not_know_is_refused_and_left_as_it_was(kind, config):
    """The second one it would take, and change transformers' class of it for the process."""
    model = kind(config).eval()
    hf, vllm = engines(model)
    with pytest.raises(DataError) as found:
        vllm.generate(prompts(1), Sampling(4))
    text = str(found.value)
    assert text.startswith(f"--rollout vllm: vLLM has no {kind.__name__} of its own, expected")
    assert "\n" not in text and text.endswith("; --rollout hf takes any")
    assert len(hf.generate(prompts(1), Sampling(4)).response_ids[0]) > 0


def test_new_weights_of_experts_are_not_taken_on_a_cpu_and_that_is_caught():
    """There vLLM packs those of a mixture when it starts, and never again (docs/vllm.md)."""
    torch.manual_seed(1)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = enlarged(MixtralForCausalLM(config), 0.12).eval().requires_grad_(False)
    hf, vllm = engines(model)
    asked, greedy = prompts(4, seed=8), Sampling(8, 0.0)
    try:
        one, other = hf.generate(asked, greedy), vllm.generate(asked, greedy)
        assert not assert_greedy_alike(model, asked, one.response_ids, other.response_ids)
        move(model.requires_grad_(True), 1)
        with pytest.raises(GuardError, match="vLLM was given all weights, and has others"):
            vllm.generate(asked, greedy)
    finally:
        vllm.close()


def test_an_engine_sleeps_between_calls_and_prompts_are_apart_with_dense():
    """On a CPU vLLM ignores what it is told here; what is tested is that it is told in order."""
    model = tiny(seed=14)
    hf, vllm = engines(model, prefix="dense")
    asked, greedy = [prompts(1, length=100)[0]] * 4, Sampling(6, 0.0)
    try:
        expected = hf.generate(asked, greedy).response_ids
        assert vllm.generate(asked, greedy).response_ids == expected
        assert vllm.engine.prefix_hits()[1] == 0
        engine, told = vllm.engine, []
        engine.on_gpu = True
        sleep, wake, hand_over = engine.llm.sleep, engine.llm.wake_up, engine.hand_over
        engine.llm.sleep = lambda level: told.append(f"sleep {level}") or sleep(level=level)
        engine.llm.wake_up = lambda: told.append("wake") or wake()
        engine.hand_over = lambda model: told.append("weights") or hand_over(model)
        for _ in range(2):
            assert vllm.generate(asked, greedy).response_ids == expected
        assert told == ["weights", "sleep 1", "wake", "weights", "sleep 1"]
        del engine.hand_over
    finally:
        vllm.close()
