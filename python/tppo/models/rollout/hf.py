"""Answers by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from tppo.models.batch import pad
from tppo.models.config import Prefix
from tppo.models.folder import without_generation_settings
from tppo.models.guards import GuardError, check_weights
from tppo.models.keeper import NOTHING_KEPT, Keeper, Rest, answers_of, weights_of
from tppo.models.part_size import out_of_memory
from tppo.models.rollout.decoding import CACHE, decode, empty_cache, has_rows
from tppo.models.rollout.seam import (
    RolloutBatch,
    Sampling,
    batch_of,
    check_prefixes,
    open_rows,
    until_eos,
)
from tppo.models.vocabulary import embeddings_of, phantoms
from tppo.progress import say, say_once, status


class HFRollout:
    """transformers' `generate`, prompts sorted by length so that batches pad little.

    eos_id: the id that ends an answer, or several of them, any of which does.  The sampling
    settings of the model's own generation config are not used.

    A prompt that stands in several rows of a batch is prefilled once for all of them (with
    `prefix="dense"`: once for each).  Answers that have ended leave their batch.

    Several processes share every batch out and get its answers, which are those of one process but
    where rounding decides a draw: the noise of a token is drawn for the whole batch by each.
    So is that of a batch which does not fit the memory, and is sampled in smaller ones.
    """

    shares_out = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        eos_id: int | Sequence[int],
        batch_size: int = 256,
        prefix: Prefix = "shared",
    ):
        self.model, self.pad_id = model, pad_id
        self.eos_ids = [eos_id] if isinstance(eos_id, int) else [*eos_id]
        self.batch_size, self.prefix = batch_size, prefix
        self.at_once = batch_size  # answers, and fewer where memory did not hold them

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        prefixes: Sequence[Sequence[int]] | None = None,
        description: str = "generate",
        keeper: Keeper = NOTHING_KEPT,
    ) -> RolloutBatch:
        """One response a row, a function of the weights and the arguments alone.

        keeper: has what an earlier process sampled by the same call, whose draws go on.
        Prefixes that are all empty change no draw.
        Errors: ValueError naming the row whose prefix is longer than `sampling.max_new_tokens`, or
        goes on behind an EOS.
        """
        if prefixes is None:
            responses = self._continue(prompts, sampling, description, keeper)
        else:
            check_prefixes(prefixes, len(prompts), sampling.max_new_tokens, self.eos_ids)
            responses = self._behind(prompts, prefixes, sampling, description, keeper)
        return batch_of(prompts, responses, self.eos_ids, prefixes)

    def _behind(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        description: str,
        keeper: Keeper,
    ) -> list[list[int]]:
        """The prefixes, and what the model writes behind those that have not ended.

        All of them may get as many tokens as the shortest prefix leaves; the others are cut.
        """
        responses = [[*prefix] for prefix in prefixes]
        cap = sampling.max_new_tokens
        rows = open_rows(responses, cap, self.eos_ids)
        if not rows:
            return responses
        longest = max(cap - len(responses[i]) for i in rows)
        written = self._continue(
            [[*prompts[i], *prefixes[i]] for i in rows],
            replace(sampling, max_new_tokens=longest),
            description,
            keeper,
        )
        for i, row in zip(rows, written, strict=True):
            responses[i] += row[: cap - len(responses[i])]
        return responses

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        description: str,
        keeper: Keeper,
    ) -> list[list[int]]:
        """What the model writes behind each row, up to an EOS or the cap."""
        place: dict[tuple[int, ...], int] = {}
        first = [place.setdefault(tuple(p), i) for i, p in enumerate(prompts)]
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), first[i]))
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        written: list[list[int]] = []  # in that order
        device = self.model.device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            status(description, len(chunks)) as bar,
        ):
            torch.manual_seed(sampling.seed)
            kept = keeper.newest(len(chunks))
            if kept and _draws_go_on(weights_of(kept, "draws"), device, description):
                rows = sum(map(len, chunks[: kept.step]))
                (ids,) = answers_of(kept, rows, "ids")
                written += ids
                bar.resume(kept.step)
            for number in range(bar.count, len(chunks)):
                written += self._shared_out([prompts[i] for i in chunks[number]], sampling)
                bar.advance()
                keeper.after(number + 1, len(chunks), partial(_rest, written, device))
        responses: list[list[int]] = [[] for _ in prompts]
        for i, row in zip(order, written, strict=True):
            responses[i] = row
        return responses

    def _shared_out(self, prompts: list[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """The answers of a batch, of which each process samples a share."""
        world, n = sampling.world, len(prompts)
        if world.size == 1:
            return self._fitted(prompts, sampling, (0, n))
        first, end = (n * k // world.size for k in (world.rank, world.rank + 1))
        own = self._fitted(prompts[first:end], sampling, (first, n)) if first < end else []
        rows = [*chain.from_iterable(world.exchanged(own))]
        # The next batch's noise comes behind that of the longest answer, in whichever process.
        behind = max(map(len, rows)) - max(map(len, own), default=0)
        if behind and sampling.temperature:
            like = torch.ones(n, embeddings_of(self.model), device=self.model.device)
            for _ in range(behind):
                like.multinomial(1)
        return rows

    def _fitted(
        self, prompts: list[Sequence[int]], sampling: Sampling, place: tuple[int, int]
    ) -> list[list[int]]:
        """As `_sample`, begun again with half of the answers as long as it is out of memory.

        Errors: torch.OutOfMemoryError where one answer alone does not fit.
        """
        begun = _draws(self.model.device)
        while True:
            try:
                return self._in_turn(prompts, sampling, place)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                before = min(self.at_once, len(prompts))
                if before == 1:
                    raise torch.OutOfMemoryError(
                        f"{error} One answer alone does not fit the memory while it is sampled: "
                        "--lora.rank 16 or shorter answers (--generate.max-new-tokens) take less"
                    ) from error
            # Behind the `except`: until there the error holds the cache of the failed answers.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.at_once = before // 2
            say(f"WARNING: out of memory with {before} answers sampled at once; from here on "
                f"{self.at_once}, with the same draws: --generate.batch-size {self.at_once} begins "
                "with them, and draws others")  # fmt: skip
            _set_draws(begun, self.model.device)

    def _in_turn(
        self, prompts: list[Sequence[int]], sampling: Sampling, place: tuple[int, int]
    ) -> list[list[int]]:
        """At most `at_once` answers at a time, each drawn as in the whole batch."""
        (first, whole), device = place, self.model.device
        begun = behind = _draws(device)
        written: list[list[int]] = []
        longest = 0
        for i in range(0, len(prompts), self.at_once):
            _set_draws(begun, device)
            rows = self._sample(prompts[i : i + self.at_once], sampling, (first + i, whole))
            if max(map(len, rows)) > longest:
                longest, behind = max(map(len, rows)), _draws(device)
            written += rows
        _set_draws(behind, device)
        return written

    def _sample(
        self, prompts: list[Sequence[int]], sampling: Sampling, place: tuple[int, int]
    ) -> list[list[int]]:
        batch = pad(prompts, [[] for _ in prompts], self.pad_id, self.model.device)
        config = GenerationConfig(
            do_sample=False,  # the draw is `decode`'s
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            suppress_tokens=phantoms(self.model) or None,
        )
        try:
            with without_generation_settings(self.model):
                cache = self._prefill(prompts)
                rows = decode(
                    self.model,
                    batch.input_ids,
                    batch.attention_mask,
                    empty_cache(self.model) if cache is None else cache,
                    config,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    place=place,
                )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            check_weights("while sampling", {"model": self.model})
            raise GuardError(
                "while sampling: the model's probabilities of a next token are not finite, though "
                "its weights are: they are far too large, or the temperature "
                f"({sampling.temperature:g}) is far too small"
            ) from None
        return [until_eos(row, self.eos_ids) for row in rows]

    def _prefill(self, prompts: list[Sequence[int]]) -> Cache | None:
        """Keys and values of every prompt but its last token, computed once a distinct prompt.

        None where there is nothing to share, or the model keeps more than keys and values: then
        every row is prefilled from here on, which is said once.
        """
        place: dict[tuple[int, ...], int] = {}
        rows = [place.setdefault(tuple(prompt), len(place)) for prompt in prompts]
        if self.prefix == "dense" or len(place) == len(prompts) or max(map(len, prompts)) == 1:
            return None
        batch = pad([p[:-1] for p in place], [[] for _ in place], self.pad_id, self.model.device)
        output = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=True,
        )
        cache = output.get(CACHE)
        if not has_rows(cache):
            self.prefix = "dense"
            say_once(
                f"{type(self.model).__name__} remembers a prompt by more than keys and values "
                "(a hybrid or recurrent model): it is read again for each of its answers"
            )
            return None
        cache.batch_select_indices(torch.tensor(rows, device=self.model.device))
        return cache


def _rest(written: Sequence[Sequence[int]], device: torch.device) -> Rest:
    """What the answers that are still to be sampled depend on."""
    answers = {
        "ids": torch.tensor([*chain.from_iterable(written)], dtype=torch.int32),
        "lengths": torch.tensor([*map(len, written)], dtype=torch.int32),
    }
    return Rest({"answers": answers, "draws": _draws(device)}, {}, {})


def _draws(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that sampling on a device draws from."""
    found = {"cpu": torch.get_rng_state()}
    return found | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else found


def _draws_go_on(draws: Mapping[str, Tensor], device: torch.device, description: str) -> bool:
    """Sets the generators to what `_draws` gave; False where that was on another kind of device."""
    here = _draws(device)
    was, now = ({name: (len(x), x.dtype) for name, x in of.items()} for of in (draws, here))
    if was != now:
        say(f"{description}: begins anew all the same: what is kept was drawn on "
            f"{'cuda' if 'cuda' in draws else 'cpu'}, this process draws on {device.type}")
        return False
    _set_draws(draws, device)
    return True


def _set_draws(draws: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(draws["cpu"])
    if "cuda" in draws:
        torch.cuda.set_rng_state(draws["cuda"], device)
