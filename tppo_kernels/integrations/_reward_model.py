"""The token reward model that `tppo train-rm` exports, read by transformers alone.

    rewards = TokenRewardModel("runs/demo/train-rm/model").rewards(prompts, responses)

The folder is a token classifier of three classes, as `save_pretrained` writes it: `config.json`,
`model.safetensors` and the tokenizer. Classes: 0 no reward, 1 irrelevant, 2 relevant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tppo_kernels as tk

_HEAD = ("score.weight", "score.bias")


class TokenRewardModel:
    """Rewards of the tokens of responses, from the classes of a frozen reward model.

        r_t = sum_c softmax(logits_t)_c values[c] sigmoid(6 - alpha (l_t - suggested_length))

    by `tk.token_rewards`, at the tokens that the policy has written; mode "argmax" takes the value
    of the likeliest class alone; without `suggested_length` no penalty. The model reads the
    policy's own token ids: it was trained on them.

    model: the exported folder. mode, values, alpha: as in `tk.token_rewards`; those of the run that
    exported it stand in its `config.yaml` under `ppo`. device: "auto" is CUDA where torch sees a
    GPU, else the CPU. max_tokens: tokens of prompts and responses that are read at once.

    Raises ValueError where the folder holds no token classifier of three classes, an adapter
    without its base, or a model that reads text with a tokenizer of its own.
    """

    def __init__(self, model: str | Path, *, mode: str = "expected",
                 values: Sequence[float] = (0.0, -0.5, 0.5), alpha: float = 2.0,
                 device: str = "auto", max_tokens: int = 65_536) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.mode, self.values, self.alpha = mode, tuple(values), alpha
        self.max_tokens = max_tokens
        self.model = load_token_classifier(model).to(device).eval()
        self.device = torch.device(device)
        config = self.model.config.get_text_config()
        self.vocabulary = config.vocab_size
        self.pad = next((i for i in (config.pad_token_id, config.eos_token_id)
                         if isinstance(i, int) and i >= 0), 0)

    @torch.no_grad()
    def rewards(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
                masks: Sequence[Sequence[int]] | None = None,
                suggested_lengths: Sequence[float] | None = None) -> list[list[float]]:
        """A reward for each token of each response, 0 where a token is not the policy's.

        prompts, responses: token ids. masks: 1 at tokens that the policy has written, 0 at those of
        a tool; None: all of them. suggested_lengths: one a response, in tokens.

        Raises ValueError where lengths differ, a token is not in the model's vocabulary, or a
        reward is not finite: a broken reward model would train the policy silently.
        """
        _check(prompts, responses, masks, suggested_lengths, self.vocabulary)
        found: list[list[float]] = [[] for _ in responses]
        for rows in _parts([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)],
                           self.max_tokens):
            rows = [i for i in rows if len(responses[i])]
            if not rows:
                continue
            logits = self._logits([prompts[i] for i in rows], [responses[i] for i in rows])
            mask = _padded([masks[i] if masks is not None else [1] * len(responses[i])
                            for i in rows], 0, left=False).to(self.device) > 0  # [B, T]
            length = None if suggested_lengths is None else torch.tensor(
                [float(suggested_lengths[i]) for i in rows], device=self.device)  # [B]
            paid = tk.token_rewards(logits, mask, mode=self.mode, values=self.values,
                                    suggested_length=length, alpha=self.alpha).rewards  # [B, T]
            paid = paid.masked_fill(mask & ~logits.isfinite().all(-1), torch.nan)
            for i, row in zip(rows, paid.tolist(), strict=True):
                found[i] = row[:len(responses[i])]
                if not all(map(math.isfinite, found[i])):
                    raise ValueError(f"the reward of response {i} is {found[i]}, expected finite "
                                     "numbers: the reward model's weights or dtype are broken")
        return found

    def _logits(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
                ) -> Tensor:
        """Class logits at the tokens of the responses, [B, T, 3] fp32."""
        width, longest = max(map(len, prompts)), max(map(len, responses))
        ids = torch.cat([_padded(prompts, self.pad, left=True),
                         _padded(responses, self.pad, left=False)], 1)  # [B, P + T]
        real = torch.cat([_padded([[1] * len(p) for p in prompts], 0, left=True),
                          _padded([[1] * len(r) for r in responses], 0, left=False)], 1)
        logits = self.model(input_ids=ids.to(self.device), attention_mask=real.to(self.device),
                            position_ids=(real.cumsum(1) - 1).clamp(min=0).to(self.device)).logits
        return tk.response_states(logits.float(), width, longest, align="reward")


def load_token_classifier(folder: str | Path) -> Any:
    """A token classifier of three classes from an exported folder; nothing in it is executed.

    Of families for which transformers has no class (Gemma 3 and others) the trunk and the head are
    read apart: the folder holds both under plain names.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter, expected a whole reward model: "
                         "`tppo merge` writes one, and examples/integrations/cluster_data.py")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json, expected the folder of a reward model, as "
                         "RUN/train-rm/model of a run of tppo")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.num_labels != 3:
        raise ValueError(f"{folder} has {config.num_labels} classes, expected the 3 of a token "
                         "reward model: no reward, irrelevant, relevant")
    if getattr(config, "own_tokens", False):
        raise ValueError(f"{folder} reads text with a tokenizer of its own, expected a model that "
                         "reads the policy's tokens: `tppo train-rm` without --reward-model")
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return AutoModelForTokenClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False)
    return _TrunkAndHead(folder)


