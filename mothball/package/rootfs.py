"""What a bundle's rootfs holds beside the workspace: mount points, and the merged files of a base image.

One sequence of entries, sorted as a tar wants them (a folder before what it holds), from which both a folder and a tar are
written. What it says about modes and times is what both write, so that they are the same tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, NamedTuple

from mothball.store.toc import sort_key

WORKSPACE_DIR: Final = b"workspace"
"""Where the workspace lies in the rootfs. What a base image has there is left out."""
POINTS: Final[dict[bytes, int]] = {b"dev": 0o755, b"proc": 0o555, b"sys": 0o555, b"tmp": 0o1777, WORKSPACE_DIR: 0o755}
SAFE_BITS: Final = 0o777
"""Bits of a mode that are kept. Setuid and setgid are not: a container that can gain no privileges has no use for them, and a
program of a hostile image that is setuid to root must not lie on the host's disk."""

Kind = Literal["f", "d", "l", "h"]
"""File, folder, symbolic link, further name of an earlier file (``link`` is that one's path)."""


def _no_content() -> Iterator[bytes]:
    return iter(())


class RootEntry(NamedTuple):
    """One entry below ``rootfs/``. `path` and `link` are bytes, `size` is bytes of content (kind ``f`` only)."""

    path: bytes
    kind: Kind
    mode: int
    mtime_ns: int = 0
    size: int = 0
    link: bytes = b""
    pieces: Callable[[], Iterator[bytes]] = _no_content
    """The content of a file in pieces of at most 1 MiB; may raise `Corrupt`."""


def skeleton(base: Iterable[RootEntry] = ()) -> Iterator[RootEntry]:
    """Everything below ``rootfs/`` but the workspace's content, sorted by path components.

    `base` (sorted, see `Base.entries`) is merged in; at and below the mount points nothing of it is taken, and they are real
    folders. The entry ``workspace`` stands where the workspace's own files have to follow; its mode and time are those of the
    capture's root folder, not what stands here.
    """
    points = sorted(POINTS)
    for entry in base:
        if entry.path.partition(b"/")[0] in POINTS:
            continue
        while points and sort_key(points[0]) < sort_key(entry.path):
            yield _point(points.pop(0))
        yield entry
    for path in points:
        yield _point(path)


def _point(path: bytes) -> RootEntry:
    return RootEntry(path, "d", POINTS[path])
