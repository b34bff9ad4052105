"""A crash package: one tar with ``report.json``, ``config.json`` and ``rootfs/``, redacted, scanned again, sealed if asked.

It is a bundle: unpacked anywhere, ``runc run`` starts it. The same report, capture, rules and key give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol

from mothball.crash.facts import PackageFacts, Packaged
from mothball.store import Store

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor

__all__ = ["Base", "BaseEntry", "PackageFacts", "Packaged", "write_package", "write_package_to"]

Seal = Callable[[BinaryIO, BinaryIO], None]
"""Called as ``seal(clear, sealed)``: reads the first to its end and writes the second. What it raises ends the package."""
Tick = Callable[..., None]
"""Called with ``step=`` (``learn``, ``pack``, ``again``, ``scan``, ``seal``), ``entries=`` and ``bytes=``, at least every few
megabytes; what it raises ends the package, and nothing is left of it."""


class BaseEntry(Protocol):
    """One entry of a base image's merged tree. `path` is relative, its folders before it; `type` is that of the tree's rows."""

    @property
    def path(self) -> bytes: ...
    @property
    def type(self) -> Literal["f", "d", "l", "h"]: ...
    @property
    def mode(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def link(self) -> bytes:
        """The target of a symbolic link; of a hard link the path of its first name, which came before."""

    def open(self) -> BinaryIO:
        """The content of a file, to be closed by the caller."""


class Base(Protocol):
    """An image whose files lie below the workspace's in the package."""

    @property
    def name(self) -> str:
        """What was asked for, with its digest."""

    def entries(self) -> Iterator[BaseEntry]:
        """The merged entries, sorted by path components."""


def write_package(
    store: Store,
    digest: str,
    *,
    report: Callable[[PackageFacts], bytes],
    config: bytes,
    redactor: Redactor,
    folder: Path,
    name: str,
    binaries: Literal["include", "exclude"] = "include",
    base: Base | None = None,
    seal: Seal | None = None,
    tick: Tick = lambda **_: None,
) -> Packaged:
    """Write the package `name` (an id: ``.tar`` is added, ``.tar.age`` with `seal`) into `folder`, which is made 0700 (B-54).

    `digest` is that of the capture or of its crash report; `report` gives report.json for the facts of the package and may be
    called more than once; `config` is the bundle's config.json. The file is 0600 and is there whole or not at all (B-55).
    Raises `Unredacted` when a secret is left in the finished bytes, `AlreadyExists`, `NoSpace`, `Corrupt`, and what `seal` and
    `tick` raise.
    """
    raise NotImplementedError


def write_package_to(
    store: Store,
    digest: str,
    *,
    report: Callable[[PackageFacts], bytes],
    config: bytes,
    redactor: Redactor,
    path: Path,
    binaries: Literal["include", "exclude"] = "include",
    base: Base | None = None,
    seal: Seal | None = None,
    tick: Tick = lambda **_: None,
) -> Packaged:
    """`write_package` to a path of the caller's choice outside of the store. Errors as there, and as `check_new`."""
    raise NotImplementedError
