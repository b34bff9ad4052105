"""What a directory is, from its names: a pull cache, another tool's store, or something that nothing may be pruned from.

A pure pull cache holds nothing else: one foreign file at its top is enough to refuse it (N-12), for it may as well be somebody's
folder in which a few blobs lie. Declaring the kind says that the other things there are known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final

from msgspec.structs import replace

from mothball.errors import InvalidParams, PathNotAllowed
from mothball.ocicache.system import open_folder
from mothball.ocicache.types import Found, Kind
from mothball.store.read import show

ASIDE: Final = ".mothball-aside-"
FLAT: Final = re.compile(r"sha256[:-][0-9a-f]{64}\Z")
HEX: Final = re.compile(r"[0-9a-f]{64}\Z")
BLOBINFO: Final = re.compile(r"blob-info-cache-v1\.(?:boltdb|sqlite)\Z")
BESIDE_BLOBINFO: Final = re.compile(r"blob-info-cache-v1\.(?:boltdb\.lock|sqlite-(?:wal|shm|journal))\Z")
ALGORITHMS: Final = frozenset({"sha256", "sha384", "sha512"})
_SHOWN: Final = 3
_ABOVE: Final = 4
_LOOKED_AT: Final = 10_000
_STRONG: Final = (
    (Kind.BUILDKIT, {"buildkitd.lock"}), (Kind.BUILDKIT, {"cache.db", "snapshots.db"}), (Kind.DOCKER, {"engine-id"}),
    (Kind.CONTAINERS_STORAGE, {"overlay-images", "overlay-layers"}), (Kind.CONTAINERS_STORAGE, {"vfs-images", "vfs-layers"}),
    (Kind.CONTAINERD, {"io.containerd.metadata.v1.bolt"}),
)  # fmt: skip
"""Names that only a store's own folder has together: anything may lie beside a cache."""
_DIRECTORY_MARK: Final = ("index.json", "oci-layout")
_ADVICE: Final = {
    Kind.BUILDKIT: "buildctl prune --keep-storage <MB>` (or `docker builder prune`)",
    Kind.CONTAINERD: "crictl rmi --prune` (or `nerdctl system prune`)",
    Kind.CONTAINERS_STORAGE: "podman system prune` (or `buildah prune`)",
    Kind.DOCKER: "docker system prune`",
    Kind.REGISTRY: "registry garbage-collect <config.yml>`",
}


def recognise(folder: Path) -> Kind:
    """What `folder` is. Raises `InvalidParams` (``unrecognised``, not a directory), `PathNotAllowed` for a link, `OSError`."""
    try:
        fd = open_folder(str(folder))
    except NotADirectoryError:
        if folder.is_symlink():
            raise PathNotAllowed(f"{str(folder)!r} is a symbolic link, and none is followed", path=str(folder)) from None
        raise InvalidParams(f"{str(folder)!r} is not a directory") from None
    try:
        return recognise_fd(fd, str(folder)).kind
    finally:
        os.close(fd)


def recognise_fd(fd: int, path: str, declared: str | None = None) -> Found:
    """What the open folder is, `declared` being what somebody said it is. Raises `InvalidParams` that says what was found."""
    top = _Top(fd)
    return replace(_recognised(fd, path, declared, top), inside=top.inside)


def _recognised(fd: int, path: str, declared: str | None, top: _Top) -> Found:
    if (store := _store(fd, top) or _inside_store(fd, path, top)) is not None:
        return store
    marked = [name for name in _DIRECTORY_MARK if name in top.special]
    if marked and declared not in {None, Kind.LAYOUT}:
        raise _unrecognised(path, f"it has {marked[0]!r}, so it is an OCI image layout (kind=layout) and not kind={declared}")
    if marked:
        return Found(Kind.LAYOUT, f"it has {marked[0]!r}", folder="blobs/sha256")
    if declared is not None:
        return _as_declared(fd, path, Kind(declared), top)
    if not top.names:
        return Found(Kind.EMPTY, "it is empty")
    if top.flat and not top.foreign and not top.special:
        if _has_folder(fd, "../manifests"):
            raise _unrecognised(path, "beside it is a folder 'manifests', which may need what lies here (ollama keeps models so)")
        return Found(Kind.FLAT, f"its {top.flat} entries are named by digests")
    for special, kind, where in (("blobs", Kind.BLOBS, "blobs/sha256"), ("sha256", Kind.SHARED, "sha256")):
        if special in top.special and not top.flat and not top.foreign and top.special <= ({special} | ALGORITHMS):
            if _holds_blobs(fd, where):
                return Found(kind, f"it has {where} and no index", folder=where)
            raise _unrecognised(path, f"it has {special!r}, and what lies in it is not named by digests")
    if top.blobinfo and not top.flat and not top.special and not top.foreign:
        return Found(Kind.BLOBINFO, "it has the blob-info cache of containers/image")
    raise _unrecognised(path, f"it holds {top.shown()}")


def _as_declared(fd: int, path: str, kind: Kind, top: _Top) -> Found:
    """Believed, when there is at least one entry of that kind, or nothing at all."""
    why = f"it was declared kind={kind}"
    if not top.names:
        return Found(Kind.EMPTY, "it is empty")
    if kind is Kind.FLAT and top.flat:
        return Found(kind, why)
    if kind is Kind.BLOBINFO and top.blobinfo:
        return Found(kind, why)
    if kind in {Kind.BLOBS, Kind.SHARED}:
        for where in ("blobs/sha256", "sha256") if kind is Kind.BLOBS else ("sha256",):
            if where.split("/")[0] in top.special and _holds_blobs(fd, where):
                return Found(kind, why, folder=where)
    raise _unrecognised(path, f"it was declared kind={kind}, has no entry of that kind, and holds {top.shown()}")


