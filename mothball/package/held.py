"""All blobs of a capture, held while they are copied one after the other, however long that takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from typing import NamedTuple

from mothball.errors import Corrupt
from mothball.store import Store
from mothball.store.artifact import no_image
from mothball.store.manifest import Descriptor, Manifest, load_manifest


class Held(NamedTuple):
    """A manifest, its bytes, and the blobs it names: each once, the config first, open for reading."""

    digest: str
    manifest: Manifest
    data: bytes
    blobs: list[Descriptor]
    files: dict[str, FileIO]


@contextmanager
def held(store: Store, digest: str) -> Iterator[Held]:
    """The capture `digest`; `Corrupt` names the first blob that is missing or has the wrong size.

    `InvalidParams` for a crash report, which is no image.

    Their age is renewed and they are opened before the first is read: a collector takes nothing that is young, and what it
    takes later stays readable through the open file.
    """
    manifest = load_manifest(store.blobs, digest)
    if manifest.is_artifact:
        raise no_image(digest)
    blobs = list({blob.digest: blob for blob in (manifest.config, *manifest.layers)}.values())
    with ExitStack() as stack:
        files: dict[str, FileIO] = {}
        data = store.blobs.read(digest)
        store.blobs.reuse(digest, len(data))
        for blob in blobs:
            # Opened first, which refuses what is no file: the age of whatever a link leads to is nobody's business here.
            file = files[blob.digest] = stack.enter_context(store.blobs.open(blob.digest))
            size = os.fstat(file.fileno()).st_size
            if size != blob.size:
                reason = f"it has {size} bytes, its manifest says {blob.size}"
                raise Corrupt(what=f"blob {blob.digest}", reason=reason, digest=blob.digest)
            store.blobs.reuse(blob.digest, blob.size)
        yield Held(digest, manifest, data, blobs, files)
