"""Folders of models: nothing in them is executed, and what is written generates as what was read.

An answer ends with any of the folder's EOS ids: those of its generation config, of its
configuration and of its tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tppo.models.adapters import has_adapter, save_adapter
from tppo.models.hub import is_gguf
from tppo.models.load import GENERATION_CONFIG, as_ids, load_from, read_generation_config
from tppo.models.vocabulary import phantoms


def eos_ids(tokenizer: PreTrainedTokenizerBase | None, *configs: Any) -> list[int]:
    """Every id that ends an answer, that of the tokenizer first.

    configs: generation configs and model configurations, None for one that is not there.
    """
    found = [] if tokenizer is None else as_ids(tokenizer.eos_token_id)
    for config in configs:
        parts = [config, *(c() for c in [getattr(config, "get_text_config", None)] if c)]
        found += [i for part in parts for i in as_ids(getattr(part, "eos_token_id", None))]
    return [i for i in dict.fromkeys(found) if i >= 0]  # -1 stands for none in some configurations


def model_eos_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Every id that ends an answer of a model as `load_policy` or `new_policy` gives it."""
    return eos_ids(tokenizer, model.generation_config, model.config)


def folder_eos_ids(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[int]:
    """Every id that ends an answer of the model in a folder, without reading its weights."""
    return eos_ids(tokenizer, *folder_configs(path))


def folder_configs(path: str | Path) -> list[Any]:
    """Generation config and configuration of a folder or GGUF file, those that are there."""
    path = Path(path)
    configured = is_gguf(path) or (path / "config.json").exists()
    found = [read_generation_config(path), load_from(AutoConfig, path) if configured else None]
    return [config for config in found if config is not None]


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Write a causal LM that plain `generate` samples and stops as the folder it came from; of an
    adapted one the adapter alone, which names its base.

    Its generation config is written as its author has it, with every EOS id that ended an answer
    in training, and with the tokens that training suppressed (`limit_vocabulary`) among the
    suppressed ones.  `save_pretrained` would refuse settings that transformers only warns about
    when it reads them, such as a temperature without `do_sample`.
    """
    config = copy.deepcopy(model.generation_config)
    author = as_ids(config.eos_token_id)
    ids = list(dict.fromkeys([*author, *model_eos_ids(tokenizer, model)]))
    if ids != author:
        config.eos_token_id = ids[0] if len(ids) == 1 else ids
    if unsampled := phantoms(model):
        config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *unsampled})
    if has_adapter(model):
        save_adapter(model, folder)
    else:
        with without_generation_settings(model):
            save_weights(model, folder)
    tokenizer.save_pretrained(folder)
    config.to_json_file(Path(folder) / GENERATION_CONFIG, keys_to_pop=["compile_config"])


def save_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """`save_pretrained` in the type that the weights had in the folder that the model came from.

    Memory may hold them wider, in float32 on a CPU.  A model from scratch is saved as it is.
    """
    dtype = getattr(model, "folder_dtype", model.dtype)
    if dtype == model.dtype:
        model.save_pretrained(folder)
        return
    made: dict[tuple[Any, ...], Tensor] = {}  # tied weights stay tied: they are saved once
    state = {}
    for name, tensor in model.state_dict().items():
        where = tied_key(tensor)
        if where not in made:
            made[where] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = made[where]
    model.save_pretrained(folder, state_dict=state)
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.dtype = dtype
    config.save_pretrained(folder)


def tied_key(tensor: Tensor) -> tuple[Any, ...]:
    """What is the same of two tensors if they are one under two names: tied weights."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


@contextmanager
def without_generation_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's own generation config is an empty one.

    `generate` takes from the model's own config whatever the config that it is given leaves open:
    a repetition penalty or suppressed tokens would bend the sampled distribution away from the
    log-probs of the policy.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
