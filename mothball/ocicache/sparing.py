"""What layouts need: their reach, the referrers of what is reachable, and whether a pull into them is in progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final

from mothball.cache_fields import Cache
from mothball.errors import Corrupt
from mothball.ocicache.aside import Aside
from mothball.ocicache.layouts import busy_with, is_removed, layouts_in
from mothball.ocicache.openfiles import OpenFiles
from mothball.ocicache.place import Place
from mothball.ocicache.reach import Reach, subject_of
from mothball.ocicache.records import Records
from mothball.ocicache.referrers import Referrers
from mothball.ocicache.removal import Note
from mothball.ocicache.scan import BLOCK
from mothball.ocicache.settle import is_empty, put_back
from mothball.ocicache.system import exists
from mothball.ocicache.types import PruneResult, Tick

QUIET_NS: Final = 60 * 1_000_000_000
"""A file of another name that was written since then is a pull in progress; an older one was left by a killed pull."""
_WAIT_S: Final = 5.0
_POLL_S: Final = 0.1
_TICKS: Final = 256

Layouts = Callable[[], Iterator[tuple[str, int]]]


def layouts_of(cache: Cache, place: Place, pool: int) -> Layouts:
    """The layouts that refer to the blobs of the cache: it is one itself, or they were declared."""

    def itself() -> Iterator[tuple[str, int]]:
        yield cache.path, place.fd if place.fd is not None else -1

    def declared() -> Iterator[tuple[str, int]]:
        for folder in cache.layouts:
            none = True
            for found in layouts_in(folder, but=place.fd):
                yield found
                # When the last one is removed while it is looked at, nothing is known, as when it had not been there.
                none = none and is_removed(found[1])
            if none and not is_empty(pool):
                text = f"there is no layout in {folder!r}, so nobody knows which blobs are needed; nothing was deleted"
                raise Corrupt(f"{text}; is its disk mounted? If none refers to them any more, declare kind=blobs", path=folder)

    return declared if cache.layouts else itself


class Sparing:
    """For a cache to which no layout refers, nothing is reachable and no pull is in progress."""

    def __init__(self, cache: Cache, place: Place, pool: int, *, referred: bool, tick: Tick | None = None) -> None:
        """`referred`: layouts need its blobs."""
        layouts = layouts_of(cache, place, pool) if referred else None
        self._pool = pool
        self._place = place
        self._folders = cache.layouts
        self._layouts = layouts
        self.paths = (cache.path, *cache.layouts)
        """The folders that a pull into it names."""
        self.coming = self.coming_bytes = 0
        """Blobs that a prune would give back, in a dry run."""
        self._referrers: Referrers | None = None
        self.reach = None if layouts is None else Reach(pool, layouts, tick)

    def mark(self) -> None:
        """See what is reachable. Raises `Corrupt` when that cannot be known, `Busy`."""
        if self.reach is not None:
            self.reach.mark()

    def again(self) -> None:
        """And what became so meanwhile."""
        if self.reach is not None:
            self.reach.again()
        if self._referrers is not None:
            self._referrers.again()

    def changed(self) -> tuple[int, ...]:
        """Something else whenever the cache's own folder changed, or an index that was read."""
        place = () if self._place.fd is None else (os.fstat(self._place.fd).st_mtime_ns,)
        return (*place, hash(self.reach.state)) if self.reach is not None else place

    def give_back(self, aside: Aside, where: str, note: Note) -> tuple[int, int]:
        """Put back out of the folder `where` of the aside what is reachable; how many blobs, and their bytes.

        What a manifest names is known when the manifest is back, so this goes on until nothing more comes.
        """
        blobs = size = 0
        while self.reach is not None:
            came, room = put_back(aside, where, self._pool, self.reach.reachable.__contains__, note)
            if not came:
                break
            blobs, size = blobs + came, size + room
            self.mark()
        return blobs, size

    def would_give_back(self, aside: Aside, where: str, _: Note) -> tuple[int, int]:
        """What `give_back` would, and nothing is changed."""
        fd = aside.open(where)
        if fd is None or self.reach is None:
            return 0, 0
        blobs = size = 0
        try:
            with os.scandir(fd) as listed:
                for entry in listed:
                    if entry.name in self.reach.reachable and not exists(entry.name, self._pool):
                        found = entry.stat(follow_symlinks=False)
                        blobs += 1
                        size += found.st_blocks * BLOCK if found.st_nlink < 2 else 0  # noqa: PLR2004 - other names hold it
        finally:
            os.close(fd)
        self.coming, self.coming_bytes = self.coming + blobs, self.coming_bytes + size
        return blobs, size

    def report(self, result: PruneResult) -> None:
        """Say which blobs are named and missing."""
        if self.reach is not None and self.reach.missing_count:
            for digest in self.reach.missing[:10]:
                result.problem(digest, "an index names it and it is not there; pull that image again")
            if (more := self.reach.missing_count - len(self.reach.missing[:10])) > 0:
                result.problem("", f"{more} more blob(s) that an index names are not there")

    def referrers(self, records: Records, tick: Tick) -> None:
        """Count as reachable what refers to something reachable as its subject, and what that names, to the last of them."""
        if self.reach is None:
            return
        pairs = bytearray()
        for number, entry in enumerate(records):
            if not number % _TICKS:
                tick(number)
            subject = subject_of(entry.name, self._pool)
            if subject is not None:
                pairs += bytes.fromhex(subject) + entry.key
        self._referrers = Referrers(pairs, self.reach, tick)
        self._referrers.follow()

    def follow(self, digests: bytearray) -> None:
        """What stays for another reason than that an index reaches it (32 bytes each) stays whole: with all that it names."""
        for at in range(0, len(digests), 32):
            if self.reach is not None:
                self.reach.add(digests[at : at + 32].hex())

    def pulling(self, opened: OpenFiles, *, wait: bool) -> str | None:
        """The name of what shows that a pull is in progress; with `wait`, of one that does not end within five seconds."""
        if self._layouts is None:
            return None
        until = time.monotonic() + (_WAIT_S if wait else 0)
        while True:
            sign = self._sign(opened)
            if sign is None or time.monotonic() >= until:
                return sign
            time.sleep(_POLL_S)

    def _sign(self, opened: OpenFiles) -> str | None:
        since = time.time_ns() - QUIET_NS
        for fd in (self._pool, self._place.fd):
            if fd is not None and (sign := busy_with(fd, since, opened.__contains__)) is not None:
                return sign
        for _, fd in chain(self._layouts(), self._unfinished()) if self._layouts is not None else ():
            if (sign := busy_with(fd, since, opened.__contains__)) is not None:
                return sign
        return None

    def _unfinished(self) -> Iterator[tuple[str, int]]:
        for folder in self._folders:
            yield from layouts_in(folder, unfinished=True, but=self._place.fd)
