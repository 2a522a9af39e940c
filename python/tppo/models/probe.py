"""What a token reward model says of one short text, written beside it.

By it a server of the model is told from one of other weights, of another tokenizer, or of another
form of output, without the weights: `reward_probe.json` of the export.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from tppo.models.own_tokens import PROBE
from tppo.store.jsonl import write_json

FILE = "reward_probe.json"


class Probe(NamedTuple):
    """A text, its tokens, and the class logits of each of them."""

    text: str
    ids: list[int]
    logits: list[list[float]]  # [L, C]
    own_tokens: bool
    """Whether the model reads text with a tokenizer of its own, and not the policy's tokens."""


@torch.no_grad()
def write_probe(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write what a token classifier, which takes `input_ids`, says of the text."""
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]  # [L, C]
    own = bool(getattr(model.config, "own_tokens", False))
    write_json(Path(folder) / FILE, Probe(PROBE, ids, logits.float().tolist(), own)._asdict())


def read_probe(folder: str | Path) -> Probe:
    """What the reward model in a folder said of the text.

    Errors: ValueError naming the file where it is not there, or not what `write_probe` writes.
    """
    file = Path(folder) / FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        probe = Probe(str(found["text"]), found["ids"], found["logits"], found["own_tokens"])
        numbers = [x for row in probe.logits for x in row]
        sound = len(probe.ids) == len(probe.logits) > 0 and all(map(math.isfinite, numbers))
    except FileNotFoundError:
        raise ValueError(
            f"{file}: no such file, expected what the reward model says of a short text, by which "
            "its server is known: `tppo train-rm` of this version writes it beside the model"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {error!r}, expected a text, its ids and their logits") from error
    if not sound:
        raise ValueError(f"{file}: {len(probe.ids)} ids and {len(probe.logits)} rows of logits, "
                         "expected a row of finite numbers for each id")  # fmt: skip
    return probe
