"""Asides of earlier runs: finished, or given back. And what goes back into a cache out of an aside, never over what is there."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from fnmatch import translate
from typing import Final

import msgspec

from mothball.ocicache import aside as asides
from mothball.ocicache.aside import NEW, OLD, TREE, Aside, State
from mothball.ocicache.place import Place
from mothball.ocicache.recognise import BESIDE_BLOBINFO, open_below
from mothball.ocicache.records import key_of
from mothball.ocicache.removal import Note, Spare, Tally, count_content, remove_content
from mothball.ocicache.scan import BLOCK, pattern
from mothball.ocicache.system import rename_new
from mothball.ocicache.types import Kind, PruneResult, Tick

REST_S: Final = 0.25
"""How long a whole cache's folders stay after the exchange: a pull on its way into one of them makes its file there meanwhile."""
_TRIES: Final = 10
_AHEAD_MS: Final = 3_600_000

Wanted = Callable[[str], bool]
GiveBack = Callable[[Aside, str, Note], tuple[int, int]]
"""Puts back out of a folder of an aside what a layout needs by now; how many blobs, and their bytes."""


def settle(
    place: Place,
    pools: asides.Pools,
    result: PruneResult,
    *,
    now_ms: int,
    force: bool,
    dry_run: bool,
    give_back: GiveBack | None,
    tick: Tick,
) -> int:
    """Deal with every aside of the cache that earlier runs left, and return the bytes that this frees on the disk.

    Whole caches that a killed run had taken are deleted, those whose quarantine ended (with `force`: all) too; before that, what
    a layout needs by now goes back (`give_back`). A cache whose name meant nothing when its run was killed is there again.
    """
    freed = 0

    def foreign(name: str, owner: int) -> None:
        result.notes.append(
            f"{name!r} beside the cache is what a prune by user {owner} left in quarantine, which this one (user {os.geteuid()}) "
            f"leaves alone; run a prune as user {owner} or root, or remove it"
        )

    for each in asides.found(place, pools, foreign):
        if each is None:
            continue
        state = each.state()
        if state is None:
            if not dry_run:
                each.drop()
            result.leaked_asides += 1
        elif state.stage == "full":
            result.leaked_asides += 1
            tally = _measure(each, (NEW, OLD), tick) if dry_run else finish_whole(place, each, state, result, tick)
            result.leaked_bytes += tally.bytes
            freed += tally.bytes
        else:
            freed += _of_policy(each, state, result, now_ms=now_ms, force=force, dry_run=dry_run, give_back=give_back, tick=tick)
    return freed


def _of_policy(
    each: Aside,
    state: State,
    result: PruneResult,
    *,
    now_ms: int,
    force: bool,
    dry_run: bool,
    give_back: GiveBack | None,
    tick: Tick,
) -> int:
    killed = state.stage == "moving"
    result.leaked_asides += killed
    # A state from the future was written under a wrong clock, and so was the end of its quarantine.
    due = (force and not state.held) or state.delete_after <= now_ms or state.at > now_ms + _AHEAD_MS
    blobs = 0
    size = 0
    if give_back is not None:
        # Also long before it is due: the image that needs them is broken until then.
        blobs, size = give_back(each, f"{TREE}/{state.folder}".rstrip("/"), result.problem)
        result.given_back += blobs
    if not due:
        if (killed or blobs) and not dry_run:
            if _is_empty(each, state):
                each.drop()
            else:
                each.say(msgspec.structs.replace(state, stage="kept"))
        return 0
    tally = _measure(each, (TREE,), tick) if dry_run else _remove(each, (TREE,), result.problem, tick)
    if dry_run:
        tally.bytes -= size
    if killed:
        result.leaked_bytes += tally.bytes
    else:
        result.expired_bytes += tally.bytes
    return tally.bytes


def finish_whole(place: Place, each: Aside, state: State, result: PruneResult, tick: Tick) -> Tally:
    """Delete a cache that was exchanged for an empty one; what was to stay of it goes back first."""
    if place.parent is not None and place.fd is None and each.has(OLD):
        # Killed between two renames: until now the name of the cache meant nothing.
        rename_new(NEW if each.has(NEW) else OLD, each.fd, place.name, place.parent)
        place.open()
    pool = _pool(place, state.folder)
    try:
        why = stays(state)
        if why is None:
            return _remove(each, (NEW, OLD), result.problem, tick, rest=True)
        if pool is None:
            if _measure(each, (NEW, OLD), tick).files:
                result.problem(
                    each.name, f"what was to stay of {place.path!r} lies in it, and the cache is not there to take it back"
                )
                return Tally()
            return _remove(each, (NEW, OLD), result.problem, tick)
        back = GoingBack(pool, why, result)
        for name in (NEW, OLD):
            if state.keep and (fd := each.open(f"{name}/{state.folder}".rstrip("/"))) is not None:
                try:
                    with os.scandir(fd) as listed:
                        for entry in listed:
                            back(fd, entry)
                finally:
                    os.close(fd)
        # What is no blob goes back as it is met: to look for it first would take as long as half of the deletion.
        plain = pattern(Kind(state.kind)).match
        return _remove(each, (NEW, OLD), result.problem, tick, Spare(state.folder, plain, back), rest=True)
    finally:
        if pool is not None:
            os.close(pool)


