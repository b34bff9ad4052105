"""The hidden folder beside a cache, on the same device, into which entries are moved before they are deleted.

A rename takes an entry out of the cache in one step; until it is deleted it can be brought back. A file says what the folder is
for, so that the next run finishes what a killed one left. Only folders that have our state, our owner and our cache's name in the
state are ever touched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Literal

import msgspec

from mothball.errors import Corrupt, MothballError, NoSpace, OperationFailed
from mothball.ocicache.place import Place
from mothball.ocicache.recognise import ASIDE, open_below
from mothball.ocicache.system import mount_of, open_folder
from mothball.ocicache.types import Kind
from mothball.store import beside
from mothball.store.foreign import read_json

TREE: Final = "tree"
"""Entries that a policy moved, each where it lay in the cache."""
NEW: Final = "new"
"""The folder that takes the place of the cache in a full prune; after the exchange it is the old one."""
OLD: Final = "old"
"""The cache, where names cannot be exchanged: between two renames its name means nothing."""
_FOLDERS: Final = frozenset({"", "sha256", "blobs/sha256"})
"""Where blobs lie in caches: nothing that a state says leads anywhere else."""
_RANDOM: Final = 8
_HEX: Final = re.compile(r"[0-9a-f]{16}\Z")
_MAX_NAME: Final = 180
_STATE_BYTES: Final = 1024**2
_REFUSED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What an aside is for; times are ms of this host's clock. Stage ``moving``: entries come; ``kept``: all are here, until
    `delete_after`; ``full``: a whole cache, decided and being deleted. `keep`: what goes back into the cache first."""

    at: int
    delete_after: int
    cache: str
    kind: str
    policy: str
    stage: Literal["moving", "kept", "full"]
    folder: str = ""
    keep: tuple[str, ...] = ()
    everything: bool = False
    """Also what is no blob goes, because the kind was declared."""
    held: bool = False
    """A pull may count on it until `delete_after`, so that a full disk is no reason to delete it before."""


class Aside:
    """One such folder, open and locked: a run that works in it is never disturbed."""

    def __init__(self, holder: int, name: str, fd: int) -> None:
        self.holder = holder
        self.name = name
        self.fd = fd
        self._folders: dict[str, int] = {}

    def state(self) -> State | None:
        """What it says of itself; None when it says nothing, or nothing that can be read."""
        try:
            fd = os.open(beside.STATE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:
            return None
        try:
            seen = os.fstat(fd)
            if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.fstat(self.fd).st_uid:
                return None
            with os.fdopen(fd, "rb", closefd=False) as file:
                found = read_json(file.read(_STATE_BYTES), State, "the state of a prune")
        except (Corrupt, OSError):
            return None
        finally:
            os.close(fd)
        return found if found.folder in _FOLDERS and found.kind in set(Kind) else None

    def say(self, state: State) -> None:
        """Write it down so that it survives a power cut. Raises `OSError`."""
        beside.write_state(self.fd, msgspec.json.encode(state), durable=True)

    def take(self, name: str, source: int, folder: str) -> None:
        """Move an entry of the open folder `source`, which is `folder` in the cache, here. Raises `OSError`."""
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=self.folder(folder))

    def folder(self, folder: str) -> int:
        """Where entries of `folder` lie in here; it is made when there is none."""
        fd = self._folders.get(folder)
        if fd is None:
            here = os.dup(self.fd)
            for part in (TREE, *(folder.split("/") if folder else ())):
                try:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=here)
                    deeper = open_folder(part, here)
                finally:
                    os.close(here)
                here = deeper
            fd = self._folders[folder] = here
        return fd

    def open(self, name: str) -> int | None:
        """A descriptor of the folder `name` in here, which the caller closes; None when there is none."""
        try:
            return open_below(self.fd, name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, name: str) -> bool:
        """True when something of that name is in here."""
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            return True
        return False

    def drop(self) -> bool:
        """Remove the folder, which must be empty but for what we keep in it; False when something else is in it."""
        for name in (NEW, OLD):
            with suppress(OSError):
                os.rmdir(name, dir_fd=self.fd)
        self._drop_tree()
        if any(self.has(name) for name in (TREE, NEW, OLD)):
            return False
        for state in (beside.NEW_STATE, beside.STATE):
            with suppress(FileNotFoundError):
                os.unlink(state, dir_fd=self.fd)
        try:
            os.rmdir(self.name, dir_fd=self.holder)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    def _drop_tree(self) -> None:
        state = self.state()
        parts = [TREE, *(state.folder.split("/") if state is not None and state.folder else ())]
        while parts:
            with suppress(OSError):
                os.rmdir("/".join(parts), dir_fd=self.fd)
            parts.pop()

    def close(self) -> None:
        """Let go of it."""
        for fd in (*self._folders.values(), self.fd):
            os.close(fd)
        self._folders.clear()


def prefix_of(name: str) -> str:
    """How the names of asides beside the cache `name` begin."""
    base = name if len(os.fsencode(name)) <= _MAX_NAME else hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{base}{ASIDE}"


@contextmanager
def make(place: Place, pool: int, state: State) -> Iterator[Aside | None]:
    """A new aside: beside the cache, in it where that is another device or may not be written; None when the disk is full.

    Raises `OperationFailed` when the cache may not be written at all; nothing was changed then.
    """
    aside = _new(place, pool, state)
    try:
        yield aside
    finally:
        if aside is not None:
            aside.close()
            os.close(aside.holder)