def _unrecognised(path: str, what: str) -> InvalidParams:
    text = f"{path!r} is unrecognised: {what}. Only a pure pull cache is pruned"
    return InvalidParams(f"{text}; if it is one, declare its kind (kind=flat, kind=blobs, ...)", reason="unrecognised", path=path)


class _Top:
    """The names at the top, counted; few are remembered."""

    def __init__(self, fd: int) -> None:
        self.names = self.flat = 0
        self.blobinfo = self.inside = False
        self.special: set[str] = set()
        self.foreign: list[str] = []
        self.signs: set[str] = set()
        flat = FLAT.match
        with os.scandir(fd) as entries:
            for entry in entries:
                if flat(name := entry.name):
                    self.flat += 1
                elif name.startswith(ASIDE):
                    self.inside = True
                else:
                    self.names += 1
                    self._other(name)
        self.names += self.flat

    def _other(self, name: str) -> None:
        if BLOBINFO.match(name) or BESIDE_BLOBINFO.match(name):
            self.blobinfo = True
        elif name in {"blobs", *_DIRECTORY_MARK} or name in ALGORITHMS:
            self.special.add(name)
        else:
            if name in _SIGNS or name.startswith("io.containerd."):
                self.signs.add(name)
            if len(self.foreign) < _SHOWN:
                self.foreign.append(name)

    def shown(self) -> str:
        """A few of the names, for an error."""
        found = [repr(show(os.fsencode(each))) for each in (*self.foreign, *sorted(self.special))][:_SHOWN]
        if self.flat:
            found.append(f"{self.flat} blob(s)")
        if self.blobinfo:
            found.append("a blob-info cache")
        return ", ".join(found) or "nothing"


_SIGNS: Final = frozenset({
    "buildkitd.lock", "cache.db", "snapshots.db", "runc-overlayfs", "runc-native", "storage.lock", "overlay-images",
    "overlay-layers", "vfs-images", "vfs-layers", "engine-id", "image", "containers", "volumes", "overlay2", "docker",
})  # fmt: skip


def _store(fd: int, top: _Top) -> Found | None:
    """Another tool's store, by names that nobody else uses together."""
    signs = top.signs
    for kind, is_it in (
        (Kind.CONTAINERD, any(each.startswith("io.containerd.") for each in signs)),
        (Kind.CONTAINERS_STORAGE, bool(signs & {"storage.lock", "overlay-images", "overlay-layers", "vfs-images", "vfs-layers"})),
        (Kind.DOCKER, "engine-id" in signs or {"image", "containers", "volumes"} <= signs or {"image", "overlay2"} <= signs),
        (Kind.BUILDKIT, bool(signs & {"buildkitd.lock", "runc-overlayfs", "runc-native"}) or {"cache.db", "snapshots.db"} <= signs),
        (Kind.REGISTRY, "docker" in signs and _has_folder(fd, "docker/registry/v2")),
    ):
        if is_it:
            sign = min(signs)
            advice = f"this is a {kind} store, which only its own tool may prune: `{_ADVICE[kind]}"
            return Found(kind, f"it has {sign!r}", advice=advice)
    return None


def _inside_store(fd: int, path: str, top: _Top) -> Found | None:
    """A store's own folder of blobs looks like a cache. Its names, or those of a few folders above it, tell."""
    for part in PurePosixPath(path).parts:
        if part.startswith("io.containerd."):
            return _found(Kind.CONTAINERD, f"it lies in {part!r}")
        if part in {"runc-overlayfs", "runc-native"}:
            return _found(Kind.BUILDKIT, f"it lies in {part!r}")
    opened = os.dup(fd)
    try:
        for _ in range(_ABOVE):
            try:
                above = open_folder("..", opened)
            except OSError:  # it may not be read: then nobody here put a cache into a store either
                return None
            os.close(opened)
            opened = above
            signs = set()
            with os.scandir(opened) as listed:
                for entry in islice(listed, _LOOKED_AT):
                    if entry.name in _SIGNS or entry.name.startswith("io.containerd."):
                        signs.add(entry.name)
            for kind, wanted in _STRONG:
                if wanted <= signs:
                    return _found(kind, f"a folder above it has {min(wanted)!r}")
    finally:
        os.close(opened)
    if "ingest" in top.foreign and top.special:
        return _found(Kind.CONTAINERD, "it has 'ingest'")
    return None


def _found(kind: Kind, why: str) -> Found:
    return Found(kind, why, advice=f"this is (a part of) a {kind} store, which only its own tool may prune: `{_ADVICE[kind]}")


def _has_folder(fd: int, where: str) -> bool:
    try:
        os.close(open_below(fd, where))
    except OSError:
        return False
    return True


def _holds_blobs(fd: int, where: str) -> bool:
    """True when the folder has a blob, or nothing; read no further than to the first."""
    try:
        folder = open_below(fd, where)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    try:
        empty = True
        for name in _listed(folder):
            if HEX.match(name):
                return True
            empty = False
        return empty
    finally:
        os.close(folder)


def open_below(fd: int, where: str) -> int:
    """A descriptor of the folder `where` below `fd`, part by part, never through a link; raises `OSError`."""
    if not where:
        return open_folder(".", fd)
    opened = fd
    for part in where.split("/"):
        try:
            deeper = open_folder(part, opened)
        finally:
            if opened != fd:
                os.close(opened)
        opened = deeper
    return opened


def _listed(fd: int) -> Iterator[str]:
    with os.scandir(fd) as entries:
        for entry in entries:
            yield entry.name
