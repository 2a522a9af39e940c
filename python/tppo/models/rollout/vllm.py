"""Answers by vLLM, which gets the trainer's weights before it is asked, and is checked then."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from math import inf, isnan
from typing import Any

import torch
from transformers import PreTrainedModel

from tppo.errors import DataError
from tppo.models.batch import Batch
from tppo.models.config import Prefix, VLLMConfig
from tppo.models.guards import GuardError, trainable
from tppo.models.keeper import NOTHING_KEPT, Keeper, Rest, answers_of
from tppo.models.policy import policy_logprobs
from tppo.models.precision import dtype_name
from tppo.models.rollout.engine import Said, VLLMEngine, running
from tppo.models.rollout.installed import check_vllm
from tppo.models.rollout.seam import (
    RolloutBatch,
    Sampling,
    batch_of,
    check_prefixes,
    open_rows,
)
from tppo.progress import status

PROBE = 16  # tokens of the answer that both sides score
# Nats, of any of its tokens.  Rounding to bfloat16 was measured to make .05 on average, up to .27.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.5}
COLDEST = 0.01  # below it the likeliest token is taken
KEPT_EVERY = 4  # batches: the engine fills a batch up as answers end, and empties it at the end


class VLLMRollout:
    """vLLM in this process, from a copy of the model's weights that it is given anew by each call.

    With LoRA the copy of the base stays, and the adapter is given; a model without a weight that is
    trained is given once.  After that one short answer of the engine is scored by the model too:
    where a log-prob of a token differs by more than `BOUNDS` the call fails, and nothing is
    sampled.  The engine starts with the first call, and on a GPU sleeps between calls; models that
    are alike in all but their weights share it, which then go to it by turns.

    eos_id: the id that ends an answer, or several of them, any of which does.  batch_size: answers
    under way at once.  The rest is as in `HFRollout`, whose draws are others.
    `RolloutBatch.logprobs` are those of the engine, at the temperature of the sampling.
    Errors: DataError where vLLM is not installed, or cannot hold the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        eos_id: int | Sequence[int],
        batch_size: int = 256,
        prefix: Prefix = "shared",
        config: VLLMConfig | None = None,
    ):
        check_vllm(model)
        if model.dtype not in BOUNDS:
            known = " or ".join(map(dtype_name, BOUNDS))
            raise DataError(f"--rollout vllm: the model's weights are of {dtype_name(model.dtype)}"
                            f", expected {known}; --rollout hf takes any")  # fmt: skip
        self.model, self.pad_id, self.batch_size = model, pad_id, batch_size
        self.eos_ids = [eos_id] if isinstance(eos_id, int) else [*eos_id]
        self.prefix, self.config = prefix, config or VLLMConfig()
        self.engine: VLLMEngine | None = None
        self.drift = 0.0
        """Of the newest check: the largest difference of a log-prob, in nats."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        prefixes: Sequence[Sequence[int]] | None = None,
        description: str = "generate",
        keeper: Keeper = NOTHING_KEPT,
    ) -> RolloutBatch:
        """One response a row, each from a seed of its own: a function of the weights and arguments.

        keeper: has what an earlier process sampled by the same call.
        Errors: ValueError as `HFRollout`; GuardError where the engine has other weights.
        """
        cap = sampling.max_new_tokens
        begun: Sequence[Sequence[int]] = [[]] * len(prompts)
        if prefixes is not None:
            check_prefixes(prefixes, len(prompts), cap, self.eos_ids)
            begun = prefixes
        rows = open_rows(begun, cap, self.eos_ids)
        said = [Said([], []) for _ in prompts]
        if rows:
            asked = [[*prompts[i], *begun[i]] for i in rows]
            wanted = [self._wanted(sampling, i, cap - len(begun[i])) for i in rows]
            found = self._ask(asked, wanted, description, keeper)
            for i, one in zip(rows, found, strict=True):
                said[i] = one
        responses = [[*start, *one.ids] for start, one in zip(begun, said, strict=True)]
        logprobs = [[*[float("nan")] * len(start), *one.logprobs]
                    for start, one in zip(begun, said, strict=True)]  # fmt: skip
        return batch_of(prompts, responses, self.eos_ids, prefixes, logprobs)

    def _wanted(self, sampling: Sampling, row: int, tokens: int) -> dict[str, Any]:
        # vLLM would sample at 0.01, where ties of a tenth of a nat are left to chance.
        warmth = sampling.temperature if sampling.temperature >= COLDEST else 0.0
        return {
            "max_tokens": tokens, "temperature": warmth, "top_p": sampling.top_p,
            "stop_token_ids": self.eos_ids, "seed": row_seed(sampling.seed, row),
        }  # fmt: skip

    def _ask(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[dict[str, Any]],
        description: str,
        keeper: Keeper,
    ) -> list[Said]:
        """Chunk after chunk, the rows of one prompt after each other."""
        place: dict[tuple[int, ...], int] = {}
        order = sorted(range(len(prompts)),
                       key=lambda i: place.setdefault(tuple(prompts[i]), i))  # fmt: skip
        size = KEPT_EVERY * self.batch_size
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        written: list[Said] = []  # in that order
        with status(description, len(chunks)) as bar:
            kept = keeper.newest(len(chunks))
            if kept is not None:
                rows_kept = sum(map(len, chunks[: kept.step]))
                written += map(Said, *answers_of(kept, rows_kept, "ids", "logprobs"))
                bar.resume(kept.step)
            if bar.count < len(chunks):
                engine = self._awake(prompts, wanted)
                try:
                    self._give_weights(engine, prompts[0])
                    for number in range(bar.count, len(chunks)):
                        rows = chunks[number]
                        written += engine.ask([prompts[i] for i in rows], [wanted[i] for i in rows])
                        bar.advance()
                        keeper.after(number + 1, len(chunks), partial(_rest, written))
                finally:
                    engine.sleep()
        found = [Said([], [])] * len(prompts)
        for i, one in zip(order, written, strict=True):
            found[i] = one
        return found

    def _awake(
        self, prompts: Sequence[Sequence[int]], wanted: Sequence[dict[str, Any]]
    ) -> VLLMEngine:
        """An engine with room for the longest of the prompts and its answer."""
        longest = max(len(p) + w["max_tokens"] for p, w in zip(prompts, wanted, strict=True))
        engine = self.engine = running(
            self.model, self.config, longest=longest, start_for=self._length(longest),
            batch_size=self.batch_size, share_prompts=self.prefix == "shared",
        )  # fmt: skip
        engine.wake()
        return engine

    def _give_weights(self, engine: VLLMEngine, prompt: Sequence[int]) -> None:
        """The weights as they are now, and the check that the engine has them."""
        if trainable(self.model) or not engine.has(self.model):
            engine.hand_over(self.model)
        self._check(engine, prompt)

    def _length(self, longest: int) -> int:
        """Tokens that an engine is started for: with reserve, so that it seldom starts again."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        most = max(1024, 2 * longest) + PROBE
        if positions is not None and longest > positions:
            raise ValueError(f"a prompt and its answer have {longest} tokens, expected at most "
                             f"{positions}, the positions of the model")  # fmt: skip
        return most if positions is None else min(most, positions)

    def _check(self, engine: VLLMEngine, prompt: Sequence[int]) -> None:
        """The engine has the weights of the model: both give an answer the same log-probs.

        Errors: GuardError where they do not.
        """
        tokens = min(PROBE, engine.max_length - 1)
        prompt = [*prompt[-(engine.max_length - tokens) :]]
        probe = {"max_tokens": tokens, "temperature": 1.0, "seed": 0, "ignore_eos": True}
        (said,) = engine.ask([prompt], [probe])
        batch = Batch([prompt], [said.ids], self.pad_id, self.model.device)
        own = policy_logprobs(self.model, batch, 1.0)[0][0].tolist()
        differences = (abs(a - b) for a, b in zip(own, said.logprobs, strict=True))
        apart = [inf if isnan(x) else x for x in differences]
        self.drift, bound = max(apart), BOUNDS[self.model.dtype]
        if self.drift > bound:
            engine.given = None
            worst = apart.index(self.drift)
            what = "the base with this step's adapter" if engine.adapter else "all weights"
            raise GuardError(
                f"vLLM was given {what}, and has others: token {worst} of a test answer, "
                f"{said.ids[worst]}, has the log-prob {said.logprobs[worst]:.6g} there and "
                f"{own[worst]:.6g} in the trainer, {self.drift:.3g} apart, expected at most "
                f"{bound:g} in {dtype_name(self.model.dtype)}. Stopped before "
                "anything was sampled from them; --rollout hf goes on from the same checkpoint"
            )

    def close(self) -> None:
        """Give the engine's memory free; the next call starts another one."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def row_seed(seed: int, row: int) -> int:
    """The seed of a row of a call, independent of those of other rows and calls."""
    digest = hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _rest(written: Sequence[Said]) -> Rest:
    """The answers there are; each of the others depends on its own seed alone."""

    def flat(parts: Iterable[Sequence[Any]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([*chain.from_iterable(parts)], dtype=dtype)

    answers = {
        "ids": flat((one.ids for one in written), torch.int32),
        "logprobs": flat((one.logprobs for one in written), torch.float32),
        "lengths": torch.tensor([len(one.ids) for one in written], dtype=torch.int32),
    }
    return Rest({"answers": answers}, {}, {})
