"""Whether a path lies below one of the roots that an operator allowed: text first, then folder by folder, never through a link."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mothball.errors import InvalidParams, PathNotAllowed

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def check_path(path: str, roots: Sequence[Path], what: str = "workspace path") -> tuple[Path, tuple[str, ...]]:
    """The allowed root above `path` and the components below it; raises `InvalidParams` and `PathNotAllowed`.

    Pure text: nothing on disk is touched. A root itself is not a workspace, only what lies below it.
    """
    if not path or "\0" in path or not path.startswith("/"):
        raise InvalidParams(f"{what} {path!r} must be an absolute path")
    parts = Path(path).parts
    if ".." in parts:
        raise InvalidParams(f"{what} {path!r} must not contain '..'")
    for root in roots:
        for known in {root, root.resolve()}:
            if len(parts) > len(known.parts) and parts[: len(known.parts)] == known.parts:
                return root, parts[len(known.parts) :]
    raise PathNotAllowed(path=path)


def open_below(root: Path, parts: Sequence[str]) -> int:
    """A descriptor of the folder `parts` below `root`, opened one by one without following a link; raises `OSError`.

    The error's ``filename`` is the component that failed. The caller closes the descriptor.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in parts:
        try:
            deeper = os.open(part, FOLDER_FLAGS, dir_fd=fd)
        finally:
            os.close(fd)
        fd = deeper
    return fd


def lies_in(path: Path, folder: Path) -> bool:
    """True when the real path `path` is `folder` or lies below it; False while there is no such folder.

    By device and inode: one folder can have many names (links above it, bind mounts).
    """
    mine = identity(folder.resolve())
    return mine is not None and any(identity(each) == mine for each in (path, *path.parents))


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; None for what is not there."""
    with suppress(OSError):
        found = os.lstat(path)
        return found.st_dev, found.st_ino
    return None


def read_small(folder_fd: int, name: str, limit: int) -> bytes | None:
    """A small regular file in a folder, never through a link; None when it is something else, larger or unreadable."""
    try:
        fd = os.open(name, FILE_FLAGS, dir_fd=folder_fd)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        data = os.read(fd, limit + 1)
        return data if len(data) <= limit else None
    except OSError:
        return None
    finally:
        os.close(fd)
