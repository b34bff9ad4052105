"""Where a purge may delete at all: a folder strictly below an allowed root that nothing else lives in.

No flag overrules what is refused here. The folder above the workspace is opened once, part by part, never through a link, and
everything that follows goes by that descriptor.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mothball
from mothball.errors import PathNotAllowed
from mothball.settings import Settings
from mothball.store.below import FOLDER_FLAGS, check_path, identity, lies_in, open_below

Others = Iterable[tuple[str, str]]
"""(id, path) of the other workspaces that are registered on this host."""


class Place:
    """The folder of a workspace. `parent` is a descriptor of the folder above it, None when even that is gone."""

    def __init__(self, path: str, parent: int | None, name: bytes, real: bytes) -> None:
        self.path = path
        self.name = name
        self.parent = parent
        self.real = real
        """The path without links, in bytes."""

    def open(self) -> int | None:
        """A descriptor of the folder, which the caller closes; None when there is none. `PathNotAllowed` for anything else."""
        if self.parent is None:
            return None
        try:
            return os.open(self.name, FOLDER_FLAGS, dir_fd=self.parent)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR}:
                what = "a symbolic link" if self._is_link() else "no folder"
                raise PathNotAllowed(
                    f"{self.path!r} is {what} now; a workspace's folder was registered there, so nothing is deleted", path=self.path
                ) from error
            raise

    def _is_link(self) -> bool:
        try:
            return stat.S_ISLNK(os.stat(self.name, dir_fd=self.parent, follow_symlinks=False).st_mode)
        except OSError:
            return False


def real_path(fd: int) -> Path:
    """Where the open folder `fd` lies now, without links."""
    return Path(f"/proc/self/fd/{fd}").readlink()


@contextmanager
def open_place(path: str, settings: Settings, others: Others) -> Iterator[Place]:
    """The place of a workspace, checked.

    Raises `InvalidParams` and `PathNotAllowed`: not below `settings.workspace_roots`, a root itself, the store or the data of
    Mothball in it or around it, the code of this very program in it, another registered workspace in it or around it, a link on
    the way.
    """
    root, below = check_path(path, settings.workspace_roots)
    try:
        parent = open_below(root, below[:-1])
    except FileNotFoundError:
        yield Place(path, None, os.fsencode(below[-1]), os.fsencode(path))
        return
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            text = f"{path!r} leads through a symbolic link or a file; nothing is deleted through it"
            raise PathNotAllowed(text, path=path) from error
        raise
    try:
        name = os.fsencode(below[-1])
        real = os.path.join(os.fsencode(real_path(parent)), name)  # noqa: PTH118 -- the name may be no UTF-8
        check_alone(Path(os.fsdecode(real)), path, settings, others)
        yield Place(path, parent, name, real)
    finally:
        os.close(parent)


def check_alone(real: Path, path: str, settings: Settings, others: Others) -> None:
    """Raise `PathNotAllowed` when deleting `real` would take more than a workspace. By inode: a folder can have many names."""
    if identity(real) is None:
        return
    for folder, what in _kept(settings):
        if lies_in(folder.resolve(), real):
            raise PathNotAllowed(f"{path!r} holds {what} ({str(folder)!r}) and is never deleted", path=path)
    for folder in (settings.store_dir, settings.run_dir):
        if lies_in(real, folder):
            raise PathNotAllowed(f"{path!r} lies in Mothball's own folder {str(folder)!r} and is never deleted", path=path)
    for other, place in others:
        if lies_in(Path(place).resolve(), real):
            text = f"{path!r} holds workspace {other!r} ({place!r}); release or purge that one first"
            raise PathNotAllowed(text, path=path)
        if lies_in(real, Path(place)):
            text = f"{path!r} lies in workspace {other!r} ({place!r}); release that one first, or purge it as a whole"
            raise PathNotAllowed(text, path=path)


def _kept(settings: Settings) -> list[tuple[Path, str]]:
    """What no purge takes, whatever is registered as a workspace."""
    kept = [
        (settings.data_dir, "Mothball's data"),
        (settings.store_dir, "the store"),
        *((root, "a workspace root") for root in settings.workspace_roots),
        (Path(sys.prefix), "the Python that runs this"),
        (Path(mothball.__file__).parent, "the code that runs this"),
        (Path("/proc/self/cwd"), "the folder that this worker runs in"),
    ]
    if settings.runtime_commands:
        kept.append((Path(settings.runtime_commands), "the operator's runtime commands"))
    return kept
