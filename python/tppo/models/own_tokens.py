"""A reward model with a tokenizer of its own: it reads text, its classes come back by characters.

    policy          ch | eap | \\n | free     a token of the policy has the class of the token on
    reward model    cheap         | fr | ee   its last character: of "cheap", "cheap", none, "ee"

Any `AutoModelForTokenClassification` serves, Longformer (the paper's) included.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import tppo_kernels as tk
from tppo.models.adapters import is_adapter, load_classifier
from tppo.models.batch import Batch, pad_rows
from tppo.models.config import DType, Prefix
from tppo.models.load import load_from, load_reward_model
from tppo.models.policy import RewardModel
from tppo.models.precision import relative_rms, rounding_error
from tppo.models.token_classifier import head_name
from tppo.models.tokenizer import decode, token_offsets
from tppo.plain_text import plain_text
from tppo.progress import say, say_once

QUESTION, ANSWER = "question: ", ". \n\n answer: "
MAX_TOKENS = 2048  # of an input, as in the paper, or the model's positions where they are fewer
TOKENS_AT_ONCE = 65_536  # of frozen scoring
READ_AT_ONCE = 256  # inputs; the offsets of all their tokens are held as Python objects
PROBE = "search: na\u00efve t-shirt, 3.5\nnext 3:\n\u6771\u4eac \U0001f600 relevant queries"
NONE = (30.0, 0.0, 0.0)  # class logits where no token of the reward model stands: P(0) = 1 in fp32


class Reading(NamedTuple):
    """What a reward model reads of one answer, in its own tokens."""

    prompt_ids: list[int]  # all that stands before the answer, special tokens included
    response_ids: list[int]
    offsets: list[tuple[int, int]]  # of each response token, half-open, in the answer's text


class OwnTokens(nn.Module):
    """A token classifier that reads `question: {prompt}. \\n\\n answer: {response}`."""

    prefix: Prefix = "dense"  # each answer with a prompt of its own

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        probe = tokenizer("a", return_offsets_mapping=True)
        ends = [end for _, end in probe["offset_mapping"]]
        behind = len(ends) - max(i for i, end in enumerate(ends) if end) - 1
        self.suffix = probe["input_ids"][len(ends) - behind :]  # such as [SEP]
        self.limit = _positions(model) - behind
        fill = tokenizer.pad_token_id
        self.fill = (getattr(model.config, "pad_token_id", None) or 0) if fill is None else fill

    def read(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Reading]:
        """Its tokens of each answer.

        What does not fit the model's positions is cut from the left of the history; an answer that
        does not fit alone loses its end. Both are said once.
        """
        before = [f"{QUESTION}{prompt.strip()}{ANSWER}" for prompt in prompts]
        texts = [head + response for head, response in zip(before, responses, strict=True)]
        result = []
        for i in range(0, len(texts), READ_AT_ONCE):
            part = slice(i, i + READ_AT_ONCE)
            encoded = plain_text(self.tokenizer).spelled(texts[part])
            rows = zip(encoded, before[part], strict=True)
            result += [self._fit(*spelled, len(head)) for spelled, head in rows]
        return result

    def _fit(self, ids: list[int], offsets: list[tuple[int, int]], start: int) -> Reading:
        size = len(ids) - len(self.suffix)
        ids, offsets = ids[:size], offsets[:size]
        ends = [end for _, end in offsets]
        first = next((i for i, end in enumerate(ends) if end > start), size)
        head = next((i for i, end in enumerate(ends[:first]) if end > len(QUESTION)), first)
        cut = min(max(0, size - self.limit), first - head)
        prompt = ids[:head] + ids[head + cut : first]
        last = min(size, first + self.limit - len(prompt))
        if cut:
            say_once(f"the reward model reads {self.limit} tokens: long histories lose their start")
        if last < size:
            say_once(f"the reward model reads {self.limit} tokens: long answers lose their end")
        spans = [(max(0, a - start), b - start) for a, b in offsets[first:last]]
        return Reading(prompt, ids[first:last], spans)

    def forward(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits [B, S, 3] of its own response tokens, and where there are any [B, S]."""
        pairs = zip(prompts, responses, strict=True)
        rows = [[*prompt, *response, *self.suffix] for prompt, response in pairs]
        width = max(map(len, rows))
        device = self.model.device
        ids = [row + [self.fill] * (width - len(row)) for row in rows]
        real = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        logits = self.model(  # padded on the right: positions as the model itself counts them
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(real, device=device),
        ).logits  # [B, L, 3]
        starts = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
        lengths = torch.tensor([len(response) for response in responses], device=device)  # [B]
        columns = torch.arange(max(1, int(lengths.max())), device=device)  # [S]
        index = (starts[:, None] + columns).clamp(max=width - 1)  # [B, S]
        mask = columns < lengths[:, None]  # [B, S]
        return logits.gather(1, index[..., None].expand(-1, -1, 3)).float(), mask


