"""How much a capture is about to store, known after the comparison and before the first byte is written (Q-11)."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterable
from contextlib import suppress
from typing import Final

from mothball.capture.types import Entry

_BLOCK: Final = 512
OVERHEAD: Final = 1024
"""Bytes per name for its head in the archive, its row in the table of contents and the image's own documents, compressed."""


def need(root_fd: int, entries: Iterable[Entry], emit: Container[str]) -> int:
    """Bytes that the layer of the entries whose path is in `emit` takes at most, were its content not to compress at all.

    Hard links count once. A file with holes counts with the blocks it has: holes compress to nothing.
    """
    total, groups = OVERHEAD, set()
    for entry in entries:
        if entry.path not in emit:
            continue
        total += OVERHEAD
        if stat.S_ISREG(entry.mode) and (entry.group is None or entry.group not in groups):
            groups.add(entry.group)
            total += _allocated(root_fd, entry) if entry.sparse else entry.size
    return total


def _allocated(root_fd: int, entry: Entry) -> int:
    with suppress(OSError):
        return min(entry.size, os.stat(entry.path, dir_fd=root_fd, follow_symlinks=False).st_blocks * _BLOCK)
    return entry.size
