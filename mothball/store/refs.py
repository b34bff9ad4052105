"""Refs: one OCI image layout per workspace, whose ``index.json`` names its captures.

The registry decides who may publish; this module makes that decision hold on disk. A worker that was paused past its
lease wakes up without knowing it: `take_fence` stores the highest fence that ever began here, and `publish` compares it
under a lock, so only the newest holder can move a ref.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from mothball.errors import Busy, Corrupt, LeaseLost, NotFound
from mothball.names import slug
from mothball.store.blobs import replace_file
from mothball.store.manifest import MEDIA_INDEX, MEDIA_MANIFEST, PREFIX, Descriptor, canonical

REF_NAME = "org.opencontainers.image.ref.name"
LATEST = "latest"
LOCK_SECONDS = 10.0
"""The lock is held for a few file operations; a holder that keeps it longer is stopped or on a dead disk."""


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
        return int(self.get("generation", "0"))


class _Index(msgspec.Struct, frozen=True):
    manifests: list[Descriptor]


_decode_index = msgspec.json.Decoder(_Index).decode


class RefIndex:
    """The refs of one workspace. `workspace` is its id; the folder is its slug."""

    def __init__(self, root: Path, workspace: str, *, fsync: bool = True) -> None:
        self.workspace = workspace
        self.folder = root / "workspaces" / slug(workspace)
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
        try:
            data = (self.folder / "index.json").read_bytes()
        except FileNotFoundError:
            return []
        try:
            found = _decode_index(data).manifests
        except msgspec.DecodeError as error:
            raise Corrupt(what=f"index of workspace {self.workspace!r}", reason=str(error)) from error
        return sorted(
            (Ref(d.annotations.get(REF_NAME, ""), d.digest, d.size, d.annotations) for d in found), key=lambda ref: ref.name
        )

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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclusive among all processes of this host; raises `Busy` after `LOCK_SECONDS`."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Busy(what=f"the index of {self.workspace!r}", reason="another process holds its lock") from None
                    time.sleep(0.05)
            yield
        finally:
            os.close(fd)

    def take_fence(self, fence: int, job: str) -> None:
        """Announce that `job` works here with `fence`; raises `LeaseLost` when a newer one already does."""
        with self.locked():
            if self._fence() > fence:
                raise LeaseLost(job=job)
            replace_file(self.folder / "fence", b"%d\n" % fence, self._temp, sync=self._fsync)

    def publish(self, name: str, digest: str, size: int, annotations: dict[str, str], *, fence: int, job: str) -> None:
        """Point `name` at a manifest; every other ref stays. Raises `LeaseLost` unless `fence` is the newest."""
        with self.locked():
            if self._fence() != fence:
                raise LeaseLost(job=job)
            kept = [_descriptor(ref) for ref in self.list() if ref.name != name]
            new = Descriptor(MEDIA_MANIFEST, digest, size, {**annotations, REF_NAME: name})
            document = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": msgspec.to_builtins([*kept, new])}
            replace_file(self.folder / "index.json", canonical(document), self._temp, sync=self._fsync)

    def _fence(self) -> int:
        try:
            return int((self.folder / "fence").read_bytes())
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise Corrupt(what=f"fence file of workspace {self.workspace!r}", reason="it does not hold a number") from error


def _descriptor(ref: Ref) -> Descriptor:
    return Descriptor(MEDIA_MANIFEST, ref.digest, ref.size, ref.annotations)
