"""Pairs of answers to one prompt, as files of preferences have them.

    {"prompt": P, "chosen": A, "rejected": B}     P a text, A and B what follows it; or all three
                                                  lists of chat messages (TRL's formats)
    {"chosen": A, "rejected": B}                  whole chats that share all but their ends (TRL),
                                                  or whole texts that share all up to the last
                                                  "\\n\\nAssistant:" (HH-RLHF)
    {"prompt": P, "answers": [A, B]}              a pair that nobody has labelled
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tppo.errors import DataError, short
from tppo.methods.ser import Doubtful
from tppo.plain_text import plain_text
from tppo.progress import say, say_once
from tppo.stages.prompts import encode_given, prompt_problem
from tppo.store.jsonl import BadRows, is_text, read_jsonl

TURN = "\n\nAssistant:"  # of HH-RLHF: what stands behind the last one is the answer
_EXPECTED = (
    "the keys 'prompt', 'chosen' and 'rejected'; 'chosen' and 'rejected' alone, whole chats or "
    f"texts with {TURN!r}; or, where nobody has chosen, 'prompt' and 'answers' with two of them"
)


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt; the first is the better one where they are labelled."""

    prompt: Any
    """A text, or a list of chat messages."""
    answers: tuple[str, str]
    labelled: bool
    place: str
    """What messages call it: `pairs[3]`, or file and line."""


def read_preferences(
    source: Any, name: str = "pairs", *, skip_bad: bool = False
) -> list[Preference]:
    """The pairs of a JSONL file, or of a list of dicts, a `datasets.Dataset` and the like.

    skip_bad: pairs that are wrong are left out and counted instead of ending the reading.
    Errors: DataError naming the pair (file and line), what it was and what was expected; where no
    pair is left.
    """
    found, bad = list[Preference](), _bad(skip_bad)
    for values, place in _rows(source, name, bad):
        with bad:
            found.append(preference_of(values, place))
    _tell(bad, name)
    if not found:
        raise DataError(f"{name}: no pair, expected at least one")
    return found


def _bad(skip_bad: bool) -> BadRows:
    return BadRows(skip_bad, "; --skip-bad (skip_bad=True) leaves such pairs out")


def _tell(bad: BadRows, name: str) -> None:
    if bad.count:
        say(f"{name}: {bad.count} pairs are left out, the first because {bad.first[0]}")


def _rows(source: Any, name: str, bad: BadRows) -> Iterable[tuple[Any, str]]:
    if isinstance(source, str | Path):
        path = Path(source)
        return ((line.values, f"{path}: line {line.number}") for line in read_jsonl(path, bad))
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise DataError(f"{name} was {short(source)}, a {type(source).__name__}, expected the path "
                        "of a JSONL file, a list of dicts, or a datasets.Dataset")  # fmt: skip
    return ((row, f"{name}[{i}]") for i, row in enumerate(source))


def preference_of(row: Any, place: str) -> Preference:
    """The pair that a row holds, in any of the forms above.

    Errors: DataError where it is none of them, an answer is empty, or both are the same.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: was {short(row)}, expected a dict with {_EXPECTED}")
    labelled = "answers" not in row
    if labelled:
        if not {"chosen", "rejected"} <= row.keys():
            raise DataError(f"{place}: the keys were {short(list(row))}, expected {_EXPECTED}")
        given, names = (row["chosen"], row["rejected"]), ("chosen", "rejected")
    else:
        given, names = row["answers"], ("answers[0]", "answers[1]")
        if not isinstance(given, list | tuple) or len(given) != 2 or "prompt" not in row:
            raise DataError(f"{place}: answers was {short(given)}, expected two of them, and "
                            "'prompt'")  # fmt: skip
    prompt, *ends = (row["prompt"], *given) if "prompt" in row else _split(*given, place)
    problem = prompt_problem(prompt)
    if problem is not None:
        raise DataError(f"{place}: prompt was {short(prompt)}, {problem}")
    first, second = (_answer(e, isinstance(prompt, str), f"{place}: {n}")
                     for e, n in zip(ends, names, strict=True))  # fmt: skip
    if first == second:
        raise DataError(f"{place}: {names[0]} and {names[1]} were both {short(first)}, expected "
                        "two answers that differ: nothing is preferred")  # fmt: skip
    return Preference(prompt, (first, second), labelled, place)


def _split(chosen: Any, rejected: Any, place: str) -> tuple[Any, Any, Any]:
    """The prompt that two whole chats or texts share, and their ends."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, turn, end = chosen.rpartition(TURN)
        other, _, other_end = rejected.rpartition(TURN)
        if turn and prompt == other:
            return prompt + turn, end, other_end
        raise DataError(f"{place}: there is no 'prompt', and chosen and rejected do not share a "
                        f"text up to their last {TURN!r}, expected {_EXPECTED}")  # fmt: skip
    if isinstance(chosen, list | tuple) and isinstance(rejected, list | tuple):
        n = min(len(chosen), len(rejected)) - 1
        if n > 0 and list(chosen[:n]) == list(rejected[:n]):
            return list(chosen[:n]), chosen[n:], rejected[n:]
    raise DataError(f"{place}: there is no 'prompt', and chosen and rejected do not share all "
                    f"messages but their last, expected {_EXPECTED}")  # fmt: skip


def _answer(given: Any, text: bool, what: str) -> str:
    expected = "a text that is not blank"
    if not text:
        expected += ", or a list of one message by the assistant with such a content"
        if isinstance(given, list | tuple) and len(given) == 1 and isinstance(given[0], Mapping):
            if given[0].get("role") == "assistant":
                given = given[0].get("content")
    if not is_text(given):
        raise DataError(f"{what} was {short(given)}, expected {expected}")
    return given


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer, its one EOS included."""
    return [*plain_text(tokenizer).ids(text), tokenizer.eos_token_id]


class Spelled(NamedTuple):
    """A pair with the tokens of its answers."""

    pair: Preference
    first: list[int]
    second: list[int]


def spelled(
    pairs: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    *,
    skip_bad: bool = False,
    name: str = "pairs",
) -> list[Spelled]:
    """The pairs with the tokens of their answers.

    Errors: DataError naming the pair whose answer alone does not fit `positions`, or whose answers
    have the same tokens; where no pair is left.
    """
    found, bad = list[Spelled](), _bad(skip_bad)
    for pair in pairs:
        first, second = (answer_ids(tokenizer, text) for text in pair.answers)
        longest = max(len(first), len(second))
        with bad:
            if longest >= positions:
                raise DataError(f"{pair.place}: an answer has {longest} tokens, expected less than "
                                f"the {positions} positions of the model")  # fmt: skip
            if first == second:
                raise DataError(f"{pair.place}: both answers have the same tokens, expected two "
                                "that differ")  # fmt: skip
            found.append(Spelled(pair, first, second))
    _tell(bad, name)
    if pairs and not found:
        raise DataError(f"{name}: no pair, expected at least one")
    return found


def encoded(
    pairs: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    *,
    skip_bad: bool = False,
) -> list[Doubtful]:
    """The pairs in tokens; a prompt that does not fit beside its longer answer loses its start.

    Errors: as of `spelled`.
    """
    found = []
    for pair, first, second in spelled(pairs, tokenizer, positions, skip_bad=skip_bad):
        prompt = encode_given(tokenizer, pair.prompt, pair.place)
        room = positions - max(len(first), len(second))
        if len(prompt) > room:
            say_once(f"prompts that do not fit the model's {positions} positions beside their "
                     "answers lose their start")  # fmt: skip
        found.append(Doubtful(prompt[-room:], first, second, 0 if pair.labelled else None))
    return found
