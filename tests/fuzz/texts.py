"""Texts with what goes wrong in text: accents of their own, joiners, other directions, bytes."""

import functools
import random
import unicodedata

PIECES = (
    "boots",
    "trail",
    "SHOES",
    "caf\u00e9",
    "cafe\u0301",
    "na\u0131ve",
    "\u0130stanbul",
    "stra\u00dfe",
    "\ufb03",
    "\u01c5",
    "1\u00b2",
    "\u00bd",
    "3.5",
    "1,000",
    "12:30",
    "t-shirt",
    "don't",
    "l\u2019eau",
    "\u4eac\u90fd",
    "\u65c5\u884c",
    "\u6771\u4eac\u30bf\u30ef\u30fc",
    "\u30ab\uff9e",
    "\u0e19\u0e31\u0e01\u0e40",
    "\uac00",
    "\u1100\u1161\u11a8",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u0915\u094d\u0937",
    "\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd",
    "1\ufe0f\u20e3",
    "\u2764\ufe0f",
    "\U0001d538",
    "\U00020000",
    "\u212b",
    "$5",
    "\u20ac7",
    "C++",
    "#1",
    "@a",
    "a_b",
    "%",
    "</s>",
    "<|im_end|>",
    "[SEP]",
    "<0x0A>",
    "\u2581",
    "\u0120",
    "\ue000",
    "x" * 120,
    "\u0301",
    "\u200d",
    "\u202eabc\u202c",
    "\ufeff",
    "\u00ad",
    "a\u00adb",
    "\u2028",
    "\x85",
    "\x00",
    "\x1f",
    "\u3000",
    "\ufffd",
    "\u00a0",
    "\t",
    "-",
    "\u2014",
    "\u2026",
    "\u3002",
    "(",
    ")",
    '"',
    "'",
    "\U000e0067",
    "\u0300\u0301\u0302",
)
JOINTS = (" ", " ", " ", "", "-", ", ", "\u200b", "\u00a0", "\u200d", "/", ".", "'", "\u3001", "  ")
PLANES = (
    (0x20, 0x7F),
    (0x80, 0x250),
    (0x300, 0x370),
    (0x370, 0x530),
    (0x590, 0x700),
    (0x900, 0xE80),
    (0x1100, 0x1200),
    (0x2000, 0x2C00),
    (0x3000, 0x3200),
    (0x4E00, 0x4F00),
    (0xAC00, 0xAD00),
    (0xF900, 0xFFFF),
    (0x10000, 0x10200),
    (0x1D400, 0x1D800),
    (0x1F000, 0x1FAFF),
    (0xE0000, 0xE0080),
)


@functools.cache
def hostile_words() -> tuple[str, ...]:
    """Pieces of text, and each of them in Unicode's other forms."""
    forms = [unicodedata.normalize(form, piece) for piece in PIECES for form in ("NFD", "NFKC")]
    return tuple(dict.fromkeys((*PIECES, *forms)))


def hostile_text(rng: random.Random, longest: int = 8) -> str:
    """A line of such pieces and of characters of any plane."""
    found = []
    for _ in range(rng.randint(0, longest)):
        if rng.random() < 0.7:
            found.append(rng.choice(hostile_words()))
        else:
            first, last = rng.choice(PLANES)
            found.append("".join(chr(rng.randrange(first, last)) for _ in range(rng.randint(1, 4))))
        found.append(rng.choice(JOINTS))
    return "".join(found).replace("\n", " ")
