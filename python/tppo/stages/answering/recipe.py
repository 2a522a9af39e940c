"""How a model was asked in training, which lies beside its weights as `tppo.json`.

The weights and the tokenizer, with its chat template, do not say what a prompt looks like, how many
queries an answer has, or how its tokens were paid.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tppo.errors import DataError
from tppo.methods.config import PPOConfig
from tppo.sessions.session import Session
from tppo.settings import Count, NonNegative, Positive, Text, from_dict, section
from tppo.store.jsonl import bounded_bytes, parse_object, plain, write_json

FILE = "tppo.json"


@section
class Paid:
    """How a token reward model paid the tokens in training."""

    mode: Literal["argmax", "expected"] = "expected"
    """Of the likeliest class, or the expectation over classes."""
    values: tuple[float, float, float] = (0.0, -0.5, 0.5)
    """Reward of the classes none, irrelevant, relevant."""
    length_alpha: NonNegative | None = None
    """Steepness of the length penalty; None: no penalty."""
    query_tokens: Positive = 1.0
    """Median tokens of a query, which the penalty goes by."""

    def suggested_length(self, queries: int) -> float:
        """Tokens after which the length penalty bites."""
        return self.query_tokens * queries + queries - 1


@section
class Recipe:
    """How a model was asked in training."""

    prompt: Literal["history", "as given"] = "history"
    """The profile and history of a user, or a text or chat as it stands."""
    queries: Count = 1
    """How many next queries were asked for most often."""
    events: tuple[Text, ...] = ("search",)
    """Types of the events of the training data, the most frequent first."""
    max_new_tokens: Count = 256
    """Cap of an answer, in tokens."""
    temperature: Positive = 1.0
    """Of the answers in training."""
    paid: Paid = field(default_factory=Paid)
    """How its tokens were paid."""
    version: Annotated[int, Field(ge=1, le=1)] = 1
    """Of this file."""


def recipe_of(
    sessions: Sequence[Session], cap: int, temperature: float = 1.0, paid: Paid | None = None
) -> Recipe:
    """The recipe of a model that was trained on sessions, with answers of at most `cap` tokens."""
    queries = Counter(len(session.targets) for session in sessions)
    types = Counter(event.type for session in sessions for event in session.history)
    return Recipe(
        queries=queries.most_common(1)[0][0],
        events=tuple(name for name, _ in types.most_common()) or ("search",),
        max_new_tokens=cap,
        temperature=temperature,
        paid=paid or Paid(),
    )


def paid_by(config: PPOConfig, query_tokens: float) -> Paid:
    """How PPO with these settings pays the tokens."""
    return Paid(config.reward, config.reward_values, config.length_alpha, float(query_tokens))


def write_recipe(folder: str | Path, recipe: Recipe) -> None:
    """Write the recipe of the model in `folder`."""
    write_json(Path(folder) / FILE, plain(recipe))


def copy_recipe(source: Path, folder: Path) -> None:
    """The recipe of a model for another form of it."""
    if (source / FILE).exists():
        shutil.copyfile(source / FILE, folder / FILE)


def read_recipe(folder: Path) -> Recipe:
    """The recipe of the model in `folder`.

    Errors: DataError naming the file where it is not there, or is not what `write_recipe` writes.
    """
    file = folder / FILE
    try:
        text = bounded_bytes(file)
    except OSError:
        raise DataError(
            f"{file}: no such file, expected a model that `tppo` exported: the file says how the "
            "model was asked in training. One that was exported before there was such a file gets "
            "it when its stage runs again"
        ) from None
    return from_dict(Recipe, parse_object(file, 1, text), str(file))
