"""Reward models of a study that are one linear layer over states that nothing trains.

The states behind a layer of the SFT model are computed once an answer and kept, so that a real
model can be asked about many numbers of labelled answers in the time that it takes to read them
once.  Both kinds of labels are given the same states, the same fit and the same choice of its
ridge; a model of whole answers reads the last token's state, or the mean of all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tppo.methods.config import MAX_TOKENS
from tppo.methods.reward_model import IRRELEVANT, RELEVANT, LabelledAnswer
from tppo.models.adapters import AdaptedClassifier, shared_copy
from tppo.models.batch import Batch
from tppo.models.part_size import PartSize
from tppo.models.policy import RewardModel
from tppo.rewards.sentence_model import Pooling, SentenceModel
from tppo.stages.study.config import Cell
from tppo.stages.study.material import Material, labelled_rows

RIDGES = (1.0, 10.0, 100.0, 1000.0)
FOLDS = 5
AT_ONCE = 32  # answers that the trunk reads at once
WEIGHTS = "head.safetensors"


def first_layers(trunk: nn.Module, layers: int) -> nn.Module:
    """The trunk's first layers with the norm behind its last, over the same weights.

    Errors: ValueError where it has not so many, or keeps them where no list of layers is.
    """
    cut: Any = shared_copy(trunk)
    have = cut.config.num_hidden_layers
    lists = [name for name, child in cut.named_children()
             if isinstance(child, nn.ModuleList) and len(child) == have]  # fmt: skip
    if len(lists) != 1 or not 1 <= layers <= have:
        raise ValueError(f"layer was {layers}, expected 1 to {have} of a model that has its layers "
                         f"in one list; {type(trunk).__name__} has {len(lists)}")  # fmt: skip
    setattr(cut, lists[0], getattr(cut, lists[0])[:layers])
    cut.config.num_hidden_layers = layers
    if getattr(cut.config, "layer_types", None) is not None:
        cut.config.layer_types = cut.config.layer_types[:layers]
    cut.requires_grad_(False)
    return cut.eval()


def states_of(material: Material, layer: int, rows: Sequence[LabelledAnswer]) -> list[Tensor]:
    """The states behind a layer of the SFT model at the tokens of each answer, [T, D] each.

    They are kept in the material's folder, and those that are not there yet are added.
    """
    run = material.run
    path = run.out / f"states-{layer}.safetensors"
    known = load_file(path) if path.exists() else {}
    keys = [_key(row) for row in rows]
    new = [i for i, key in enumerate(keys) if key not in known]
    if new:
        model = run.sft_model()
        trunk, size = first_layers(model.base_model, layer), PartSize(MAX_TOKENS, "")
        for first in range(0, len(new), AT_ONCE):
            part = new[first : first + AT_ONCE]
            batch = Batch([rows[i].prompt_ids for i in part], [rows[i].response_ids for i in part],
                          run.tokenizer.pad_token_id, run.device, run.config.prefix)  # fmt: skip
            with torch.no_grad():
                states = size.read(batch, lambda part: part.states(trunk, "reward")[0])  # [B, T, D]
            for k, i in enumerate(part):
                length = len(rows[i].response_ids)
                known[keys[i]] = states[k, :length].float().cpu().clone()
        work = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(known, work)
        work.replace(path)
    return [known[key] for key in keys]


def _key(row: LabelledAnswer) -> str:
    ids = json.dumps([[*row.prompt_ids], [*row.response_ids]])
    return hashlib.sha256(ids.encode()).hexdigest()


def pooled(states: Tensor, pooling: Pooling) -> Tensor:
    """One state of an answer, [D], as `SentenceModel` takes it."""
    return states[-1] if pooling == "last" else states.mean(0)


def fit_head(material: Material, cell: Cell) -> nn.Linear:
    """The head of a cell: class logits of tokens, or the score of whole answers."""
    arm = cell.arm
    rows = labelled_rows(material, material.pool[: cell.answers], cell.noise, arm.labels)
    states = states_of(material, arm.layer, rows)
    if arm.labels == "words":
        x, groups = torch.cat(states), [i for i, s in enumerate(states) for _ in range(len(s))]
        y = torch.tensor([label for row in rows for label in row.categories])
        return fit_linear(x, y, 3, groups, material.seed)
    x = torch.stack([pooled(s, arm.pooling) for s in states])
    y = torch.tensor([int(row.sentence == RELEVANT) for row in rows])
    both = fit_linear(x, y, 2, list(range(len(rows))), material.seed)
    head = nn.Linear(x.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(both.weight[1:] - both.weight[:1])
        head.bias.copy_(both.bias[1:] - both.bias[:1])
    return head


def fit_linear(x: Tensor, y: Tensor, classes: int, groups: Sequence[int], seed: int) -> nn.Linear:
    """Class logits W x + b by softmax regression with a ridge.

        min  sum_i -log softmax(W z_i + b)[y_i] + c / 2 |W|^2      z = (x - mean) / deviation

    x: [N, D].  y: classes [N].  groups: examples of one group are held out together.
    c is the one of RIDGES whose held-out likelihood is highest over FOLDS folds; nothing but these
    examples is looked at.
    """
    mean, deviation = x.double().mean(0), x.double().std(0).clamp(min=1e-6)
    z = (x.double() - mean) / deviation
    names = sorted(set(groups))
    random.Random(f"{seed}/folds").shuffle(names)
    fold_of = {name: k % FOLDS for k, name in enumerate(names)}
    fold = torch.tensor([fold_of[name] for name in groups])
    losses = {c: 0.0 for c in RIDGES}
    for k in range(min(FOLDS, len(names)) if len(names) > 1 else 0):
        held = fold == k
        for c in RIDGES:
            weight, bias = _softmax_regression(z[~held], y[~held], classes, c)
            losses[c] += cross_entropy(z[held] @ weight.T + bias, y[held], reduction="sum").item()
    weight, bias = _softmax_regression(z, y, classes, min(losses, key=losses.__getitem__))
    head = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(weight / deviation)
        head.bias.copy_(bias - (weight / deviation) @ mean)
    return head


def _softmax_regression(z: Tensor, y: Tensor, classes: int, c: float) -> tuple[Tensor, Tensor]:
    weight = z.new_zeros(classes, z.shape[1]).requires_grad_()
    bias = z.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The bias has a little of the ridge too: with one class alone it would grow for ever.
        penalty = c / 2 * weight.square().sum() + 0.005 * bias.square().sum()
        loss = (cross_entropy(z @ weight.T + bias, y, reduction="sum") + penalty) / len(z)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def save_head(head: nn.Linear, folder: Path) -> None:
    """Write it as `load_head` reads it."""
    save_file({name: x.detach().contiguous() for name, x in head.state_dict().items()},
              folder / WEIGHTS)  # fmt: skip


def load_head(folder: Path) -> nn.Linear:
    """The head in a folder."""
    weights = load_file(folder / WEIGHTS)
    head = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
    head.load_state_dict(weights)
    return head.requires_grad_(False)


def word_model(model: PreTrainedModel, layer: int, head: nn.Linear) -> nn.Module:
    """Class logits [B, T, 3] of a batch, from the first layers of the SFT model and a head."""
    trunk = first_layers(model.base_model, layer)
    return RewardModel(AdaptedClassifier(trunk, head.to(model.device)))


def sentence_model(
    model: PreTrainedModel, layer: int, pooling: Pooling, head: nn.Linear
) -> SentenceModel:
    """The scores of a batch, from the first layers of the SFT model and a head."""
    found = SentenceModel(first_layers(model.base_model, layer), head.in_features, pooling)
    found.head = head.to(model.device)
    return found


def head_scores(cell: Cell, head: nn.Linear, states: Sequence[Tensor]) -> list[float]:
    """How good a head thinks each answer: the relevant share of its words that it expects, or the
    score of the whole.
    """
    found = []
    for each in states:
        if cell.arm.labels == "sentences":
            found.append(head(pooled(each, cell.arm.pooling)).item())
            continue
        chance = head(each).softmax(-1).sum(0)
        both = chance[IRRELEVANT] + chance[RELEVANT]
        found.append((chance[RELEVANT] / both).item())
    assert all(map(math.isfinite, found))
    return found
