"""Batches that do not fit the memory are read in smaller parts, which gives the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tppo.models.batch import Batch
from tppo.progress import say

Found = TypeVar("Found")


class PartSize:
    """Tokens that a model reads at once: `max_tokens`, and less where memory did not hold them.

    flag: what sets them, for messages; "" where nothing does.
    """

    def __init__(self, tokens: int, flag: str = "--ppo.max-tokens"):
        self.tokens, self.flag = tokens, flag

    def fitted(self, batch: Batch, work: Callable[[int], Found]) -> Found:
        """`work(tokens)`, begun again with half of the tokens as long as it is out of memory.

        Errors: torch.OutOfMemoryError where one answer alone does not fit.
        """
        least = max(map(len, batch.prompt_ids)) + max(map(len, batch.response_ids))
        while True:
            try:
                return work(self.tokens)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.tokens <= least:
                    raise torch.OutOfMemoryError(
                        f"{error} One answer of {least} tokens alone does not fit the memory: "
                        "--model.gradient-checkpointing, --lora.rank 16 or shorter answers "
                        "(--generate.max-new-tokens) take less"
                    ) from error
            # Behind the `except`: until there the error holds the tensors of the failed pass.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            before, self.tokens = self.tokens, max(least, min(self.tokens, _tokens(batch)) // 2)
            begins = f": {self.flag} {self.tokens} begins with them" if self.flag else ""
            say(f"WARNING: out of memory with {before} tokens read at once; from here on "
                f"{self.tokens}, with the same result{begins}")  # fmt: skip

    def go_on(self, tokens: int) -> None:
        """With what an earlier process of the same work read at once."""
        if tokens < self.tokens:
            say(f"reads {tokens} tokens at once, as before: the memory did not hold more")
        self.tokens = tokens

    def read(self, batch: Batch, read: Callable[[Batch], Tensor]) -> Tensor:
        """`batch.in_parts(read, tokens)` with as many tokens as fit."""
        return self.fitted(batch, lambda tokens: batch.in_parts(read, tokens))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator refused; that of the CPU has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _tokens(batch: Batch) -> int:
    """Of the whole batch, counted with a prompt for each answer."""
    return sum(map(len, (*batch.prompt_ids, *batch.response_ids)))