class AlignedRewardModel(nn.Module):
    """The reward model as PPO sees it: classes at the policy's tokens."""

    def __init__(
        self,
        reader: OwnTokens,
        policy_tokenizer: PreTrainedTokenizerBase,
        eos_ids: Collection[int] = (),
    ):
        super().__init__()
        self.reader, self.policy_tokenizer, self.eos_ids = reader, policy_tokenizer, eos_ids

    def forward(self, batch: Batch) -> Tensor:
        """Class logits at each response token of the policy, [B, T, 3].

        Those of the reward model's token that covers the last character of the policy's; class 0
        where there is none: EOS, a separator that the reward model's tokenizer drops.
        """
        prompt_text = cache(lambda ids: decode(self.policy_tokenizer, ids))
        prompts = [prompt_text(tuple(ids)) for ids in batch.prompt_ids]
        answers = [
            token_offsets(self.policy_tokenizer, ids, self.eos_ids) for ids in batch.response_ids
        ]
        readings = self.reader.read(prompts, [text for text, _ in answers])
        logits = self._logits(readings)  # [B, S, 3]
        none = logits.new_tensor(NONE).expand(len(readings), 1, 3)
        places = tk.align.transfer(
            [reading.offsets for reading in readings],
            [spans for _, spans in answers],
            [torch.arange(1, len(reading.offsets) + 1) for reading in readings],
        )  # 1 + the covering token, 0 without one
        index = pad_rows(places, batch.targets)  # [B, T]
        table = torch.cat([none, logits], 1)  # [B, 1+S, 3]
        return table.gather(1, index[..., None].expand(-1, -1, 3))

    def _logits(self, readings: Sequence[Reading]) -> Tensor:
        """Class logits of its own response tokens, [B, S, 3]; what lies behind a response varies.

        In parts, because no prompt is shared here: B rows of it may be far more than the policy's.
        """
        width = max(len(r.prompt_ids) + len(r.response_ids) for r in readings)
        longest = max(1, *(len(r.response_ids) for r in readings))
        rows = max(1, TOKENS_AT_ONCE // max(1, width))
        parts = []
        for i in range(0, len(readings), rows):
            part = readings[i : i + rows]
            logits, _ = self.reader([r.prompt_ids for r in part], [r.response_ids for r in part])
            parts.append(nn.functional.pad(logits, (0, 0, 0, longest - logits.shape[1])))
        return torch.cat(parts)


def load_own_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model's folder.

    Errors: ValueError where it has no character offsets.
    """
    tokenizer = load_from(AutoTokenizer, path)
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: the tokenizer is not a fast one; rewards need character offsets")
    return tokenizer


def start_reward_model(
    own: str | Path | None,
    sft: Path,
    policy_tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: DType = "auto",
    *,
    pickles: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, from the folder `own` or else from SFT, with the tokenizer that it reads.

    `model.config.own_tokens` says whether that is another one than the policy's; it is saved with
    the model, so that PPO reads as training did.
    """
    path = sft if own is None else Path(own)
    model = load_reward_model(path, device, dtype, new_head=True, pickles=pickles)
    tokenizer = policy_tokenizer if own is None else load_own_tokenizer(path)
    model.config.own_tokens = own is not None and not reads_policy_tokens(
        model, tokenizer, policy_tokenizer
    )
    if model.config.own_tokens:
        say(f"{path}: read in its own tokens; its classes reach the policy's by characters")
    return model, tokenizer


def load_frozen(
    path: Path,
    policy_tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    eos_ids: Collection[int] = (),
    dtype: DType = "auto",
    *,
    base: PreTrainedModel | None = None,
) -> nn.Module:
    """The trained reward model in `path`, to give class logits [B, T, 3] at the policy's tokens.

    eos_ids: the policy's ends of an answer, which have no text and therefore class 0.
    base: the causal LM over which an adapter in `path` was made; its weights are shared.
    """
    if base is not None and is_adapter(path):
        return RewardModel(load_classifier(base, path))
    model = load_reward_model(path, device, dtype)
    if not getattr(model.config, "own_tokens", False):
        return RewardModel(model)
    reader = OwnTokens(model, load_own_tokenizer(path))
    return AlignedRewardModel(reader, policy_tokenizer, eos_ids)


@torch.no_grad()
def reads_policy_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Whether a token classifier can be given the policy's ids, prompts shared and padded left.

    One vocabulary, equal ids of a probe text, a linear head, and a trunk that looks back only and
    counts positions from 0: half of the probe, its positions given, has the states of the whole.
    """
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    if tokenizer.get_vocab() != policy_tokenizer.get_vocab():
        return False
    if ids != policy_tokenizer.encode(PROBE, add_special_tokens=False):
        return False
    trunk = model.base_model
    head = getattr(model, head_name(model), None)
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return False
    if not isinstance(head, nn.Linear):
        return False
    whole = torch.tensor([ids], device=model.device)  # [1, L]
    half = whole[:, : max(1, len(ids) // 2)]
    positions = torch.arange(half.shape[1], device=model.device)[None]
    states = trunk(input_ids=whole).last_hidden_state[:, : half.shape[1]]
    alone = trunk(input_ids=half, position_ids=positions).last_hidden_state
    if model.dtype != torch.float32:
        return relative_rms(states, alone) < rounding_error(model)
    return torch.allclose(states, alone, rtol=1e-4, atol=1e-4)


def _positions(model: PreTrainedModel) -> int:
    """Tokens that the model can read."""
    count = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if module.padding_idx is not None:  # RoBERTa's family counts on from that index
                count = module.num_embeddings - module.padding_idx - 1
    return min(count, MAX_TOKENS)
