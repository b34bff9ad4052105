"""Opening the root of a workspace: once, inside an allowed root, never through a link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mothball.errors import PathNotAllowed, SourceMissing
from mothball.store.below import FOLDER_FLAGS, check_path


@contextmanager
def open_root(path: str, roots: Sequence[Path]) -> Iterator[int]:
    """A descriptor of the workspace's folder.

    Raises `PathNotAllowed` when it is not below `roots` or a link stands in the way, `SourceMissing` when it is not there
    or no folder (B-25: the reference took both for an empty workspace and replaced the good copy with it).
    """
    root, below = check_path(path, roots)
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceMissing(path=path, reason=f"its root {root} cannot be opened: {error.strerror}") from error
    try:
        for part in below:
            try:
                deeper = os.open(part, FOLDER_FLAGS, dir_fd=fd)
            except OSError as error:
                raise _explain(error, path, part, fd) from error
            os.close(fd)
            fd = deeper
        yield fd
    finally:
        os.close(fd)


def _explain(error: OSError, path: str, part: str, fd: int) -> Exception:
    if error.errno == errno.ENOENT:
        return SourceMissing(path=path, reason="it does not exist")
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        try:
            if stat.S_ISLNK(os.stat(part, dir_fd=fd, follow_symlinks=False).st_mode):
                return PathNotAllowed(
                    f"{path!r} leads through the symbolic link {part!r}; register the real path of the folder", path=path
                )
        except OSError:
            pass
        return SourceMissing(path=path, reason="it is not a folder")
    return SourceMissing(path=path, reason=error.strerror or str(error))
