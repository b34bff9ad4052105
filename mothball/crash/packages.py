"""The packages of crash reports on this host's disk: what is there, and taking one away."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from mothball.errors import InvalidParams, OperationFailed
from mothball.store.blobs import sync_folder

CLEAR: Final = ".tar"
SEALED: Final = ".tar.age"
_NAME = re.compile(r"(crash-[A-Za-z0-9._-]{1,150}?)(\.tar|\.tar\.age)\Z")
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PackageFile(msgspec.Struct, frozen=True):
    """One package on disk; `at` is its mtime in ms of this host's clock."""

    id: str
    path: str
    bytes: int
    sealed: bool
    at: int


def list_packages(folder: Path) -> list[PackageFile]:
    """The packages in `folder` by name, none when there is no folder. Links and what has another name are not packages."""
    found: list[PackageFile] = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.match(entry.name)
            if match is None:
                continue
            with suppress(FileNotFoundError):
                now = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(now.st_mode):
                    at = now.st_mtime_ns // 1_000_000
                    found.append(PackageFile(match[1], str(folder / entry.name), now.st_size, match[2] == SEALED, at))
    return sorted(found, key=lambda package: package.path)


def remove_package(folder: Path, id: str) -> list[str]:  # noqa: A002  # what everybody calls it
    """Remove the package of the report `id`, clear and sealed; returns the names that were there. Idempotent.

    Raises `InvalidParams` for what is no id, `OperationFailed` when the file cannot be removed.
    """
    if not _NAME.match(f"{id}{CLEAR}"):
        raise InvalidParams(f"{id[:200]!r} is no id of a crash report")
    gone: list[str] = []
    try:
        fd = os.open(folder, _OPEN)
    except FileNotFoundError:
        return gone
    try:
        for name in (id + CLEAR, id + SEALED):
            try:
                os.unlink(name, dir_fd=fd)
                gone.append(name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise OperationFailed(reason=f"{folder / name} cannot be removed: {error.strerror}") from error
    finally:
        os.close(fd)
    if gone:
        sync_folder(folder)
    return gone
