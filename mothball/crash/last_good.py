"""Whether a directory can be captured, and what is packaged when it cannot: the last good generation, never an empty one (B-50)."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mothball.capture.root import open_root
from mothball.errors import PathNotAllowed, SourceMissing
from mothball.store import Ref, RefIndex
from mothball.store.below import FOLDER_FLAGS
from mothball.store.refs import LATEST, SNAPSHOT
from mothball.store.snapshots import whole

_MOST: Final = 100_000
"""Folders without any file that are looked into before a tree counts as one with content: a capture will say it exactly."""
_DEEPEST: Final = 200


def why_not(path: str, roots: Sequence[Path]) -> str:
    """Why the directory `path` cannot be captured as what the workspace was; empty when it can.

    An empty one is no reason here: whether it always was is for the caller to know, see `is_empty`. A disk's errors are reasons.
    """
    try:
        with open_root(path, roots) as root:
            os.listdir(root)  # noqa: PTH208 - a descriptor
    except (SourceMissing, PathNotAllowed) as error:
        return error.message
    except OSError as error:
        return f"{path!r} cannot be read: {error.strerror or error}"
    return ""


def is_empty(path: str, roots: Sequence[Path]) -> bool:
    """True when there is no file and no link in the directory `path`, however many folders there are (up to a hundred thousand)."""
    seen = [0]
    with open_root(path, roots) as root:
        return not _has_file(root, seen, _DEEPEST)


def last_good(refs: RefIndex) -> Ref | None:
    """The newest capture that there is: ``latest``, else the newest snapshot; an empty one only when there is no other.

    Crash reports are not among them: their captures are those of other refs, or none of this workspace's any more.
    """
    found = refs.list()
    latest = [ref for ref in found if ref.name == LATEST]
    snaps = sorted(((int(match[1]), ref) for ref in found if (match := SNAPSHOT.match(ref.name))), key=lambda pair: -pair[0])
    order = [*latest, *(ref for _, ref in snaps)]
    return next((ref for ref in order if whole(ref.get("files")) > 0), order[0] if order else None)


def _has_file(folder: int, seen: list[int], deeper: int) -> bool:
    for name in os.listdir(folder):
        seen[0] += 1
        if seen[0] > _MOST or deeper == 0:
            return True
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                return True
            below = os.open(name, FOLDER_FLAGS, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError:
            return True  # what cannot be looked into may hold anything
        try:
            if _has_file(below, seen, deeper - 1):
                return True
        finally:
            os.close(below)
    return False
