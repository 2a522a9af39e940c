"""LoRA (Hu et al., 2021): roles that share one frozen base and train an adapter each.

    y = W x + (alpha / rank) B A x        W frozen; A [rank, in] starts random, B [out, rank] zero

Each role (policy, critic's trunk, token reward model) has modules of its own, whose weights are the
base's own tensors, and an adapter beside them; the reference is the base without one.  So all of
them take the memory of one base, and none has to be made the active one before it is read: layers
that are computed again in backward, shared prompts and sampling are those of any other model.

peft makes the adapters, and reads what is written here.  Adapters have no dropout, because old and
new log-probs of PPO must be those of one model.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tppo.models.config import ALL_LINEAR, AdapterConfig
from tppo.models.hub import locate
from tppo.models.token_classifier import head_name

if TYPE_CHECKING:
    from peft import LoraConfig

M = TypeVar("M", bound=nn.Module)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # of the one adapter that a role has
_OF_PEFT = "base_model.model."  # what peft's files put before the name of each weight
_MARK = f".{NAME}.weight"


def need_peft() -> Any:
    """The package.  Errors: ImportError with the command that installs it."""
    try:
        import peft
    except ImportError:
        raise ImportError(
            "LoRA needs the package peft, which is not installed: pip install 'tppo-kernels[lora]'"
        ) from None
    return peft


def shared_copy(model: M) -> M:
    """The model once more: modules of its own, and the very tensors of the model as weights."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


class Origin(NamedTuple):
    """Where a base comes from, as an adapter's folder says it: a path, or an id of the hub."""

    name: str = ""
    revision: str | None = None


UNNAMED = Origin()


def origin_of(given: str | Path | None, found: Path) -> Origin:
    """The origin of a model of the user: `found`, or the id of the hub that was `given` for it."""
    if given is None or Path(given).exists():
        return Origin(str(found.absolute()))
    return Origin(str(given), found.name)


def add_adapter(
    model: M, settings: AdapterConfig, *, seed: int, origin: Origin = UNNAMED
) -> M:
    """The model, frozen, with a new adapter in place, which changes no output yet.

    model: of transformers; all of its weights are frozen from here on, in every copy that shares
    them.
    Errors: ValueError where a module of `settings.target_modules` is not there, or is not linear.
    """
    peft = need_peft()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    names = list(settings.target_modules)
    if names == [ALL_LINEAR]:
        names = [n for n, m in model.named_modules() if _is_linear(m) and m is not head]
    elif head is not None:
        check_targets(model, settings)
    else:  # a trunk, which lacks the head
        names = [name for name in names if _called(model, name)]
        if not names:
            raise ValueError(f"lora.target_modules was {list(settings.target_modules)}, of which "
                             f"{type(model).__name__} has none: critic and reward model would have "
                             "no adapter; expected layers of the trunk among them")  # fmt: skip
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,
        target_modules=names,
        base_model_name_or_path=origin.name,
        revision=origin.revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, config)
    return model


