"""A reward of whole answers from a model of whole answers: what a token reward is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tppo_kernels as tk
from tppo.models.adapters import add_adapter, has_adapter, merged
from tppo.models.batch import Batch, pad
from tppo.models.config import AdapterConfig, DType
from tppo.models.folder import save_model
from tppo.models.load import load_policy
from tppo.models.part_size import PartSize
from tppo.models.recompute import recompute_layers
from tppo.models.token_classifier import state_size
from tppo.rewards import Answers, TokenReward
from tppo.rewards.mark import weights_mark
from tppo.store.jsonl import read_object, write_json

Pooling = Literal["last", "mean"]
HEAD_STD = 0.02  # as transformers starts the heads of its classifiers
HEAD, POOLING = "sentence_head.safetensors", "sentence_model.json"  # beside a causal LM's files


class SentenceModel(nn.Module):
    """A trunk with one linear head on the states of an answer's tokens, pooled to one score.

        s = w . h + b,  h = h_T ("last") or 1/T sum_t h_t ("mean")

    As a Bernoulli model P(relevant) = sigmoid(s); as one of Bradley and Terry
    P(answer 1 is better than answer 2) = sigmoid(s_1 - s_2).
    """

    def __init__(self, trunk: nn.Module, size: int, pooling: Pooling = "last"):
        super().__init__()
        self.trunk, self.pooling = trunk, pooling
        self.whole: tuple[PreTrainedModel, ...] = ()  # in a tuple: its head is not trained
        self.head = nn.Linear(size, 1)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_policy(
        cls,
        path: str | Path,
        device: torch.device,
        pooling: Pooling = "last",
        dtype: DType = "auto",
        seed: int = 0,
        *,
        lora: AdapterConfig | None = None,
        pickles: bool = False,
        recompute: bool = False,
    ) -> SentenceModel:
        """The one whose trunk is that of the causal LM in `path`; its head is in float32.

        lora: trains adapters in the trunk, and the head whole.  recompute: layers are computed
        again in backward.
        """
        policy = load_policy(path, device, dtype, pickles=pickles)
        if lora is not None and lora.on:
            add_adapter(policy, lora, seed=seed)
        if recompute:
            recompute_layers(policy)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(policy.base_model, state_size(policy.config), pooling)
        model.whole = (policy,)
        return model.to(device).eval()

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device, dtype: DType = "auto"
    ) -> SentenceModel:
        """The one that `save` has written into a folder.

        Errors: ValueError where the folder holds none.
        """
        found = read_object(Path(path) / POOLING)
        if found is None or found.get("pooling") not in ("last", "mean"):
            raise ValueError(f"{path}: has no {POOLING} that says how answers are pooled, expected "
                             "the folder of a reward model of whole answers")  # fmt: skip
        model = cls.from_policy(path, device, found["pooling"], dtype)
        model.head.load_state_dict(load_file(Path(path) / HEAD))
        return model

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the trunk as the plain causal LM that it came from, adapters added to it, and the
        head beside it.
        """
        (policy,) = self.whole
        plain: PreTrainedModel = merged(policy) if has_adapter(policy) else policy
        save_model(plain, tokenizer, folder)
        head = {name: x.detach().cpu().clone() for name, x in self.head.state_dict().items()}
        save_file(head, Path(folder) / HEAD)
        write_json(Path(folder) / POOLING, {"pooling": self.pooling})

    def forward(self, batch: Batch) -> Tensor:
        """Scores of the responses, [B]."""
        (states,) = batch.states(self.trunk, "reward")  # [B, T, D]
        lengths = batch.mask.sum(1)  # [B]
        if self.pooling == "last":
            pooled = states[torch.arange(len(lengths), device=states.device), lengths - 1]  # [B, D]
        else:
            kept = torch.where(batch.mask[..., None], states, 0.0)  # [B, T, D]
            sums = kept.sum(1, dtype=torch.promote_types(kept.dtype, torch.float32))  # [B, D]
            pooled = (sums / lengths[:, None]).to(states.dtype)
        return tk.token_head(pooled, self.head.weight, self.head.bias)

    def of_tokens(self, batch: Batch) -> Tensor:
        """What each token adds to the score of its response, [B, T], with pooling "mean":

            s = sum_t s_t,  s_t = (w . h_t + b) / T
        """
        (states,) = batch.states(self.trunk, "reward")  # [B, T, D]
        found = tk.token_head(states, self.head.weight, self.head.bias, batch.mask)  # [B, T]
        return torch.where(batch.mask, found, 0.0) / batch.mask.sum(1, keepdim=True)

    def prefixes(self, batch: Batch) -> Tensor:
        """Scores of all beginnings of the responses, [B, T], of a trunk that sees no later token:
        from one reading.
        """
        (states,) = batch.states(self.trunk, "reward")  # [B, T, D]
        if self.pooling == "mean":
            places = torch.arange(1, states.shape[1] + 1, device=states.device)  # [T]
            kept = torch.where(batch.mask[..., None], states, 0.0)
            sums = kept.cumsum(1, dtype=torch.promote_types(kept.dtype, torch.float32))
            states = (sums / places[:, None]).to(states.dtype)
        return tk.token_head(states, self.head.weight, self.head.bias, batch.mask)


    def attention(self, batch: Batch) -> Tensor:
        """The attention of the last layer, the mean of its heads, from the last token of each
        response to its tokens, [B, T]; 0 where masked.

        Errors: ValueError for a trunk that gives no attention.
        """
        trunk: Any = self.trunk
        rows = [[*p, *y] for p, y in zip(batch.prompt_ids, batch.response_ids, strict=True)]
        # Padded on the right alone: padding on the left, which sees nothing, is NaN to some trunks.
        padded = pad([row[:1] for row in rows], [row[1:] for row in rows], batch.pad_id,
                     batch.device)  # fmt: skip
        kept = trunk.config._attn_implementation
        trunk.set_attn_implementation("eager")  # the others keep no attention
        try:
            found = trunk(input_ids=padded.input_ids, attention_mask=padded.attention_mask,
                          position_ids=padded.position_ids, use_cache=False,
                          output_attentions=True).attentions  # fmt: skip
        finally:
            trunk.set_attn_implementation(kept)
        if not found or found[-1] is None:
            raise ValueError(f"{type(trunk).__name__} gave no attention of its last layer, "
                             "expected a transformer whose last layer has attention")  # fmt: skip
        last = torch.tensor([len(row) - 1 for row in rows], device=batch.mask.device)  # [B]
        given = found[-1].mean(1)[torch.arange(len(rows), device=last.device), last]  # [B, P+T]
        first = last + 1 - batch.mask.sum(1)  # [B]
        places = first[:, None] + torch.arange(batch.mask.shape[1], device=last.device)  # [B, T]
        weights = given.gather(1, torch.minimum(places, last[:, None]))
        return torch.where(batch.mask, weights, 0.0)


