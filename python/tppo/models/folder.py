"""Folders of models: nothing in them is executed, and what is written generates as what was read.

An answer ends with any of the folder's EOS ids: those of its generation config, of its
configuration and of its tokenizer.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

GENERATION_CONFIG = "generation_config.json"


def load_from(auto: Any, path: str | Path, **options: Any) -> Any:
    """`auto.from_pretrained` of a local folder, without its Python code and without a question.

    auto: `AutoModelForCausalLM`, `AutoTokenizer` or another such class.
    Errors: ValueError naming the folder, where it is none that transformers can read, cannot be
    read without running code of its own, or names a kernel of a hub, which transformers would fetch
    and run.
    """
    _check_kernels(Path(path) / "config.json")
    try:
        loaded = auto.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file meets errors of every kind in there
        raise ValueError(f"{path}: {_why(error)}") from error
    # An export does not hold the code that `auto_map` names, so it must not name it.
    vars(getattr(loaded, "config", loaded)).pop("auto_map", None)
    getattr(loaded, "init_kwargs", {}).pop("auto_map", None)
    return loaded


def _why(error: Exception) -> str:
    """What keeps a folder from being read, for a reader who does not know transformers."""
    text = str(error).strip() or "no reason was given"
    if "trust_remote_code" in text:
        return (
            "the model needs Python code of its folder (`auto_map` in its configuration), expected "
            "an architecture that transformers has: code of a model is never executed"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that holds other things than tensors, or a damaged one, "
            "expected safetensors: nothing in a pickle is executed"
        )
    kind = type(error).__name__
    return f"cannot be read ({kind}: {text.splitlines()[0]}), expected what save_pretrained writes"


def _check_kernels(file: Path) -> None:
    """Refuse a configuration whose attention or experts come from a repository of a hub."""
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}; expected a JSON object") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: it holds a {type(found).__name__}, expected a JSON object")
    pending = [found]
    while pending:
        settings = pending.pop()
        for name, value in settings.items() if isinstance(settings, dict) else ():
            pending.append(value)
            if name.endswith(("attn_implementation", "experts_implementation")):
                values = value.values() if isinstance(value, dict) else [value]
                if remote := [v for v in values if isinstance(v, str) and "/" in v]:
                    raise ValueError(
                        f"{file}: {name} is {remote[0]!r}, expected one of transformers' own, such "
                        "as 'sdpa': code from a hub is never executed"
                    )


def read_generation_config(path: str | Path) -> GenerationConfig | None:
    """The generation config of a folder, None where it has no such file.

    Errors: ValueError naming the file where it is no JSON object or has settings that
    transformers refuses; left to transformers, a broken file would count as an absent one.
    """
    file = Path(path) / GENERATION_CONFIG
    if not file.exists():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}, expected an object")
        config = GenerationConfig.from_pretrained(str(path), local_files_only=True)
        _as_ids(config.eos_token_id)
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(
            f"{file}: {error}; correct the file, or remove it to use the ids of config.json"
        ) from error
    return config


def eos_ids(tokenizer: PreTrainedTokenizerBase | None, *configs: Any) -> list[int]:
    """Every id that ends an answer, that of the tokenizer first.

    configs: generation configs and model configurations, None for one that is not there.
    """
    found = [] if tokenizer is None else _as_ids(tokenizer.eos_token_id)
    for config in configs:
        parts = [config, *(c() for c in [getattr(config, "get_text_config", None)] if c)]
        found += [i for part in parts for i in _as_ids(getattr(part, "eos_token_id", None))]
    return [i for i in dict.fromkeys(found) if i >= 0]  # -1 stands for none in some configurations


def model_eos_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Every id that ends an answer of a model as `load_policy` or `new_policy` gives it."""
    return eos_ids(tokenizer, model.generation_config, model.config)


def folder_eos_ids(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[int]:
    """Every id that ends an answer of the model in a folder, without reading its weights."""
    configured = (Path(path) / "config.json").exists()
    config = load_from(AutoConfig, path) if configured else None
    return eos_ids(tokenizer, read_generation_config(path), config)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Write a causal LM that plain `generate` samples and stops as the folder it came from.

    Its generation config is written as its author has it, with every EOS id that ended an answer
    in training.  `save_pretrained` would refuse settings that transformers only warns about when
    it reads them, such as a temperature without `do_sample`.
    """
    config = copy.deepcopy(model.generation_config)
    author = _as_ids(config.eos_token_id)
    ids = list(dict.fromkeys([*author, *model_eos_ids(tokenizer, model)]))
    if ids != author:
        config.eos_token_id = ids[0] if len(ids) == 1 else ids
    with without_generation_settings(model):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config.to_json_file(Path(folder) / GENERATION_CONFIG, keys_to_pop=["compile_config"])


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


def _as_ids(value: object) -> list[int]:
    """No, one or several token ids as a list."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"eos_token_id is {value!r}, expected a token id or a list of them")
    return list(ids)
