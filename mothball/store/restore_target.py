"""Where a restore goes: the target's parent, opened once, and the folder beside the target in which a new one is made.

That folder has a name that follows from the target's, is locked while a restore works in it, and says in a file what it
is for. So a second run finds what the first one wrote, and two runs for one target meet. It is for its owner alone: nobody
else can put a link into a tree while it is written.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

from mothball.errors import AlreadyExists, Busy, InvalidParams, OperationFailed, PathNotAllowed
from mothball.store import beside
from mothball.store.below import FOLDER_FLAGS, check_path, identity, lies_in, open_below
from mothball.store.beside import STATE, TREE
from mothball.store.folders import explained
from mothball.store.read import show

SUFFIX: Final = b".mothball-restore"
_STATE_BYTES: Final = 1024**2

Look = Literal["absent", "empty", "folder"]


class Target:
    """The directory that a restore makes or fills. `parent` is a descriptor of the folder above it."""

    def __init__(self, path: Path, parent: int, name: bytes) -> None:
        self.path = path
        self.parent = parent
        self.name = name

    @property
    def sibling(self) -> bytes:
        """Name of the folder beside it, in which a new target is made."""
        return beside.beside(self.name, SUFFIX)

    @property
    def sibling_path(self) -> str:
        """The sibling for messages."""
        return show(os.fsencode(self.path.parent) + b"/" + self.sibling)

    def look(self) -> Look:
        """What is there now. `PathNotAllowed` for a symbolic link, `AlreadyExists` for anything but a folder."""
        try:
            found = os.stat(self.name, dir_fd=self.parent, follow_symlinks=False)
        except FileNotFoundError:
            return "absent"
        if stat.S_ISLNK(found.st_mode):
            raise PathNotAllowed(f"{str(self.path)!r} is a symbolic link; give the real path of the folder", path=str(self.path))
        if not stat.S_ISDIR(found.st_mode):
            raise AlreadyExists(f"{str(self.path)!r} exists and is no folder; move it away or choose another target")
        fd = self.open()
        try:
            with os.scandir(fd) as entries:
                return "folder" if next(entries, None) is not None else "empty"
        finally:
            os.close(fd)

    def open(self) -> int:
        """A descriptor of the target itself, which is a folder."""
        try:
            return os.open(self.name, FOLDER_FLAGS, dir_fd=self.parent)
        except OSError as error:
            raise explained(error, os.fsencode(self.path)) from error

    def replaceable(self) -> bool:
        """True when a folder made beside it can take the place of the (empty) target: same file system, not in use as one."""
        found = os.stat(self.name, dir_fd=self.parent, follow_symlinks=False)
        here = Path().stat()  # not `Path.cwd`: the folder one stands in may have been removed
        mine = os.access(".", os.W_OK | os.X_OK, dir_fd=self.parent, effective_ids=True)
        return mine and found.st_dev == os.fstat(self.parent).st_dev and (found.st_dev, found.st_ino) != (here.st_dev, here.st_ino)


@contextmanager
def open_target(path: Path, roots: Sequence[Path] | None, forbidden: Path) -> Iterator[Target]:
    """The target at `path`. With `roots` it must lie below one of them, and no link may stand on the way.

    `InvalidParams` for a path without a name, `PathNotAllowed`, and `OperationFailed` when the folder above is not there.
    `forbidden` is the store: nothing is restored into it.
    """
    text = str(path)
    if "\0" in text or path.name in {"", "..", "."}:
        raise InvalidParams(f"{text!r} cannot be a target: it must name a folder to be made or filled")
    try:
        if roots is None:
            path = path.parent.resolve() / path.name
            fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            root, below = check_path(text, roots, "target")
            fd = open_below(root, below[:-1])
    except OSError as error:
        if roots is not None and error.errno in {errno.ENOTDIR, errno.ELOOP}:
            raise PathNotAllowed(f"{text!r} leads through a symbolic link or a file; give the real path", path=text) from error
        reason = "does not exist; make it first" if error.errno == errno.ENOENT else f"cannot be opened: {error.strerror}"
        raise OperationFailed(f"the folder {str(path.parent)!r}, in which the target is to be, {reason}") from error
    try:
        _not_in_store(path, forbidden)
        yield Target(path, fd, os.fsencode(path.name))
    finally:
        os.close(fd)


def _not_in_store(path: Path, store: Path) -> None:
    real, inner = path.parent.resolve() / path.name, store.resolve()
    if identity(inner) is None:
        return  # no store yet, and nothing in it
    if lies_in(real, inner):
        raise PathNotAllowed(f"{str(path)!r} lies in the store {str(store)!r}; nothing is restored into it", path=str(path))
    # Not resolved: a link in the place of the target is refused as such.
    target = identity(real)
    if target is not None and any(identity(each) == target for each in inner.parents):
        raise PathNotAllowed(
            f"{str(path)!r} holds the store {str(store)!r}, which a restore might overwrite or delete; choose another target",
            path=str(path),
        )


class Sibling:
    """The folder beside a target in which it is made, locked. `tree` is what becomes the target."""

    def __init__(self, target: Target, fd: int) -> None:
        self._target = target
        self._fd = fd

    def state(self) -> dict[str, Any]:
        """What it is for; empty when nobody has said, or when its removal has begun."""
        return beside.read_state(self._fd, dict[str, Any], "the state of a restore", _STATE_BYTES) or {}

    def say(self, state: dict[str, Any]) -> None:
        """Write down what it is for, in one step."""
        if state == self.state():
            return  # on a full disk it could not be written again, and nothing would be lost by that
        try:
            beside.write_state(self._fd, json.dumps(state).encode(), durable=False)
        except OSError as error:
            raise explained(error, os.fsencode(self._target.sibling_path)) from error

    def tree(self) -> tuple[int, bool]:
        """A descriptor of the tree, which the caller closes, and whether it was there already."""
        try:
            os.mkdir(TREE, 0o700, dir_fd=self._fd)
            there = False
        except FileExistsError:
            there = True
        return os.open(TREE, FOLDER_FLAGS, dir_fd=self._fd), there

    def has_tree(self) -> bool:
        """True until the tree has become the target."""
        return beside.has_tree(self._fd)

    def publish(self) -> None:
        """The tree becomes the target, in one step; `AlreadyExists` when something with content is there by now."""
        target = self._target
        try:
            os.rename(TREE, target.name, src_dir_fd=self._fd, dst_dir_fd=target.parent)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                text = f"{str(target.path)!r} appeared while it was restored; it was left as it is, and nothing was restored"
                raise AlreadyExists(text) from error
            if error.errno == errno.EBUSY:
                text = f"{str(target.path)!r} is in use as a mount point; with overwrite (never, changed or always) it is filled"
                raise AlreadyExists(text) from error
            raise explained(error, os.fsencode(target.path)) from error

    def drop_tree(self) -> None:
        """Remove the tree alone."""
        remove_tree(TREE, self._fd)

    def remove(self) -> None:
        """Remove it with all it holds; what it is for goes first, so that a removal that was ended looks like nothing else."""
        with suppress(FileNotFoundError):
            os.unlink(STATE, dir_fd=self._fd)
        remove_tree(self._target.sibling, self._target.parent)


@contextmanager
def open_sibling(target: Target, *, make: bool = True) -> Iterator[Sibling | None]:
    """The locked sibling of `target`; None without `make` when there is none.

    `Busy` when another run works in it, `PathNotAllowed` when somebody else's file or folder has its name.
    """
    refusals = beside.Refusals(
        not_made=lambda error: explained(error, os.fsencode(target.path.parent)),
        not_opened=lambda error: explained(error, os.fsencode(target.sibling_path)),
        anothers=lambda user: PathNotAllowed(
            f"{target.sibling_path!r} belongs to another user ({user}); remove it or choose another target", path=str(target.path)
        ),
        busy=lambda: Busy(what=f"target {str(target.path)!r}", reason="another restore writes it"),
    )
    fd = beside.lock(target.sibling, target.parent, refusals, make=make)
    if fd is None:
        yield None
        return
    try:
        os.fchmod(fd, 0o700)  # also takes away a group's stickiness, which would pass on to all that is made in it
        yield Sibling(target, fd)
    finally:
        os.close(fd)


def remove_tree(name: bytes, parent: int) -> None:
    """Remove a folder of ours with all it holds, whatever its folders' modes, however deep; never through a link."""
    _lift(name, parent)
    top = os.open(name, FOLDER_FLAGS, dir_fd=parent)
    try:
        # Folders found inside are moved up and emptied from there: depth costs neither descriptors nor recursion.
        while folders := _clear(top, top):
            for each in folders:
                _lift(each, top)
                fd = os.open(each, FOLDER_FLAGS, dir_fd=top)
                try:
                    _clear(fd, top)
                finally:
                    os.close(fd)
                os.rmdir(each, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def _clear(fd: int, top: int) -> list[bytes]:
    """Remove the files in the folder `fd`; its folders are moved to `top`. Returns the folders' names when it is `top` itself."""
    with os.scandir(fd) as entries:
        found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
    folders = []
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=fd)
        elif fd == top:
            folders.append(name)
        else:
            _lift(name, fd)
            os.rename(name, secrets.token_hex(12).encode(), src_dir_fd=fd, dst_dir_fd=top)
    return folders


def _lift(name: bytes, parent: int) -> None:
    """Give the owner all rights on a folder, which a restore that was ended may have taken away already."""
    handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            Path(f"/proc/self/fd/{handle}").chmod(0o700)
    finally:
        os.close(handle)
