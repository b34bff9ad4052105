"""The tree of a capture: its layers merged by their tables of contents, without decompressing any content.

Walking keeps one block per layer in memory (see `merge`); finding one path decodes one block per layer.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO, Final, Literal

import msgspec

from mothball.errors import Corrupt, InvalidParams, NotFound, Oversize
from mothball.store import Store
from mothball.store.blobs import BlobStore, check_digest
from mothball.store.manifest import MEDIA_LAYER, Descriptor, Manifest, load_image
from mothball.store.merge import Found, Hidden, flat, merged
from mothball.store.read import ContentReader, FrameCache, Layer, clean_path, show
from mothball.store.toc import Toc, sort_key

__all__ = ["MAX_LAYERS", "READ_LIMIT", "Entry", "Found", "Tree", "entry_of", "open_layer"]

MAX_LAYERS: Final = 128
"""Most layers of one capture that a reader opens; each costs a file descriptor."""
READ_LIMIT: Final = 256 * 1024**2
"""Largest file that `Tree.read` returns in one piece, bytes, unless the caller says more."""
_KINDS: Final[dict[str, Literal["file", "dir", "symlink", "hardlink"]]] = {
    "f": "file",
    "d": "dir",
    "l": "symlink",
    "h": "hardlink",
}


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of the merged tree. `size` in bytes (0 for all but files and hard links), `mode` the permission bits.

    `path` and `link` are texts as `os.fsdecode` makes them: bytes that are no UTF-8 are lone surrogates.
    """

    path: str
    type: Literal["file", "dir", "symlink", "hardlink"]
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    sha256: str | None
    link: str | None
    layer: int

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.path.rpartition("/")[2]


