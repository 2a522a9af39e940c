"""Sessions that say the same again."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from tppo.fingerprints import Fingerprints
from tppo.sessions import Session

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
    """NFKC, case-folded, without punctuation, single spaces; as it was if nothing else is in it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_SPACES).split()) or folded


class _Spaces(dict[int, str]):
    """Punctuation, separators and control characters become spaces, the rest stays."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = unicodedata.category(character)[0] not in "PZC"
        self[code] = character if kept else " "
        return self[code]


_SPACES = _Spaces()
