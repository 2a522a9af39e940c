"""The tokenizer: a byte-level BPE trained on the data, or that of a local model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cache, partial
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tppo.models.folder import folder_configs, folder_eos_ids
from tppo.models.load import load_from
from tppo.models.pieces import pieces_of
from tppo.progress import say

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with three distinct special tokens: bos, eos, pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a local model.

    A tokenizer without an eos token gets the first of the configuration.
    A tokenizer without a pad token gets that of the configuration, else its eos, as filler;
    nothing here infers a mask from an id, so an eos of the answer stays an eos.
    Errors: ValueError if there is no eos token, the tokenizer has no character offsets, or it is
    code of the folder.
    """
    tokenizer = load_from(AutoTokenizer, path)
    if tokenizer.eos_token_id is None:
        ends = folder_eos_ids(path)
        if not ends:
            raise ValueError(
                f"{path}: no eos token, neither of the tokenizer nor in config.json or "
                "generation_config.json; an answer could never end"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: the tokenizer is not a fast one; labels need character offsets")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _pad_of_folder(path, tokenizer) or tokenizer.eos_token
        say(f"{path}: no pad token of the tokenizer, {tokenizer.pad_token!r} fills the batches "
            "(always masked)")  # fmt: skip
    return tokenizer


def _pad_of_folder(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that fills batches by generation_config.json or config.json, None without one."""
    known = set(tokenizer.get_vocab().values())
    for config in folder_configs(path):
        found = getattr(config, "pad_token_id", None)
        if type(found) is int and found in known:
            return str(tokenizer.convert_ids_to_tokens(found))
    return None


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_ids: Collection[int] = ()
) -> str:
    """The text of token ids, special tokens left out.

    eos_ids: ids that end an answer; the last token is left out where it is one of them, because
    not every end is a special token of the tokenizer.
    """
    shown = ids[:-1] if ids and ids[-1] in eos_ids else ids
    text = tokenizer.decode(
        list(shown), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)  # a list only for a batch
    return text


def token_offsets(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_ids: Collection[int] = ()
) -> tuple[str, list[tuple[int, int]]]:
    """The text of sampled ids and the half-open character span of each of them, in linear time.

    Sampled ids need not be those that the tokenizer gives for their text.  Tokens that share one
    character (bytes of it) all get that character; a special token gets (s, s), and so does a last
    one that is one of `eos_ids`.
    """
    if ids and ids[-1] in eos_ids:
        text, before = token_offsets(tokenizer, ids[:-1])
        return text, [*before, (len(text), len(text))]
    text = decode(tokenizer, ids)
    spans = pieces_of(tokenizer, partial(decode, tokenizer)).spans(text, ids)
    if spans is None:
        _say_slow(type(tokenizer).__name__)
        spans = _spans_by_prefixes(tokenizer, text, ids)
    return text, spans


def _spans_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]
) -> list[tuple[int, int]]:
    """The spans from decoding every prefix: for tokenizers whose tokens change their neighbours.

    Where a prefix ends in half a character, it differs from the text there: that character is the
    token's.  A token that shows nothing gets (s, s).
    """
    spans, start = [], 0
    for i in range(len(ids)):
        prefix = decode(tokenizer, ids[: i + 1])
        end = _common(text, prefix)
        half = end < min(len(prefix), len(text))
        spans.append((start, max(start, end + half)))
        start = max(start, end)
    return spans


@cache
def _say_slow(name: str) -> None:
    say(f"{name}: what a token adds depends on its neighbours; offsets come from decoding prefixes")


def _common(text: str, prefix: str) -> int:
    """Length of the longest common prefix; half a character decodes to another one."""
    if text.startswith(prefix):
        return len(prefix)
    return next(i for i, character in enumerate(prefix) if text[i : i + 1] != character)
