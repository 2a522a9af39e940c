"""Prompts of a user: texts or chats, with columns, as lists, a data set, or a JSONL file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tppo.errors import DataError, short
from tppo.plain_text import plain_text
from tppo.rewards import Questions
from tppo.rewards.user_function import GIVEN
from tppo.store.jsonl import is_encodable, read_jsonl

PROMPT = "prompt"  # the column that is read
_EXPECTED = (
    "a text, or a chat: a list of messages {'role': ..., 'content': ...}, the last of them not by "
    "the assistant; UTF-8 must be able to hold each text"
)


@dataclass(frozen=True)
class Prompts:
    """Prompts as the user gave them, with their other columns."""

    prompts: list[Any]
    columns: dict[str, list[Any]]
    place: Callable[[int], str]
    """What messages call a prompt: `prompts[3]`, or file and line."""

    @property
    def fingerprint(self) -> str:
        """Changes where any prompt or column does."""
        text = json.dumps([self.prompts, self.columns], default=repr, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_prompts(source: Any, name: str = "prompts") -> Prompts:
    """Prompts from

        a list of texts, or of chats (lists of messages {"role": ..., "content": ...})
        a list of dicts with the key "prompt" (a text or a chat); other keys are columns
        a `datasets.Dataset`, or another iterable of such dicts
        the path of a JSONL file of such objects

    `name` is what messages call the source.
    Errors: DataError naming the prompt, what it was and what was expected.
    """
    if isinstance(source, (Path, str)):
        path = Path(source)
        if isinstance(source, str) and not path.exists():
            raise DataError(f"{name} was {short(source)}, which is no file, expected the path of a "
                            "JSONL file; texts are given as a list, a single one too")  # fmt: skip
        lines = list(read_jsonl(path))
        return _rows([line.values for line in lines],
                     lambda i: f"{path}: line {lines[i].number}")  # fmt: skip
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # would give its columns' names
        raise DataError(f"{name} was a {type(source).__name__}, expected its rows as dicts: "
                        f"{name}.to_dict('records')")  # fmt: skip
    if isinstance(source, Mapping | Set | bytes) or not isinstance(source, Iterable):
        raise DataError(
            f"{name} was {short(source)}, a {type(source).__name__}, expected a list of texts, of "
            f"chats, or of dicts with the key '{PROMPT}', a datasets.Dataset, or a JSONL file"
        )
    return _rows(list(source), lambda i: f"{name}[{i}]")


def _rows(rows: Sequence[Any], place: Callable[[int], str]) -> Prompts:
    if not rows:
        raise DataError(f"{place(0)}: absent, expected at least one prompt")
    if not isinstance(rows[0], Mapping):
        prompts, columns = list(rows), {}
    else:
        columns = _columns(rows, place)
        prompts = columns.pop(PROMPT)
    for i, prompt in enumerate(prompts):
        problem = prompt_problem(prompt)
        if problem is None and isinstance(prompt, str) != isinstance(prompts[0], str):
            problem = f"expected {'a text' if isinstance(prompts[0], str) else 'a chat'}, as the " \
                      "first is"  # fmt: skip
        if problem is not None:
            raise DataError(f"{place(i)}: prompt was {short(prompt)}, {problem}")
    return Prompts(prompts, columns, place)


def _columns(rows: Sequence[Any], place: Callable[[int], str]) -> dict[str, list[Any]]:
    """The rows as columns; every row has those of the first."""
    names = list(rows[0])
    if PROMPT not in names:
        raise DataError(f"{place(0)}: there is no '{PROMPT}' among {short(names)}, expected the "
                        f"key '{PROMPT}' with {_EXPECTED}")  # fmt: skip
    for name in names:
        if not isinstance(name, str) or name in GIVEN:
            raise DataError(f"{place(0)}: a column is named {name!r}, expected a text other than "
                            f"{', '.join(GIVEN)}: a function gets the answers so")  # fmt: skip
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{place(i)}: was {short(row)}, expected a dict, as the first is")
        for name in {*names} ^ {*row}:
            missing = "missing" if name in names else "not in the first row"
            raise DataError(
                f"{place(i)}: column {name!r} is {missing}, expected the columns of the first row, "
                f"{', '.join(names)} (None where there is nothing)"
            )
    return {name: [row[name] for row in rows] for name in names}


def prompt_problem(prompt: Any) -> str | None:
    """What is wrong with a prompt, None if nothing is."""
    if isinstance(prompt, str):
        return None if prompt and is_encodable(prompt) else f"expected {_EXPECTED}"
    if not isinstance(prompt, list | tuple) or not prompt:
        return f"expected {_EXPECTED}"
    for k, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not (
            is_encodable(message.get("role")) and is_encodable(message.get("content"))
        ):
            return f"message {k} was {short(message)}, expected {_EXPECTED}"
    return f"expected {_EXPECTED}" if prompt[-1]["role"] == "assistant" else None


def questions(
    given: Prompts, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Questions:
    """The prompts as the policy reads them.

    A text is read as it stands, behind the tokenizer's bos token where it has one; special tokens
    that stand in it are such.  A chat goes through the tokenizer's chat template, with the header
    of the assistant's answer behind it; special tokens there are the template's alone.
    Errors: DataError naming the first prompt with more than `max_tokens` tokens, or with none;
    where the tokenizer has no chat template or it refuses a chat.
    """
    ids = [encode_given(tokenizer, p, given.place(i)) for i, p in enumerate(given.prompts)]
    for i, row in enumerate(ids):
        if not row:
            raise DataError(f"{given.place(i)}: prompt {short(given.prompts[i])} has no token")
        if len(row) > max_tokens:
            count = sum(len(other) > max_tokens for other in ids)
            raise DataError(
                f"{given.place(i)}: the prompt has {len(row)} tokens ({count} of {len(ids)} "
                f"prompts are too long, the longest has {max(map(len, ids))}), expected at most "
                f"{max_tokens}: the positions of the model less the longest answer. Cut the "
                "prompts, or let answers be shorter (max_new_tokens)"
            )
    return Questions(ids, given.prompts, given.columns)


def encode_given(tokenizer: PreTrainedTokenizerBase, prompt: Any, place: str) -> list[int]:
    """Token ids of one prompt, as `questions` says; `place` is what errors call it."""
    if isinstance(prompt, str):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + tokenizer.encode(prompt, add_special_tokens=False)
    if not tokenizer.chat_template:
        raise DataError(
            f"{place}: a chat, and the tokenizer of {tokenizer.name_or_path or 'the model'} has no "
            "chat template, expected a model that was tuned on chats, or prompts as texts"
        )
    try:
        return plain_text(tokenizer).chat(prompt, tokenizer.apply_chat_template)
    except Exception as error:  # what a template of somebody else's does, in jinja2's words
        raise DataError(
            f"{place}: the chat template of {tokenizer.name_or_path or 'the tokenizer'} does not "
            f"take this chat ({type(error).__name__}: {error})"
        ) from error
