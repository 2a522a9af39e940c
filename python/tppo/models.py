"""Models of the trainer and the three ways it reads them, each only at response positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import tppo_kernels as tk
from tppo.batch import Batch
from tppo.config import ScratchConfig


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch {torch.__version__} sees no GPU")
    return torch.device(name)


def new_policy(config: ScratchConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small Llama with random weights, in torch's global random state."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def place(model: nn.Module, device: torch.device) -> Any:
    """The model on its device, dropout off: it stays off in training too."""
    return model.to(device).eval()


def load_policy(path: str | Path, device: torch.device) -> PreTrainedModel:
    """A causal LM from a local folder, in fp32, dropout off."""
    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, local_files_only=True
    )
    # The folder's own top_k, top_p or repetition penalty would bend the rollouts' distribution
    # away from the log-probs of the policy.
    model.generation_config = GenerationConfig()
    return place(model, device)


def load_reward_model(path: str | Path, device: torch.device) -> PreTrainedModel:
    """A three-class token classifier from a local folder; a causal LM's trunk is taken over."""
    model = AutoModelForTokenClassification.from_pretrained(
        str(path), num_labels=3, dtype=torch.float32, local_files_only=True
    )
    return place(model, device)


class Critic(nn.Module):
    """A trunk of its own, started from the SFT model, with a value head started at zero."""

    def __init__(self, trunk: nn.Module, hidden_size: int):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_policy(cls, path: str | Path, device: torch.device) -> Critic:
        """The critic that starts from the causal LM in `path`."""
        model = load_policy(path, device)
        return cls(model.base_model, model.config.hidden_size).to(device).eval()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values before each response token [B, T], and after the last column [B]."""
        hidden = hidden_states(self.trunk, batch)  # [B, P+T, D]
        width, length = batch.prompt_length, batch.response_length
        before = tk.response_states(hidden, width, length, "value", mask=batch.mask)
        after = tk.response_states(hidden, width, length, "bootstrap", mask=batch.mask)
        values = tk.token_head(before, self.head.weight, self.head.bias, batch.mask)
        return values, tk.token_head(after, self.head.weight, self.head.bias)


def hidden_states(trunk: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states of a trunk over prompts and responses, [B, P+T, D]."""
    output = trunk(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state


def policy_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each response token under the policy, both [B, T]."""
    length = batch.response_length
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=length + 1,
        use_cache=False,
    ).logits  # [B, 1+T, V]: the last prompt token's and the response's
    states = tk.response_states(logits, 1, length, "logprob")  # [B, T, V]
    return tk.token_logprobs(states, batch.targets, batch.mask, temperature=temperature)


def class_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Class logits of the token reward model at each response token, [B, T, 3]."""
    hidden = hidden_states(model.base_model, batch)  # [B, P+T, D]
    states = tk.response_states(hidden, batch.prompt_length, batch.response_length, "reward")
    head = getattr(model, "score", None) or model.classifier
    assert isinstance(head, nn.Linear)
    return tk.token_head(states, head.weight, head.bias, batch.mask)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that training does not touch."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
