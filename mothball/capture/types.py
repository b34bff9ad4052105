"""What a capture is asked for and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from mothball.errors import InvalidParams
from mothball.settings import Settings

LIGHT_MAX_FILE_BYTES = 1_048_576
"""B-24: the reference's cap; a file of exactly this size is kept."""

Signature = tuple[int, int, int, int, int, int, int]
"""mode, uid, gid, size, mtime_ns, ctime_ns, inode."""

Checkpoint = Callable[[str, dict[str, Any]], None]
"""Called between steps with the step's name and its progress; raises `Cancelled` or `LeaseLost` to stop the capture."""

REASONS = ("ignored", "too_large", "unreadable", "special", "vanished", "whiteout_name", "other_filesystem")


class Entry(NamedTuple):
    """One name found by the walk. Small on purpose: a tree has a hundred thousand of them.

    Fields 1-7 are the *signature*: a file whose signature is that of the last capture has not changed. A folder's size,
    ctime and inode are 0 in it, because they move whenever its content does.
    """

    path: str
    mode: int
    """``st_mode`` with the type bits."""
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    group: tuple[int, int] | None = None
    """(device, inode) of a file with more than one name, else None."""
    sparse: bool = False

    @property
    def signature(self) -> Signature:
        return self[1:8]


class Omission(msgspec.Struct, frozen=True):
    """One thing that was left out. `size` is bytes; None for a folder that was not entered."""

    path: str
    reason: str
    size: int | None
    detail: str = ""


class CaptureOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to capture; each value left out comes from the settings of the host."""

    profile: Literal["full", "light"]
    max_file_bytes: int
    max_total_bytes: int
    max_files: int
    use_gitignore: bool
    exclude_caches: bool
    one_file_system: bool
    owner: Literal["captured", "clamp"]
    ignore: tuple[str, ...] = ()

    @property
    def file_cap(self) -> int | None:
        """Largest file captured, bytes; None: no cap."""
        if self.max_file_bytes:
            return self.max_file_bytes
        return LIGHT_MAX_FILE_BYTES if self.profile == "light" else None

    @classmethod
    def merge(cls, settings: Settings, given: Mapping[str, Any]) -> CaptureOptions:
        """The settings with `given` on top; an unknown name or a wrong value is `InvalidParams`."""
        base = {
            "profile": settings.capture_profile,
            "max_file_bytes": settings.max_file_bytes,
            "max_total_bytes": settings.max_total_bytes,
            "max_files": settings.max_files,
            "use_gitignore": settings.use_gitignore,
            "exclude_caches": settings.exclude_caches,
            "one_file_system": settings.one_file_system,
            "owner": settings.owner,
        }
        try:
            options = msgspec.convert({**base, **given}, cls)
        except msgspec.ValidationError as error:
            raise InvalidParams(f"capture options: {error}") from error
        if options.max_file_bytes < 0 or options.max_total_bytes < 0 or options.max_files < 1:
            raise InvalidParams("capture options: sizes must not be negative and max_files must be at least 1")
        return options


class CaptureRequest(msgspec.Struct, frozen=True):
    """One capture of one workspace, as a job asks for it."""

    workspace: str
    path: str
    host: str
    job: str
    fence: int
    repo: str | None = None
    paths: tuple[str, ...] | None = None
    """Read these again even if their stat says unchanged; None trusts the stat index."""
    full: bool = False
    """One fresh layer instead of an increment."""
    verify: bool = False
    """Read back from disk what was written before it is published."""
    parent_candidate: str | None = None
    """Workspace of the same repo whose latest capture may be the parent of a first capture."""
    options: dict[str, Any] = {}
    generation_floor: int = 0
    """The generation in the registry's record: a store that was lost or restored must not fall behind it."""
    record: str = ""
    """What the ref keeps of the registry's record (`mothball.registry.kept`), ASCII; empty: nothing."""


class CaptureResult(msgspec.Struct, frozen=True):
    """The outcome of one capture. Sizes in bytes."""

    workspace: str
    digest: str
    parent: str | None
    generation: int
    changed: bool
    files: int
    bytes: int
    stored_bytes: int
    """What this capture added to the store."""
    layers: int
    added: int = 0
    modified: int = 0
    deleted: int = 0
    omitted: dict[str, int] = {}
    omissions: list[dict[str, Any]] = []
    """The first ones, at most 100; the image's config has up to 10 000, `omitted` counts them all."""
    torn: list[str] = []
    """Files that changed while they were read (the first 32 KiB of names)."""
    git: list[dict[str, Any]] = []
    squashed: bool = False
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]  # a Struct becomes a dict


def printable(path: str) -> str:
    """`path` for JSON: bytes that are not UTF-8 become ``\\xNN`` (a lone surrogate cannot be encoded)."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
