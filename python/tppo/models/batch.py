"""Responses and their prompts as tensors, and how a model reads them.

Shared (where a prompt has several responses): every prompt once, its responses behind it.

    p p p p p | a b c | d e | p p p | f g h | i

Dense: one row a response, the prompt again in each, padded left and right, so that one integer
`prompt_length` serves `tppo_kernels.response_states`.

    . . p p p | a b c
    p p p p p | d e .
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from heapq import heapreplace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tppo_kernels as tk
from tppo.models.config import Prefix
from tppo.progress import say_once


class Padded(NamedTuple):
    """P prompt columns, then T response columns."""

    input_ids: Tensor  # [B, P+T] int64
    attention_mask: Tensor  # [B, P+T] int64, 1 at real tokens
    position_ids: Tensor  # [B, P+T] int64, counted over real tokens
    prompt_length: int  # P

    def hidden(self, trunk: nn.Module) -> Tensor:
        """Last hidden states of a trunk over prompts and responses, [B, P+T, D]."""
        return trunk(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            use_cache=False,
        ).last_hidden_state


def pad(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Padded:
    """The dense arrangement; masks come from lengths, never from `pad_id`."""
    width = max(map(len, prompts))
    length = max(map(len, responses))
    ids, real = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        left, right = width - len(prompt), length - len(response)
        ids.append([pad_id] * left + [*prompt] + [*response] + [pad_id] * right)
        real.append([0] * left + [1] * (len(prompt) + len(response)) + [0] * right)
    attention_mask = torch.tensor(real, device=device)  # [B, P+T]
    return Padded(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        prompt_length=width,
    )


class Piece(NamedTuple):
    """Responses that are read together, with their prompt."""

    tokens: int
    rows: list[int]


class Batch:
    """B responses, each with its prompt; T is the longest response.

    prompt_ids, response_ids: token ids, one list a response.  Equal prompts that follow each other
    are computed once where the prefix is shared.
    targets: int64 [B, T], the response tokens.  mask: bool [B, T], True at sampled tokens,
    separators and EOS included.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pad_id: int,
        device: torch.device | str = "cpu",
        prefix: Prefix = "shared",
    ):
        self.prompt_ids, self.response_ids = prompts, responses
        self.pad_id, self.device, self.prefix = pad_id, device, prefix
        lengths = torch.tensor([len(response) for response in responses])
        width = int(lengths.max())
        rows = [[*response] + [pad_id] * (width - len(response)) for response in responses]
        self.targets = torch.tensor(rows, device=device)
        self.mask = (torch.arange(width) < lengths[:, None]).to(device)

    @property
    def shares(self) -> bool:
        """Whether there is a prompt to compute once for several responses."""
        return self.prefix == "shared" and len(self._groups) < len(self.response_ids)

    def rows(self, index: Sequence[int]) -> Batch:
        """The batch of some of the responses, itself for all of them; T may shrink."""
        if list(index) == list(range(len(self.response_ids))):
            return self
        prompts = [self.prompt_ids[i] for i in index]
        responses = [self.response_ids[i] for i in index]
        return Batch(prompts, responses, self.pad_id, self.device, self.prefix)

    def dense(self) -> Batch:
        """The same responses, each with a prompt of its own."""
        return Batch(self.prompt_ids, self.response_ids, self.pad_id, self.device, "dense")

    def parts(self, max_tokens: int, ranks: int = 1) -> list[list[list[int]]]:
        """For each of `ranks` processes its responses, in parts of at most `max_tokens` tokens.

        Responses of one prompt stay together where they fit and no process has much more to do
        than another; one that is too long stands alone.  Parts are few and evenly filled: the
        largest pieces go first, each into the fullest part that can take it (best-fit decreasing).
        """
        whole = [piece for first, group in self._starts() for piece in
                 self._pieces(first, *group, max_tokens)]  # fmt: skip
        finer = ([cut for piece in whole for cut in self._cut(piece, n)]
                 for n in range(1, ranks + 1))  # fmt: skip
        shares = min((_balanced(pieces, ranks) for pieces in finer), key=_longest)
        return [_packed(share, max_tokens) for share in shares]

    def in_parts(self, read: Callable[[Batch], Tensor], max_tokens: int) -> Tensor:
        """What `read` finds of the responses, given at most `max_tokens` tokens of them at once."""
        (parts,) = self.parts(max_tokens)
        return assembled(self.mask, [(index, read(self.rows(index))) for index in parts])

    def _cut(self, piece: Piece, n: int) -> list[Piece]:
        """A piece in at most n of about equal length, each with the prompt."""
        rows, n = piece.rows, min(n, len(piece.rows))
        cuts = [rows[len(rows) * k // n : len(rows) * (k + 1) // n] for k in range(n)]
        prompt = len(self.prompt_ids[rows[0]])
        return [Piece(prompt + sum(len(self.response_ids[i]) for i in cut), cut) for cut in cuts]

    def _starts(self) -> Iterator[tuple[int, tuple[Sequence[int], list[Sequence[int]]]]]:
        """Each group with the index of its first response."""
        first = 0
        for prompt, responses in self._groups:
            yield first, (prompt, responses)
            first += len(responses)

    def _pieces(
        self, first: int, prompt: Sequence[int], responses: list[Sequence[int]], max_tokens: int
    ) -> Iterator[Piece]:
        """A group, cut where it exceeds `max_tokens`, or is dense."""
        cost = len(prompt)
        indices: list[int] = []
        for i, response in enumerate(responses, first):
            if indices and (self.prefix == "dense" or cost + len(response) > max_tokens):
                yield Piece(cost, indices)
                cost, indices = len(prompt), []
            cost += len(response)
            indices.append(i)
        yield Piece(cost, indices)

    def states(self, trunk: nn.Module, *aligns: str) -> tuple[Tensor, ...]:
        """Last hidden states of a trunk, once for each alignment of `tk.response_states`.

        [B, T, D], or [B, D] for "bootstrap".  A trunk that cannot share prompts reads them dense,
        and says so once.
        """
        if self.shares:
            layout, packed = self._packed
            with ExitStack() as stack:
                try:
                    stack.enter_context(tk.shared_prefix(trunk, layout))
                except ValueError as error:
                    say_once(
                        f"every response is read with its whole prompt, not a shared one: {error}"
                    )
                else:
                    hidden = trunk(input_ids=packed, use_cache=False).last_hidden_state[0]  # [L, D]
                    return tuple(layout.response_states(hidden, align) for align in aligns)
        hidden = self.padded.hidden(trunk)  # [B, P+T, D]
        width, length = self.padded.prompt_length, self.targets.shape[1]
        return tuple(
            tk.response_states(hidden, width, length, align, mask=self.mask) for align in aligns
        )

    @cached_property
    def padded(self) -> Padded:
        """The dense arrangement."""
        return pad(self.prompt_ids, self.response_ids, self.pad_id, self.device)

    @cached_property
    def _groups(self) -> list[tuple[Sequence[int], list[Sequence[int]]]]:
        """Each prompt with the responses that follow each other under it."""
        pairs = zip(self.prompt_ids, self.response_ids, strict=True)
        return [
            (prompt, [response for _, response in members])
            for prompt, members in groupby(pairs, key=lambda pair: [*pair[0]])
        ]

    @cached_property
    def _packed(self) -> tuple[tk.PrefixLayout, Tensor]:
        """The layout, and the ids of all groups one after another, [1, L]."""
        prompts = [prompt for prompt, _ in self._groups]
        responses = [group for _, group in self._groups]
        layout = tk.PrefixLayout.from_lengths(
            map(len, prompts), [map(len, group) for group in responses]
        )
        return layout.to(self.device), layout.pack(prompts, responses).to(self.device)


def _balanced(pieces: Sequence[Piece], ranks: int) -> list[list[Piece]]:
    """The largest first, each to the process with the fewest tokens so far."""
    shares: list[list[Piece]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        load, rank = loads[0]
        shares[rank].append(piece)
        heapreplace(loads, (load + piece.tokens, rank))
    return shares


def _longest(shares: Sequence[Sequence[Piece]]) -> int:
    """Tokens of the process that has the most of them."""
    return max(sum(piece.tokens for piece in share) for share in shares)


def _packed(pieces: Sequence[Piece], max_tokens: int) -> list[list[int]]:
    """The responses of pieces, the largest of which comes first, in parts."""
    parts: list[list[int]] = []
    free: list[int] = []
    for cost, rows in pieces:
        fits = [(left - cost, k) for k, left in enumerate(free) if left >= cost]
        left, k = min(fits, default=(max_tokens - cost, len(parts)))
        if k == len(parts):
            parts.append([])
            free.append(0)
        parts[k] += rows
        free[k] = left
    return [sorted(rows) for rows in parts]


def assembled(mask: Tensor, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """What was found for parts of the rows of a batch as one tensor, 0 where nothing was.

    mask: [B, T] of the batch.  parts: rows, and of each of them [T', ...] with T' <= T, or [].
    """
    first = parts[0][1]
    shape = (*mask.shape[: first.dim()], *first.shape[2:])
    whole = torch.zeros(shape, dtype=first.dtype, device=mask.device)
    for index, found in parts:
        place = (list(index), slice(found.shape[1])) if found.dim() > 1 else list(index)
        whole[place] = found.to(mask.device)
    return whole


def pad_rows(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Ragged per-token numbers as a tensor of the shape, dtype and device of `like`, 0-filled."""
    out = torch.zeros_like(like)  # [B, T]
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.as_tensor(row, dtype=like.dtype)
    return out