def stays(state: State) -> Callable[[os.DirEntry[str]], str] | None:
    """Says of an entry of a whole cache why it goes back, empty when it does not; None when nothing does."""
    if state.everything and not state.keep:
        return None
    kind = Kind(state.kind)
    match = pattern(kind).match
    keep = re.compile("|".join(translate(each) for each in state.keep)).match if state.keep else None

    def why(entry: os.DirEntry[str]) -> str:
        if not match(entry.name) or not entry.is_file(follow_symlinks=False):
            if kind is Kind.BLOBINFO and BESIDE_BLOBINFO.match(entry.name):
                return ""  # a journal without its database would be taken for that of the next one
            return "" if state.everything else "other"
        if keep is not None and keep(key_of(entry.name)[0].hex()):
            return "kept"
        return ""

    return why


class GoingBack:
    """Puts back into the folder `pool` what there is a reason for, and counts it as kept."""

    def __init__(self, pool: int, why: Callable[[os.DirEntry[str]], str], result: PruneResult) -> None:
        self._pool = pool
        self._why = why
        self._result = result

    def __call__(self, fd: int, entry: os.DirEntry[str]) -> bool:
        """True when the entry of the open folder `fd` went back; False when it has to go, as the cache has that name again."""
        reason = self._why(entry)
        if not reason:
            return False
        found = entry.stat(follow_symlinks=False)
        if not rename_new(entry.name, fd, entry.name, self._pool):
            return False
        self._result.kept[reason] = self._result.kept.get(reason, 0) + 1
        self._result.kept_bytes += found.st_blocks * BLOCK if entry.is_file(follow_symlinks=False) else 0
        return True


def put_back(each: Aside, where: str, pool: int, wanted: Wanted, note: Note, *, again: Note | None = None) -> tuple[int, int]:
    """Rename what is `wanted` (by name) out of the folder `where` of the aside into `pool`; how many, and their bytes.

    `note` is told of what could not be put back, `again` of what need not be: it was pulled again.
    """
    fd = each.open(where)
    if fd is None:
        return 0, 0
    blobs = size = 0
    try:
        with os.scandir(fd) as listed:
            for entry in listed:
                if not wanted(entry.name):
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                    if rename_new(entry.name, fd, entry.name, pool):
                        blobs += 1
                        size += found.st_blocks * BLOCK if found.st_nlink < 2 else 0  # noqa: PLR2004 - other names hold it
                    elif again is not None:
                        again(entry.name, "it was pulled again meanwhile, which is what stays")
                except OSError as error:
                    note(entry.name, f"cannot be put back: {error.strerror}")
    finally:
        os.close(fd)
    return blobs, size


def _remove(
    each: Aside, names: tuple[str, ...], note: Note, tick: Tick, spare: Spare | None = None, *, rest: bool = False
) -> Tally:
    total = Tally()
    rest_until = _rest_until(each) if rest else 0.0
    for _ in range(_TRIES):
        before = total.files + total.others
        for name in names:
            fd = each.open(name)
            if fd is None:
                continue
            try:
                tally = remove_content(fd, tick, note, spare, rest_until=rest_until)
            finally:
                os.close(fd)
            total.files += tally.files
            total.others += tally.others
            total.bytes += tally.bytes
        # Again when something came into it in this moment; not when it holds what cannot be deleted.
        if each.drop() or total.files + total.others == before:
            break
    return total


def _rest_until(each: Aside) -> float:
    """When (monotonic) the folders of a whole cache may go: an exchange changes the times of the folder that it lies in."""
    since = time.time() - os.fstat(each.fd).st_mtime
    return time.monotonic() + min(max(REST_S - since, 0.0), REST_S)


def remove(each: Aside, note: Note, tick: Tick) -> Tally:
    """Delete what a policy moved into it, and the aside."""
    return _remove(each, (TREE,), note, tick)


def _measure(each: Aside, names: tuple[str, ...], tick: Tick) -> Tally:
    total = Tally()
    for name in names:
        fd = each.open(name)
        if fd is not None:
            try:
                tally = count_content(fd, tick)
            finally:
                os.close(fd)
            total.files += tally.files
            total.others += tally.others
            total.bytes += tally.bytes
    return total


def _is_empty(each: Aside, state: State) -> bool:
    fd = each.open(f"{TREE}/{state.folder}".rstrip("/"))
    if fd is None:
        return True
    try:
        return is_empty(fd)
    finally:
        os.close(fd)


def is_empty(fd: int) -> bool:
    """True when the open folder has nothing in it."""
    with os.scandir(fd) as listed:
        return next(listed, None) is None


def _pool(place: Place, folder: str) -> int | None:
    if place.fd is not None:
        with suppress(OSError):
            return open_below(place.fd, folder)
    return None
