"""Models and prompts that the tests of vLLM share: tiny ones, whose log-probs are not all alike."""

import json

import torch
from _weights import enlarged
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.cli import main
from tppo.models.adapters import add_adapter
from tppo.models.config import AdapterConfig
from tppo.models.rollout import HFRollout
from tppo.models.rollout.engine import _OPEN
from tppo.models.rollout.vllm import VLLMRollout

PAD, EOS, OTHER_EOS, SIZE = 0, 1, 2, 320
TIE = 1e-3  # nats: where two tokens are as near as that, either may be the likelier


def tiny(seed=0, tied=True, std=0.12, **options):
    """A Llama with heads of 32 numbers, whose next tokens have quite different probabilities."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": SIZE,
        "max_position_embeddings": 256, "tie_word_embeddings": tied, "bos_token_id": None,
        "eos_token_id": EOS, "pad_token_id": PAD, **options,
    })  # fmt: skip
    return enlarged(LlamaForCausalLM(config), std).eval()


def adapted(model, rank=4, seed=3, size=0.3):
    """The model with an adapter that changes its output."""
    model = add_adapter(model, AdapterConfig(rank=rank), seed=seed)
    move(model, seed, size)
    return model


@torch.no_grad()
def move(model, seed, size=0.1):
    """Changes the weights that are trained, by noise of that share of their spread."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            spread = parameter.std() if parameter.std() > 0 else 0.1
            parameter += size * spread * noise


def prompts(rows, length=40, seed=1, size=SIZE):
    """Different prompts of a few lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, size, (length - i % 5,), generator=generator).tolist()
            for i in range(rows)]


def run_by_transformers(folder, settings):
    """A run with these settings that transformers sampled, up to the policy; all engines are closed
    when the test module has done with it.
    """
    (folder / "tiny.yaml").write_text(json.dumps(settings))
    for stage in ("data", "sft", "generate", "label", "map", "train-rm", "train"):
        main([stage, "--out", str(folder / "out"), "--config", str(folder / "tiny.yaml")])
    yield folder / "out"
    for engine in [*_OPEN]:
        engine.close()


def engines(model, eos_id=EOS, batch_size=64, **options):
    """transformers' and vLLM's for one model."""
    return (HFRollout(model, pad_id=PAD, eos_id=eos_id, batch_size=batch_size),
            VLLMRollout(model, pad_id=PAD, eos_id=eos_id, batch_size=batch_size, **options))


@torch.no_grad()
def next_logprobs(model, ids, temperature=1.0):
    return (model(torch.tensor([ids])).logits[0, -1] / temperature).log_softmax(-1)


def assert_greedy_alike(model, asked, one, other):
    """Token by token equal, up to the first tie within TIE of a row, which is named.

    Gives the ties: everything behind one is another answer.
    """
    ties = []
    for row, (ids, a, b) in enumerate(zip(asked, one, other, strict=True)):
        for t, (x, y) in enumerate(zip(a, b, strict=False)):
            if x != y:
                found = next_logprobs(model, [*ids, *a[:t]])
                gap = abs(found[x] - found[y]).item()
                assert gap < TIE, f"row {row} token {t}: {x} and {y}, {gap:.3g} nats apart"
                ties.append((row, t, x, y, gap))
                break
        else:
            assert len(a) == len(b), f"row {row}"
    return ties
