"""A dictionary of millions of texts in bounded memory: it keeps 8-byte hashes, not the texts."""

from __future__ import annotations

import hashlib
from array import array

_FIRST_SLOTS = 1 << 10
_FULLEST = 0.6


class Fingerprints:
    """Maps texts to whole numbers 0 <= value < 2^63, in 16 bytes a slot and at most 54 bytes a text
    (81 while it grows).

    Two texts with the same 64-bit hash count as one: among n texts that happens with a probability
    of about n^2 / 2^65 (n = 10^6: 3e-8; n = 10^8: 3e-4).
    """

    def __init__(self) -> None:
        self._length = 0
        self._allocate(_FIRST_SLOTS)

    def __len__(self) -> int:
        return self._length

    def __contains__(self, text: str) -> bool:
        return self.get(text) is not None

    def get(self, text: str) -> int | None:
        """The value of a text, or None."""
        key = fingerprint(text)
        slot = self._slot(key)
        return self._values[slot] if self._keys[slot] else None

    def setdefault(self, text: str, value: int) -> int:
        """The value that the text has; a text that is new gets `value`."""
        key = fingerprint(text)
        slot = self._slot(key)
        if self._keys[slot]:
            return self._values[slot]
        self._keys[slot], self._values[slot] = key, value
        self._length += 1
        if self._length > _FULLEST * len(self._keys):
            self._grow()
        return value

    def add(self, text: str) -> bool:
        """Whether the text is new; it is not from now on."""
        before = self._length
        self.setdefault(text, 0)
        return self._length > before

    def _allocate(self, slots: int) -> None:
        self._keys = array("Q", bytes(8 * slots))  # 0 marks a free slot
        self._values = array("q", bytes(8 * slots))
        self._mask = slots - 1

    def _slot(self, key: int) -> int:
        """The slot of a key, or the free one where it belongs."""
        keys, mask = self._keys, self._mask
        slot = key & mask
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        self._allocate(2 * len(keys))
        for key, value in zip(keys, values, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._values[slot] = key, value


def fingerprint(text: str) -> int:
    """A hash 0 < h < 2^64 that is the same on every machine and in every process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
