"""The tokenizer: a byte-level BPE trained on the data, or that of a local model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import tppo_kernels as tk
from tppo.models.folder import folder_configs, folder_eos_ids
from tppo.models.load import load_from
from tppo.progress import say

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

decode = tk.align.decode
token_offsets = tk.align.token_offsets


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
