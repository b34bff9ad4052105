"""The end of a log file: of two gigabytes the last piece is read, and nothing but a regular file below an allowed root."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from mothball.crash.text import clean, line_start
from mothball.errors import InvalidParams, PathNotAllowed
from mothball.settings import Settings
from mothball.store.below import FILE_FLAGS, check_path, open_below


def tail(log: str, *, root: Path, settings: Settings) -> dict[str, Any]:
    """The last ``crash_log_bytes`` of the file `log`: ``path``, ``bytes`` (of all of it), ``tail_bytes``, ``text``, ``truncated``.

    A relative `log` lies below the workspace's directory `root`. Raises `InvalidParams` and `PathNotAllowed` for a place outside
    the workspace roots, for a link, a FIFO, a device, and `OSError`. What was cut off at the front is cut between lines.
    """
    path = log if log.startswith("/") else str(root / log)
    found, parts = check_path(path, [*settings.workspace_roots], "log")
    fd = _open(found, parts, path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidParams(f"log {path!r} is not a regular file")
        want = settings.crash_log_bytes
        offset = max(status.st_size - want, 0)
        data = _read(fd, offset, want)
    finally:
        os.close(fd)
    text = data.decode("utf-8", "surrogateescape")
    if offset:
        text = line_start(text)
    return {
        "path": path, "bytes": status.st_size, "tail_bytes": len(text.encode("utf-8", "surrogateescape")), "text": clean(text),
        "truncated": offset > 0, "modified": status.st_mtime_ns // 1_000_000,
    }  # fmt: skip


def _open(root: Path, parts: tuple[str, ...], path: str) -> int:
    """The file, through folders that are no links."""
    try:
        folder = open_below(root, parts[:-1])
        try:
            return os.open(parts[-1], FILE_FLAGS, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.ENXIO}:
            raise PathNotAllowed(
                f"log {path!r} is, or lies behind, a symbolic link or something else that is not read", path=path
            ) from None
        raise


def _read(fd: int, offset: int, want: int) -> bytes:
    """`want` bytes from `offset`: a file that grows meanwhile is not followed."""
    pieces: list[bytes] = []
    while want > 0 and (piece := os.pread(fd, min(want, 1024**2), offset)):
        pieces.append(piece)
        offset += len(piece)
        want -= len(piece)
    return b"".join(pieces)
