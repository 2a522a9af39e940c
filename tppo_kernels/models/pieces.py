"""Characters of sampled tokens, in linear time: what each token adds to the text, in bytes.

Byte-level BPE and byte fallback are read off the vocabulary; of every other token it is found out
once what it adds after another one (SentencePiece's spaces, WordPiece's `##`).
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd".encode()
_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Pieces] = weakref.WeakKeyDictionary()

Decode = Callable[[Sequence[int]], str]


def pieces_of(tokenizer: PreTrainedTokenizerBase, decode: Decode) -> Pieces:
    """The pieces of a tokenizer, kept for as long as it lives and gains no token."""
    found = _known.get(tokenizer)
    if found is None or found.size != len(tokenizer):
        found = _known[tokenizer] = Pieces(tokenizer, decode)
    return found


class Pieces:
    """What the tokens of one tokenizer add to a text; `decode` leaves special tokens out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, decode: Decode) -> None:
        self.size, self.decode = len(tokenizer), decode
        self.backend = tokenizer.backend_tokenizer
        added = self.backend.get_added_tokens_decoder()
        self.special = {token for token, form in added.items() if form.special}
        self.special.update(tokenizer.all_special_ids)
        kinds = _decoder_kinds(json.loads(self.backend.to_str())["decoder"])
        self.byte_level = kinds == {"ByteLevel"}
        self.byte_fallback = "ByteFallback" in kinds
        self._anchor: tuple[int, str] | None = None
        self._inner: dict[int, bytes] = {}  # after another token
        self._first: dict[int, bytes] = {}  # where the text begins

    def spans(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]] | None:
        """Half-open spans in the `text` of these ids: every character that a token has a byte of;
        (s, s) for a token without any.  None if the pieces do not make up the text.
        """
        pieces = self._pieces(ids)
        data = b"".join(pieces)
        if data.decode("utf-8", "replace") != text:
            return None
        cells = None if len(data) == len(text) else _character_of_byte(data)
        spans, start = [], 0
        for piece in pieces:
            end = start + len(piece)
            if cells is None:
                spans.append((start, end))
            elif piece:
                spans.append((cells[start], cells[end - 1] + 1))
            else:
                spans.append((cells[start], cells[start]))
            start = end
        return spans

    def _pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token in its place; b"" for special tokens."""
        found = [b""] * len(ids)
        shown = [i for i, token in enumerate(ids) if token not in self.special]
        for i in shown[:1]:
            found[i] = self._remembered(self._first, ids[i], first=True)
        for i in shown[1:]:
            found[i] = self._remembered(self._inner, ids[i], first=False)
        if self.byte_fallback:
            self._replace_broken_runs(found, [i for i in shown], ids)
        return found

    def _remembered(self, memory: dict[int, bytes], token: int, *, first: bool) -> bytes:
        piece = memory.get(token)
        if piece is None:
            piece = memory[token] = self._piece(token, first)
        return piece

    def _piece(self, token: int, first: bool) -> bytes:
        name = self.backend.id_to_token(token)
        if name is None:  # a row of the model's vocabulary that the tokenizer does not have
            return b""
        if self.byte_level:
            codes = [_BYTE_OF.get(character) for character in name]
            return name.encode() if None in codes else bytes(c for c in codes if c is not None)
        if self.byte_fallback and (byte := _BYTE.fullmatch(name)):
            stripped = first and not self.decode([token])  # the space before a first word
            return b"" if stripped else bytes([int(byte[1], 16)])
        if first:
            return self.decode([token]).encode()
        if self._anchor is None:
            self._anchor = self._find_anchor()
        before, shown = self._anchor
        return self.decode([before, token]).removeprefix(shown).encode()

    def _find_anchor(self) -> tuple[int, str]:
        """A token that shows letters, and what it shows."""
        for token in range(self.size):
            shown = "" if token in self.special else self.decode([token])
            if shown.isascii() and shown.isalnum():
                return token, shown
        return 0, self.decode([0])

    def _replace_broken_runs(
        self, pieces: list[bytes], shown: Sequence[int], ids: Sequence[int]
    ) -> None:
        """Byte tokens in a row that are not UTF-8 show U+FFFD, each of them."""

        def is_byte(i: int) -> bool:
            return _BYTE.fullmatch(self.backend.id_to_token(ids[i]) or "") is not None

        for of_bytes, group in groupby(shown, is_byte):
            run = list(group)
            if of_bytes:
                try:
                    b"".join(pieces[i] for i in run).decode()
                except UnicodeDecodeError:
                    for i in run:
                        pieces[i] = _REPLACEMENT


def _decoder_kinds(decoder: dict[str, object] | None) -> set[str]:
    if decoder is None:
        return set()
    inner = decoder.get("decoders")
    if isinstance(inner, list):
        return set().union(*map(_decoder_kinds, inner))
    return {str(decoder["type"])}


def _character_of_byte(data: bytes) -> list[int]:
    """The index of every byte's character, and of one behind the last; a broken sequence is one."""
    cells: list[int] = []
    at = count = 0
    while at < len(data):
        try:
            good, broken = data[at:].decode(), 0
        except UnicodeDecodeError as error:
            good, broken = data[at : at + error.start].decode(), error.end - error.start
        for character in good:
            cells += [count] * len(character.encode())
            count += 1
        if broken:
            cells += [count] * broken
            count += 1
        at = len(cells)
    return [*cells, count]


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's vocabulary, the other way round."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_alphabet()
