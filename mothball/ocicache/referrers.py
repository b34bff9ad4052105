"""What refers to something as its subject, such as a signature: it stays as long as that does."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from mothball.ocicache.reach import Reach
from mothball.ocicache.types import Tick

_PAIR: Final = 64
_SUBJECT: Final = 32
_TICKS: Final = 64


class Referrers:
    """Pairs of a subject and what refers to it. What a referrer names may be another's subject, and so on, each is met once."""

    def __init__(self, pairs: bytearray, reach: Reach, tick: Tick) -> None:
        """`pairs`: 32 bytes of a subject's digest, then 32 of the referrer's, again and again."""
        self._count = len(pairs) // _PAIR
        self._pairs = b"".join(sorted(bytes(pairs[at : at + _PAIR]) for at in range(0, len(pairs), _PAIR)))
        self._met = bytearray(self._count)
        self._todo: list[int] = []
        self._reach = reach
        self._tick = tick
        reach.fresh = self._see

    def follow(self) -> None:
        """Count as reachable what refers to something reachable, and what that names, to the last of them."""
        for number in range(self._count):
            if not self._met[number] and (subject := self._subject(number).hex()) in self._reach.reachable:
                self._see(subject)
            self.again()

    def again(self) -> None:
        """And for what became reachable since."""
        while self._todo:
            if not len(self._todo) % _TICKS:
                self._tick(len(self._reach.reachable))
            at = self._todo.pop() * _PAIR
            self._reach.add(self._pairs[at + _SUBJECT : at + _PAIR].hex())

    def _subject(self, number: int) -> bytes:
        return self._pairs[number * _PAIR : number * _PAIR + _SUBJECT]

    def _see(self, digest: str) -> None:
        subject = bytes.fromhex(digest)
        number = bisect_left(range(self._count), subject, key=self._subject)
        while number < self._count and not self._met[number] and self._subject(number) == subject:
            self._met[number] = 1
            self._todo.append(number)
            number += 1
