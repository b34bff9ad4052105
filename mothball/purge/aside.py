"""The hidden folder beside a workspace in which it is deleted.

A workspace is moved there whole before anything of it goes: nobody finds it half deleted under its name, nobody else can enter it
any more, and no capture can take what is left of it for its content. A file says what the folder is for and how far it came, so
that the next run puts back what was not begun and finishes what was.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal

import msgspec

from mothball.errors import Busy, NoSpace, OperationFailed, PathNotAllowed
from mothball.purge.place import Place
from mothball.store import beside
from mothball.store.below import FOLDER_FLAGS
from mothball.store.beside import NEW_STATE, STATE, TREE
from mothball.store.folders import explained
from mothball.store.read import show

SUFFIX: Final = b".mothball-purge"
_STATE_BYTES: Final = 4 * 1024**2


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What the folder is for. Stage ``aside``: moved there, nothing deleted. ``deleting``: it is decided and has begun."""

    stage: Literal["aside", "deleting"]
    workspace: str
    registration: str
    device: int
    inode: int
    forced: bool = False
    digest: str | None = None
    repositories: list[int] = []
    """Inodes of the ``.git`` that were examined before."""
    receipt: dict[str, Any] = {}


class Aside:
    """The folder, locked: one purge of a workspace at a time on this host, whatever became of the leases."""

    def __init__(self, place: Place, parent: int, fd: int) -> None:
        self._place = place
        self._parent = parent
        self._fd = fd

    @property
    def shown(self) -> str:
        """Where the moved workspace lies, for messages."""
        return show(os.path.join(os.path.dirname(self._place.real), sibling_name(self._place.name), TREE))  # noqa: PTH118, PTH120 -- bytes

    def state(self) -> State | None:
        """What it says of itself; None when it says nothing, or nothing that can be read."""
        return beside.read_state(self._fd, State, "the state of a purge", _STATE_BYTES)

    def check_ours(self) -> None:
        """Raise `PathNotAllowed` for a folder that merely has this name and holds something that no purge put there."""
        if self.state() is None and not self.has_tree() and set(os.listdir(self._fd)) - {os.fsdecode(NEW_STATE)}:  # noqa: PTH208
            text = f"{show(sibling_name(self._place.name))!r} beside {self._place.path!r} is needed to delete it; move it away"
            raise PathNotAllowed(text, path=self._place.path)

    def say(self, state: State) -> None:
        """Write it down so that it survives a power cut. Raises `NoSpace`, `OperationFailed`."""
        try:
            beside.write_state(self._fd, json.dumps(msgspec.to_builtins(state)).encode(), durable=True)
        except OSError as error:
            raise _explained(error, self._place.path) from error

    def tree(self) -> int | None:
        """A descriptor of what was moved here, which the caller closes; None when there is nothing.

        `PathNotAllowed` when it is no folder: what was moved was swapped for something else in the last moment.
        """
        try:
            return os.open(TREE, FOLDER_FLAGS, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR}:
                raise PathNotAllowed(
                    f"{self._place.path!r} was swapped for something that is no folder", path=self._place.path
                ) from None
            raise _explained(error, self._place.path) from error

    def has_tree(self) -> bool:
        """True while anything that was moved here is still here."""
        return beside.has_tree(self._fd)

    def take(self, state: State) -> int:
        """Move the workspace here and return a descriptor of it; whatever else stands under its name by now is put back.

        Raises `Busy` when it is not the folder that `state` means any more, `NoSpace`, `OperationFailed`, `PathNotAllowed`.
        """
        self.say(state)
        try:
            os.rename(self._place.name, TREE, src_dir_fd=self._parent, dst_dir_fd=self._fd)
        except FileNotFoundError:
            raise Busy(what=f"{self._place.path!r}", reason="it went away while it was looked at") from None
        except OSError as error:
            if error.errno in {errno.EBUSY, errno.EXDEV}:
                text = f"{self._place.path!r} is a mount point; unmount it first, nothing was deleted"
                raise PathNotAllowed(text, path=self._place.path) from error
            raise _explained(error, self._place.path) from error
        try:
            fd = self.tree()
            if fd is not None and _identity(fd) == (state.device, state.inode):
                os.fsync(self._parent)
                return fd
            if fd is not None:
                os.close(fd)
            raise Busy(what=f"{self._place.path!r}", reason="another folder took its place while it was looked at")
        except BaseException:
            self.put_back()
            raise

    def put_back(self) -> None:
        """Give the workspace its name again. `Busy` when something with content has it by now: then both stay as they are."""
        try:
            os.rename(TREE, self._place.name, src_dir_fd=self._fd, dst_dir_fd=self._parent)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}:
                text = (
                    f"{self._place.path!r} was moved to {self.shown!r} to be deleted, and something else took its name meanwhile; "
                    "nothing was deleted. Move one of the two away and purge again"
                )
                raise Busy(text) from error
            raise _explained(error, self._place.path) from error
        os.fsync(self._parent)

    def drop_tree(self) -> bool:
        """Remove the emptied tree; False when it still has content."""
        try:
            os.rmdir(TREE, dir_fd=self._fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                return False
            raise _explained(error, self._place.path) from error
        os.fsync(self._fd)
        return True

    def remove(self) -> None:
        """Remove the folder, unless it still has a tree. Something else in it stays, and so does the folder."""
        if self.has_tree():
            return
        with suppress(FileNotFoundError):
            os.unlink(NEW_STATE, dir_fd=self._fd)
        with suppress(FileNotFoundError):
            os.unlink(STATE, dir_fd=self._fd)
        with suppress(OSError):
            os.rmdir(sibling_name(self._place.name), dir_fd=self._parent)


def sibling_name(name: bytes) -> bytes:
    """Its name follows from that of the workspace's folder, so that the next run finds it."""
    return beside.beside(name, SUFFIX)


def put_back(place: Place, workspace: str, registration: str) -> bool:
    """Give a workspace its name again that an interrupted purge only moved aside; True when that was done now.

    What such a purge began to delete is left as it is. `Busy` while a purge works there, and when something else has the name.
    """
    with open_aside(place, make=False) as aside:
        state = None if aside is None else aside.state()
        if aside is None or state is None or not aside.has_tree():
            return False
        if (state.stage, state.workspace, state.registration) != ("aside", workspace, registration):
            return False
        aside.put_back()
        aside.remove()
        return True


@contextmanager
def open_aside(place: Place, *, make: bool) -> Iterator[Aside | None]:
    """The folder beside `place`, locked; None when there is none and it is not to be made.

    `Busy` when another purge works in it, `PathNotAllowed` when somebody else's file or folder has its name, `NoSpace`.
    """
    if place.parent is None:
        yield None
        return
    shown = show(sibling_name(place.name))

    def foreign(what: str) -> PathNotAllowed:
        return PathNotAllowed(f"{shown!r} beside {place.path!r} {what}; move it away", path=place.path)

    refusals = beside.Refusals(
        not_made=lambda error: _explained(error, place.path),
        not_opened=lambda _: foreign("is needed to delete it, and is no folder"),
        anothers=lambda user: foreign(f"belongs to another user ({user})"),
        busy=lambda: Busy(what=f"{place.path!r}", reason="another purge of it is running"),
    )
    fd = beside.lock(sibling_name(place.name), place.parent, refusals, make=make)
    if fd is None:
        yield None
        return
    try:
        aside = Aside(place, place.parent, fd)
        aside.check_ours()
        os.fchmod(fd, 0o700)
        yield aside
    finally:
        os.close(fd)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _explained(error: OSError, path: str) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(f"no space left to note that {path!r} is being deleted; nothing was deleted. Free a little and run it again")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return OperationFailed(f"{path!r} cannot be moved aside to be deleted: {error.strerror}; nothing was deleted")
    return explained(error, os.fsencode(path))