def _inject(model: nn.Module, config: LoraConfig) -> None:
    peft = need_peft()
    with warnings.catch_warnings():  # of tied weights, and of layers that are stored transposed
        warnings.simplefilter("ignore")
        try:
            peft.inject_adapter_in_model(config, model, NAME)
        except ValueError as error:
            raise ValueError(f"no adapter for {type(model).__name__}: {error}") from error
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}
    if kinds != {"Linear"}:
        raise ValueError(f"no adapter for {type(model).__name__}: it would be of the kinds "
                         f"{', '.join(sorted(kinds))} of peft, expected Linear alone")  # fmt: skip
    vars(model)["adapter"] = config


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _called(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that peft finds under a name of `target_modules`."""
    return [m for n, m in model.named_modules() if n == name or n.endswith(f".{name}")]


def check_targets(model: nn.Module, settings: AdapterConfig) -> None:
    """The layers of `settings.target_modules` are there.

    Errors: ValueError naming the first that is not, or is not linear.
    """
    for name in settings.target_modules:
        if name == ALL_LINEAR:
            continue
        chosen = _called(model, name)
        wrong = [m for m in chosen if not _is_linear(m)]
        if wrong or not chosen:
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules()
                             if _is_linear(m)})  # fmt: skip
            was = f", which is a {type(wrong[0]).__name__}" if wrong else ""
            raise ValueError(f"lora.target_modules had {name!r}{was}, expected linear layers of "
                             f"{type(model).__name__}: {', '.join(linear)}, or {ALL_LINEAR!r} for "
                             "all but the head")  # fmt: skip


def add_to_classifier(
    model: Any, settings: AdapterConfig, *, seed: int, origin: Origin = UNNAMED
) -> Any:
    """A token classifier with a new adapter in its trunk; its head is trained whole beside it."""
    trunk = add_adapter(model.base_model, settings, seed=seed, origin=origin)
    vars(model)["adapter"] = trunk.adapter
    return model


def has_adapter(model: nn.Module) -> bool:
    """Whether the model is frozen but for an adapter."""
    return "adapter" in vars(model)


def adapter_settings(model: Any) -> dict[str, Any]:
    """Rank and alpha of an adapted model, nothing of another one."""
    if not has_adapter(model):
        return {}
    return {"lora_rank": model.adapter.r, "lora_alpha": model.adapter.lora_alpha}


def adapter_state(model: nn.Module, head: str | None = None) -> dict[str, Tensor]:
    """The weights of the adapter, and of a head beside it, by the names of peft's files."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(_MARK) or head is not None and name.startswith(f"{head}."):
            found[_OF_PEFT + name.replace(_MARK, ".weight")] = tensor.detach().cpu().contiguous()
    return found


def save_adapter(
    model: Any, folder: str | Path, *, task: str = "CAUSAL_LM", head: str | None = None
) -> None:
    """Write the adapter as peft reads it: `PeftModel.from_pretrained(base, folder)`.

    head: the name of a head that is trained whole beside it.
    """
    config = copy.deepcopy(model.adapter)
    config.target_modules = _short(model, config.target_modules)
    config.task_type, config.inference_mode = task, True
    config.modules_to_save = None if head is None else [head]
    config.save_pretrained(str(folder))
    save_file(adapter_state(model, head), Path(folder) / WEIGHTS)


def save_classifier(model: Any, folder: str | Path) -> None:
    """Write adapter and head of a token classifier."""
    save_adapter(model, folder, task="TOKEN_CLS", head=head_name(model))


def _short(model: nn.Module, targets: Collection[str]) -> list[str]:
    """The last parts of the names of the layers alone, where that says the same; in order, because
    a set has another one in each run.
    """
    last = {name.rpartition(".")[2] for name in targets}
    others = (name.rpartition(".")[2] for name, module in model.named_modules()
              if not hasattr(module, "lora_A"))  # fmt: skip
    return sorted(targets if last.intersection(others) else last)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return (Path(path) / CONFIG).is_file()


def base_path(folder: str | Path, *, pickles: bool = False) -> Path:
    """The model that the adapter in `folder` was made over.

    It is named by a path from the folder itself, by another path, or by an id of the hub.
    Errors: ValueError naming the file where it names none, or one that is not there.
    """
    file = Path(folder) / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        name, revision = found.get("base_model_name_or_path"), found.get("revision")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: {error}; expected the JSON object that peft writes") from error
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{file}: base_model_name_or_path was {name!r}, expected the folder or "
                         "the hub id of the model that the adapter was made over")  # fmt: skip
    beside = Path(folder) / name
    if beside.exists():
        return beside.resolve()
    try:
        local = Path(name).exists()
        return locate(name, None if local else revision, pickles=pickles)
    except ValueError as error:
        raise ValueError(f"{file}: base_model_name_or_path is {name!r}: {error}; write there where "
                         "the base lies now") from error  # fmt: skip


def load_adapter(model: M, folder: str | Path, *, trained: bool = False) -> M:
    """The model, frozen, with the adapter that `save_adapter` has written into `folder`.

    trained: the adapter itself is not frozen, and is trained on.
    Errors: ValueError where the folder holds another kind of adapter, or does not fit the model.
    """
    config = need_peft().PeftConfig.from_pretrained(str(folder))
    _inject(model, config)
    given = load_file(Path(folder) / WEIGHTS)
    _fill(model, {_own_name(name): tensor for name, tensor in given.items()}, folder)
    if trained:
        for name, parameter in model.named_parameters():
            if name.endswith(_MARK):
                parameter.requires_grad_()
    return model


def _own_name(name: str) -> str:
    """A name of peft's files as the model has it."""
    name = name.removeprefix(_OF_PEFT)
    return name.removesuffix(".weight") + _MARK if ".lora_" in name else name


