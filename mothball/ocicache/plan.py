"""Who goes: pure. The words of a policy, the figures of disk and cache, and for each entry one reason to stay or none."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import translate
from typing import Final, NamedTuple

from mothball.cache_fields import CachePolicy, to_dict
from mothball.ocicache.types import Lease, Pressure

MS: Final = 1_000_000
"""Nanoseconds."""


class Disk(NamedTuple):
    """A file system, bytes. `free`: what an ordinary user may still write; `usable`: that and what is in use."""

    total: int
    usable: int
    free: int

    @property
    def used(self) -> int:
        """What is in use."""
        return self.usable - self.free


def disk_of(fd: int) -> Disk:
    """The file system of an open folder."""
    found = os.fstatvfs(fd)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    free = found.f_bavail * found.f_frsize
    return Disk(found.f_blocks * found.f_frsize, used + free, free)


def under_pressure(disk: Disk, pressure: Pressure) -> bool:
    """True when the disk is fuller than the high mark, as ``df`` counts."""
    return disk.used * 100 > pressure.high * disk.usable


def to_free(policy: CachePolicy, disk: Disk, pressure: Pressure | None) -> int:
    """Bytes that must become free on the disk: by the low mark under pressure, else by ``min_free``; 0 when none must."""
    if pressure is not None:
        return max(0, disk.used - int(disk.usable * pressure.low / 100)) if under_pressure(disk, pressure) else 0
    wanted = policy.wanted_free(disk.total)
    return 0 if wanted is None else max(0, wanted - disk.free)


class Chooser:
    """Says of entries, the least recently used first, which go. Whoever removes one says so with `gone`."""

    def __init__(
        self, policy: CachePolicy, *, now: int, total: int, free: int, pressed: bool = False, everything: bool = False
    ) -> None:
        """`now`: ns of the files' clock. `total`: bytes of the cache. `free`: bytes that must become free. `pressed`: only that."""
        self._cap = None if policy.max_bytes is None or pressed else policy.max_bytes
        self._need = free
        self._older = None if policy.older_than is None or pressed else policy.older_than * MS
        self._reserve = 0 if everything else policy.reserve
        self._everything = everything
        self._now = now
        self._left = total
        self.freed = 0

    def verdict(self, used: int, size: int) -> str:
        """The reason to stay of an entry that was used last at `used` (ns) and whose removal frees `size`; empty: it goes.

        ``used`` and ``reserve`` hold for all that were used later too, when asked in order.
        """
        if not self._everything:
            old = self._older is not None and self._now - used > self._older
            if not old and self.freed >= self._need and (self._cap is None or self._left <= self._cap):
                return "used"
        if self._reserve and self._left - size < self._reserve:
            return "reserve"
        return ""

    def gone(self, size: int, freed: int) -> None:
        """An entry went: `size` bytes from the cache, and `freed` from the disk. Other names elsewhere may hold it there."""
        self.freed += freed
        self._left -= size


class Guard:
    """What no removal takes, whatever its policy says: the young, the kept, the leased."""

    def __init__(self, policy: CachePolicy, *, now: int, grace: bool = True, referred: bool = False) -> None:
        """`now`: ns of the files' clock; `grace` False: young ones are not spared (a full prune).

        `referred`: it guards blobs of layouts. A pull only asks whether such a blob is there, which leaves no trace, and counts on
        it: a lease then keeps all of them.
        """
        self._referred = referred
        self._young = now - policy.grace * MS if grace else None
        self._now = now
        self._leased: int | None = None
        self._keep = re.compile("|".join(translate(each) for each in policy.keep)) if policy.keep else None

    def lease(self, leases: Sequence[Lease]) -> None:
        """What was used or written since the first of them began is theirs; a lease that ended meanwhile still counts."""
        for each in leases:
            began = self._now - each.age_ms * MS
            self._leased = began if self._leased is None else min(began, self._leased)

    def reason(self, digest: str, used: int, changed: int) -> str:
        """Why it stays; empty when nothing here speaks for it. `changed`: the newest of its times of change, ns.

        `changed` is the newest of ctime and mtime. A birth time is never newer than its ctime, and cannot be asked for here.
        """
        if self._young is not None and changed > self._young:
            return "young"
        if self._keep is not None and self._keep.match(digest):
            return "kept"
        if self._leased is not None and (self._referred or max(used, changed) >= self._leased):
            return "leased"
        return ""


def explain(policy: CachePolicy) -> str:
    """The words of a policy without those that are as always: ``older_than=30d``; ``nothing`` when it never removes anything."""
    default = to_dict(CachePolicy())
    words = {word: value for word, value in to_dict(policy).items() if value != default[word]}
    return ",".join(f"{word}={'|'.join(value) if isinstance(value, list) else value}" for word, value in words.items()) or "nothing"
