"""Refs: one OCI image layout per workspace, whose ``index.json`` names its captures.

The registry decides who may publish; this module makes that decision hold on disk. A worker that was paused past its
lease wakes up without knowing it: `take_fence` stores the highest fence that ever began here, and `publish` compares it
under a lock, so only the newest holder can move a ref.

Two locks, always taken in this order: the index's own, then the store's (`BlobStore.in_use`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from mothball.errors import Corrupt, InvalidParams, LeaseLost, NotFound, TransientFailure
from mothball.names import slug
from mothball.store.blobs import BlobStore, file_lock, read_regular, replace_file
from mothball.store.foreign import read_json
from mothball.store.manifest import MEDIA_INDEX, MEDIA_MANIFEST, PREFIX, Descriptor, canonical, load_manifest, reach

REF_NAME = "org.opencontainers.image.ref.name"
LATEST = "latest"
SNAPSHOT = re.compile(r"snap-([1-9][0-9]{0,14})\Z")
"""The name of a numbered snapshot."""
RELEASED = "released"
"""File of a layout whose workspace was released: when, and why. The collector writes it on evidence and acts on it later."""
LAST_SNAPSHOT = PREFIX + "snapshots"
"""Annotation of the index: the highest snapshot number that was ever given here, so that none is given twice."""


class Ref(msgspec.Struct, frozen=True):
    """One named capture of a workspace."""

    name: str
    digest: str
    size: int
    annotations: dict[str, str] = {}

    def get(self, key: str, default: str = "") -> str:
        """The annotation ``dev.mothball.<key>``."""
        return self.annotations.get(PREFIX + key, default)

    @property
    def generation(self) -> int:
        """Which capture of the workspace this is, 0 when it does not say; `Corrupt` when what it says is no number."""
        text = self.get("generation", "0")
        if not (text.isascii() and text.isdecimal() and len(text) <= 18):  # noqa: PLR2004 -- what 64 bits hold
            raise Corrupt(what=f"ref {self.name!r} of {self.digest}", reason=f"its generation is {text[:40]!r}, which is no number")
        return int(text)


class _Index(msgspec.Struct, frozen=True):
    manifests: list[Descriptor]
    annotations: dict[str, str] = {}


Refs = list[Ref]  # `RefIndex.list` hides the builtin inside the class body
Change = Callable[[Refs], Sequence[Ref]]
_MAX_INDEX: Final = 256 * 1024**2


class RefIndex:
    """The refs of one workspace. `workspace` is its id; the folder is its slug."""

    def __init__(self, root: Path, workspace: str, *, fsync: bool = True) -> None:
        self.workspace = workspace
        self.folder = root / "workspaces" / slug(workspace)
        self._blobs = BlobStore(root, fsync=fsync)
        self._temp = root / "tmp"
        self._fsync = fsync

    @property
    def exists(self) -> bool:
        return (self.folder / "index.json").is_file()

    def prepare(self) -> None:
        """Make the layout's fixed parts; idempotent."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        layout = self.folder / "oci-layout"
        if not layout.exists():
            replace_file(layout, canonical({"imageLayoutVersion": "1.0.0"}), self._temp, sync=self._fsync)
        blobs = self.folder / "blobs"
        if not blobs.is_symlink():
            with suppress(FileExistsError):  # another first capture of this workspace was quicker
                blobs.symlink_to(Path("..") / ".." / "blobs")

    def list(self) -> list[Ref]:
        """All refs, by name; empty when nothing was captured. Raises `Corrupt` for an index that cannot be read."""
        found = (Ref(d.annotations.get(REF_NAME, ""), d.digest, d.size, d.annotations) for d in self._read().manifests)
        return sorted(found, key=lambda ref: ref.name)

    @property
    def last_snapshot(self) -> int:
        """The highest snapshot number that was ever given here; 0 before the first."""
        index = self._read()
        numbers = [int(match[1]) for d in index.manifests if (match := SNAPSHOT.match(d.annotations.get(REF_NAME, "")))]
        noted = index.annotations.get(LAST_SNAPSHOT, "0")
        return max([int(noted) if noted.isdecimal() else 0, *numbers])

    def _read(self) -> _Index:
        try:
            data = read_regular(self.folder / "index.json")
        except FileNotFoundError:
            return _Index([])
        return read_json(data, _Index, f"index of workspace {self.workspace!r}", limit=_MAX_INDEX)

    def find(self, name: str = LATEST) -> Ref | None:
        return next((ref for ref in self.list() if ref.name == name), None)

    def get(self, name: str = LATEST) -> Ref:
        """The ref `name`; a full digest works too when a ref has it. Raises `NotFound`."""
        refs = self.list()
        for ref in refs:
            if name in (ref.name, ref.digest):
                return ref
        known = ", ".join(ref.name for ref in refs) or "none"
        raise NotFound(
            f"workspace {self.workspace!r} has no capture {name!r} on this host; it has: {known}", what="capture", id=name
        )

    def locked(self) -> AbstractContextManager[None]:
        """Exclusive among all processes of this host; raises `Busy` when another keeps it for ten seconds."""
        return file_lock(self.folder / "lock", f"the index of {self.workspace!r}")

    def take_fence(self, fence: int, job: str) -> None:
        """Announce that `job` works here with `fence`; raises `LeaseLost` when a newer one already does."""
        try:
            self._write_fence(fence, job)
        except FileNotFoundError:
            # A collector took the layout of a workspace that was released long ago, and this is its first capture since.
            self.prepare()
            self._write_fence(fence, job)

    def _write_fence(self, fence: int, job: str) -> None:
        with self.locked():
            if self._fence() > fence:
                raise LeaseLost(job=job)
            # Only a registered workspace gets a fence. Were Redis lost now, the mark of its last life would end this one.
            (self.folder / RELEASED).unlink(missing_ok=True)
            replace_file(self.folder / "fence", b"%d\n" % fence, self._temp, sync=self._fsync)

    def publish(self, name: str, digest: str, size: int, annotations: dict[str, str], *, fence: int, job: str) -> None:
        """Point `name` at a manifest; every other ref stays. Errors as `replace`."""
        new = Ref(name, digest, size, annotations)
        self.replace(lambda refs: [*(ref for ref in refs if ref.name != name), new], fence=fence, job=job)

    def replace(self, change: Change, *, fence: int | None = None, job: str = "") -> Refs:
        """Put what `change` makes of the refs in their place, in one step, and return it.

        With `fence` only its newest holder may (`LeaseLost`); without, `change` must decide from the refs it is given alone.
        Every manifest that gets a ref here is looked at and touched with all it names: `TransientFailure` when a collector
        took any of it, for a writer may have slept longer than the collector waits. `change` may raise to leave all as it is.
        `InvalidParams` for annotations that no reader of the index would take.
        """
        with self.locked(), self._blobs.in_use():
            if fence is not None and self._fence() != fence:
                raise LeaseLost(job=job)
            index, before = self._read(), self.list()
            after = sorted(change(before), key=lambda ref: ref.name)
            for digest in {ref.digest for ref in after} - {ref.digest for ref in before}:
                self._hold(digest)
            last = max([self.last_snapshot, *(int(match[1]) for ref in after if (match := SNAPSHOT.match(ref.name)))])
            document = {
                "schemaVersion": 2,
                "mediaType": MEDIA_INDEX,
                "manifests": msgspec.to_builtins([_descriptor(ref) for ref in after]),
                "annotations": {**index.annotations, LAST_SNAPSHOT: str(last)},
            }
            data = canonical(document)
            self._check(data, after)
            replace_file(self.folder / "index.json", data, self._temp, sync=self._fsync)
            return after

    def _check(self, data: bytes, refs: Refs) -> None:
        """Refuse to write what could not be read again: the index is the only way to every capture of the workspace."""
        try:
            index = read_json(data, _Index, "the new index", limit=_MAX_INDEX)
        except Corrupt as error:
            reason = str(error.fields["reason"])
        else:
            if index.manifests == [_descriptor(ref) for ref in refs]:
                return
            reason = "it would not say the same when it is read again"
        raise InvalidParams(f"the refs of workspace {self.workspace!r} cannot be written: {reason}; nothing was changed")

    def _hold(self, digest: str) -> None:
        """Touch a manifest and all it names, or raise `TransientFailure`: what is gone has to be written again."""
        if not self._blobs.exists(digest):
            raise TransientFailure(reason=_taken(digest))
        for blob in reach(partial(load_manifest, self._blobs), digest, self._blobs.size(digest)):
            if not self._blobs.touch(blob.digest, blob.size):
                raise TransientFailure(reason=_taken(blob.digest))

    def _fence(self) -> int:
        try:
            return int(read_regular(self.folder / "fence"))
        except FileNotFoundError:
            return 0
        except ValueError as error:
            reason = f"it does not hold a number; delete {self.folder / 'fence'}, and the next job writes it again"
            raise Corrupt(what=f"fence file of workspace {self.workspace!r}", reason=reason) from error


def _taken(digest: str) -> str:
    return f"blob {digest} left the store before a ref named it; it must be written again"


def _descriptor(ref: Ref) -> Descriptor:
    return Descriptor(MEDIA_MANIFEST, ref.digest, ref.size, {**ref.annotations, REF_NAME: ref.name})
