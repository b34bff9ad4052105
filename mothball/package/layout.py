"""A capture as an OCI image layout of its own: a folder, or one archive, for skopeo, podman, buildah, umoci and the like.

As stored the digest stays the same. With gzip the layers are encoded anew for tools that do not know zstd: other blobs and
another digest, the same tars inside, hence the same diff ids and the same config.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from mothball.errors import Corrupt, InvalidParams
from mothball.package.held import Held, held
from mothball.package.reference import is_tag
from mothball.package.target import check_new, new_file, new_folder, scratch_folder
from mothball.store import Store
from mothball.store.manifest import (
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    Descriptor,
    build_manifest,
    canonical,
    diff_ids,
)
from mothball.store.refs import REF_NAME
from mothball.store.tarhead import END_OF_ARCHIVE, header, padded
from mothball.store.toc import read_frame
from mothball.store.tree import open_layer

MEDIA_GZIP: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
Progress = Callable[..., None]
"""Called with ``step=``, ``blobs=``, ``total_blobs=``, ``bytes=`` and ``total_bytes=`` (of the blobs as stored)."""

_STEP: Final = 1024**2
_LEVEL: Final = 6
_GZIP_WINDOW: Final = 31  # a gzip header, in which zlib writes no name and the time 0
_THREADS: Final = max(1, min(4, os.cpu_count() or 1))
_LAYOUT: Final = canonical({"imageLayoutVersion": "1.0.0"})


class Exported(msgspec.Struct, frozen=True):
    """The image `digest` of `blobs` blobs and `bytes` bytes (without index and the archive's headers) is at `path`."""

    path: str
    digest: str
    name: str
    blobs: int
    bytes: int


class _Blob(msgspec.Struct, frozen=True):
    digest: str
    size: int
    file: FileIO


class _Image(msgspec.Struct, frozen=True):
    """What goes out: the manifest's bytes and the blobs it names."""

    manifest: bytes
    blobs: list[_Blob]

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"

    @property
    def size(self) -> int:
        return len(self.manifest) + sum(blob.size for blob in self.blobs)


def export_layout(
    store: Store, digest: str, target: Path, *, name: str = "latest", gzip: bool = False, progress: Progress | None = None
) -> Exported:
    """Write the capture `digest` as an image layout into the new folder `target`; `name` is the image's tag there.

    Every blob is compared with its digest on the way. `AlreadyExists` when there is something at `target`, `PathNotAllowed` when
    that is inside a store, `Corrupt` for a damaged blob, `NoSpace`, `InvalidParams`; then nothing is left behind.
    """
    _check_name(name)
    place = check_new(target, store.root)
    with _image(store, digest, place, gzip, progress or _quiet) as image, new_folder(place, store.root) as folder:
        report = _Counter(progress, image)
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        for blob in image.blobs:
            with (blobs / blob.digest[7:]).open("xb") as out:
                _copy(blob, out, report)
                _sync(out)
        for path, data in (
            (blobs / image.digest[7:], image.manifest),
            (folder / "index.json", _index(image, name)),
            (folder / "oci-layout", _LAYOUT),
        ):
            with path.open("xb") as out:
                out.write(data)
                _sync(out)
        return Exported(str(place), image.digest, name, len(image.blobs) + 1, image.size)


def export_archive(
    store: Store, digest: str, target: Path, *, name: str = "latest", gzip: bool = False, progress: Progress | None = None
) -> Exported:
    """As `export_layout`, as one tar (``oci-archive:`` of skopeo and podman) whose bytes depend on the content alone."""
    _check_name(name)
    place = check_new(target, store.root)
    with _image(store, digest, place, gzip, progress or _quiet) as image, new_file(place, store.root) as out:
        report = _Counter(progress, image)
        for path in ("blobs/", "blobs/sha256/"):
            out.write(header(path.encode(), b"5", 0o755, 0, 0, 0, 0))
        whole = {image.digest: image.manifest}
        files = {blob.digest: blob for blob in image.blobs}
        for item in sorted({*whole, *files}):
            size = len(whole[item]) if item in whole else files[item].size
            out.write(header(b"blobs/sha256/" + item[7:].encode(), b"0", 0o644, 0, 0, size, 0))
            if item in whole:
                out.write(whole[item])
            else:
                _copy(files[item], out, report)
            out.write(bytes(padded(size) - size))
        for path, data in (("index.json", _index(image, name)), ("oci-layout", _LAYOUT)):
            out.write(header(path.encode(), b"0", 0o644, 0, 0, len(data), 0))
            out.write(data + bytes(padded(len(data)) - len(data)))
        out.write(END_OF_ARCHIVE)
        return Exported(str(place), image.digest, name, len(image.blobs) + 1, image.size)


def _quiet(**_: object) -> None:
    return None


def _check_name(name: str) -> None:
    if not is_tag(name):
        raise InvalidParams(f"{name[:200]!r} is not a name for an image: at most 128 letters, digits, '.', '_' and '-'")


def _sync(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _index(image: _Image, name: str) -> bytes:
    entry = {
        "mediaType": MEDIA_MANIFEST,
        "digest": image.digest,
        "size": len(image.manifest),
        "annotations": {REF_NAME: name},
    }
    return canonical({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [entry]})


def _copy(blob: _Blob, out: BinaryIO, report: Callable[[int], None]) -> None:
    """The blob's bytes to `out`; `Corrupt` when they are not what its digest says. `report` gets the bytes of each step."""
    sha = hashlib.sha256()
    place = 0
    while place < blob.size and (piece := os.pread(blob.file.fileno(), min(_STEP, blob.size - place), place)):
        sha.update(piece)
        out.write(piece)
        place += len(piece)
        report(len(piece))
    if sha.hexdigest() != blob.digest[7:]:
        reason = f"its content has the digest sha256:{sha.hexdigest()}"
        raise Corrupt(what=f"blob {blob.digest}", reason=reason, digest=blob.digest)


class _Counter:
    """Adds up what is copied."""

    def __init__(self, progress: Progress | None, image: _Image) -> None:
        self._progress = progress or _quiet
        self._total = image.size
        self._done = 0

    def __call__(self, count: int) -> None:
        self._done += count
        self._progress(step="copy", bytes=self._done, total_bytes=self._total)


@contextmanager
def _image(store: Store, digest: str, place: Path, gzip: bool, progress: Progress) -> Iterator[_Image]:
    """The image to write: the blobs of the store as they are, or with their layers encoded anew beside `place`."""
    with ExitStack() as stack:
        capture = stack.enter_context(held(store, digest))
        if not gzip:
            yield _Image(capture.data, [_Blob(blob.digest, blob.size, capture.files[blob.digest]) for blob in capture.blobs])
            return
        folder = stack.enter_context(scratch_folder(place))
        yield _gzipped(store, capture, folder, stack, progress)


def _gzipped(store: Store, capture: Held, folder: Path, stack: ExitStack, progress: Progress) -> _Image:
    known = diff_ids(store.blobs, capture.manifest)
    total = sum(layer.size for layer in capture.manifest.layers)
    layers: list[Descriptor] = []
    made: dict[str, _Blob] = {}
    done = 0
    for number, layer in enumerate(capture.manifest.layers):
        path = folder / str(number)

        def report(read: int, before: int = done, count: int = number) -> None:
            progress(step="gzip", blobs=count, total_blobs=len(known), bytes=before + read, total_bytes=total)

        blob = _gzip_layer(store, layer, number, known[number], path, report)
        kept = made.setdefault(blob[0], _Blob(*blob, stack.enter_context(FileIO(path, "rb"))))
        layers.append(Descriptor(MEDIA_GZIP, kept.digest, kept.size))
        done += layer.size
    config = capture.manifest.config
    manifest = build_manifest(config=config, layers=layers, annotations=capture.manifest.annotations)
    return _Image(manifest, [_Blob(config.digest, config.size, capture.files[config.digest]), *made.values()])


def _gzip_layer(
    store: Store, descriptor: Descriptor, number: int, diff_id: str, path: Path, report: Callable[[int], None]
) -> tuple[str, int]:
    """Encode one layer into `path`, a gzip member per frame and several at a time; returns digest and bytes."""
    layer = open_layer(store, descriptor, number)
    sha, tar = hashlib.sha256(), hashlib.sha256()
    size = 0
    waiting: deque[Future[bytes]] = deque()

    def drain(limit: int) -> None:
        nonlocal size
        while len(waiting) > limit:
            packed = waiting.popleft().result()
            sha.update(packed)
            out.write(packed)
            size += len(packed)

    try:
        with path.open("xb") as out, ThreadPoolExecutor(_THREADS, thread_name_prefix="gzip") as pool:
            for index, frame in enumerate(layer.toc.frames):
                data = read_frame(layer.file, layer.toc, index)
                tar.update(data)
                waiting.append(pool.submit(_pack, data))
                drain(2 * _THREADS)
                report(frame.offset + frame.length)
            drain(0)
    finally:
        layer.file.close()
    if f"sha256:{tar.hexdigest()}" != diff_id:
        raise layer.toc.corrupt("its content does not have the diff id that its config says")
    return f"sha256:{sha.hexdigest()}", size


def _pack(data: bytes) -> bytes:
    engine = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    return engine.compress(data) + engine.flush()
