"""What every engine that samples takes and gives.  Ids travel, never text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple, Protocol

from tppo.models.keeper import NOTHING_KEPT, Keeper
from tppo.models.parallel import ALONE, World

LOST = "lost"  # a response that a guide did not give: the step cannot be taken


@dataclass(frozen=True)
class Sampling:
    """How to sample: the policy that is trained always from the whole distribution (top_p 1).

    At temperature 0 the likeliest token is taken each time.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    top_p: float = 1.0
    """Of a guide alone: the likeliest tokens with at least this much of the probability."""
    world: World = ALONE
    """The processes that make the call together, each with all prompts, for all answers."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise ValueError(f"temperature was {self.temperature}, expected a finite one of at "
                             "least 0, at which the likeliest token is taken")  # fmt: skip
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p was {self.top_p}, expected a share above 0, at most 1")


class RolloutBatch(NamedTuple):
    """One prompt and one response a row; `logprobs` are the engine's own where it reports them."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]  # the EOS included where `finish` is "eos"
    logprobs: list[list[float]] | None
    finish: list[str]  # "eos", "length" where the response was cut, LOST where a guide gave none
    author: list[list[bool]] | None = None
    """True at response tokens that the learner wrote, False at those that were forced; None: it
    wrote all of them."""


class Rollout(Protocol):
    """An engine that samples responses.

    One with an attribute `shares_out` that is true knows of `Sampling.world`; `together` gives each
    process's share to any other.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """One response a prompt.

        prefixes: forced beginnings of the responses, one a prompt, [] for none.  They are part of
        `response_ids` and of `max_new_tokens`, and have no author; one that ends in an EOS is the
        whole response.
        """
        ...


class Engine(Rollout, Protocol):
    """A rollout whose work can be kept on the way: what `tppo.models.rollout.build` gives."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        prefixes: Sequence[Sequence[int]] | None = None,
        description: str = "generate",
        keeper: Keeper = NOTHING_KEPT,
    ) -> RolloutBatch:
        """As above.  keeper: has what an earlier process sampled by the same call."""
        ...


def together(
    rollout: Rollout,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    prefixes: Sequence[Sequence[int]] | None = None,
) -> RolloutBatch:
    """The answers of any engine for the processes of `sampling.world`.

    Of an engine that shares out by itself, as transformers' does, they are those of one process.
    Any other is asked by each process for the answers to its prompts, all of a prompt, with a seed
    of its own: with another number of processes it gives other answers.
    """
    world = sampling.world
    if world.size == 1 or getattr(rollout, "shares_out", False):
        return rollout.generate(prompts, sampling, *(() if prefixes is None else (prefixes,)))
    later = [prompts[i] != prompts[i - 1] for i in range(1, len(prompts))]
    groups = accumulate(later, initial=0)  # which of the prompts a row has
    own = [i for i, group in enumerate(groups) if group % world.size == world.rank]
    found = RolloutBatch([], [], None, [])
    if own:
        found = rollout.generate(
            [prompts[i] for i in own],
            replace(sampling, world=ALONE, seed=(sampling.seed + world.rank * 104_729) % 2**31),
            *(() if prefixes is None else ([prefixes[i] for i in own],)),
        )
    nothing: list[list[Any]] = [[]] * len(own)
    part = (own, found.response_ids, found.logprobs or nothing, found.finish,
            found.author or nothing)  # fmt: skip
    rows = {i: row for part in world.exchanged(part) for i, *row in zip(*part, strict=True)}
    responses, logprobs, finish, author = (
        [*x] for x in zip(*(rows[i] for i in range(len(prompts))), strict=True)
    )
    return RolloutBatch([[*p] for p in prompts], responses, logprobs if any(logprobs) else None,
                        finish, author if any(author) else None)  # fmt: skip


def check_prefixes(
    prefixes: Sequence[Sequence[int]], rows: int, cap: int, eos_ids: Sequence[int]
) -> None:
    """Forced beginnings fit the rows and the cap, and none goes on behind an EOS.

    Errors: ValueError naming the first that does not.
    """
    if len(prefixes) != rows:
        raise ValueError(f"prefixes had {len(prefixes)} rows, expected one a prompt, {rows}")
    for i, prefix in enumerate(prefixes):
        if len(prefix) > cap:
            raise ValueError(
                f"the prefix of row {i} had {len(prefix)} tokens, expected at most max_new_tokens, "
                f"{cap}, which counts them"
            )
        end = next((t for t, token in enumerate(prefix, 1) if token in eos_ids), len(prefix))
        if end < len(prefix):
            raise ValueError(
                f"the prefix of row {i} had an EOS ({prefix[end - 1]}) at token {end - 1} of "
                f"{len(prefix)}, expected none but at its end"
            )


def open_rows(begun: Sequence[Sequence[int]], cap: int, eos_ids: Sequence[int]) -> list[int]:
    """The rows whose responses have not ended with their beginnings."""
    ends = set(eos_ids)
    return [i for i, row in enumerate(begun) if len(row) < cap and not ends.intersection(row)]


def batch_of(
    prompts: Sequence[Sequence[int]],
    responses: list[list[int]],
    eos_ids: Sequence[int],
    prefixes: Sequence[Sequence[int]] | None,
    logprobs: list[list[float]] | None = None,
) -> RolloutBatch:
    """Whole responses, of which the prefixes have no author; how each of them has ended."""
    author = None if prefixes is None else [
        [t >= len(prefix) for t in range(len(row))]
        for prefix, row in zip(prefixes, responses, strict=True)]  # fmt: skip
    finish = ["eos" if row[-1] in eos_ids else "length" for row in responses]
    return RolloutBatch([[*p] for p in prompts], responses, logprobs, finish, author)


def until_eos(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The row up to its first EOS, included; what follows is filler."""
    end = next((i for i, token in enumerate(row, 1) if token in eos_ids), len(row))
    return row[:end]