class _TrunkAndHead(nn.Module):
    """A trunk of transformers and the linear head that its folder holds beside it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        super().__init__()
        self.trunk: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False)
        self.config = self.trunk.config
        weight, bias = (_tensor(folder, name).to(self.trunk.dtype) for name in _HEAD)
        self.score = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        self.score.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, **inputs: Tensor) -> Any:
        """Class logits [B, L, C] of the tokens."""
        from transformers.modeling_outputs import TokenClassifierOutput

        return TokenClassifierOutput(logits=self.score(self.trunk(**inputs).last_hidden_state))


def _tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a folder's safetensors, whole or in shards."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    file = folder / files.get(name, "model.safetensors")
    with safe_open(file, "pt") as weights:
        if name not in weights.keys():
            raise ValueError(f"{file} has no {name}, expected the head of a token classifier")
        return weights.get_tensor(name)


def deal(columns: Sequence[Any], hands: int) -> list[list[Any]]:
    """The rows of columns in turn to each of several; None stands for a column that is not given.
    """
    return [[None if column is None else column[i::hands] for column in columns]
            for i in range(hands)]


def gather(shares: Sequence[Sequence[Any]]) -> list[Any]:
    """What `deal` has given away, in its order."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def _padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> Tensor:
    """Rows of whole numbers as [B, longest], filled on one side."""
    longest = max(map(len, rows))
    return torch.tensor([[fill] * (longest - len(row)) * left + list(row)
                         + [fill] * (longest - len(row)) * (not left) for row in rows],
                        dtype=torch.int64)


def _parts(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in parts of about equal lengths, of at most `max_tokens` with padding, or of one."""
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= max_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def _check(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
           masks: Sequence[Sequence[int]] | None, suggested_lengths: Sequence[float] | None,
           vocabulary: int) -> None:
    """Raises ValueError that names the argument, the row, and what was expected."""
    for name, given in (("prompts", prompts), ("masks", masks),
                        ("suggested_lengths", suggested_lengths)):
        if given is not None and len(given) != len(responses):
            raise ValueError(f"{name} has {len(given)} rows, expected {len(responses)}: one a "
                             "response")
    for i, response in enumerate(responses):
        if masks is not None and len(masks[i]) != len(response):
            raise ValueError(f"masks[{i}] has {len(masks[i])} tokens, expected {len(response)}: "
                             "those of its response")
        beyond = max([*prompts[i], *response], default=0)
        if beyond >= vocabulary:
            raise ValueError(f"row {i} has token {beyond}, expected ids below {vocabulary}, the "
                             "reward model's vocabulary: was it trained on this policy's tokens?")
