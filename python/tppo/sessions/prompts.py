"""A session as prompt and answer: text, and token ids.

Prompt: profile, history in time order, how many queries are asked for.  Answer: the next queries,
one a line, then EOS.  The targets never reach a prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from tppo.errors import DataError
from tppo.labels.queries import answer_text
from tppo.plain_text import plain_text
from tppo.progress import say_once, track
from tppo.sessions.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_text(session: Session, skip: int = 0) -> str:
    """The prompt without the first `skip` lines that it can do without.

    The oldest events go first, up to the newest, which stays; then the profile, last line first.
    """
    return "\n".join([*history_lines(session, skip), f"next {len(session.targets)}:\n"])


def history_lines(session: Session, skip: int = 0) -> list[str]:
    """Profile and history, a line each, without `skip` of them as in `prompt_text`."""
    skip_events = min(skip, max(0, len(session.history) - 1))
    kept_profile = len(session.profile) - (skip - skip_events)
    lines = [f"profile: {line}" for line in session.profile[: max(0, kept_profile)]]
    return lines + [f"{event.type}: {event.text}" for event in session.history[skip_events:]]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt: through the chat template where there is one, else bos + text.

    Control tokens are the template's alone: those that a user typed are text.
    """
    encoder = plain_text(tokenizer)
    if tokenizer.chat_template:
        try:
            return encoder.message(text, tokenizer.apply_chat_template)
        except Exception as error:  # what a template of somebody else's does, in jinja2's words
            raise ValueError(
                f"{tokenizer.name_or_path}: the chat template of the tokenizer cannot be used "
                f"({type(error).__name__}: {error}), expected one that takes a user's message; "
                "without a template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json) the prompt is given as it is"
            ) from error
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + encoder.ids(text)


def encode_answer(tokenizer: PreTrainedTokenizerBase, queries: Sequence[str]) -> list[int]:
    """Token ids of an answer, its one EOS included."""
    return [*plain_text(tokenizer).ids(answer_text(queries)), tokenizer.eos_token_id]


def check_ends(
    tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int], sessions: Sequence[Session]
) -> None:
    """Errors: ValueError where a token between two queries would already end the answer, and
    DataError naming the first session whose true queries have such a token.
    """
    one, two = (set(encode_answer(tokenizer, ["a"] * n)[:-1]) for n in (1, 2))
    remedy = "remove it from eos_token_id of the model's generation_config.json and config.json"
    for token in (two - one) & set(eos_ids):
        raise ValueError(
            f"token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, ends an answer and also "
            f"separates its queries, so that no answer could have two; {remedy}"
        )
    for session in sessions:
        for token in {*encode_answer(tokenizer, session.targets)[:-1]} & set(eos_ids):
            raise DataError(
                f"session {session.id!r}: its next queries have token {token}, "
                f"{tokenizer.convert_ids_to_tokens(token)!r}, which would end the answer there; "
                f"{remedy}, or leave the session out"
            )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, sessions: Sequence[Session], max_tokens: int
) -> list[list[int]]:
    """Token ids of every session's prompt; one that is too long loses events, the oldest first,
    and when only the newest is left, lines of the profile.

    Errors: DataError naming the session whose newest event alone does not fit.
    """
    prompts = []
    for session in track(sessions, "prompts"):
        for skip in range(max(1, len(session.history)) + len(session.profile)):
            ids = encode_prompt(tokenizer, prompt_text(session, skip))
            if len(ids) <= max_tokens:
                break
        else:
            raise DataError(
                f"session {session.id!r}: its prompt has {len(ids)} tokens with the newest event "
                f"alone, the model has room for {max_tokens} before the answer"
            )
        if skip:
            say_once(f"prompts longer than {max_tokens} tokens lose their oldest events")
        prompts.append(ids)
    return prompts