class Tree:
    """The merged tree of one capture. It holds its layers open: use it in a ``with`` block, from one thread at a time."""

    def __init__(self, blobs: BlobStore, layers: list[Layer], digest: str, manifest: Manifest) -> None:
        self.blobs = blobs
        self.layers = layers
        self.digest = digest
        self.manifest = manifest
        self._frames = FrameCache()

    @classmethod
    def open(cls, store: Store, digest: str) -> Tree:
        """The tree of the manifest `digest`; of a crash report the tree of the capture it is about.

        `Corrupt` names the first blob that is missing, altered or lies.
        """
        digest, manifest = load_image(store.blobs, digest)
        if len(manifest.layers) > MAX_LAYERS:
            raise Corrupt(what=f"manifest {digest}", reason=f"it has {len(manifest.layers)} layers", digest=digest)
        layers: list[Layer] = []
        try:
            for number, descriptor in enumerate(manifest.layers):
                layers.append(open_layer(store, descriptor, number))
        except BaseException:
            _close(layers)
            raise
        return cls(store.blobs, layers, digest, manifest)

    def close(self) -> None:
        """Close the layers; files opened from the tree cannot be read afterwards."""
        self._frames.clear()
        _close(self.layers)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- listing -------------------------------------------------------------------------------------------------------

    def walk(
        self,
        prefix: str | bytes = "",
        *,
        max_depth: int = 0,
        filter: Callable[[Entry], bool] | None = None,  # noqa: A002  # B-105
    ) -> Iterator[Entry]:
        """Everything below the folder `prefix`, sorted by path components, a folder before what it holds.

        The folder itself is not among it. `max_depth` 1 is what lies directly in it, 0 everything; `filter` says which entries are
        wanted, and what lies below an unwanted folder is asked for all the same (B-105). Errors as `listdir`; `Corrupt` for an
        entry that lies in no folder, `InvalidParams` for a negative depth.
        """
        if max_depth < 0:
            raise InvalidParams(f"max_depth must be 0 (everything) or more, not {max_depth}")
        folder = clean_path(prefix)
        deepest = folder.count(b"/") + bool(folder) + max_depth
        for found in self.below(prefix):
            if max_depth and found.row.path.count(b"/") >= deepest:
                continue
            entry = entry_of(found)
            if filter is None or filter(entry):
                yield entry

    def below(self, prefix: str | bytes = "") -> Iterator[Found]:
        """What `walk` finds, as the layers' own rows. Errors as `walk`, those about `prefix` at once."""
        path = clean_path(prefix)
        self._folder(path)
        return flat(merged(self.layers, path, self.hidden_at(path)))

    def names(self, prefix: str | bytes = "") -> Iterator[list[bytes]]:
        """The paths of everything below the folder `prefix`, in the order of `walk`, by the hundred. Errors as `listdir`.

        Rows are checked as far as they are read: a lie about a size or a digest is found by who reads those.
        """
        path = clean_path(prefix)
        self._folder(path)
        for rows, _, _ in merged(self.layers, path, self.hidden_at(path), names_only=True):
            yield [row.path for row in rows]

    def rows(self) -> Iterator[Found]:
        """The root folder and everything below it, in the order of `walk`, for whoever copies content frame by frame.

        `Corrupt` for an entry that lies in no folder.
        """
        yield self._require(b"")
        yield from self.below()

    def first_name(self, found: Found) -> bytes | None:
        """The first name of a row ``h`` when it is still that file in the merged tree; None when a layer above took it away."""
        first = self.locate(found.row.link)
        return found.row.link if first is not None and first.layer == found.layer and first.row.type == "f" else None

    def listdir(self, path: str | bytes = "") -> list[Entry]:
        """The entries of one folder, sorted by name (B-87). `NotFound`, or `InvalidParams` when it is no folder."""
        folder = clean_path(path)
        self._folder(folder)
        names: set[bytes] = set()
        for layer in self.layers:
            names |= _children(layer.toc, folder)
        start = folder + b"/" if folder else b""
        found = (self.locate(start + name) for name in sorted(names))
        return [entry_of(item) for item in found if item is not None]

    def find(self, path: str | bytes) -> Entry:
        """The entry at `path` (``""``: the root); one block per layer is decoded. Raises `NotFound`, `InvalidParams`."""
        return entry_of(self._require(clean_path(path)))

    stat = find

    def exists(self, path: str | bytes, kind: Literal["file", "dir", "symlink"] | None = None) -> bool:
        """True when there is an entry at `path`, of that kind if one is named; a symbolic link may lead nowhere (B-89, B-105).

        A further name of a file is a file. `InvalidParams` for what is no path, never for what is not there.
        """
        found = self.locate(clean_path(path))
        return found is not None and kind in {None, _KINDS[found.row.type].replace("hardlink", "file")}

    # -- content -------------------------------------------------------------------------------------------------------

    def reader(self, path: str | bytes) -> ContentReader:
        """The unbuffered content of a file or hard link. Links are never followed. Errors as `read`."""
        raw = clean_path(path)
        found = self._require(raw)
        kind = found.row.type
        if kind == "d":
            raise InvalidParams(f"is a directory: {show(raw)}")
        if kind == "l":
            raise InvalidParams(f"is a symbolic link: {show(raw)}")
        return ContentReader(self.layers[found.layer], found.row, self._frames)

    def open_file(self, path: str | bytes) -> BinaryIO:
        """The content, seekable and buffered. Read from beginning to end it is verified; else frame by frame only."""
        return io.BufferedReader(self.reader(path), 64 * 1024)

    def read(self, path: str | bytes, limit: int = READ_LIMIT) -> bytes:
        """The whole content of a file, verified by its sha256.

        `NotFound` for an unknown path, `InvalidParams` for a folder or link (B-81), `Oversize` over `limit` bytes,
        `Corrupt` with the blob's digest when anything does not match.
        """
        reader = self.reader(path)
        size = reader.seek(0, io.SEEK_END)
        if size > limit:
            raise Oversize(what=f"file {show(clean_path(path))}", size=size, limit=limit)
        out = io.BytesIO()
        reader.copy_to(out)
        return out.getvalue()

    def copy(self, path: str | bytes, out: BinaryIO) -> int:
        """Stream the content to `out` in small pieces and verify it at the end; returns bytes. Errors as `read`."""
        return self.reader(path).copy_to(out)

    # -- merging -------------------------------------------------------------------------------------------------------

    def _require(self, path: bytes) -> Found:
        found = self.locate(path)
        if found is None and not path:
            raise Corrupt(what=f"capture {self.digest}", reason="it has no root folder", digest=self.digest)
        if found is None:
            raise NotFound(f"not found: {show(path)}", what="file", id=show(path))
        return found

    def _folder(self, path: bytes) -> None:
        if self._require(path).row.type != "d":
            raise InvalidParams(f"is not a directory: {show(path)}")

    def locate(self, path: bytes) -> Found | None:
        """The topmost row of `path` that no layer above hides, with the mtime of the topmost override."""
        above = _ancestors(path)
        mtime: int | None = None
        for number in range(len(self.layers) - 1, -1, -1):
            toc = self.layers[number].toc
            row = toc.find(path)
            if row is not None and row.type != "m":
                return Found(row, number, row.mtime_ns if mtime is None else mtime)
            if row is not None and mtime is None:
                mtime = row.mtime_ns
            if number and _hides_below(toc, path, above):
                break
        if mtime is not None:
            raise Corrupt(what=f"capture {self.digest}", reason=f"{show(path)} has an mtime and no entry", digest=self.digest)
        return None

    def hidden_at(self, folder: bytes) -> Hidden:
        """Per layer, the prefix under which it is hidden by removals and replacements at or above `folder`."""
        hidden: Hidden = [None] * len(self.layers)
        above = _ancestors(folder)
        for number in range(len(self.layers) - 1, 0, -1):
            toc = self.layers[number].toc
            row = toc.find(folder)
            if _hides_below(toc, folder, above) or (row is not None and row.type not in "dm"):
                hidden[:number] = [b""] * number
                break
        return hidden


