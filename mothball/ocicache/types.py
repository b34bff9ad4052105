"""What the parts of this room hand to each other and to who calls: figures, leases, the pressure of a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Final

import msgspec

from mothball.store.read import show


class Kind(StrEnum):
    """What a directory is. The second half are stores of other tools, which are only ever looked at."""

    FLAT = "flat"
    """Files ``sha256:<hex>`` (or ``sha256-<hex>``): crane and other users of go-containerregistry."""
    BLOBS = "blobs"
    """``blobs/sha256/<hex>`` without an index; where it was declared, also ``sha256/<hex>``."""
    SHARED = "shared"
    """``sha256/<hex>``, to which layouts elsewhere refer (skopeo's shared blob folder)."""
    LAYOUT = "layout"
    """An OCI image layout: only what its index does not reach may go."""
    BLOBINFO = "blobinfo"
    """containers/image's record of where blobs were seen."""
    BUILDKIT = "buildkit"
    CONTAINERD = "containerd"
    CONTAINERS_STORAGE = "containers-storage"
    DOCKER = "docker"
    REGISTRY = "registry"
    EMPTY = "empty"
    """Nothing is in it."""


PRUNABLE: Final = frozenset({Kind.FLAT, Kind.BLOBS, Kind.SHARED, Kind.LAYOUT, Kind.BLOBINFO, Kind.EMPTY})
Tick = Callable[[int], None]
"""Called now and then with the number of entries that were dealt with; what it raises ends the work between two entries."""
LastUse = Callable[[Sequence[str]], Sequence[int | None]]
"""Given digests (``sha256:<hex>``), says for each how many ms ago it was used last, None when nobody reported it.

Ages and not times: the record has another clock than the files, and ages of both can be compared.
"""
MAX_ERRORS: Final = 50


class Lease(msgspec.Struct, frozen=True):
    """Somebody pulls into the cache or reads from it, and began `age_ms` ago."""

    holder: str
    age_ms: int


Leases = Callable[[], Sequence[Lease]]
"""The leases of the cache that are alive now; asked at the start and again before anything goes."""


class Pressure(msgspec.Struct, frozen=True):
    """Prune only when the file system is fuller than `high` percent, and then until it is at `low`, as ``df`` counts."""

    high: float = 85.0
    low: float = 80.0


class Problem(msgspec.Struct, frozen=True):
    """Something that was left alone, and why. `path` is relative to the cache where it lies in it."""

    path: str
    reason: str


class Found(msgspec.Struct, frozen=True):
    """What a directory is, and what of it speaks for that. `advice`: the command that prunes another tool's store."""

    kind: Kind
    why: str
    advice: str = ""
    folder: str = ""
    """Where the blobs lie, relative to the directory; empty: at its top."""
    inside: bool = False
    """An aside may lie at its top."""


def printable(text: str) -> str:
    """A name, or what has names in it, that a terminal and JSON can show: anybody may have named a file in a cache."""
    return show(text.encode("utf-8", "surrogateescape"))


class PruneResult(msgspec.Struct, kw_only=True):
    """What a prune did, or a dry run would do (N-01). Bytes are disk bytes, a file with several names once.

    `bytes_freed` and `blobs_freed` are what left the cache in this run, taken from what was moved; `quarantined_bytes` of them
    are on the disk until their time is over, in `quarantine_ms`. `notes`: in plain words, what was done in another way than was
    asked; no failure. `leaked_asides`, `leaked_bytes`: left by runs that were killed, removed by this one;
    `others_freed`: links, pipes and the like, which a full prune takes and which are no blobs.
    `expired_bytes`: of earlier runs, whose quarantine ended in this one (those runs counted them). `given_back`: blobs that earlier
    runs moved and that an index names by now, so they are in the cache again. `kept`: entries by reason,
    `kept_bytes` their bytes. `policy`: the words it worked by, ``all`` for a full prune. `gap_ms`: how long the name of the cache
    meant no folder. `advice`: the right command, for a store of another tool, which is never touched.
    """

    bytes_freed: int = 0
    blobs_freed: int = 0
    dry_run: bool = False
    cache_dir: str
    host: str = ""
    kind: str = ""
    seconds: float = 0.0
    kept: dict[str, int] = msgspec.field(default_factory=dict)
    kept_bytes: int = 0
    leaked_asides: int = 0
    leaked_bytes: int = 0
    expired_bytes: int = 0
    others_freed: int = 0
    given_back: int = 0
    quarantined_bytes: int = 0
    quarantine_ms: int = 0
    errors: list[Problem] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)
    errors_left_out: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    policy: str = ""
    advice: str = ""
    gap_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    def problem(self, path: str, reason: str) -> None:
        """Note what was left alone; after `MAX_ERRORS` they are only counted."""
        problem = Problem(printable(path), printable(reason))
        if problem in self.errors:
            return
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(problem)
        else:
            self.errors_left_out += 1


class VerifyResult(msgspec.Struct, kw_only=True):
    """What was read: `blobs` and `bytes` (content), how many are not what their name says, and how many of those were deleted."""

    cache_dir: str
    host: str = ""
    kind: str = ""
    blobs: int = 0
    bytes: int = 0
    bad: int = 0
    bad_digests: list[str] = msgspec.field(default_factory=list)
    """The first of them."""
    deleted: int = 0
    bytes_freed: int = 0
    kept: dict[str, int] = msgspec.field(default_factory=dict)
    """Not judged, by reason: ``young`` and ``open`` are written just now."""
    missing: list[str] = msgspec.field(default_factory=list)
    """Blobs that an index names and that are not there."""
    errors: list[Problem] = msgspec.field(default_factory=list)
    advice: str = ""
    """The right command, for a store of another tool, of which nothing is read."""
    notes: list[str] = msgspec.field(default_factory=list)
    """In plain words, what reading did beside; no failure."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


class UndeleteResult(msgspec.Struct, kw_only=True):
    """What came back out of quarantine; `left` what did not, and why. `notes`: what did not need to, for it was pulled again."""

    cache_dir: str
    host: str = ""
    blobs: int = 0
    bytes: int = 0
    asides: int = 0
    left: list[Problem] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


class Usage(msgspec.Struct, kw_only=True):
    """A cache in figures. `size`: disk bytes; `oldest_ms`, `newest_ms`: ms since the last use of the least and the most recently
    used entry, None for an empty cache; `unused`, `unused_bytes`: entries that were not used for longer than was asked.
    `other`: entries that are no blobs. `quarantined_bytes`: what `undelete` could bring back."""

    cache_dir: str
    host: str = ""
    kind: str = ""
    exists: bool = True
    size: int = 0
    count: int = 0
    oldest_ms: int | None = None
    newest_ms: int | None = None
    unused: int = 0
    unused_bytes: int = 0
    other: int = 0
    quarantined_bytes: int = 0
    quarantined: int = 0
    advice: str = ""
    errors: list[Problem] = msgspec.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found