def _fill(model: nn.Module, given: dict[str, Tensor], where: Any) -> None:
    names = {_own_name(name) for name in adapter_state(model)}
    if given.keys() != names:
        odd = sorted(given.keys() ^ names)[0]
        raise ValueError(f"{where}: {len(given)} weights of an adapter, expected {len(names)} for "
                         f"{type(model).__name__}; {odd} is on one side alone")  # fmt: skip
    model.load_state_dict(given, strict=False)


class AdaptedClassifier(nn.Module):
    """A token classifier over a trunk that it shares with others; what `class_logits` reads."""

    def __init__(self, trunk: nn.Module, head: nn.Linear):
        super().__init__()
        self.base_model, self.score = trunk, head


def load_classifier(base: Any, folder: str | Path) -> AdaptedClassifier:
    """The token classifier whose adapter and head lie in `folder`, over a causal LM's own trunk.

    Errors: ValueError where they do not fit the model.
    """
    own = load_file(Path(folder) / WEIGHTS)
    trunk = shared_copy(base).base_model
    config = need_peft().PeftConfig.from_pretrained(str(folder))
    (name,) = config.modules_to_save
    _inject(trunk, config)
    prefix = f"{_OF_PEFT}{base.base_model_prefix}."
    parts = {_own_name(n.replace(prefix, _OF_PEFT, 1)): t for n, t in own.items()}
    weight = parts.pop(f"{name}.weight")
    bias = parts.pop(f"{name}.bias", None)
    _fill(trunk, parts, folder)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return AdaptedClassifier(trunk, head.to(base.device, base.dtype)).eval()


@torch.no_grad()
def merged(model: Any) -> Any:
    """A plain model, to be saved: adapted weights are W + (alpha / rank) B A, summed in float32.

    What is not adapted stays shared with `model`; the sums lie in the memory of the host.
    """
    plain = shared_copy(model)
    for name, layer in _adapted_layers(plain):
        base, weight = layer.get_base_layer(), layer.get_base_layer().weight
        if weight is plain.get_input_embeddings().weight:  # a head that is no longer tied
            _say_untied(plain)
        delta = layer.lora_B[NAME].weight.float() @ layer.lora_A[NAME].weight.float()
        delta = (delta.T if layer.fan_in_fan_out else delta) * layer.scaling[NAME]
        base.weight = nn.Parameter((weight.float() + delta).to(weight.dtype).cpu(), False)
        _put(plain, name, base)
    return _forget_adapter(plain)


def unadapted(model: Any) -> Any:
    """The base of an adapted model, whose weights it shares."""
    plain = shared_copy(model)
    for name, layer in _adapted_layers(plain):
        _put(plain, name, layer.get_base_layer())
    return _forget_adapter(plain)


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules()
            if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer")]  # fmt: skip


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _forget_adapter(model: Any) -> Any:
    for module in (model, model.base_model):
        for left in ("adapter", "peft_config", "fused_head"):
            vars(module).pop(left, None)
    return model


def merge_into(model: Any, folder: str | Path, *, pickles: bool = False) -> Any:
    """The model with the adapter in `folder` added to its weights, of any kind that peft knows.

    Errors: ValueError where the adapter is a pickle, or peft cannot read or merge it.
    """
    peft = need_peft()
    if not pickles and not (Path(folder) / WEIGHTS).exists():
        raise ValueError(f"{folder}: the adapter has no {WEIGHTS}, expected one; --model.allow-"
                         "pickle reads the tensors of a pickle and executes nothing")  # fmt: skip
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
            _untie(model)
            plain = adapted.merge_and_unload()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a damaged file, of shapes that differ, of another base
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{folder}: the adapter does not fit its base: {reason}") from error
    vars(plain).pop("peft_config", None)
    return plain.requires_grad_(True)


def _untie(model: Any) -> None:
    """Give the head a weight of its own where it shares that of the embeddings and either of them
    has an adapter, which would be added to both.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embeddings.weight is not head.weight:
        return
    if type(embeddings).__module__.startswith("peft.") or type(head).__module__.startswith("peft."):
        inner = getattr(head, "base_layer", head)
        inner.weight = nn.Parameter(head.weight.detach().clone())
        _say_untied(model)


def _say_untied(model: Any) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