class SentenceModelReward(nn.Module):
    """The score of a `SentenceModel`, paid at the last token of each response.

        r_T = scale (sigmoid(s) - 1/2)      mode "probability", between -scale/2 and scale/2
        r_T = scale s                       mode "score"

    max_tokens: tokens of prompts and responses that the model reads at once.
    """

    def __init__(
        self,
        model: SentenceModel,
        *,
        mode: Literal["probability", "score"] = "probability",
        scale: float = 1.0,
        max_tokens: int = 65_536,
    ):
        super().__init__()
        self.model, self.mode, self.scale = model, mode, scale
        self.part_size = PartSize(max_tokens)

    def extra_repr(self) -> str:
        """With a mark of the weights: a training that resumes must not go on with other ones."""
        return f"mode={self.mode}, scale={self.scale:g}, weights={weights_mark(self.model)}"

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T], 0 but at the last tokens; NaN where a score is not finite."""
        scores = self.part_size.read(batch, self.model).float()  # [B]
        paid = scores.sigmoid() - 0.5 if self.mode == "probability" else scores
        # An infinite score has a finite probability: it must stop the training all the same.
        terminal = (self.scale * paid).masked_fill(~scores.isfinite(), torch.nan)
        return TokenReward(tk.place_rewards(batch.mask, terminal=terminal).rewards)
