"""What a crash package holds, and what it does not: the facts that stand in its report."""

from __future__ import annotations

import builtins
from typing import Any, Final

import msgspec

LISTED: Final = 200
"""Files of each list that a report names one by one; its counts are complete."""


class Binary(msgspec.Struct, frozen=True):
    """A binary file that is in the package as it was captured. `path` is redacted and below the workspace, `size` in bytes."""

    path: str
    size: int


class LeftOut(msgspec.Struct, frozen=True):
    """A file that is not in the package. `reason` is ``binary`` (they were not wanted), ``secret_in_binary`` (`rules` fired in
    it), ``name`` (a name that no archive can hold once it is redacted, for another file has it)."""

    path: str
    reason: str
    size: int
    rules: list[str] = []


class PackageFacts(msgspec.Struct, frozen=True):
    """Counts are of the workspace's own entries, without the base and the mount points; bytes are those in the package."""

    files: int = 0
    """Regular files, further names of one file included: the true count (B-56)."""
    bytes: int = 0
    """Bytes of their content as packaged."""
    folders: int = 0
    symlinks: int = 0
    links_outside: int = 0
    """Symbolic links that lead out of the workspace. They are packaged as links; nothing was read through them."""
    redacted_files: int = 0
    """Files whose content was changed."""
    redactions: dict[str, int] = {}
    """Secrets replaced in content, names and link targets, per rule."""
    binaries: list[Binary] = []
    """The first `LISTED` binary files that are in the package."""
    binary_files: int = 0
    binary_bytes: int = 0
    left_out: list[LeftOut] = []
    """The first `LISTED` files that are not."""
    left_out_counts: dict[str, int] = {}
    """Files that are not, per reason."""
    base: str | None = None
    """The image below the workspace, as it was asked for, and its digest; None without one."""

    def to_dict(self) -> dict[str, Any]:
        """The facts in JSON types, counts with sorted keys."""
        out: dict[str, Any] = msgspec.to_builtins(self)
        for key in ("redactions", "left_out_counts"):
            out[key] = dict(sorted(out[key].items()))
        return out


class Packaged(msgspec.Struct, frozen=True):
    """A package that is on disk: `sha256` (64 hex digits) and `bytes` are the file's, sealed or not; `report` its report.json."""

    path: str
    sha256: str
    bytes: int
    sealed: bool
    facts: PackageFacts
    report: builtins.bytes
