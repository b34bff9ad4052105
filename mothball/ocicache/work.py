"""The removal that a policy asks for: look at every entry once, choose, look again just before each goes, tally what went."""

from __future__ import annotations

import os
import stat
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from mothball.cache_fields import CachePolicy
from mothball.durations import show
from mothball.ocicache import aside as asides
from mothball.ocicache.aside import TREE, Aside, State
from mothball.ocicache.grace import HELD_MS, MOST_S, PRESSED_S, Grace
from mothball.ocicache.openfiles import OpenFiles
from mothball.ocicache.place import Place
from mothball.ocicache.plan import MS, Chooser, Guard
from mothball.ocicache.recognise import ASIDE
from mothball.ocicache.records import Entry, Records, within
from mothball.ocicache.removal import count_content
from mothball.ocicache.scan import BLOCK, pattern, survey
from mothball.ocicache.settle import remove, stays
from mothball.ocicache.sparing import Sparing
from mothball.ocicache.system import open_folder
from mothball.ocicache.table import Links
from mothball.ocicache.types import Found, LastUse, Leases, PruneResult, Tick
from mothball.store import beside

_BATCH: Final = 256
SETTLE_S: Final = 2.0
"""How long a layout is watched after blobs left it: a pull that counted on one of them names it about now."""
_SKEW_NS: Final = 2_000_000_000


class Request(msgspec.Struct, frozen=True):
    """What was asked for."""

    policy: CachePolicy
    everything: bool
    pressed: bool
    declared: bool
    folder: Path
    """For files without a name."""
    last_use: LastUse | None
    leases: Leases
    tick: Tick


