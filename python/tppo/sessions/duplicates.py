"""Sessions that repeat another session."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from tppo.labels.queries import query_text
from tppo.sessions.session import Session
from tppo.store.fingerprints import Fingerprints

__all__ = ["exact_key", "near_key", "normalize", "without_duplicates"]


def without_duplicates(
    sessions: Iterable[Session], mode: str, left_out: Counter[str]
) -> Iterator[Session]:
    """The sessions that no earlier one equals by `exact_key` or `near_key`; or all ("keep")."""
    if mode == "keep":
        yield from sessions
        return
    key = {"exact": exact_key, "near": near_key}[mode]
    seen = Fingerprints()
    for session in sessions:
        if seen.add(key(session)):
            yield session
        else:
            left_out[f"{mode} duplicate"] += 1


def exact_key(session: Session) -> str:
    """All of a session but its id and its source."""
    return repr((session.user, session.profile, session.history, session.targets))


def near_key(session: Session) -> str:
    """The texts of a session, normalised; whose it is and when it was does not matter."""
    texts = (*(event.text for event in session.history), "", *session.targets)
    return "\n".join(map(normalize, texts))


def normalize(text: str) -> str:
    """A text as the rule and the metrics compare it; case-folded NFKC if it holds no word."""
    return query_text(text) or unicodedata.normalize("NFKC", text).casefold()