def open_layer(store: Store, descriptor: Descriptor, number: int) -> Layer:
    """Open one layer of a manifest and read its index; `Corrupt` names the blob."""
    digest = descriptor.digest
    try:
        check_digest(digest)
    except InvalidParams as error:
        raise Corrupt(what="a manifest", reason=f"its layer {number}: {error.message}") from None
    if descriptor.media_type != MEDIA_LAYER:
        raise Corrupt(what=f"layer {digest}", reason=f"its media type is {descriptor.media_type[:100]!r}", digest=digest)
    size = store.blobs.size(digest)
    if size != descriptor.size:
        reason = f"it has {size} bytes, its manifest says {descriptor.size}"
        raise Corrupt(what=f"layer {digest}", reason=reason, digest=digest)
    file = store.blobs.open(digest)
    try:
        return Layer(number, digest, file, Toc.load(file, digest, descriptor.annotations))
    except BaseException:
        file.close()
        raise


def _close(layers: list[Layer]) -> None:
    for layer in layers:
        layer.file.close()


def entry_of(found: Found) -> Entry:
    """What readers see of `found`."""
    row = found.row
    return Entry(
        row.path.decode("utf-8", "surrogateescape"),
        _KINDS[row.type],
        row.mode,
        row.uid,
        row.gid,
        found.mtime_ns,
        row.size if row.type in "fh" else 0,
        row.sha256.hex() or None,
        row.link.decode("utf-8", "surrogateescape") if row.link else None,
        found.layer,
    )


def _ancestors(path: bytes) -> list[bytes]:
    """The folders above `path`, without the root."""
    parts = path.split(b"/")
    return [b"/".join(parts[:count]) for count in range(1, len(parts))]


def _hides_below(toc: Toc, path: bytes, above: list[bytes]) -> bool:
    """True when this layer removes `path` or a folder above it, or puts something else in such a folder's place."""
    if toc.removed and any(toc.removes(item) for item in (path, *above)):
        return True
    return any(row is not None and row.type not in "dm" for row in map(toc.find, above))


def _children(toc: Toc, folder: bytes) -> set[bytes]:
    """Names directly below `folder` in one layer; the rows below a child are jumped over, block by block."""
    base = sort_key(folder) + b"\0" if folder else b""
    key = base or b"\0"
    names: set[bytes] = set()
    while (row := next(toc.rows(key), None)) is not None:
        found = sort_key(row.path)
        if not found.startswith(base):
            break
        name = found[len(base) :].partition(b"\0")[0]
        names.add(name)
        key = base + name + b"\1"
    return names
