"""Whether the entries of a cache hold what their names say (N-04): a pull that was interrupted leaves a part under a valid name.

In a flat cache a layer lies twice, compressed under its digest and uncompressed under its diff id; each is the digest of what the
file holds, so one check does for both.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mothball.cache_fields import Cache, CachePolicy
from mothball.errors import MothballError
from mothball.ocicache.openfiles import OpenFiles
from mothball.ocicache.place import Place, locked, open_place
from mothball.ocicache.plan import Guard
from mothball.ocicache.prune import open_pool
from mothball.ocicache.recognise import recognise_fd
from mothball.ocicache.records import key_of
from mothball.ocicache.scan import BLOCK, Totals, entries
from mothball.ocicache.sparing import Sparing
from mothball.ocicache.system import open_file
from mothball.ocicache.types import MAX_ERRORS, PRUNABLE, Found, Kind, Leases, Problem, Tick, VerifyResult, printable

_PIECE: Final = 1 << 20
_SHOWN: Final = 50


def verify(
    cache: Cache,
    *,
    data_dir: Path,
    roots: Sequence[Path] = (),
    host: str = "",
    delete: bool = False,
    grace_ms: int = 600_000,
    leases: Leases | None = None,
    tick: Tick | None = None,
    wait_s: float = 0.0,
) -> VerifyResult:
    """Read every entry; with `delete`, remove those whose content does not match their name: the next pull fetches them again.

    What is younger than `grace_ms`, open, or leased is written just now and is not judged. Raises as `prune` does.
    """
    started = time.monotonic()
    out = VerifyResult(cache_dir=cache.path, host=host)
    with open_place(cache.path, data_dir=data_dir, roots=roots) as place:
        if place.fd is not None:
            if delete:
                with locked(cache.path, data_dir, wait_s):
                    place.open()
                    _verify(cache, place, out, delete=True, grace_ms=grace_ms, leases=leases, tick=tick or _silent)
            else:
                _verify(cache, place, out, delete=False, grace_ms=grace_ms, leases=leases, tick=tick or _silent)
    out.seconds = round(time.monotonic() - started, 6)
    return out


def _verify(
    cache: Cache, place: Place, out: VerifyResult, *, delete: bool, grace_ms: int, leases: Leases | None, tick: Tick
) -> None:
    if place.fd is None:
        return
    found = recognise_fd(place.fd, cache.path, cache.kind)
    out.kind = found.kind.value
    if found.kind not in PRUNABLE:
        out.advice = found.advice
        return
    pool = None if found.kind in {Kind.EMPTY, Kind.BLOBINFO} else open_pool(place, found)
    if pool is None:
        return
    try:
        guard = Guard(CachePolicy(grace=grace_ms), now=time.time_ns())
        if leases is not None:
            guard.lease(leases())
        if found.kind is Kind.LAYOUT or cache.layouts:
            _see_missing(Sparing(cache, place, pool, referred=True, tick=tick), out)
        _read_all(pool, found, guard, out, delete=delete, tick=tick)
    finally:
        os.close(pool)


def _see_missing(sparing: Sparing, out: VerifyResult) -> None:
    try:
        sparing.mark()
    except MothballError as error:  # a damaged manifest is what is looked for here
        out.errors.append(Problem(str(error.fields.get("digest", "index.json")), error.message))
    if sparing.reach is not None:
        out.missing = list(sparing.reach.missing)


def _read_all(pool: int, found: Found, guard: Guard, out: VerifyResult, *, delete: bool, tick: Tick) -> None:
    opened = OpenFiles(os.fstat(pool).st_dev)
    touched, now = 0, time.time_ns()
    for name, seen in entries(pool, found.kind, Totals(), tick):
        # A time in the future says nothing; the time of change nobody can set.
        changed = max(seen.st_mtime_ns if seen.st_mtime_ns <= now else 0, seen.st_ctime_ns)
        why = guard.reason(key_of(name)[0].hex(), seen.st_mtime_ns, changed) or ("open" if seen.st_ino in opened else "")
        if why:
            out.kept[why] = out.kept.get(why, 0) + 1
            continue
        try:
            good, after = _matches(pool, name, out, tick)
            touched += after.st_atime_ns != seen.st_atime_ns and seen.st_uid != os.geteuid()
        except FileNotFoundError:
            continue
        except OSError as error:
            if len(out.errors) < MAX_ERRORS:
                out.errors.append(Problem(printable(name), f"cannot be read: {error.strerror}"))
            continue
        if good:
            continue
        if _state(after) != _state(seen) or after.st_ino in opened:
            out.kept["used"] = out.kept.get("used", 0) + 1
            continue
        _bad(pool, name, after, out, delete=delete)
    if touched and found.kind not in {Kind.LAYOUT, Kind.SHARED}:  # there another user's times do not count
        out.notes.append(
            f"{touched:,} blob(s) belong to another user than this one ({os.geteuid()}), for whom reading them counts as their "
            "last use: older_than begins anew for them. Verify as their owner or as root"
        )


def _matches(pool: int, name: str, out: VerifyResult, tick: Tick) -> tuple[bool, os.stat_result]:
    wanted = key_of(name)[0]
    made = hashlib.sha256()
    fd = open_file(name, pool)
    try:
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            while piece := file.read(_PIECE):
                made.update(piece)
                out.bytes += len(piece)
                tick(out.blobs)
        out.blobs += 1
        return made.digest() == wanted, os.fstat(fd)
    finally:
        os.close(fd)


def _bad(pool: int, name: str, seen: os.stat_result, out: VerifyResult, *, delete: bool) -> None:
    out.bad += 1
    if len(out.bad_digests) < _SHOWN:
        out.bad_digests.append(f"sha256:{key_of(name)[0].hex()}")
    if not delete:
        return
    try:
        # What was read is what goes, and not a good one that a pull put there in this moment.
        if _state(os.stat(name, dir_fd=pool, follow_symlinks=False)) != _state(seen):
            return
        os.unlink(name, dir_fd=pool)
    except OSError as error:
        if len(out.errors) < MAX_ERRORS:
            out.errors.append(Problem(printable(name), f"cannot be deleted: {error.strerror}"))
        return
    out.deleted += 1
    out.bytes_freed += seen.st_blocks * BLOCK if seen.st_nlink < 2 else 0  # noqa: PLR2004 - other names hold it


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _silent(_: int) -> None:
    return
