"""Looking at the entries of a cache, each once, with flat memory: what is there, what stays at once and why, what may go."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from mothball.ocicache.plan import MS, Guard
from mothball.ocicache.reach import SMALL
from mothball.ocicache.recognise import ASIDE, BESIDE_BLOBINFO, BLOBINFO, FLAT, HEX
from mothball.ocicache.records import key_of
from mothball.ocicache.table import Links
from mothball.ocicache.types import Kind, LastUse, Tick

BLOCK: Final = 512
_BATCH: Final = 1000
_PATTERNS: Final[dict[Kind, re.Pattern[str]]] = {
    Kind.FLAT: FLAT, Kind.BLOBS: HEX, Kind.SHARED: HEX, Kind.LAYOUT: HEX, Kind.BLOBINFO: BLOBINFO,
}  # fmt: skip


class Sink(Protocol):
    """Where entries go that nothing speaks for: `mothball.ocicache.records.Records`, or whoever counts them."""

    def add(
        self, used: int, key: bytes, form: int, inode: int, size: int, room: int, mtime: int, atime: int, links: int, /
    ) -> None:
        """One entry."""


class Totals:
    """What a scan saw. `bytes` on the disk, files with several names once; `kept` by reason; times in ns, 0 for none."""

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.others = 0
        self.kept: Counter[str] = Counter()
        self.vanished = 0
        self.oldest = 0
        self.newest = 0


def pattern(kind: Kind) -> re.Pattern[str]:
    """What the names of blobs look like there."""
    return _PATTERNS[kind]


def entries(pool: int, kind: Kind, totals: Totals, tick: Tick) -> Iterator[tuple[str, os.stat_result]]:
    """(name, state) of every blob in the folder; everything else is counted in `totals` and left alone."""
    match = pattern(kind).match
    regular = stat.S_ISREG
    seen = 0
    links = Links()
    with os.scandir(pool) as listed:
        for entry in listed:
            name = entry.name
            seen += 1
            if not seen % _BATCH:
                tick(seen)
            if name.startswith(ASIDE):
                continue
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                totals.vanished += 1
                continue
            totals.bytes += links.first(found.st_ino, found.st_nlink, found.st_blocks * BLOCK) if regular(found.st_mode) else 0
            if match(name) and regular(found.st_mode):
                totals.count += 1
                yield name, found
            else:
                totals.others += 1
                # A database that has a journal is in use, or must be mended by its next user with that journal.
                totals.kept["open" if kind is Kind.BLOBINFO and BESIDE_BLOBINFO.match(name) else "other"] += 1


def survey(
    pool: int,
    kind: Kind,
    guard: Guard,
    records: Sink,
    *,
    now: int,
    reachable: Callable[[str], bool] | None,
    last_use: LastUse | None,
    tick: Tick,
    stayed: Callable[[str], None] | None = None,
) -> Totals:
    """Look at every entry once: what nothing speaks for goes into `records`, the rest is counted by its reason.

    `stayed` is told of blobs that stay though nothing reaches them, but for those of a lease: then all do. A time in the future
    says nothing: then the time of change counts, which nobody can set. Of blobs that layouts need the time of reading does not
    count where we cannot but change it when we look for what they refer to: they are small and another user's.
    """
    totals = Totals()
    in_use = kind is Kind.BLOBINFO and any(BESIDE_BLOBINFO.match(name) for name in os.listdir(pool))
    reason_of, add, kept = guard.reason, records.add, totals.kept
    oldest = newest = 0
    theirs = os.geteuid() if reachable is not None and os.geteuid() else None

    def judge(name: str, found: os.stat_result, own: int | None) -> None:
        nonlocal oldest, newest
        key, form = key_of(name)
        digest = key.hex() if form < 3 else ""  # noqa: PLR2004 - a name that is no digest
        mtime, atime, ctime = found.st_mtime_ns, found.st_atime_ns, found.st_ctime_ns
        if theirs is not None and found.st_uid != theirs and found.st_size <= SMALL:
            atime = 0
        written = mtime if mtime <= now else ctime
        used = last_used(written, atime if atime <= now else ctime, own, now)
        oldest = used if not oldest or used < oldest else oldest
        newest = max(used, newest)
        if reachable is not None and reachable(digest):
            why = "reachable"
        else:
            why = reason_of(digest, used, max(written, ctime))
        if not why and in_use:
            why = "open"
        if why:
            kept[why] += 1
            if stayed is not None and digest and why not in {"reachable", "leased"}:
                stayed(digest)
            return
        add(used, key, form, found.st_ino, found.st_size, found.st_blocks * BLOCK, mtime, atime, found.st_nlink)

    if last_use is None:
        for name, found in entries(pool, kind, totals, tick):
            judge(name, found, None)
    else:
        batch: list[tuple[str, os.stat_result]] = []
        for item in entries(pool, kind, totals, tick):
            batch.append(item)
            if len(batch) >= _BATCH:
                _judge_all(batch, last_use, judge)
                batch = []
        _judge_all(batch, last_use, judge)
    totals.oldest, totals.newest = oldest, newest
    return totals


def last_used(mtime: int, atime: int, own: int | None, now: int) -> int:
    """When it was used last, ns of the files' clock: by our own record (`own`, ms ago) or since it was written, else by its times.

    The time of reading alone is not believed where there is a record: a backup reads everything.
    """
    return max(mtime, atime) if own is None else max(mtime, now - own * MS)


def digest_of(name: str) -> str:
    """``sha256:<hex>`` of the name of a blob; the name itself for anything else."""
    key, form = key_of(name)
    return f"sha256:{key.hex()}" if form < 3 else name  # noqa: PLR2004 - as above


def _judge_all(
    batch: list[tuple[str, os.stat_result]], last_use: LastUse, judge: Callable[[str, os.stat_result, int | None], None]
) -> None:
    if batch:
        for (name, found), own in zip(batch, last_use([digest_of(name) for name, _ in batch]), strict=True):
            judge(name, found, own)
