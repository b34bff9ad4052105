"""Sets of millions in a few bytes each: digests that are reachable, files with several names.

A digest or text is known by eight bytes of a secret hash. By its own first bytes it must not be: whoever makes an image chooses
what it names, and what is taken for reachable is not looked at again: what only that needs would seem to be needed by nobody.
"""

from __future__ import annotations

import secrets
from array import array
from hashlib import blake2b
from typing import Final

_FIRST_BITS: Final = 10
_FIRST: Final = 1 << _FIRST_BITS
_WORD: Final = (1 << 64) - 1
_ODD: Final = secrets.randbits(64) | 1
"""Whoever chooses the digests of an image must not know which of them meet in one slot."""
_SECRET: Final = secrets.token_bytes(16)
_SALT: Final = secrets.token_hex(16)
_FULL: Final = 0.66


class Numbers:
    """A map of whole numbers (0 to 2**64-1) to small counts; a number that was never added has count 0."""

    def __init__(self) -> None:
        self._mask = _FIRST - 1
        self._shift = 64 - _FIRST_BITS
        self._keys = array("Q", bytes(8 * _FIRST))
        self._counts = array("I", bytes(4 * _FIRST))
        self._limit = int(_FIRST * _FULL)
        self.count = 0

    def add(self, key: int) -> int:
        """Count `key` once more and return its count."""
        slot = self._slot(key)
        if not self._counts[slot]:
            self._keys[slot] = key
            self.count += 1
            if self.count > self._limit:
                self._counts[slot] = 1
                self._grow()
                return 1
        self._counts[slot] += 1
        return self._counts[slot]

    def __contains__(self, key: int) -> bool:
        return self._counts[self._slot(key)] > 0

    def _slot(self, key: int) -> int:
        keys, counts, mask = self._keys, self._counts, self._mask
        slot = (key * _ODD & _WORD) >> self._shift
        while counts[slot] and keys[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, counts = self._keys, self._counts
        slots = 2 * (self._mask + 1)
        self._mask = slots - 1
        self._shift -= 1
        self._keys, self._counts = array("Q", bytes(8 * slots)), array("I", bytes(4 * slots))
        self._limit = int(slots * _FULL)
        for key, count in zip(keys, counts, strict=True):
            if count:
                slot = self._slot(key)
                self._keys[slot], self._counts[slot] = key, count


class Digests:
    """Which digests (64 hex digits) are in it."""

    def __init__(self) -> None:
        self._numbers = Numbers()

    def __len__(self) -> int:
        return self._numbers.count

    def add(self, digest: str) -> bool:
        """True when it was not in it yet."""
        return self._numbers.add(hash(_SALT + digest) & _WORD) == 1

    def __contains__(self, digest: str) -> bool:
        # Python's own hash of a text is as good a one, and three times as fast as others: a scan asks for each blob.
        return hash(_SALT + digest) & _WORD in self._numbers


class Texts:
    """Which texts are in it; which two are taken for one nobody can choose."""

    def __init__(self) -> None:
        self._numbers = Numbers()

    def add(self, text: str) -> bool:
        """True when it was not in it yet."""
        return self._numbers.add(int.from_bytes(blake2b(text.encode(), digest_size=8, key=_SECRET).digest())) == 1


class Links:
    """Bytes of files that may have several names: each file once."""

    def __init__(self) -> None:
        self._seen = Numbers()

    def first(self, inode: int, links: int, size: int) -> int:
        """`size` when this is the first name of the file that was seen, else 0."""
        return size if links < 2 or self._seen.add(inode) == 1 else 0  # noqa: PLR2004 - a second name

    def last(self, inode: int, links: int, size: int) -> int:
        """`size` when this is the last of its names that go, else 0: until then the bytes stay."""
        return size if links < 2 or self._seen.add(inode) == links else 0  # noqa: PLR2004 - a second name