class Work:
    """One removal. `pool`: the folder of the blobs."""

    def __init__(
        self, request: Request, place: Place, pool: int, found: Found, sparing: Sparing, state: State, result: PruneResult
    ) -> None:
        self._request = request
        self._place = place
        self._pool = pool
        self._found = found
        self._sparing = sparing
        self._state = state
        self._result = result
        self._referred = sparing.reach is not None
        self._whole = request.everything and not self._referred
        device = os.fstat(pool).st_dev
        self._opened = OpenFiles(device, [place.path] if self._referred else [])
        self._links, self._names = Links(), Links()
        self._aside: Aside | None = None
        self._guard: Guard | None = None
        self._held = ""
        """Why what went must not be deleted yet."""
        self._given_at: tuple[int, ...] = ()

    def run(self, needed: int, *, at_once: bool) -> None:
        """Remove; `needed`: bytes that must become free on the disk, `at_once`: what goes is deleted in this run."""
        with ExitStack() as stack:
            if not self._result.dry_run:
                self._aside = stack.enter_context(asides.make(self._place, self._pool, self._state))
            try:
                self._remove(needed)
                self._say_if_full(at_once=at_once)
                if self._referred and self._aside is not None and self._result.blobs_freed:
                    self._watch(self._aside)
            except BaseException:
                self._held = self._held or ("the prune was ended in the middle" if self._referred else "")
                raise
            finally:
                if self._aside is not None:
                    self._end(self._aside, at_once=at_once)

    def _say_if_full(self, *, at_once: bool) -> None:
        result = self._result
        if self._aside is None and not result.dry_run and result.blobs_freed and (self._referred or not at_once):
            result.notes.append(
                "the disk is so full that nothing can be put into quarantine: what went was deleted at once and cannot be brought "
                "back; pull again what is missed"
            )

    def _remove(self, needed: int) -> None:
        request, result = self._request, self._result
        now = self._now()
        guard = self._guard = Guard(request.policy, now=now, grace=not self._whole, referred=self._referred)
        guard.lease(request.leases())
        policy = request.policy
        ordered = not self._whole and bool(policy.reserve or policy.max_bytes is not None or needed)
        with Records(request.folder, ordered=ordered) as records:
            reach = self._sparing.reach
            stayed = bytearray()
            totals = survey(
                self._pool,
                self._found.kind,
                guard,
                records,
                now=now,
                reachable=None if reach is None else reach.reachable.__contains__,
                last_use=None if self._whole else request.last_use,
                tick=request.tick,
                stayed=None if reach is None else lambda digest: stayed.extend(bytes.fromhex(digest)),
            )
            if result.dry_run:  # a prune gives it back before it looks
                totals.bytes += self._sparing.coming_bytes
                self._keep("reachable", self._sparing.coming)
            result.before_bytes = totals.bytes
            for reason, count in totals.kept.items():
                self._keep(reason, count)
            self._sparing.report(result)
            if records.count:
                self._sparing.follow(stayed)
            self._sparing.referrers(records, request.tick)
            if records.count and (sign := self._sparing.pulling(self._opened, wait=not result.dry_run)) is not None:
                self._keep("pulling", records.count)
                result.problem(sign, "a pull is in progress, which may count on blobs that no index names yet; nothing was deleted")
                return
            chooser = Chooser(
                policy, now=now, total=totals.bytes, free=needed, pressed=request.pressed, everything=request.everything
            )
            self._go_through(records, chooser, ordered=ordered, now=now)
        if self._whole and request.declared:
            self._take_others()

    def _go_through(self, records: Records, chooser: Chooser, *, ordered: bool, now: int) -> None:
        done = 0
        chosen = iter(records)
        while batch := list(islice(chosen, _BATCH)):
            uses = self._before_batch(batch)
            for entry, own in zip(batch, uses, strict=True):
                done += 1
                freed = entry.bytes
                why = chooser.verdict(entry.used, freed)
                if why and ordered:
                    # They come in the order of their last use: what holds for this one holds for all the rest.
                    self._keep(why, records.count - done + 1)
                    return
                if not why:
                    why = self._look_again(entry, own, now)
                if why:
                    self._keep(why, 1)
                elif (size := self._take(entry)) is not None:
                    chooser.gone(self._names.first(entry.inode, entry.links, entry.bytes), size)
                    self._result.blobs_freed += 1
                    self._result.bytes_freed += size

    def _before_batch(self, batch: list[Entry]) -> list[int | None]:
        """What may have changed since the scan is asked again, for some at a time."""
        request = self._request
        request.tick(self._result.blobs_freed)
        self._sparing.again()
        if self._whole:
            return [None] * len(batch)
        if self._guard is not None:
            self._guard.lease(request.leases())
        if request.last_use is None:
            return [None] * len(batch)
        return list(request.last_use([f"sha256:{entry.digest}" for entry in batch]))

    def _look_again(self, entry: Entry, own: int | None, now: int) -> str:
        """Why an entry that was chosen stays after all; empty when it does not."""
        try:
            found = os.stat(entry.name, dir_fd=self._pool, follow_symlinks=False)
        except FileNotFoundError:
            return "vanished"
        if self._whole:
            return ""
        # A time of reading that was not believed in the scan is none now.
        atime = within(found.st_atime_ns) if entry.atime else 0
        seen = (found.st_ino, found.st_size, within(found.st_mtime_ns), atime)
        if seen != (entry.inode, entry.size, entry.mtime, entry.atime):
            return "used"
        # A record that is younger than what the scan knew, by more than the clocks may differ in a run.
        if own is not None and now - own * MS > entry.used + _SKEW_NS:
            return "used"
        reach = self._sparing.reach
        if reach is not None and entry.digest in reach.reachable:
            return "reachable"
        # A file with several names was changed by our own rename of another of them.
        written = found.st_mtime_ns if found.st_mtime_ns <= now else entry.used  # a time in the future says nothing
        changed = found.st_ctime_ns if entry.links < 2 else written  # noqa: PLR2004 - a second name
        if self._guard is not None and (why := self._guard.reason(entry.digest, entry.used, changed)):
            return why
        return "open" if entry.inode in self._opened else ""

    def _take(self, entry: Entry) -> int | None:
        """Move it aside (or, where the disk is too full for an aside, delete it); the bytes that this frees, None if it stays."""
        name = entry.name
        try:
            if self._aside is not None:
                self._aside.take(name, self._pool, self._found.folder)
            elif not self._result.dry_run:
                os.unlink(name, dir_fd=self._pool)
        except FileNotFoundError:
            self._keep("vanished", 1)
            return None
        except OSError as error:
            self._result.problem(name, f"cannot be removed: {error.strerror}")
            self._keep("error", 1)
            return None
        return self._links.last(entry.inode, entry.links, entry.bytes)

    def _take_others(self) -> None:
        """A full prune of a declared cache that cannot be exchanged: what is no blob goes too."""
        result = self._result
        why = stays(msgspec.structs.replace(self._state, everything=True))
        match = pattern(self._found.kind).match  # of those a dry run has counted already, which leaves them where they are
        match_top = self._found.folder.split("/")[0]
        places = [(self._pool, self._found.folder)]
        if self._found.folder and self._place.fd is not None:
            places.append((self._place.fd, ""))
        for fd, folder in places:
            with os.scandir(fd) as listed:
                others = [
                    each.name
                    for each in listed
                    if not each.name.startswith(ASIDE)
                    and not (why is not None and why(each))
                    and not (result.dry_run and fd == self._pool and match(each.name) and each.is_file(follow_symlinks=False))
                ]
            for name in others:
                if folder == self._found.folder or name != match_top:
                    self._take_other(name, fd, folder)
        result.kept.pop("other", None)

    def _take_other(self, name: str, fd: int, folder: str) -> None:
        result = self._result
        try:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            files, others = (1, 0) if stat.S_ISREG(found.st_mode) else (0, 1)
            size = found.st_blocks * BLOCK if found.st_nlink < 2 else 0  # noqa: PLR2004 - other names hold it
            if stat.S_ISDIR(found.st_mode):
                below = open_folder(name, fd)
                try:
                    tally = count_content(below, self._request.tick)
                finally:
                    os.close(below)
                files, others, size = tally.files, tally.others, tally.bytes
            if self._aside is not None:
                self._aside.take(name, fd, folder)
            elif not result.dry_run:
                os.unlink(name, dir_fd=fd)
        except OSError as error:
            result.problem(name, f"cannot be removed: {error.strerror}")
            return
        result.blobs_freed += files
        result.others_freed += others
        result.bytes_freed += size

    def _watch(self, aside: Aside) -> None:
        """Give back what an index names by now: a pull may have found it here and written its index after it went."""
        self._held = "the prune was ended before it could tell that no pull counts on it"
        grace = Grace(self._sparing, self._pool, self._opened, self._request.tick, lambda: self._give_back(aside))
        most = PRESSED_S if self._request.pressed else MOST_S
        self._held = grace.wait(settle_s=SETTLE_S, most_s=max(most, SETTLE_S))

    def _give_back(self, aside: Aside) -> None:
        self._sparing.again()
        state = (os.fstat(self._pool).st_mtime_ns, *self._sparing.changed())
        if state == self._given_at:
            return
        where = f"{TREE}/{self._found.folder}".rstrip("/")
        blobs, size = self._sparing.give_back(aside, where, self._result.problem)
        self._result.blobs_freed -= blobs
        self._result.bytes_freed -= size
        self._keep("reachable", blobs)
        self._given_at = (os.fstat(self._pool).st_mtime_ns, *self._sparing.changed())

    def _end(self, aside: Aside, *, at_once: bool) -> None:
        result = self._result
        if not result.blobs_freed and not result.others_freed:
            aside.drop()
        elif at_once and not self._held:
            tally = remove(aside, result.problem, self._request.tick)
            if self._whole:  # folders that were moved as one are counted here
                result.blobs_freed, result.bytes_freed, result.others_freed = tally.files, tally.bytes, tally.others
                result.before_bytes = max(result.before_bytes, tally.bytes)
        else:
            self._hold(aside)

    def _hold(self, aside: Aside) -> None:
        """It is deleted later; what a pull may count on not before a minute, however full the disk is."""
        result = self._result
        now = time.time_ns() // MS
        until = max(self._state.delete_after, now + HELD_MS) if self._held else self._state.delete_after
        aside.say(msgspec.structs.replace(self._state, stage="kept", delete_after=until, held=bool(self._held)))
        result.quarantined_bytes = result.bytes_freed
        result.quarantine_ms = max(0, until - now)
        if self._held:
            text = f"a pull may count on what went: {self._held}. It stays in quarantine for {show(result.quarantine_ms)}; "
            result.notes.append(text + "the next prune then gives back what an index names, and deletes the rest")

    def _now(self) -> int:
        """The clock of the files, ns: this host's, unless the file system has another (a server's)."""
        mine = time.time_ns()
        if self._aside is None:
            return mine
        theirs = os.stat(beside.STATE, dir_fd=self._aside.fd, follow_symlinks=False).st_mtime_ns
        return theirs if abs(theirs - mine) > _SKEW_NS else mine

    def _keep(self, reason: str, count: int) -> None:
        if count:
            self._result.kept[reason] = self._result.kept.get(reason, 0) + count
