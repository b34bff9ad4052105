"""Where the image below a bundle comes from: an image layout on disk, an archive of one, or a registry."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol

from mothball.errors import Corrupt, InvalidParams, NotFound, PathNotAllowed
from mothball.package.reference import is_tag, parse_reference
from mothball.package.tarread import TarReader
from mothball.settings import Settings
from mothball.store.below import FILE_FLAGS, check_path, lies_in
from mothball.store.blobs import BlobStore, check_digest
from mothball.store.manifest import MEDIA_INDEX, MEDIA_MANIFEST, Descriptor

MEDIA_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
MEDIA_DOCKER: Final = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES: Final = frozenset({MEDIA_INDEX, MEDIA_LIST})
MANIFESTS: Final = frozenset({MEDIA_MANIFEST, MEDIA_DOCKER})
MAX_DOCUMENT: Final = 4 * 1024**2
_FORMS: Final = "write oci:DIR[:TAG], oci-archive:FILE[:TAG] or REGISTRY/REPO:TAG"

Tick = Callable[..., None]
"""Called often with ``step=`` and counts; what it raises ends the work."""


class Source(Protocol):
    """Documents and blobs of one image. `blob` may be read from its beginning to its end; who reads checks the digest."""

    reference: str

    def top(self) -> tuple[bytes, str]:
        """The index or manifest that the reference names, and its media type."""

    def document(self, descriptor: Descriptor) -> bytes:
        """A small blob, at most `MAX_DOCUMENT` bytes, not yet checked."""

    def blob(self, descriptor: Descriptor) -> BinaryIO:
        """A layer, open for reading; the caller closes it."""

    @property
    def tag(self) -> str:
        """What to look for in the index of a layout; empty when the reference is that of one image already."""


def open_source(
    reference: str, settings: Settings, scratch: Path, tick: Tick, stack: ExitStack, roots: tuple[Path, ...] | None
) -> Source:
    """The source that `reference` names. With `roots`, a layout or archive must lie below one of them (`PathNotAllowed`)."""
    kind, colon, rest = reference.partition(":")
    if colon and kind in {"oci", "oci-archive"}:
        path, tag = _split(rest)
        if roots is not None:
            check_path(str(path), roots, "path of a base image")
            real = path.resolve()
            if not any(lies_in(real.parent, root) for root in roots):
                raise PathNotAllowed(path=str(path))
        return _Layout(reference, path, tag) if kind == "oci" else _Archive(reference, path, tag, stack, tick)
    if reference.startswith(("/", ".", "~")) or colon == "":
        raise InvalidParams(f"{reference[:300]!r} is no base image; {_FORMS}")
    return _Registry(reference, settings, scratch, tick, stack)


def _split(text: str) -> tuple[Path, str]:
    """Path and tag; a path may hold a ``:`` itself."""
    if not text or "\0" in text:
        raise InvalidParams(f"a base image needs a path; {_FORMS}")
    whole = Path(text).expanduser()
    path, colon, tag = text.rpartition(":")
    if not colon or os.path.lexists(whole) or not is_tag(tag):
        return whole, ""
    return Path(path).expanduser(), tag


class _Layout:
    """``oci:DIR[:TAG]``"""

    def __init__(self, reference: str, folder: Path, tag: str) -> None:
        self.reference = reference
        self.tag = tag
        self._folder = folder
        if not (folder / "oci-layout").is_file():
            raise NotFound(f"{folder} is no OCI image layout: it has no file oci-layout", what="image", id=reference)

    def top(self) -> tuple[bytes, str]:
        return self._read("index.json"), MEDIA_INDEX

    def document(self, descriptor: Descriptor) -> bytes:
        return self._read(f"blobs/sha256/{_hex(descriptor)}")

    def blob(self, descriptor: Descriptor) -> BinaryIO:
        return self._open(f"blobs/sha256/{_hex(descriptor)}")

    def _read(self, name: str) -> bytes:
        with self._open(name) as file:
            return file.read(MAX_DOCUMENT + 1)

    def _open(self, name: str) -> BinaryIO:
        return open_regular(self._folder / name, f"{self.reference}")


def open_regular(path: Path, what: str) -> BinaryIO:
    """A regular file that is not reached through a link of its own name; never a FIFO or device, which may hang or do things."""
    try:
        fd = os.open(path, FILE_FLAGS)
    except OSError as error:
        why = "it is a link; give the path of the file itself" if path.is_symlink() else error.strerror
        raise NotFound(f"{what}: {path} cannot be read: {why}", what="file", id=str(path)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidParams(f"{what}: {path} is no regular file")
    return os.fdopen(fd, "rb", buffering=1024**2)


class _Part(NamedTuple):
    start: int
    size: int


class _Archive:
    """``oci-archive:FILE[:TAG]``: a tar of a layout; its blobs are read where they lie in it."""

    def __init__(self, reference: str, path: Path, tag: str, stack: ExitStack, tick: Tick) -> None:
        self.reference = reference
        self.tag = tag
        self._file = stack.enter_context(open_regular(path, reference))
        self._parts: dict[bytes, _Part] = {}
        reader = TarReader(self._file.read, str(path), strict=False)
        for member in reader:
            tick(step="base")
            if member.kind == "f":
                self._parts[member.path] = _Part(member.start, member.size)
                self._file.seek(reader.jump())  # its content is read when it is wanted
        if b"oci-layout" not in self._parts:
            raise InvalidParams(f"{path} is no archive of an OCI image layout: it has no file oci-layout")

    def top(self) -> tuple[bytes, str]:
        return self._open(b"index.json").read(MAX_DOCUMENT + 1), MEDIA_INDEX

    def document(self, descriptor: Descriptor) -> bytes:
        return self._open(b"blobs/sha256/" + _hex(descriptor).encode()).read(MAX_DOCUMENT + 1)

    def blob(self, descriptor: Descriptor) -> BinaryIO:
        return self._open(b"blobs/sha256/" + _hex(descriptor).encode())

    def _open(self, name: bytes) -> BinaryIO:
        part = self._parts.get(name)
        if part is None:
            raise Corrupt(what=self.reference, reason=f"it has no {name.decode()}")
        return _Window(self._file.fileno(), part)


class _Window(BytesIO):
    """A part of a file, to be read once from its beginning."""

    def __init__(self, fd: int, part: _Part) -> None:
        super().__init__()
        self._fd = fd
        self._place = part.start
        self._end = part.start + part.size

    def read(self, size: int | None = -1) -> bytes:
        left = self._end - self._place
        data = os.pread(self._fd, left if size is None or size < 0 else min(size, left), self._place)
        self._place += len(data)
        return data


class _Registry:
    """``REGISTRY/REPO:TAG``; layers are fetched into `scratch` first, where an interrupted transfer goes on."""

    tag = ""

    def __init__(self, reference: str, settings: Settings, scratch: Path, tick: Tick, stack: ExitStack) -> None:
        from mothball.package.distribution import Distribution
        from mothball.package.download import Download

        wanted = parse_reference(reference.removeprefix("docker://"))
        self.reference = str(wanted)
        self._target = wanted.target
        self._remote = stack.enter_context(Distribution(wanted, settings))
        self._remote.tick = lambda: tick(step="base")
        self._blobs = BlobStore(scratch / "base", fsync=False)
        self._blobs.prepare()
        self._download = Download(self._remote, self._blobs, lambda size: tick(step="base", bytes=size))

    def top(self) -> tuple[bytes, str]:
        return self._get(self._target)

    def document(self, descriptor: Descriptor) -> bytes:
        _hex(descriptor)
        if descriptor.media_type in INDEXES | MANIFESTS:
            return self._get(descriptor.digest)[0]
        with self.blob(descriptor) as file:
            return file.read(MAX_DOCUMENT + 1)

    def blob(self, descriptor: Descriptor) -> BinaryIO:
        if not self._blobs.reuse(descriptor.digest, descriptor.size):
            self._download.fetch(descriptor)
        return self._blobs.open(descriptor.digest)

    def _get(self, target: str) -> tuple[bytes, str]:
        accept = ", ".join(sorted(INDEXES | MANIFESTS))
        return self._remote.patiently(lambda: self._remote.get_manifest(target, accept))


def _hex(descriptor: Descriptor) -> str:
    """The digest's digits; `InvalidParams` for what is none, which could name any file."""
    return check_digest(descriptor.digest)[7:]