def _new(place: Place, pool: int, state: State) -> Aside | None:
    mount = mount_of(pool)
    refused: OSError | None = None
    for holder, prefix in _holders(place, pool):
        name = prefix + secrets.token_hex(_RANDOM)
        try:
            if mount_of(holder) != mount:
                os.close(holder)
                continue
            os.mkdir(name, 0o700, dir_fd=holder)
        except OSError as error:
            os.close(holder)
            if error.errno in _FULL:
                return None
            if error.errno not in _REFUSED:
                raise OperationFailed(f"nothing can be moved aside beside {place.path!r}: {error.strerror}") from error
            refused = error
            continue
        fd = open_folder(name, holder)
        aside = Aside(holder, name, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside.say(state)
        except OSError as error:
            aside.drop()
            aside.close()
            os.close(holder)
            if error.errno in _FULL:
                return None
            raise OperationFailed(f"nothing can be moved aside beside {place.path!r}: {error.strerror}") from error
        return aside
    why = refused.strerror if refused is not None else "it lies across several file systems"
    raise OperationFailed(f"{place.path!r} cannot be pruned: {why}; {who(pool)}; nothing was changed")


def _holders(place: Place, pool: int) -> Iterator[tuple[int, str]]:
    """(descriptor, prefix of names) of the folders that may hold an aside, the best first."""
    if place.parent is not None:
        with suppress(OSError):
            yield open_folder(".", place.parent), prefix_of(place.name)
    if place.fd is not None:
        yield os.dup(place.fd), ASIDE
    yield os.dup(pool), ASIDE


Pools = Sequence[int]
"""Descriptors of the folders in a cache that may hold an aside, beside the one above the cache."""


def pools(place: Place, pool: int | None, *, inside: bool = True) -> Pools:
    """Where asides may lie. `inside` False: it is known that the cache itself has none at its top."""
    here = [place.fd] if inside and place.fd is not None else []
    if pool is not None and place.fd is not None and (mount_of(pool) != mount_of(place.fd) or not may_write(place.fd)):
        here.append(pool)
    return here


def who(fd: int) -> str:
    """Who may prune what is in the open folder."""
    return f"this is user {os.geteuid()}, and it belongs to user {os.fstat(fd).st_uid}, who may (so may root)"


def barred(pool: int) -> str:
    """Why nobody like us can take anything out of the folder of the blobs; empty when we may."""
    if may_write(pool):
        return ""
    if os.fstatvfs(pool).f_flag & os.ST_RDONLY:
        return "Read-only file system; mount it for writing"
    return f"Permission denied; {who(pool)}"


def may_write(fd: int) -> bool:
    """True when this user may make and rename things in the open folder."""
    return os.access(f"/proc/self/fd/{fd}", os.W_OK | os.X_OK, effective_ids=True)


def found(place: Place, pools: Pools, foreign: Callable[[str, int], None] | None = None) -> Iterator[Aside | None]:
    """Every aside of this cache that no run works in, locked, each until the next; None for one that another run has.

    `foreign` is told of other users' (name, user), which are left alone. Root also takes those of the cache's owner.
    """
    seen: set[tuple[int, int]] = set()
    holders: list[tuple[int, str]] = []
    if place.parent is not None:
        with suppress(OSError):
            holders.append((open_folder(".", place.parent), prefix_of(place.name)))
    holders += [(os.dup(fd), ASIDE) for fd in pools]
    try:
        for holder, prefix in holders:
            names = _names(holder, prefix)
            for name in names:
                yield from _one(place, holder, name, seen, foreign)
    finally:
        for holder, _ in holders:
            os.close(holder)


def _names(holder: int, prefix: str) -> list[str]:
    with os.scandir(holder) as listed:
        return sorted(
            each.name
            for each in listed
            if each.name.startswith(prefix) and _HEX.match(each.name[len(prefix) :]) and each.is_dir(follow_symlinks=False)
        )


def _users(place: Place) -> set[int]:
    here = os.geteuid()
    return {here} if here or place.fd is None else {here, os.fstat(place.fd).st_uid}


def _one(
    place: Place, holder: int, name: str, seen: set[tuple[int, int]], foreign: Callable[[str, int], None] | None
) -> Iterator[Aside | None]:
    owner = -1
    with suppress(OSError):
        owner = os.stat(name, dir_fd=holder, follow_symlinks=False).st_uid
    if owner not in _users(place):
        if owner >= 0 and foreign is not None:
            foreign(name, owner)
        return
    try:
        fd = open_folder(name, holder)
    except OSError:
        return
    aside = Aside(holder, name, fd)
    try:
        known = os.fstat(fd)
        identity = (known.st_dev, known.st_ino)
        if known.st_uid != owner or known.st_mode & 0o022 or identity in seen:
            return
        seen.add(identity)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        state = aside.state()
        if state is None:
            # Made and not yet said what for: there can be nothing in it but the state's own temporary file.
            if set(os.listdir(fd)) <= {os.fsdecode(beside.NEW_STATE)}:  # noqa: PTH208 - a descriptor
                yield aside
        elif state.cache == place.path:
            yield aside
    finally:
        aside.close()


def explained(error: OSError, what: str) -> MothballError:
    """`error` of a rename in or beside the cache as one of ours."""
    if error.errno in _FULL:
        return NoSpace(f"no space left to move aside what goes from {what!r}; free a little on that file system and run it again")
    return OperationFailed(f"{what!r} cannot be pruned: {error.strerror}; nothing was deleted")
