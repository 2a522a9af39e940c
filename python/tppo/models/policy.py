"""Models of the trainer and the three ways it reads them, each only at response positions.

No way makes logits: the heads read the states of the response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import tppo_kernels as tk
from tppo.models.adapters import AdaptedClassifier
from tppo.models.batch import Batch
from tppo.models.config import DType, ScratchConfig
from tppo.models.folder import tied_key
from tppo.models.load import load_policy
from tppo.models.token_classifier import head_name, state_size


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


class Critic(nn.Module):
    """A trunk of its own, started from the SFT model, with a value head started at zero."""

    def __init__(self, trunk: nn.Module, hidden_size: int):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_policy(cls, path: str | Path, device: torch.device, dtype: DType = "auto") -> Critic:
        """The critic that starts from the causal LM in `path`; its head is in float32."""
        model = load_policy(path, device, dtype)
        return cls(model.base_model, state_size(model.config)).to(device).eval()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values before each response token [B, T], and after the last one [B]."""
        before, after = batch.states(self.trunk, "value", "bootstrap")  # [B, T, D], [B, D]
        values = tk.token_head(before, self.head.weight, self.head.bias, batch.mask)
        return values, tk.token_head(after, self.head.weight, self.head.bias)


class TwoCritics(nn.Module):
    """The critic of the learner and that of a guide, of which one has its turn: that of LOLS."""

    def __init__(self, learner: nn.Module, guide: nn.Module):
        super().__init__()
        self.learner, self.guide = learner, guide
        self.turn = ""  # the name of one of them; "" before the first step

    def forward(self, batch: Batch) -> Any:
        """What the critic whose turn it is gives, at first the learner's."""
        return self.get_submodule(self.turn or "learner")(batch)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the critic whose turn it is: the other one is not stepped on, not even by the
        optimiser's momentum.  Before the first step those of both, for the optimiser to know.
        """
        if not self.turn:
            return super().parameters(recurse)
        return self.get_submodule(self.turn).parameters(recurse)


def learners(critic: nn.Module) -> nn.Module:
    """The critic that estimates the learner's values, where there are two."""
    return critic.learner if isinstance(critic, TwoCritics) else critic


class RewardModel(nn.Module):
    """A three-class token classifier that shares the policy's tokenizer."""

    def __init__(self, model: PreTrainedModel | AdaptedClassifier):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Class logits at each response token, [B, T, 3]."""
        return class_logits(self.model, batch)


def class_logits(model: PreTrainedModel | AdaptedClassifier, batch: Batch) -> Tensor:
    """Class logits of a token classifier at each response token, [B, T, 3]."""
    (states,) = batch.states(model.base_model, "reward")  # [B, T, D]
    head = getattr(model, head_name(model))
    assert isinstance(head, nn.Linear)
    return tk.token_head(states, head.weight, head.bias, batch.mask)


def policy_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The states that `policy_head` reads, before each response token, [B, T, D]."""
    (states,) = batch.states(model.base_model, "logprob")
    return states


def policy_head(model: PreTrainedModel) -> tk.FusedLMHead:
    """The head of a causal LM; one of any family that agrees with the model's own logits."""
    if not isinstance(getattr(model, "fused_head", None), tk.FusedLMHead):
        limit = getattr(model, "valid_vocab", None)  # set by `limit_vocabulary`
        head = tk.FusedLMHead(model, verify=True, valid_vocab=limit)
        model.fused_head = head  # type: ignore[assignment]
    return model.fused_head  # type: ignore[return-value]  # kept with the model: verified once


def policy_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each response token under the policy, both [B, T]."""
    states = policy_states(model, batch)  # [B, T, D]
    return policy_head(model)(states, batch.targets, batch.mask, temperature=temperature)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict` without the weights that are frozen: of an adapted model adapters and heads."""
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of what `trained_state` gives.

    Errors: ValueError where these are not the weights that the model trains.
    """
    wanted = trained_state(model).keys()
    if wanted != weights.keys():
        odd = sorted(wanted ^ weights.keys())
        raise ValueError(
            f"{len(weights)} weights were given of {len(wanted)} that are trained, {odd[0]!r} on "
            "one side alone; were they saved with other --lora settings?"
        )
    model.load_state_dict(weights, strict=False)


def snapshot(
    model: nn.Module, into: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A copy of what `trained_state` gives that training does not touch, in the host's memory.

    Tied weights are kept once.  into: an earlier copy of the same model, which is overwritten, so
    that there are never two.
    """
    kept, copies = {}, dict[tuple[Any, ...], Tensor]()
    for name, tensor in trained_state(model).items():
        where = tied_key(tensor)
        if where not in copies:
            old = into.get(name) if into else None
            if old is None:
                copies[where] = tensor.detach().to("cpu", copy=True)
            else:
                copies[where] = old.copy_(tensor.detach())
        kept[name] = copies[where]
    return kept
