"""Manifests and configs: the OCI documents of one generation, as bytes that depend on nothing but their content."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from typing import Any, Final

import msgspec

from mothball.errors import Corrupt, InvalidParams
from mothball.store.blobs import BlobStore, check_digest
from mothball.store.foreign import read_json

MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
MEDIA_EMPTY = "application/vnd.oci.empty.v1+json"
"""Media type of the config of an artifact that needs none: the two bytes ``{}``."""
PREFIX = "dev.mothball."
TOC_OFFSET = PREFIX + "toc.offset"
TOC_SIZE = PREFIX + "toc.size"
TOC_DIGEST = PREFIX + "toc.digest"
LAYER_CONTENT = PREFIX + "content"
FORMAT = "1"

_GOARCH = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class Descriptor(msgspec.Struct, frozen=True, rename={"media_type": "mediaType"}, omit_defaults=True):
    """An OCI content descriptor."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}


_NAMES = {"schema_version": "schemaVersion", "media_type": "mediaType", "artifact_type": "artifactType"}


class Manifest(msgspec.Struct, frozen=True, rename=_NAMES):
    """An OCI image manifest, as far as Mothball reads it. An artifact has an `artifact_type`, and what it is about as `subject`."""

    schema_version: int
    config: Descriptor
    layers: list[Descriptor]
    media_type: str = MEDIA_MANIFEST
    annotations: dict[str, str] = {}
    artifact_type: str = ""
    subject: Descriptor | None = None

    @property
    def is_artifact(self) -> bool:
        """True for a manifest that is no tree. An image may have an `artifact_type` too, but never an empty config."""
        return self.config.media_type == MEDIA_EMPTY


_CONFIG_LIMIT: Final = 64 * 1024**2


def canonical(document: Any) -> bytes:
    """JSON with sorted keys and no spaces: same document, same bytes, same digest."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def build_config(*, diff_ids: list[str], labels: dict[str, str]) -> bytes:
    """The image config of a generation: no times and no names, so that equal trees have equal digests."""
    machine = platform.machine()
    return canonical(
        {
            "architecture": _GOARCH.get(machine, machine),
            "os": "linux",
            "config": {"Labels": labels, "WorkingDir": "/workspace"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    )


def build_manifest(*, config: Descriptor, layers: list[Descriptor], annotations: dict[str, str]) -> bytes:
    """The image manifest of a generation; `layers` lowest first."""
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "config": msgspec.to_builtins(config),
            "layers": msgspec.to_builtins(layers),
            "annotations": annotations,
        }
    )


def load_manifest(blobs: BlobStore, digest: str) -> Manifest:
    """The manifest `digest`; raises `Corrupt` when it is missing, altered or not a manifest of ours."""
    manifest = read_json(blobs.read(digest), Manifest, f"manifest {digest}", digest=digest)
    if manifest.schema_version != 2 or not manifest.layers:  # noqa: PLR2004  # the version of the OCI schema
        raise Corrupt(what=f"manifest {digest}", reason="it is not an OCI image manifest with layers")
    return manifest


def reach(load: Callable[[str], Manifest], digest: str, size: int) -> list[Descriptor]:
    """Everything that a ref to the manifest `digest` needs, itself first: who keeps, moves, checks or counts a ref goes by this.

    An artifact needs its subject as well, which the image specification calls a weak link: a crash report without the capture
    it is about would be worth little. Digests are as the manifests say, unchecked. Raises what `load` does, and `Corrupt` for
    a subject that is an artifact itself, so that nobody is led from one to the next for ever.
    """
    manifest = load(digest)
    found = [Descriptor(MEDIA_MANIFEST, digest, size), manifest.config, *manifest.layers]
    if (subject := wanted_subject(digest, manifest)) is not None:
        below = load(subject.digest)
        if below.is_artifact:
            raise Corrupt(what=f"manifest {digest}", reason="its subject is not an image", digest=digest)
        found += [subject, below.config, *below.layers]
    return found


def wanted_subject(digest: str, manifest: Manifest) -> Descriptor | None:
    """The subject that the artifact `digest` cannot do without. The subject of an image is a hint for registries only.

    Raises `Corrupt` when it is not a manifest.
    """
    if not manifest.is_artifact or manifest.subject is None:
        return None
    subject = manifest.subject
    try:
        check_digest(subject.digest)
    except InvalidParams as error:
        raise Corrupt(what=f"manifest {digest}", reason=f"its subject: {error.message}", digest=digest) from None
    if subject.media_type != MEDIA_MANIFEST:
        raise Corrupt(what=f"manifest {digest}", reason="its subject is not an OCI image manifest", digest=digest)
    return subject


def load_image(blobs: BlobStore, digest: str) -> tuple[str, Manifest]:
    """(digest, manifest) of the image `digest`, or of the image that the artifact `digest` is about. Raises `Corrupt`."""
    manifest = load_manifest(blobs, digest)
    if not manifest.is_artifact:
        return digest, manifest
    subject = wanted_subject(digest, manifest)
    if subject is None:
        raise Corrupt(what=f"manifest {digest}", reason="it is an artifact about no image, so there is no tree", digest=digest)
    below = load_manifest(blobs, subject.digest)
    if below.is_artifact:
        raise Corrupt(what=f"manifest {digest}", reason="its subject is not an image", digest=digest)
    return subject.digest, below


def load_config(blobs: BlobStore, manifest: Manifest) -> dict[str, Any]:
    """The config document of `manifest`; raises `Corrupt`."""
    digest = manifest.config.digest
    data = blobs.read(digest, limit=_CONFIG_LIMIT)
    config: dict[str, Any] = read_json(data, dict, f"config {digest}", limit=_CONFIG_LIMIT, digest=digest)
    return config


def diff_ids(blobs: BlobStore, manifest: Manifest) -> list[str]:
    """The uncompressed digests of the layers, bottom first; raises `Corrupt` unless there is one per layer."""
    rootfs = load_config(blobs, manifest).get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or len(found) != len(manifest.layers):
        raise Corrupt(what=f"config {manifest.config.digest}", reason="it does not have one diff id per layer")
    return [str(item) for item in found]
