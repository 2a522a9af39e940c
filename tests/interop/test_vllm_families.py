"""Families of models in vLLM, all weights and adapters, given twice; an engine that sleeps."""

import pytest
import torch
from _vllm import EOS, PAD, SIZE, adapted, assert_greedy_alike, engines, move, prompts, tiny
from _weights import enlarged
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
