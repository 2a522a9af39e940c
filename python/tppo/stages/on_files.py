"""A training on a file of preferences, without a run of stages: what SER and PIT have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from tppo import stopping
from tppo.errors import DataError
from tppo.models.adapters import need_peft
from tppo.models.config import AdapterConfig, ModelConfig
from tppo.models.hub import locate
from tppo.models.load import load_from, resolve_device
from tppo.models.tokenizer import load_tokenizer
from tppo.progress import say
from tppo.stages.given import check_model, check_place, check_sections, checked_seed
from tppo.stages.lengths import positions_of
from tppo.stages.preferences import Preference
from tppo.store.jsonl import plain
from tppo.store.run_folder import RunFolder


class Base(NamedTuple):
    """The model that a training starts from."""

    path: Path
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    positions: int


def check_arguments(
    model: Any, device: Any, prefix: Any, seed: Any, **sections: tuple[Any, type]
) -> None:
    """What can be known of arguments before a file is read.

    Errors: DataError naming the argument; ImportError without the library of adapters.
    """
    check_model(model)
    check_sections(**sections)
    check_place(device, prefix)
    checked_seed(seed)
    lora = sections["lora"][0]
    if isinstance(lora, AdapterConfig) and lora.on:
        need_peft()


def check_labelled(pairs: list[Preference], remedy: str = "") -> None:
    """Errors: DataError naming the first pair that nobody has labelled."""
    for pair in pairs:
        if not pair.labelled:
            raise DataError(f"{pair.place}: had 'answers', expected 'chosen' and 'rejected'"
                            f"{remedy}")  # fmt: skip


def base_of(model: str | Path, loading: ModelConfig, device: str) -> Base:
    """Where a model lies, and how it reads.  Errors: DataError where there is none."""
    path = locate(model, loading.revision, flag="model", pickles=loading.allow_pickle)
    positions = positions_of(load_from(AutoConfig, path))
    return Base(path, load_tokenizer(path), resolve_device(device), positions)


def mark_of(given: Any) -> str:
    """What tells pairs from others."""
    return hashlib.sha256(json.dumps(plain(given)).encode()).hexdigest()


def once(
    stage: str,
    out: str | Path,
    base: Base,
    identity: Mapping[str, Any],
    seed: int,
    train: Callable[[Path], Any],
) -> Path:
    """The folder of a training: as it was finished before, or trained now, from where it was when
    it was stopped.
    """
    folder, final = RunFolder(out), Path(out) / stage
    if folder.done(stage, [base.path], identity, seed):
        say(f"{final}: finished before, nothing is trained again")
        return final
    with stopping.listening(), folder.lock(), folder.stage(
        stage, [base.path], identity, seed, resume=True
    ) as work:
        train(work)
    return final


def need(pairs: Path | None, model: Path | None, whose: str) -> tuple[Path, Path]:
    """The two flags that a command on files cannot do without.

    Errors: DataError naming the one that is not given.
    """
    for name, value, expected in (
        ("--pairs", pairs, "a JSONL file of pairs"), ("--model", model, f"the model {whose}")
    ):  # fmt: skip
        if value is None:
            raise DataError(f"{name} was not given, expected {expected}")
    assert pairs is not None and model is not None
    return pairs, model
