"""Push and pull: a capture to a registry and back, byte for byte, with the same digest at both ends.

Either may be interrupted anywhere and called again: blobs that are there are not sent twice, and the blob that was under
way is continued. What is pulled is looked at before anybody may use it: digests, tables of contents, and the content that
the tables promise, for a registry may hold anything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from mothball.errors import Corrupt, InvalidParams, NoSpace, OperationFailed
from mothball.package.contents import check_contents
from mothball.package.distribution import Distribution
from mothball.package.download import Download
from mothball.package.held import Held, held
from mothball.package.mounts import Mounts
from mothball.package.reference import Reference, parse_reference
from mothball.package.upload import Upload
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.blobs import check_digest
from mothball.store.foreign import read_json
from mothball.store.manifest import MEDIA_CONFIG, MEDIA_LAYER, MEDIA_MANIFEST, TOC_DIGEST, Descriptor, Manifest
from mothball.store.tree import MAX_LAYERS

Progress = Callable[..., None]
"""Called often with ``step=``, ``blobs=``, ``total_blobs=``, ``bytes=`` and ``total_bytes=``; what it raises ends the transfer."""

_ACCEPT: Final = ", ".join(
    (
        MEDIA_MANIFEST,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
"""Also what is not ours: told its kind, one can say what is wrong instead of `not found`."""
_SPARE_BYTES: Final = 1024**2
_CONFIG_LIMIT: Final = 64 * 1024**2


class Pushed(msgspec.Struct, frozen=True):
    """`digest` stands at `reference` now. How many blobs were sent, taken from another repository, or there already; `bytes`
    is what was sent."""

    reference: str
    digest: str
    uploaded: int
    mounted: int
    skipped: int
    bytes: int


class Pulled(msgspec.Struct, frozen=True):
    """The manifest `digest` of `size` bytes is in the store with all it names; `bytes` is what was received for it."""

    reference: str
    digest: str
    size: int
    fetched: int
    skipped: int
    bytes: int


def push(store: Store, digest: str, reference: str, settings: Settings, *, progress: Progress | None = None) -> Pushed:
    """Bring the capture `digest` to `reference` (``REGISTRY/REPO:TAG``).

    `RegistryUnavailable` (retryable: the next call goes on where this one ended), `RegistryDenied`, `ConfigError` for a
    docker config file that is wrong, `Corrupt` for a blob that is damaged or missing, `InvalidParams` for a reference.
    """
    target = parse_reference(reference)
    if not target.tag or target.digest:
        raise InvalidParams(f"{reference!r}: a push needs a tag, REGISTRY/REPO:TAG; the digest follows from the content")
    store.prepare()
    with held(store, digest) as capture, Distribution(target, settings) as remote:
        return _Push(store, remote, progress or _quiet).run(capture)


class _Push:
    def __init__(self, store: Store, remote: Distribution, progress: Progress) -> None:
        self._store = store
        self._remote = remote
        self._progress = progress
        self._mounts = Mounts(store.cache / "mounts", store.blobs.temp, remote.registry)
        self._done = 0
        self._sent = 0
        self._total = (0, 0)

    def run(self, capture: Held) -> Pushed:
        remote = self._remote
        sessions = self._store.cache / "uploads"
        sessions.mkdir(mode=0o700, parents=True, exist_ok=True)
        upload = Upload(remote, sessions, self._store.blobs.temp, self._report)
        upload.sweep()
        remote.tick = upload.tick
        self._total = (len(capture.blobs), sum(blob.size for blob in capture.blobs))
        counts = {"uploaded": 0, "mounted": 0, "skipped": 0}
        for blob in capture.blobs:
            self._report(0)
            known = self._mounts.repositories(blob.digest, but=remote.repository)
            counts[upload.send(blob, capture.files[blob.digest], known)] += 1
            self._done += 1
            self._sent += blob.size
        remote.tick = lambda: self._report(0)
        remote.tick()
        self._put_manifest(capture.data, capture.digest)
        self._mounts.note(remote.repository, list(capture.files))
        return Pushed(str(remote.reference), capture.digest, bytes=upload.bytes, **counts)

    def _report(self, current: int) -> None:
        blobs, total = self._total
        self._progress(step="push", blobs=self._done, total_blobs=blobs, bytes=self._sent + current, total_bytes=total)

    def _put_manifest(self, data: bytes, digest: str) -> None:
        remote = self._remote
        response = remote.patiently(
            lambda: remote.request(
                "PUT",
                remote.url(f"manifests/{remote.reference.tag}"),
                headers={"Content-Type": MEDIA_MANIFEST},
                body=lambda: data,
                expected={200, 201},
            )
        )
        told = response.headers.get("Docker-Content-Digest", digest)
        if told != digest:
            raise OperationFailed(
                reason=f"registry {remote.registry} changed the manifest: it has the digest {told[:100]}, not {digest}"
            )


def pull(store: Store, reference: str, settings: Settings, *, progress: Progress | None = None) -> Pulled:
    """Bring the capture at `reference` into `store`; no ref is made for it.

    Nothing counts as pulled before it was checked. `NotFound`, `RegistryUnavailable` (retryable: the next call goes on),
    `RegistryDenied`, `ConfigError`, `NoSpace` before anything is fetched that would not fit, `InvalidParams` for an image
    that is no capture of ours, `Corrupt` when the registry's bytes are not what digests and tables of contents say.
    """
    wanted = parse_reference(reference)
    store.prepare()
    report = progress or _quiet
    with Distribution(wanted, settings) as remote:
        remote.tick = lambda: report(step="pull")
        data = remote.patiently(lambda: remote.get_manifest(wanted.target, _ACCEPT))
        manifest, digest = _our_manifest(*data, wanted)
        state = _Pull(store, remote, report, (manifest.config, *manifest.layers))
        state.fetch()
        state.store_manifest(data[0], digest)
        check_contents(store, digest, lambda seen: report(step="check", bytes=seen), state.fetch_again)
        return Pulled(str(wanted), digest, len(data[0]), state.fetched, state.skipped, state.received)


def fetch_blobs(store: Store, wanted: Sequence[Descriptor], remote: Distribution, progress: Progress) -> int:
    """Fetch `wanted` whether or not the store has blobs of these names; returns bytes received. Errors as `pull`."""
    state = _Pull(store, remote, progress, wanted)
    state.fetch(again=True)
    return state.received


class _Pull:
    def __init__(self, store: Store, remote: Distribution, progress: Progress, blobs: Sequence[Descriptor]) -> None:
        self._store = store
        self._remote = remote
        self._progress = progress
        self._blobs = _unique(blobs)
        self._download = Download(remote, store.blobs, self._report)
        remote.tick = self._download.tick
        self._total = sum(blob.size for blob in self._blobs)
        self._done = 0
        self._held = 0
        self.fetched = 0
        self.skipped = 0
        self._skipped: dict[str, Descriptor] = {}

    @property
    def received(self) -> int:
        """Bytes that came over the wire."""
        return self._download.bytes

    def fetch(self, *, again: bool = False) -> None:
        missing = [blob for blob in self._blobs if again or not self._store.blobs.reuse(blob.digest, blob.size)]
        self._check_space(missing)
        wanted = {blob.digest for blob in missing}
        for blob in self._blobs:
            self._report(0)
            if blob.digest in wanted:
                self._download.fetch(blob)
                self.fetched += 1
            else:
                self.skipped += 1
                self._skipped[blob.digest] = blob
            self._done += 1
            self._held += blob.size
        self._report(0)

    def fetch_again(self, digest: str) -> bool:
        """Fetch a blob that the store had and that has turned out to be damaged; False for one that came over the wire."""
        blob = self._skipped.pop(digest, None)
        if blob is None:
            return False
        self._done, self._held = self._done - 1, self._held - blob.size
        self._download.fetch(blob)
        self._done, self._held = self._done + 1, self._held + blob.size
        self.fetched += 1
        self.skipped -= 1
        return True

    def store_manifest(self, data: bytes, digest: str) -> None:
        """Last, so that a manifest in the store means that all it names was there."""
        with self._store.blobs.writer() as writer:
            writer.write(data)
            found, _ = writer.commit()
        if found != digest:
            raise Corrupt(what=f"the manifest of {self._remote.reference}", reason=f"it has the digest {found}, not {digest}")

    def _check_space(self, missing: Sequence[Descriptor]) -> None:
        """A manifest may claim any size: say so now and not when the disk is full."""
        room = os.statvfs(self._store.root)
        wanted, free = sum(blob.size for blob in missing) + _SPARE_BYTES, room.f_bavail * room.f_frsize
        if missing and wanted > free:
            raise NoSpace(
                f"{self._remote.reference} needs {wanted:,} bytes and {self._store.root} has {free:,} free; "
                "nothing was fetched. Free space on that file system and run it again.",
                path=str(self._store.root),
            )

    def _report(self, current: int) -> None:
        self._progress(
            step="pull", blobs=self._done, total_blobs=len(self._blobs), bytes=self._held + current, total_bytes=self._total
        )


def _our_manifest(data: bytes, media_type: str, reference: Reference) -> tuple[Manifest, str]:
    """The manifest in `data` and its digest; `InvalidParams` unless it is one of ours, `Corrupt` for another digest."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if reference.digest and digest != reference.digest:
        raise Corrupt(what=f"the manifest of {reference}", reason=f"the registry sends one with the digest {digest}")
    what = f"the manifest of {reference}"
    try:
        kind = read_json(data, dict, what).get("mediaType", media_type)
        manifest = read_json(data, Manifest, what)
    except Corrupt as error:
        if media_type == MEDIA_MANIFEST:
            raise _not_ours(reference, f"its manifest cannot be read ({error.fields['reason']})") from None
        raise _not_ours(reference, f"it is {media_type[:100] or 'no JSON'}, not an image") from None
    if manifest.schema_version != 2 or kind != MEDIA_MANIFEST:  # noqa: PLR2004 -- the version of the OCI schema
        raise _not_ours(reference, f"its manifest is {str(kind)[:100]}")
    if not 1 <= len(manifest.layers) <= MAX_LAYERS:
        raise _not_ours(reference, f"it has {len(manifest.layers)} layers")
    if manifest.config.media_type != MEDIA_CONFIG:
        raise _not_ours(reference, f"its config is {manifest.config.media_type[:100]}")
    if manifest.config.size > _CONFIG_LIMIT:
        raise _not_ours(reference, f"its config has {manifest.config.size} bytes")
    for blob in (manifest.config, *manifest.layers):
        try:
            check_digest(blob.digest)
        except InvalidParams:
            raise _not_ours(reference, "it names a blob by something that is no sha256 digest") from None
        if blob.size < 1:
            raise _not_ours(reference, f"it names a blob of {blob.size} bytes")
    for layer in manifest.layers:
        if layer.media_type != MEDIA_LAYER or TOC_DIGEST not in layer.annotations:
            raise _not_ours(reference, f"a layer is {layer.media_type[:100]} without a table of contents")
    return manifest, digest


def _not_ours(reference: Reference, reason: str) -> InvalidParams:
    hint = "images of other tools, and captures exported for them with --gzip, cannot be pulled"
    return InvalidParams(f"{reference} is not a capture as Mothball pushes it: {reason}; {hint}")


def _unique(blobs: Sequence[Descriptor]) -> list[Descriptor]:
    """Each digest once: two layers may be the same blob."""
    return list({blob.digest: blob for blob in blobs}.values())


def _quiet(**_: object) -> None:
    return None
