"""Pruning one cache: the whole way of a request, from the name of a directory to the figures of what went."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from mothball.cache_fields import Cache, CachePolicy
from mothball.errors import Busy, InvalidParams, OperationFailed, PathNotAllowed
from mothball.ocicache import whole
from mothball.ocicache.aside import TREE, Pools, State, barred, pools
from mothball.ocicache.aside import found as found_asides
from mothball.ocicache.openfiles import OpenFiles
from mothball.ocicache.place import Place, locked, open_place, work_folder
from mothball.ocicache.plan import disk_of, explain, to_free, under_pressure
from mothball.ocicache.recognise import ALGORITHMS, open_below, recognise_fd
from mothball.ocicache.removal import count_content
from mothball.ocicache.scan import Totals, entries
from mothball.ocicache.settle import settle
from mothball.ocicache.sparing import Sparing
from mothball.ocicache.types import PRUNABLE, Found, Kind, LastUse, Lease, Leases, Pressure, PruneResult, Tick
from mothball.ocicache.work import Request, Work

MS: Final = 1_000_000
_ASIDES: Final = 256
"""So many are looked into at once: each takes a descriptor."""


def prune(
    cache: Cache,
    policy: CachePolicy,
    *,
    data_dir: Path,
    roots: Sequence[Path] = (),
    host: str = "",
    dry_run: bool = False,
    everything: bool = False,
    pressure: Pressure | None = None,
    last_use: LastUse | None = None,
    leases: Leases | None = None,
    tick: Tick | None = None,
    wait_s: float = 0.0,
) -> PruneResult:
    """Remove from `cache` what `policy` says, or `everything`, and say what went and what stayed.

    `data_dir` and the workspace `roots` are never pruned, and the lock of the cache lies below `data_dir`; `wait_s`: how long to
    wait for another process that prunes it. `pressure`: only when the disk is fuller than its high mark, until its low mark.
    From a layout, and from blobs that layouts share, also `everything` takes only what no index reaches, and not what is young.

    A missing directory is all zeros (N-08). Raises `PathNotAllowed` (no place for a cache, a link on the way), `InvalidParams`
    (not a directory, ``unrecognised``), `Busy` (leased, pruned by another process), `Corrupt` (an index that cannot be read),
    `OperationFailed`; nothing was changed then.
    """
    started = time.monotonic()
    result = PruneResult(cache_dir=cache.path, host=host, dry_run=dry_run, policy="all" if everything else explain(policy))
    request = _Request(cache, policy, data_dir, everything, pressure, last_use, leases or _nobody, tick or _silent)
    with open_place(cache.path, data_dir=data_dir, roots=roots) as place:
        if dry_run:
            request.run(place, result)
        else:
            with locked(cache.path, data_dir, wait_s):
                place.open()
                request.run(place, result)
    result.seconds = round(time.monotonic() - started, 6)
    result.after_bytes = result.before_bytes - result.bytes_freed
    result.kept_bytes = result.after_bytes
    return result


def open_pool(place: Place, found: Found) -> int | None:
    """The folder of the blobs, which the caller closes; None when there is none. `PathNotAllowed` when a link stands there."""
    if place.fd is None:
        return None
    try:
        return open_below(place.fd, found.folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            where = f"{place.path}/{found.folder}"
            raise PathNotAllowed(
                f"{where!r} leads through a symbolic link or a file; nothing is pruned through it", path=where
            ) from None
        raise


def of_other_digests(place: Place, found: Found) -> int:
    """How many blobs lie beside those named by sha256: they are left alone, for nobody says what needs them."""
    above, count = found.folder.rpartition("/")[0], 0
    if place.fd is None or not found.folder:
        return 0
    for name in ALGORITHMS - {"sha256"}:
        try:
            fd = open_below(place.fd, f"{above}/{name}".lstrip("/"))
        except OSError:
            continue
        try:
            count += count_content(fd, _silent).files
        finally:
            os.close(fd)
    return count


@contextmanager
def quarantined(place: Place, where: Pools, folder: str, sparing: Sparing) -> Iterator[None]:
    """Let the walk from the indexes see what earlier runs moved: what is named of it comes back, with all that it names in turn."""
    reach = sparing.reach
    with ExitStack() as stack:
        for each in found_asides(place, where) if reach is not None else ():
            state = None if each is None else each.state()
            if each is None or reach is None or state is None or state.folder != folder or len(reach.asides) >= _ASIDES:
                continue
            if (fd := each.open(f"{TREE}/{folder}".rstrip("/"))) is not None:
                stack.callback(os.close, fd)
                reach.asides.append(fd)
        yield


def in_use(path: str, pool: int) -> bool:
    """True when a process has something in the folder open."""
    opened = OpenFiles(os.fstat(pool).st_dev, [path])
    with os.scandir(pool) as listed:
        return any(each.inode() in opened for each in listed)


def _nobody() -> Sequence[Lease]:
    return ()


def _silent(_: int) -> None:
    return


class _Request:
    def __init__(
        self,
        cache: Cache,
        policy: CachePolicy,
        data_dir: Path,
        everything: bool,
        pressure: Pressure | None,
        last_use: LastUse | None,
        leases: Leases,
        tick: Tick,
    ) -> None:
        self.cache = cache
        self.policy = policy
        self.work_folder = work_folder(data_dir)
        self.everything = everything
        self.pressure = pressure
        self.last_use = last_use
        self.leases = leases
        self.tick = tick

    def run(self, place: Place, result: PruneResult) -> None:
        now_ms = time.time_ns() // MS
        if place.fd is None:
            self._settle(place, (), result, now_ms, None, force=False)
            if place.fd is None:
                return
        found = recognise_fd(place.fd, self.cache.path, self.cache.kind)
        result.kind = found.kind.value
        if found.kind not in PRUNABLE:
            result.advice = found.advice
            result.before_bytes = count_content(place.fd, self.tick).bytes
            return
        self._check(found)
        pool = None if found.kind is Kind.EMPTY else open_pool(place, found)
        if pool is None:
            self._settle(place, pools(place, None), result, now_ms, None, force=self._free(place) > 0)
            return
        try:
            self._prune(place, pool, found, result, now_ms)
        finally:
            os.close(pool)

    def _check(self, found: Found) -> None:
        if found.kind is Kind.SHARED and not self.cache.layouts:
            text = (
                f"{self.cache.path!r} has blobs that layouts elsewhere may need; declare layouts=FOLDER (where those layouts are)"
            )
            raise InvalidParams(f"{text}, or kind=blobs when none does", reason="layouts", path=self.cache.path)
        if self.cache.layouts and found.kind not in {Kind.SHARED, Kind.EMPTY}:
            text = f"layouts= of {self.cache.path!r} is for a shared blob folder, and it is kind={found.kind}"
            raise InvalidParams(text, path=self.cache.path)
        if self.everything and (holders := [each.holder for each in self.leases()]):
            raise Busy(what=f"the cache {self.cache.path!r}", reason=f"a pull is in progress (lease of {', '.join(holders[:3])})")

    def _free(self, place: Place) -> int:
        return 0 if place.fd is None else to_free(self.policy, disk_of(place.fd), self.pressure)

    def _settle(self, place: Place, where: Pools, result: PruneResult, now_ms: int, sparing: Sparing | None, *, force: bool) -> int:
        give_back = None if sparing is None else sparing.would_give_back if result.dry_run else sparing.give_back
        return settle(place, where, result, now_ms=now_ms, force=force, dry_run=result.dry_run, give_back=give_back, tick=self.tick)

    def _prune(self, place: Place, pool: int, found: Found, result: PruneResult, now_ms: int) -> None:
        if self.pressure is not None and not under_pressure(disk_of(pool), self.pressure):
            result.policy = f"pressure: below {self.pressure.high:g}%, nothing to do"
            return
        if self.pressure is not None:
            result.policy = f"pressure: above {self.pressure.high:g}%, to {self.pressure.low:g}%"
        if why := barred(pool):
            text = f"{self.cache.path!r} cannot be pruned: {why}; nothing was changed"
            if not result.dry_run:
                raise OperationFailed(text, path=self.cache.path)
            totals = Totals()
            result.kept["permission"] = sum(1 for _ in entries(pool, found.kind, totals, self.tick))
            result.before_bytes = totals.bytes
            result.problem(self.cache.path, text)
            return
        referred = found.kind in {Kind.LAYOUT, Kind.SHARED}
        sparing = Sparing(self.cache, place, pool, referred=referred, tick=self.tick)
        where = pools(place, pool, inside=found.inside)
        with quarantined(place, where, found.folder, sparing):
            self._work(place, pool, found, result, now_ms, sparing, where)

    def _work(
        self, place: Place, pool: int, found: Found, result: PruneResult, now_ms: int, sparing: Sparing, where: Pools
    ) -> None:
        referred = sparing.reach is not None
        sparing.mark()
        needed = to_free(self.policy, disk_of(pool), self.pressure)
        settled = self._settle(place, where, result, now_ms, sparing, force=needed > 0)
        if result.dry_run:
            needed = max(0, needed - settled)
        else:
            needed = to_free(self.policy, disk_of(pool), self.pressure) if needed else 0
        at_once = self.everything or self.pressure is not None or needed > 0 or not self.policy.quarantine
        state = State(
            at=now_ms,
            delete_after=now_ms if at_once else now_ms + self.policy.quarantine,
            cache=self.cache.path,
            kind=found.kind.value,
            policy=result.policy,
            stage="moving",
            folder=found.folder,
            keep=self.policy.keep,
            everything=self.cache.kind is not None,
        )
        if self.everything and found.kind is Kind.BLOBINFO and in_use(self.cache.path, pool):
            raise Busy(what=f"the cache {self.cache.path!r}", reason="a process has its database open; try again later")
        if self.everything and not referred:
            whole.check_mounts(self.cache.path, found.folder)
            state = replace(state, stage="full")
            if result.dry_run and whole.can_exchange(place, pool, state):
                whole.promise(place, pool, state, result, self.tick)
                return
            if not result.dry_run and whole.exchange_whole(place, pool, state, result, self.tick):
                return
            state = replace(state, stage="moving")
        request = Request(
            self.policy,
            self.everything,
            self.pressure is not None,
            self.cache.kind is not None,
            self.work_folder,
            self.last_use,
            self.leases,
            self.tick,
        )
        if others := of_other_digests(place, found):
            result.kept["algorithm"] = others
        Work(request, place, pool, found, sparing, state, result).run(needed, at_once=at_once)
