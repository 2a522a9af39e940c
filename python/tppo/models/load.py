"""Models from folders and GGUF files: nothing in them is executed, and what they are is checked.

Weights are held in the type of `compute_dtype`, which need not be the folder's; `folder_dtype` of a
loaded model remembers that, and an export has it again.  docs/precision.md gives the reasons.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from tppo.errors import short
from tppo.models.adapters import base_path, is_adapter, merge_into
from tppo.models.config import DType
from tppo.models.hub import is_gguf
from tppo.models.token_classifier import token_classifier

GENERATION_CONFIG, TOKENIZER = "generation_config.json", "tokenizer_config.json"
CLASSES = ("none", "irrelevant", "relevant")  # of a token reward model, as its export names them
HALF = (torch.float16, torch.bfloat16)
_OF_HEADER = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16,
              "BF16": torch.bfloat16}  # fmt: skip
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch {torch.__version__} sees no GPU")
    return torch.device(name)


def place(model: nn.Module, device: torch.device) -> Any:
    """The model on its device, dropout off: it stays off in training too."""
    return model.to(device).eval()


def load_policy(
    path: str | Path, device: torch.device, dtype: DType = "auto", *, pickles: bool = False
) -> PreTrainedModel:
    """A causal LM, dropout off, with the folder's generation config.

    path: a local folder or a GGUF file; an adapter's folder gives its base with the adapter merged.
    dtype: of the weights in memory, see `compute_dtype`.
    pickles: take weights from a pickle too, read without executing what is in it.
    Errors: ValueError naming the folder whose generation config transformers refuses, whose model
    needs code of its own, or which holds a pickle, quantised weights, an adapter without a base, or
    weights that are not all that its configuration describes, or more.
    """
    own = read_generation_config(path)  # transformers takes a broken one for an absent one
    model = _load(AutoModelForCausalLM, path, device, dtype, pickles)
    if own is not None and is_adapter(path):
        model.generation_config = own
    return model


def load_reward_model(
    path: str | Path,
    device: torch.device,
    dtype: DType = "auto",
    *,
    new_head: bool = False,
    pickles: bool = False,
) -> PreTrainedModel:
    """A three-class token classifier from a local folder; a causal LM's trunk is taken over.

    Of every causal family, see `token_classifier`.
    new_head: a head of other than three classes is replaced too, instead of an error.
    The rest is as in `load_policy`.
    """
    auto = token_classifier(load_from(AutoConfig, path))
    options = {"num_labels": 3, "ignore_mismatched_sizes": new_head}
    model = _load(auto, path, device, dtype, pickles, **options)
    model.config.id2label = dict(enumerate(CLASSES))
    model.config.label2id = {name: i for i, name in enumerate(CLASSES)}
    return model


def _load(
    auto: Any, path: str | Path, device: torch.device, dtype: DType, pickles: bool, **options: Any
) -> PreTrainedModel:
    if is_adapter(path):
        base = base_path(path, pickles=pickles)
        read_generation_config(base)
        whole = _load(auto, base, device, dtype, pickles, **options)
        return merge_into(whole, path, pickles=pickles)
    stored = torch.float32  # what the weights of a GGUF file are dequantised to
    if not is_gguf(path):
        config = load_from(AutoConfig, path)
        _check_weights(Path(path), config, pickles)
        stored = stored_dtype(Path(path), config)
    held = compute_dtype(dtype, stored, device)
    safe = None if pickles or is_gguf(path) else True
    model, report = load_from(
        auto, path, dtype=held, use_safetensors=safe, output_loading_info=True, **options
    )
    _check_names(path, model, report)
    if is_gguf(path):
        model = _unquantised(model)
    model.folder_dtype = stored
    return place(model, device)


def compute_dtype(dtype: DType, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which weights are held.

    "auto" is float32 on a CPU, and on a GPU bfloat16 for a folder of 16-bit weights, else float32.
    float16 is never computed in: its gradients underflow without a loss scale.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return torch.bfloat16 if device.type != "cpu" and stored in HALF else torch.float32


def stored_dtype(path: Path, config: Any) -> torch.dtype:
    """The type of a folder's weights: that of its configuration, else that of its first weights."""
    found = getattr(config, "dtype", None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                slices = map(weights.get_slice, weights.keys())
                kinds = [part.get_dtype() for part in slices]
                known = [_OF_HEADER[kind] for kind in kinds if kind in _OF_HEADER]
        except Exception:  # a damaged file: reading the weights says what is wrong with it
            return torch.float32
        if known:
            return known[0]
    return torch.float32


def _check_weights(path: Path, config: Any, pickles: bool) -> None:
    """Refuse a folder whose weights cannot be trained, or should not be read, with the remedy."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = (quantised.get("quant_method") if isinstance(quantised, dict)
                  else getattr(quantised, "quant_method", None))  # fmt: skip
        raise ValueError(
            f"{path / 'config.json'}: quantization_config is of the method {str(method)!r}, "
            "expected weights that are not quantised: they are trained; take the model that this "
            "one was made of"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not layers >= 1:
        raise ValueError(f"{path / 'config.json'}: num_hidden_layers is {layers}, expected one or "
                         "more")  # fmt: skip
    safe = any(path.glob("*.safetensors"))
    if not safe and not pickles and any((path / name).exists() for name in _PICKLED):
        raise ValueError(
            f"{path}: its weights are a pickle, pytorch_model.bin, expected safetensors; convert "
            "them (from_pretrained and save_pretrained), or --model.allow-pickle reads the tensors "
            "of a pickle and executes nothing"
        )


def _check_names(path: str | Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse weights of another model, of which transformers would draw the rest at random.

    A classifier's head may be missing, and weights that no part of the model is named like may be
    left over, such as the head of what the trunk was taken from.
    """
    needed = f"{model.base_model_prefix}." if model.get_output_embeddings() is None else ""
    missing = sorted(name for name in report["missing_keys"] if name.startswith(needed))
    own = {re.sub(r"\d+", "N", name) for name in model.state_dict()}
    more = sorted(name for name in report["unexpected_keys"] if re.sub(r"\d+", "N", name) in own)
    for names, what in ((missing, "lack"), (more, "hold, beyond what it has,")):
        if names:
            rest = f" and {len(names) - 1} others" if len(names) > 1 else ""
            raise ValueError(
                f"{path}: its weights {what} {short(names[0])}{rest} of the {type(model).__name__} "
                "that config.json describes; expected the weights and configuration of one model"
            )


def _unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that transformers saves: it takes one from GGUF for quantised."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    again: Any = type(model)(config)
    again.to(model.dtype)
    again.load_state_dict(model.state_dict())
    again.generation_config = model.generation_config
    return again


def load_from(auto: Any, path: str | Path, **options: Any) -> Any:
    """`auto.from_pretrained` of a local folder, without its Python code and without a question.

    auto: `AutoModelForCausalLM`, `AutoTokenizer` or another such class.  path: the folder, or a
    GGUF file, which holds model and tokenizer in one; of an adapter's folder its base is read, and
    the tokenizer where the folder has none.
    Errors: ValueError naming the path, where it is none that transformers can read, cannot be read
    without running code of its own, or names a kernel of a hub, which transformers would fetch and
    run.
    """
    folder = Path(path)
    if is_adapter(folder) and not (auto is AutoTokenizer and (folder / TOKENIZER).exists()):
        return load_from(auto, base_path(folder), **options)
    if is_gguf(path):
        _need_gguf(folder)
        folder, options = folder.parent, options | {"gguf_file": folder.name}
    else:
        _check_kernels(folder / "config.json")
    try:
        loaded = auto.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file meets errors of every kind in there
        raise ValueError(f"{path}: {_why(error)}") from error
    # An export does not hold the code that `auto_map` names, so it must not name it.
    found = loaded[0] if isinstance(loaded, tuple) else loaded
    vars(getattr(found, "config", found)).pop("auto_map", None)
    getattr(found, "init_kwargs", {}).pop("auto_map", None)
    return loaded


def _need_gguf(path: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError(
            f"{path}: a GGUF file is read with the package gguf, which is not installed: "
            "pip install 'tppo-kernels[gguf]'"
        ) from None


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
        as_ids(config.eos_token_id)
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(
            f"{file}: {error}; correct the file, or remove it to use the ids of config.json"
        ) from error
    return config


def as_ids(value: object) -> list[int]:
    """No, one or several token ids as a list."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"eos_token_id is {value!r}, expected a token id or a list of them")
    return list(ids)
