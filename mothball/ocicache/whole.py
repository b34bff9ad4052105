"""A full prune (N-06): an empty folder takes the place of the cache in one step, then the old one is deleted.

Whoever looks finds a cache at any moment, the full one or the empty one, with the same mode, owner and attributes.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress

from mothball.errors import Busy, OperationFailed
from mothball.ocicache import aside as asides
from mothball.ocicache.aside import NEW, OLD, Aside, State
from mothball.ocicache.place import Place
from mothball.ocicache.recognise import ASIDE, open_below
from mothball.ocicache.removal import count_content
from mothball.ocicache.scan import BLOCK
from mothball.ocicache.settle import finish_whole, stays
from mothball.ocicache.system import dress, exchange, mount_of, mounts_below, open_folder
from mothball.ocicache.types import PruneResult, Tick

_NOT_HERE = frozenset({errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM})


def can_exchange(place: Place, pool: int, state: State) -> bool:
    """False when it is known that the cache cannot be exchanged, so that its entries go one by one."""
    return (
        place.fd is not None
        and place.parent is not None
        and (state.everything or _alone(place.fd, state.folder))
        and place.movable
        and mount_of(pool) == mount_of(place.fd)
        and asides.may_write(place.parent)
    )


def _alone(fd: int, folder: str) -> bool:
    """True when there is nothing beside the folder of the blobs, nor beside what it lies in: that would go with them."""
    parts = folder.split("/") if folder else []
    for depth, part in enumerate(parts):
        above = open_below(fd, "/".join(parts[:depth]))
        try:
            with os.scandir(above) as listed:
                if any(each.name != part and not each.name.startswith(ASIDE) for each in listed):
                    return False
        finally:
            os.close(above)
    return True


def check_mounts(path: str, folder: str) -> None:
    """A mount below the cache would go aside with it, and stay there with all that is on it. Raises `OperationFailed`."""
    blobs = f"{path}/{folder}/"
    if below := [each for each in mounts_below(path) if not blobs.startswith(each + "/")]:
        text = f"{below[0]!r} is mounted inside the cache {path!r}, which cannot be emptied as a whole; unmount it"
        raise OperationFailed(f"{text}, or prune by a policy; nothing was changed", path=path)


def promise(place: Place, pool: int, state: State, result: PruneResult, tick: Tick) -> None:
    """What a full prune would free, into `result`; nothing is written."""
    why = stays(state)
    if place.fd is None:
        return
    here = os.fstat(pool).st_ino

    def skip(folder: int, entry: os.DirEntry[str]) -> bool:
        if entry.name.startswith(ASIDE):
            return True
        if why is None or os.fstat(folder).st_ino != here or not (reason := why(entry)):
            return False
        result.kept[reason] = result.kept.get(reason, 0) + 1
        result.kept_bytes += entry.stat(follow_symlinks=False).st_blocks * BLOCK if entry.is_file(follow_symlinks=False) else 0
        return True

    # What goes is counted, and not taken from the whole what stays: of a file with several names some may stay.
    going = count_content(place.fd, tick, skip=skip, depth=len(state.folder.split("/")) if state.folder else 0)
    result.blobs_freed, result.bytes_freed, result.others_freed = going.files, going.bytes, going.others
    result.before_bytes = going.bytes + result.kept_bytes


def exchange_whole(place: Place, pool: int, state: State, result: PruneResult, tick: Tick) -> bool:
    """Do it; False when the cache cannot be exchanged (a mount point, no right above it): then nothing was changed.

    Raises `Busy` when another folder took its name meanwhile, `OperationFailed`.
    """
    if not can_exchange(place, pool, state):
        return False
    with asides.make(place, pool, state) as aside:
        if aside is None or place.parent is None or not _same(aside.holder, place.parent):
            if aside is not None:
                aside.drop()
            return False
        swapped = False
        try:
            swapped = _prepare(place, aside, state.folder) and _swap(place, aside, result)
        finally:
            if not swapped:
                _discard(aside, state.folder)
        if not swapped:
            return False
        place.open()
        tally = finish_whole(place, aside, state, result, tick)
        result.blobs_freed, result.bytes_freed, result.others_freed = tally.files, tally.bytes, tally.others
        result.before_bytes = tally.bytes + result.kept_bytes
    return True


def _prepare(place: Place, aside: Aside, folder: str) -> bool:
    """The empty folder, like the cache; False when it cannot be made like it."""
    try:
        os.mkdir(NEW, 0o700, dir_fd=aside.fd)
        made, model = open_folder(NEW, aside.fd), os.dup(place.fd or 0)
        try:
            if not dress(made, model):
                return False
            for part in folder.split("/") if folder else ():
                os.mkdir(part, 0o700, dir_fd=made)
                made, model = _deeper(made, part), _deeper(model, part)
                if not dress(made, model):
                    return False
            return True
        finally:
            os.close(made)
            os.close(model)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return False
        raise OperationFailed(f"no empty folder like {place.path!r} can be made: {error.strerror}; nothing was changed") from error


def _deeper(fd: int, part: str) -> int:
    below = open_below(fd, part)
    os.close(fd)
    return below


def _swap(place: Place, aside: Aside, result: PruneResult) -> bool:
    parent = place.parent if place.parent is not None else -1
    try:
        if exchange(place.name, parent, NEW, aside.fd):
            if not _is(place, aside, NEW):
                exchange(place.name, parent, NEW, aside.fd)
                raise Busy(what=f"the cache {place.path!r}", reason="another folder took its place while it was looked at")
            return True
        started = time.perf_counter()
        os.rename(place.name, OLD, src_dir_fd=parent, dst_dir_fd=aside.fd)
        if not _is(place, aside, OLD):
            os.rename(OLD, place.name, src_dir_fd=aside.fd, dst_dir_fd=parent)
            raise Busy(what=f"the cache {place.path!r}", reason="another folder took its place while it was looked at")
        try:
            os.rename(NEW, place.name, src_dir_fd=aside.fd, dst_dir_fd=parent)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                os.rename(OLD, place.name, src_dir_fd=aside.fd, dst_dir_fd=parent)
                raise
            # A pull was quicker and made the folder itself: that one stays.
        result.gap_ms = (time.perf_counter() - started) * 1000
    except OSError as error:
        if error.errno in _NOT_HERE:
            return False
        raise OperationFailed(f"{place.path!r} cannot be exchanged: {error.strerror}; nothing was deleted") from error
    return True


def _is(place: Place, aside: Aside, name: str) -> bool:
    seen = os.stat(name, dir_fd=aside.fd, follow_symlinks=False)
    here = os.fstat(place.fd if place.fd is not None else -1)
    return (seen.st_dev, seen.st_ino) == (here.st_dev, here.st_ino)


def _same(one: int, other: int) -> bool:
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def _discard(aside: Aside, folder: str) -> None:
    """Remove the empty folder that was not used."""
    parts = [NEW, *(folder.split("/") if folder else ())]
    while parts:
        with suppress(OSError):
            os.rmdir("/".join(parts), dir_fd=aside.fd)
        parts.pop()
    aside.drop()
