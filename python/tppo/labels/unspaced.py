"""Scripts that are written without spaces: inside a run of them any substring may be a word."""

from __future__ import annotations

import re
from itertools import accumulate

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3005-\u3007\u3040-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_ONE_UNSPACED = re.compile(f"[{_UNSPACED}]")
_PIECES = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}]+")


def is_unspaced(text: str) -> bool:
    """Whether the text holds a character of a script that is written without spaces."""
    return not text.isascii() and _ONE_UNSPACED.search(text) is not None


def unspaced_pieces(word: str) -> list[str]:
    """The word cut before and after each character of a script without spaces."""
    return [word] if word.isascii() else _PIECES.findall(word)


def dictionary_borders(text: str) -> frozenset[int]:
    """Where ICU ends a word beside a character of a script without spaces."""
    try:
        from icu4py.breakers import WordBreaker
    except ImportError:
        raise ImportError(
            "icu4py is not installed; the words of a script without spaces come from it: "
            "pip install 'tppo-kernels[train]'"
        ) from None
    known = text.encode(errors="replace").decode()  # half a surrogate pair is no text to ICU
    ends = accumulate(map(len, WordBreaker(known, "root")))  # its own offsets count UTF-16
    return frozenset(i for i in ends if is_unspaced(text[i - 1 : i + 1]))
