"""A cache in figures: what is in it, what nobody uses, what could be brought back. Nothing is written."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from mothball.cache_fields import Cache, CachePolicy
from mothball.ocicache import aside as asides
from mothball.ocicache.aside import TREE
from mothball.ocicache.place import Place, open_place
from mothball.ocicache.plan import MS, Guard
from mothball.ocicache.prune import open_pool
from mothball.ocicache.recognise import recognise_fd
from mothball.ocicache.removal import count_content
from mothball.ocicache.scan import survey
from mothball.ocicache.types import PRUNABLE, Found, Kind, LastUse, Tick, Usage

_NO_GRACE = CachePolicy(grace=0)


def usage(
    cache: Cache,
    *,
    data_dir: Path,
    roots: Sequence[Path] = (),
    host: str = "",
    unused_for_ms: int = 30 * 86_400_000,
    last_use: LastUse | None = None,
    tick: Tick | None = None,
) -> Usage:
    """Size, count, oldest, newest and unused of `cache`, also of another tool's store. Raises as `prune` does."""
    out = Usage(cache_dir=cache.path, host=host)
    tick = tick or _silent
    with open_place(cache.path, data_dir=data_dir, roots=roots) as place:
        if place.fd is None:
            out.exists = False
            return out
        found = recognise_fd(place.fd, cache.path, cache.kind)
        out.kind, out.advice = found.kind.value, found.advice
        if found.kind not in PRUNABLE:
            tally = count_content(place.fd, tick)
            out.size, out.count = tally.bytes, tally.files
            return out
        pool = None if found.kind is Kind.EMPTY else open_pool(place, found)
        try:
            if pool is not None:
                _count(pool, found, out, unused_for_ms, last_use, tick)
            _quarantined(place, pool, out, tick)
        finally:
            if pool is not None:
                os.close(pool)
    return out


class _Unused:
    """Takes the place of the records of a prune: what was not used for so long is counted, and nothing is kept."""

    def __init__(self, before: int) -> None:
        self._before = before
        self.count = 0
        self.bytes = 0

    def add(self, used: int, _k: bytes, _f: int, _i: int, _s: int, room: int, _m: int, _a: int, _l: int) -> None:
        """One entry."""
        if used < self._before:
            self.count += 1
            self.bytes += room


def _count(pool: int, found: Found, out: Usage, unused_for_ms: int, last_use: LastUse | None, tick: Tick) -> None:
    now = time.time_ns()
    unused = _Unused(now - unused_for_ms * MS)
    guard = Guard(_NO_GRACE, now=now, grace=False)
    totals = survey(pool, found.kind, guard, unused, now=now, reachable=None, last_use=last_use, tick=tick)
    out.size, out.count, out.other = totals.bytes, totals.count, totals.others
    out.unused, out.unused_bytes = unused.count, unused.bytes
    if totals.count:
        out.oldest_ms, out.newest_ms = max(0, now - totals.oldest) // MS, max(0, now - totals.newest) // MS


def _quarantined(place: Place, pool: int | None, out: Usage, tick: Tick) -> None:
    for each in asides.found(place, asides.pools(place, pool)):
        state = None if each is None else each.state()
        if each is None or state is None or state.stage == "full" or (fd := each.open(TREE)) is None:
            continue
        try:
            tally = count_content(fd, tick)
        finally:
            os.close(fd)
        out.quarantined += tally.files
        out.quarantined_bytes += tally.bytes


def _silent(_: int) -> None:
    return
