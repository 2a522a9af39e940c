"""Texts of users as token ids: whatever a text spells, nothing in it is a control token.

A tokenizer of transformers reads the characters `</s>` in a text as the end of the text, and
`<|im_end|>` as the end of a turn.  Somebody who types them would end an answer that is trained on,
or write a turn of the other speaker into a prompt.  Here such characters are spelled with ordinary
tokens, and decode to themselves; the ids of every other text are those of the tokenizer itself.
"""

from __future__ import annotations

import json
import re
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"<\|.+\|>", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a piece that stands for a byte, such as a line break's
_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, PlainText]] = (
    weakref.WeakKeyDictionary()
)


def plain_text(tokenizer: PreTrainedTokenizerBase) -> PlainText:
    """The encoder of users' texts for a tokenizer, kept until the tokenizer changes."""
    state = (len(tokenizer), tuple(tokenizer.all_special_ids), str(tokenizer.chat_template))
    found = _known.get(tokenizer)
    if found is None or found[0] != state:
        found = _known[tokenizer] = state, PlainText(tokenizer)
    return found[1]


class Spelled(NamedTuple):
    """A text in tokens."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # the characters of each, half-open; (0, 0) of an added one


class PlainText:
    """Encodes texts of users, bare or inside the chat template.

    It holds a copy of the tokenizer in which every control token has another, unguessable name.  In
    a text those names do not occur; in a rendered chat template the control tokens that the
    template wrote are given their new names first.  The whole is encoded at once, so that no merge
    across the border of template and text is lost.

    Control tokens are those that the tokenizer calls special, and of the other added tokens those
    that the chat template writes or that look like `<|this|>`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        nonce = secrets.token_hex(16)
        self.control = control_tokens(tokenizer)
        names = {token: f"{nonce}c{i:08d}c" for token, i in self.control.items()}
        backend = tokenizer.backend_tokenizer
        copy = _renamed(backend.to_str(), names)
        self._backend = type(backend).from_str(json.dumps(copy))
        # For texts that spell a byte: byte pieces have names that the model looks bytes up by, so
        # they are made too costly to be chosen, which changes what an unknown character costs.
        costly = _with_costly_bytes(copy)
        self._of_bytes = costly and type(backend).from_str(json.dumps(costly))
        # What stands for control tokens that a user typed while the template is rendered.
        self._stand_ins = {token: f"{nonce}u{i:08d}u" for token, i in self.control.items()}
        self._back = names | {mark: token for token, mark in self._stand_ins.items()}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, nothing added before or behind it."""
        return list(self._encoder(text).encode(text, add_special_tokens=False).ids)

    def spelled(self, texts: Sequence[str]) -> list[Spelled]:
        """Ids and character offsets of texts, with what the tokenizer adds around a text."""
        if any(self._encoder(text) is not self._backend for text in texts):
            found = [self._encoder(text).encode(text) for text in texts]
        else:
            found = self._backend.encode_batch(list(texts))
        return [Spelled(list(one.ids), list(one.offsets)) for one in found]

    def _encoder(self, text: str) -> Any:
        return self._of_bytes if self._of_bytes and _BYTE.search(text) else self._backend

    def message(self, text: str, render: Callable[..., Any]) -> list[int]:
        """Token ids of the chat template around a user's message, up to the answer.

        render: `apply_chat_template` of the tokenizer.  Errors: whatever the template raises.
        """
        return self.chat([{"role": "user", "content": text}], render)

    def chat(self, messages: Sequence[Mapping[str, str]], render: Callable[..., Any]) -> list[int]:
        """Token ids of the chat template around messages, up to the answer; see `message`."""
        marked = [
            {key: _replaced(value, self._stand_ins) for key, value in message.items()}
            for message in messages
        ]
        rendered = render(marked, add_generation_prompt=True, tokenize=False)
        return self.ids(_replaced(rendered, self._back))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """What a text may spell without meaning it, with its id; see `PlainText`."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    template = str(tokenizer.chat_template)
    found = {str(tokenizer.convert_ids_to_tokens(i)): i for i in tokenizer.all_special_ids}
    for i, token in added.items():
        written = token.content.strip() and token.content in template
        if token.special or written or _MARKED.fullmatch(token.content):
            found[token.content] = i
    return found


def _renamed(text: str, names: dict[str, str]) -> dict[str, Any]:
    """The JSON of a tokenizer in which tokens have other names, and no text gives these tokens."""
    copy = json.loads(text)
    copy["truncation"] = copy["padding"] = None  # `tokenizer.encode` sets none either
    for token in copy["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = copy["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): i for name, i in model["vocab"].items()}
    else:  # Unigram: a list, the index is the id
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            pair
            for pair in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
            if not names.keys() & {pair[0], pair[1], pair[0] + pair[1][prefix:]}
        ]
    return copy


def _with_costly_bytes(copy: dict[str, Any]) -> dict[str, Any] | None:
    """The same tokenizer with byte pieces that no text is split into, None where none could be.

    A Unigram model with byte fallback takes a text's `<0x0A>` for its piece of that name.
    """
    model = copy["model"]
    if isinstance(model["vocab"], dict) or not model.get("byte_fallback"):
        return None
    lowest = min(score for _, score in model["vocab"]) - 1_000.0
    vocab = [[name, lowest if _BYTE.fullmatch(name) else score] for name, score in model["vocab"]]
    return copy | {"model": model | {"vocab": vocab}}


def _replaced(text: Any, new: dict[str, str]) -> Any:
    """The text with every key of `new` replaced, the longest where several begin; what is no text
    as it is.
    """
    if not new or not isinstance(text, str):
        return text
    pattern = "|".join(map(re.escape, sorted(new, key=len, reverse=True)))
    return re.sub(pattern, lambda found: new[found[0]], text)
