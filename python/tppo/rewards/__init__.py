"""Rewards: responses become numbers at their tokens.

A reward is any callable that fits `Reward`: the token reward model, the total of another reward at
the last token, a function of the user.  A reward that runs a model of its own is an `nn.Module`:
PPO then freezes its weights, and checks before the first step that they are finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tppo.models.tokenizer import decode, token_offsets

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tppo.models.batch import Batch


@dataclass(frozen=True)
class Questions:
    """Prompts to answer, one entry a response: a prompt with G responses stands in G rows, which
    follow each other.
    """

    ids: Sequence[Sequence[int]]
    """What the policy reads."""
    prompts: Sequence[Any] = ()
    """As the user gave them: texts, or lists of chat messages; empty where only ids are known."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """The data set's other columns by name, one entry a row each."""

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Sequence[int]) -> Questions:
        """Some of the rows, in the order of `index`; a row may stand in it several times."""
        return Questions(
            _taken(self.ids, index), _taken(self.prompts, index), _columns(self.columns, index)
        )


@dataclass(frozen=True)
class Answers:
    """What a reward may look at besides token ids: one entry a response."""

    prompts: Sequence[Any]
    """As the user gave them: texts, or lists of chat messages."""
    response_ids: Sequence[Sequence[int]]
    """The policy's tokens, the EOS included where it was written."""
    columns: Mapping[str, Sequence[Any]]
    """The data set's other columns by name, one entry a response each."""
    tokenizer: PreTrainedTokenizerBase
    eos_ids: Sequence[int]
    groups: Sequence[int]
    """The number of the prompt that a response answers; responses of one prompt share it."""

    @cached_property
    def texts(self) -> list[str]:
        """The responses as text, without special tokens and the EOS."""
        return [decode(self.tokenizer, ids, self.eos_ids) for ids in self.response_ids]

    @cached_property
    def offsets(self) -> list[list[tuple[int, int]]]:
        """Half-open spans of characters in `texts`, one a token; (s, s) for one without text."""
        return [token_offsets(self.tokenizer, ids, self.eos_ids)[1] for ids in self.response_ids]

    def rows(self, index: Sequence[int]) -> Answers:
        """Some of the responses, in the order of `index`."""
        return Answers(
            _taken(self.prompts, index),
            _taken(self.response_ids, index),
            _columns(self.columns, index),
            self.tokenizer,
            self.eos_ids,
            _taken(self.groups, index),
        )


class TokenReward(NamedTuple):
    """What a reward gives for B responses of at most T tokens."""

    rewards: Tensor  # [B, T], 0 where masked; KL is not included
    category: Tensor | None = None  # [B, T] int64, classes of the token reward model, if it is one


class Reward(Protocol):
    """Rewards of tokens."""

    def __call__(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards of the responses in `batch`, of which `answers` holds the same rows.

        Called once a step, without gradients; where several processes train, each calls it with
        its share of the prompts with all responses to them.  A reward that runs a model reads them
        in parts by itself: `batch.parts(max_tokens)`.  A reward that is not finite stops the
        training before the update.
        """
        ...


def _taken(rows: Sequence[Any], index: Sequence[int]) -> list[Any]:
    return [rows[i] for i in index] if len(rows) else []


def _columns(columns: Mapping[str, Sequence[Any]], index: Sequence[int]) -> dict[str, list[Any]]:
    return {name: _taken(column, index) for name, column in columns.items()}
