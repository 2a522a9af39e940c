"""Characters of tokens, over tokenizers of three families trained here and hostile Unicode.

An independent mapping decodes every prefix of the ids: the characters that are whole there were
written by the tokens so far. What is left of a broken character belongs to all tokens of it.
"""

import functools
import json
import random
from collections.abc import Callable
from typing import Any

from guided import REFUSED, Target, Wrong
from texts import hostile_text, hostile_words
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tppo_kernels as tk
from tppo.labels.words import map_labels, word_spans
from tppo.models.tokenizer import train_tokenizer
from tppo.plain_text import plain_text

SPECIAL = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}


def _fast(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, **SPECIAL
    )


def _with_byte_fallback(corpus: list[str]) -> PreTrainedTokenizerFast:
    """As SentencePiece's of Llama: spaces are a character, unknown characters are bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = ["<pad>", "<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=names, show_progress=False, limit_alphabet=60
    )
    made.train_from_iterator(corpus, trainer)
    state = json.loads(made.to_str())  # bytes are pieces of the vocabulary, and no special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in names[:3]]
    return _fast(Tokenizer.from_str(json.dumps(state)))


def _word_pieces(corpus: list[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        corpus,
        trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["<pad>", "<unk>", "</s>"], show_progress=False
        ),
    )
    return _fast(made)


@functools.cache
def tokenizers() -> tuple[PreTrainedTokenizerFast, ...]:
    rng = random.Random(0)
    corpus = [hostile_text(rng) for _ in range(300)] + list(hostile_words()) * 2
    return train_tokenizer(corpus, 500), _with_byte_fallback(corpus), _word_pieces(corpus)


def by_prefixes(
    decode: Callable[[list[int]], str], ids: list[int], text: str, bytes_in_runs: bool
) -> list[int | None]:
    """How many characters of the text are whole after each token.

    bytes_in_runs: of a run of byte tokens that is not whole yet nothing is shown: None.
    """
    found: list[int | None] = []
    for i in range(len(ids)):
        prefix, n = decode(ids[: i + 1]), 0
        if bytes_in_runs and "\ufffd" in prefix:
            found.append(None)
            continue
        while n < min(len(prefix), len(text)) and prefix[n] == text[n]:
            n += 1
        found.append(n)
    return found


def offsets(data: bytes) -> None:
    """Spans tile the text, and grow as the decoded prefixes do."""
    rng = random.Random(data)
    tokenizer = rng.choice(tokenizers())
    if rng.random() < 0.4:
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(0, 12))]
    else:
        ids = list(tokenizer.encode(hostile_text(rng, 6), add_special_tokens=False))
        if ids and rng.random() < 0.3:
            ids[rng.randrange(len(ids))] = rng.randrange(len(tokenizer))
    text, spans = tk.align.token_offsets(tokenizer, ids)
    wanted = tk.align.decode(tokenizer, ids)
    if text != wanted or len(spans) != len(ids):
        raise Wrong(f"text {text!r}, expected {wanted!r}")
    special = set(tokenizer.all_special_ids)
    covered = 0
    for i, (a, b) in enumerate(spans):
        if not 0 <= a <= b <= len(text) or a > covered or b < covered and b > a and a != b - 1:
            raise Wrong(f"span {i} of {spans} of {text!r} leaves a hole behind {covered}")
        covered = max(covered, b)
        if ids[i] in special and a != b:
            raise Wrong(f"special token {i} has characters {spans[i]} of {text!r}")
    if covered != len(text):
        raise Wrong(f"spans {spans} end before the text {text!r} of {len(text)} characters")
    whole = by_prefixes(
        lambda part: tk.align.decode(tokenizer, part), ids, text, tokenizer is tokenizers()[1]
    )
    if "\ufffd" not in text:  # where no character is broken, the prefixes say it to the character
        for i, n in enumerate(whole):
            ends = max((b for _, b in spans[: i + 1]), default=0)
            if n is not None and not 0 <= ends - n <= 1:  # of one some bytes are there
                raise Wrong(
                    f"{text!r}: after token {i} {ends} characters, expected {n} or one more: "
                    f"{spans}"
                )


def spelled(data: bytes) -> str | None:
    """Texts of users as ids: they decode to themselves, and hold no control token."""
    rng = random.Random(data)
    made = rng.choice(tokenizers()[:2])
    text = hostile_text(rng, 6)
    try:
        ids = plain_text(made).ids(text)
    except ValueError as error:
        raise Wrong(f"{text!r}: {error}") from error
    if set(ids) & {made.eos_token_id, made.pad_token_id}:
        raise Wrong(f"control tokens in {ids} of {text!r}")
    shown = tk.align.decode(made, ids)
    if shown != text and made is tokenizers()[0]:
        raise Wrong(f"{text!r} became {shown!r}")
    found, spans = tk.align.token_offsets(made, ids)
    words = [(found[a:b], rng.randrange(2)) for a, b in word_spans(found)]
    try:
        categories = map_labels(found, words, spans)
    except ValueError as error:
        raise Wrong(f"{found!r}: {error}") from error
    characters = map_labels(found, words, [(i, i + 1) for i in range(len(found))])
    for (a, b), category in zip(spans, categories, strict=True):
        if category not in (set(characters[a:b]) or {0}):
            raise Wrong(f"token {found[a:b]!r} has {category}, its characters {characters[a:b]}")
    return None if shown == text else REFUSED


TARGETS: list[Any] = [
    Target("offsets of tokens", offsets, 50_000),
    Target("texts of users as tokens", spelled, 40_000),
]
