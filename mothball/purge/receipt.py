"""What a purge has to show before it deletes: a capture that was read back, and what deletion would lose all the same.

A receipt stays with the tombstone. It names the capture that holds the content of the directory, when that capture was read back
from disk, and what was left out of it by the workspace's own rules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import msgspec

from mothball.capture.listing import RESULT_BYTES, fitting
from mothball.store import Store
from mothball.store.blobs import sync_folder
from mothball.store.content import check_diff_id, compare_layer
from mothball.store.hashing import rehash
from mothball.store.manifest import diff_ids, load_manifest

SHOWN_GAPS: Final = 10
"""Gaps that a message names one by one; the others are counted."""
LISTED_GAPS: Final = 100

Report = Callable[[str, dict[str, Any]], None]
"""Called with the name of a step and its progress; what it raises ends the work."""


class Gap(msgspec.Struct, frozen=True):
    """Something that deletion would lose. `path` is relative to the workspace, printable, ``""`` for the whole of it.

    `reason` is that of a capture's omission (``too_large``, ``unreadable``, ``special`` ...) or one of ``no_capture``,
    ``damaged``, ``changed``, ``not_captured``, ``git``, ``in_use``, ``mount``, ``deep``, ``not_verified``.
    """

    path: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.detail or self.reason.replace('_', ' ')}"


class Receipt(msgspec.Struct, frozen=True):
    """The proof that stays with the tombstone. Sizes in bytes; `verified_at` is ms of Redis TIME."""

    digest: str | None
    """The capture that holds the content; None only when nothing was captured and the purge was forced."""
    generation: int
    files: int
    bytes: int
    """Files of the directory, and their bytes, that were compared with the capture one by one."""
    verified_at: int | None
    """When the capture was read back; None when it was not (forced, or the directory was gone already)."""
    directory: str
    """``deleted``, or ``gone`` when there was none any more."""
    omitted: dict[str, int] = {}
    """What went without being captured, by reason: ``ignored`` by the workspace's own rules; more only when forced."""
    git: list[dict[str, Any]] = []
    """The repositories as they were: path, head, branch, unpushed, stashes."""
    forced: list[dict[str, Any]] = []
    """What was missing and overruled."""

    def to_dict(self) -> dict[str, Any]:
        """The receipt in JSON types."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]  # a Struct becomes a dict


def gap_dicts(gaps: list[Gap]) -> list[dict[str, Any]]:
    """The first gaps in JSON types, bounded as lists in an outcome are."""
    return fitting([msgspec.to_builtins(gap) for gap in gaps[:LISTED_GAPS]], RESULT_BYTES)


def git_dicts(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first repositories as far as they fit into a receipt: with the gaps, it must go into a tombstone of 64 KiB."""
    return fitting(states, RESULT_BYTES // 2)


def explain_gaps(gaps: list[Gap]) -> str:
    """The gaps as one text for a person, the first ones by name."""
    shown = "; ".join(str(gap)[:300] for gap in gaps[:SHOWN_GAPS])
    more = len(gaps) - SHOWN_GAPS
    return f"{shown}; and {more} more" if more > 0 else shown


def read_back(store: Store, digest: str, report: Report) -> int:
    """Read everything of the capture `digest` from disk and hold it against what its manifest and tables of contents say.

    Returns the bytes of its blobs, which are flushed to disk on the way: what is deleted next must not depend on a cache. Raises
    `Corrupt`, which names the damaged blob, `OSError`, and what `report` raises.
    """
    manifest = load_manifest(store.blobs, digest)
    said = diff_ids(store.blobs, manifest)
    digests = {digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}
    size = 0
    for each in digests:
        with store.blobs.open(each) as file:
            os.fsync(file.fileno())
            size += os.fstat(file.fileno()).st_size
    sync_folder(store.blobs.folder)
    for _, error in rehash(store.blobs, sorted(digests), lambda done: report("verify", {"bytes": done})):
        if error is not None:
            raise error
    for number, descriptor in enumerate(manifest.layers):
        found, _ = compare_layer(store, descriptor, number, lambda done: report("verify", {"content_bytes": done}))
        check_diff_id(descriptor, found, said[number])
    return size
