"""A guide that writes text: what it writes becomes tokens of the learner, whose own stay as they
are.

A guide with the learner's tokens needs none of this: any `Rollout` over it is a guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from tppo.models.rollout import LOST, Rollout, RolloutBatch, Sampling, check_prefixes
from tppo.models.tokenizer import decode
from tppo.plain_text import plain_text

HALF = "\ufffd"  # what a part of a character decodes to


class Written(NamedTuple):
    """What a guide writes behind the beginning of an answer."""

    text: str
    ended: bool  # False where it was cut


class Writer(Protocol):
    """A guide that reads and writes text."""

    def __call__(
        self, prompts: Sequence[Any], begun: Sequence[str], sampling: Sampling
    ) -> Sequence[Written | None]:
        """What stands behind each beginning ("": the answer from its start), None for no answer.

        prompts: as the user gave them, texts or chats.
        """
        ...


class TextGuide:
    """A `Rollout` over a `Writer`, for a learner with another tokenizer.

    The learner's forced tokens stay the very tokens; behind them stand those of the guide's text.
    A beginning that ends within a character loses the tokens of that part, so that no guide is
    shown half a character and none goes on inside one: `author` says what was kept.

    prompts: the prompt as the user gave it, for its ids.
    """

    def __init__(
        self,
        write: Writer,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        prompts: Mapping[tuple[int, ...], Any],
    ):
        self.write, self.tokenizer, self.eos_ids, self.prompts = write, tokenizer, eos_ids, prompts

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """One response a row; `finish` is LOST where the writer gave nothing.

        Errors: ValueError for prefixes that cannot be, or text that the tokenizer cannot spell.
        """
        cap, given = sampling.max_new_tokens, prefixes or [[] for _ in prompts]
        check_prefixes(given, len(prompts), cap, self.eos_ids)
        done = {i for i, row in enumerate(given)
                if len(row) == cap or row and row[-1] in self.eos_ids}  # fmt: skip
        kept = [list(row) if i in done else whole_characters(self.tokenizer, row)
                for i, row in enumerate(given)]  # fmt: skip
        asked = [i for i in range(len(prompts)) if i not in done]
        written = self.write(
            [self.prompts[tuple(prompts[i])] for i in asked],
            [decode(self.tokenizer, kept[i]) for i in asked],
            sampling,
        ) if asked else []  # fmt: skip
        rows, finish = [list(row) for row in kept], ["eos"] * len(prompts)
        for i, found in zip(asked, written, strict=True):
            rows[i] += self._tokens(kept[i], found, cap - len(kept[i]))
        for i, row in enumerate(rows):
            if not row or row[-1] not in self.eos_ids:
                finish[i] = "length" if row else LOST
        for i, found in zip(asked, written, strict=True):
            finish[i] = LOST if found is None else finish[i]
        author = [[t >= len(begun) for t in range(len(row))]
                  for begun, row in zip(kept, rows, strict=True)]  # fmt: skip
        return RolloutBatch([[*p] for p in prompts], rows, None, finish, author)

    def _tokens(self, begun: Sequence[int], found: Written | None, room: int) -> list[int]:
        """The guide's tokens behind a beginning, with the EOS where it ended."""
        if found is None:
            return []
        ids = behind(self.tokenizer, begun, found.text)
        ids += [self.eos_ids[0]] if found.ended else []
        end = next((t for t, token in enumerate(ids, 1) if token in self.eos_ids), len(ids))
        return ids[: min(end, room)]


def whole_characters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The longest beginning of ids that does not end in a part of a character."""
    kept = list(ids)
    while kept and decode(tokenizer, kept).endswith(HALF):
        kept.pop()
    return kept


def behind(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """Token ids of a text that goes on behind ids, which stay as they are.

    Of the ways to split the text, the first under which ids and text together decode to the text of
    the ids and then the text: as the tokenizer splits both together, if no token stands on their
    border; the text alone; the text behind a line break, which is taken off (a tokenizer that
    marks the beginning of words would put one where the text goes on in a word).  A tokenizer that
    changes texts (folds case) gives none of these: then the first that leaves the learner's own
    text as it is.
    Errors: ValueError where no way does.
    """
    if not text:
        return []
    encoder, before = plain_text(tokenizer), decode(tokenizer, ids)
    ways = [encoder.ids(text)]
    (both,) = encoder.spelled([before + text])
    starts = [t for t, (a, b) in enumerate(both.offsets) if a < b and b > len(before)]
    if starts and before and both.offsets[starts[0]][0] >= len(before):
        last = max(starts) + 1
        ways.insert(0, both.ids[starts[0] : last])
    line, on_line = encoder.ids("\n"), encoder.ids("\n" + text)
    if line and on_line[: len(line)] == line:
        ways.append(on_line[len(line) :])
    whole = [decode(tokenizer, [*ids, *way]) for way in ways]
    for fits in (before + text).__eq__, _begins(before):
        for way, spelled in zip(ways, whole, strict=True):
            if fits(spelled):
                return list(way)
    raise ValueError(f"the guide wrote {text[:60]!r}, which {tokenizer.name_or_path or 'the'} "
                     "tokenizer cannot spell behind the learner's text")  # fmt: skip


def _begins(before: str) -> Callable[[str], bool]:
    return lambda spelled: spelled.startswith(before)


class ModelWriter:
    """A local model with a tokenizer of its own as a `Writer`.

    engine: samples from it.  encode: its ids of a prompt as the user gave it.
    """

    def __init__(
        self,
        engine: Rollout,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        encode: Callable[[Any], list[int]],
    ):
        self.engine, self.tokenizer, self.eos_ids, self.encode = engine, tokenizer, eos_ids, encode

    def __call__(
        self, prompts: Sequence[Any], begun: Sequence[str], sampling: Sampling
    ) -> list[Written]:
        """Its text behind each beginning, of as many of its tokens as the learner may write."""
        before = [plain_text(self.tokenizer).ids(text) for text in begun]
        cap = sampling.max_new_tokens + max(map(len, before))
        found = self.engine.generate(
            [self.encode(prompt) for prompt in prompts],
            replace(sampling, max_new_tokens=cap),
            before,
        )
        written = []
        for start, row, why in zip(before, found.response_ids, found.finish, strict=True):
            own = len(decode(self.tokenizer, start))
            text = decode(self.tokenizer, row, self.eos_ids)[own:]
            written.append(Written(text.rstrip(HALF), why == "eos"))
        return written
