"""Layers and captures for the reader's tests, written by Python's `tarfile` and not by the writer under test."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from mothball.store import Store
from mothball.store.manifest import (
    MEDIA_CONFIG,
    MEDIA_LAYER,
    TOC_DIGEST,
    TOC_OFFSET,
    TOC_SIZE,
    Descriptor,
    build_config,
    build_manifest,
)
from mothball.store.toc import encode_toc, skippable_frame, sort_key

NS = 1_700_000_000_123_456_789
ROOT = b"workspace"


@dataclass
class File:
    content: bytes = b""
    mode: int = 0o644
    mtime: int = NS
    uid: int = 1000
    gid: int = 1000


@dataclass
class Dir:
    mode: int = 0o755
    mtime: int = NS
    uid: int = 1000
    gid: int = 1000


@dataclass
class Link:
    target: bytes
    mtime: int = NS


@dataclass
class Hard:
    """Another name of the file `first` of the same layer."""

    first: bytes


@dataclass
class Mtime:
    mtime: int


Spec = Mapping[bytes, File | Dir | Link | Hard | Mtime]


@dataclass
class Blob:
    """One layer as bytes with what its descriptor says."""

    data: bytes
    diff_id: str
    rows: list[tuple[Any, ...]]
    frames: list[tuple[int, int, int]]
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.data).hexdigest()


def _header(
    path: bytes, kind: bytes, *, size: int = 0, mode: int = 0o644, mtime: int = 0, link: bytes = b"", ids: int = 1000
) -> bytes:
    info = tarfile.TarInfo((ROOT + b"/" + path if path else ROOT).decode("utf-8", "surrogateescape"))
    info.type, info.size, info.mode, info.mtime, info.uid, info.gid = kind, size, mode, mtime // 10**9, ids, ids
    info.linkname = link.decode("utf-8", "surrogateescape")
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _body(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def layer(spec: Spec, removed: Sequence[bytes] = (), *, frame_bytes: int = 1024, whiteouts: Sequence[bytes] | None = None) -> Blob:
    """The layer of `spec`; the folders of `removed` must be in the layers below. Frames are cut every `frame_bytes`."""
    spec = dict(spec)
    spec.setdefault(b"", Dir())
    markers = removed if whiteouts is None else whiteouts
    hidden = [path for path in markers if not isinstance(spec.get(path), File | Link | Hard)]
    order = [(sort_key(path), 1, path) for path in spec]
    order += [(sort_key(path.rpartition(b"/")[0]), 2, path) for path in hidden]
    out, rows, places = bytearray(), [], {}
    for _, step, path in sorted(order):
        if step == 2:
            folder, _, name = path.rpartition(b"/")
            out += _header((folder + b"/" if folder else b"") + b".wh." + name, tarfile.REGTYPE)
            continue
        item = spec[path]
        if isinstance(item, Dir):
            out += _header(path, tarfile.DIRTYPE, mode=item.mode, mtime=item.mtime, ids=item.uid)
            rows.append([path, "d", item.mode, item.uid, item.gid, item.mtime, 0, b"", b"", 0, 0])
        elif isinstance(item, File):
            out += _header(path, tarfile.REGTYPE, size=len(item.content), mode=item.mode, mtime=item.mtime, ids=item.uid)
            places[path] = len(out) if item.content else 0
            sha = hashlib.sha256(item.content).digest()
            rows.append([path, "f", item.mode, item.uid, item.gid, item.mtime, len(item.content), sha, b"", -1, places[path]])
            out += _body(item.content)
        elif isinstance(item, Link):
            out += _header(path, tarfile.SYMTYPE, mode=0o777, mtime=item.mtime, link=item.target)
            rows.append([path, "l", 0o777, 1000, 1000, item.mtime, 0, b"", item.target, 0, 0])
        elif isinstance(item, Hard):
            first = spec[item.first]
            assert isinstance(first, File)
            out += _header(path, tarfile.LNKTYPE, mode=first.mode, mtime=first.mtime, link=ROOT + b"/" + item.first)
            sha = hashlib.sha256(first.content).digest()
            rows.append(
                [path, "h", first.mode, 1000, 1000, first.mtime, len(first.content), sha, item.first, -1, places[item.first]]
            )
        else:
            rows.append([path, "m", 0, 0, 0, item.mtime, 0, b"", b"", 0, 0])
    out += bytes(1024)
    for row in rows:
        if row[9] == -1:
            row[9], row[10] = divmod(row[10], frame_bytes) if row[6] else (0, 0)
    return pack(bytes(out), [tuple(row) for row in rows], removed, frame_bytes=frame_bytes)


def pack(tar: bytes, rows: list[tuple[Any, ...]], removed: Sequence[bytes] = (), *, frame_bytes: int = 1024) -> Blob:
    """A blob of `tar` in frames with the table of contents `rows`, which need not be true."""
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True)
    blob, frames = bytearray(), []
    for start in range(0, len(tar), frame_bytes):
        stored = compressor.compress(tar[start : start + frame_bytes])
        frames.append((len(blob), len(stored), len(tar[start : start + frame_bytes])))
        blob += stored
    encoded = encode_toc(rows, frames, sorted(removed, key=sort_key), sum(row[6] for row in rows if row[1] == "f"))
    blob += skippable_frame(encoded.payload)
    notes = {
        TOC_OFFSET: str(len(blob) - len(encoded.payload)),
        TOC_SIZE: str(len(encoded.payload)),
        TOC_DIGEST: encoded.index_digest,
    }
    return Blob(bytes(blob), "sha256:" + hashlib.sha256(tar).hexdigest(), rows, frames, notes)


def new_store(root: Path) -> Store:
    store = Store(root, fsync=False)
    store.prepare()
    return store


def capture(store: Store, *layers: Blob, workspace: str | None = None, ref: str = "latest") -> str:
    """Store `layers` as one image, bottom first; returns the manifest's digest. With `workspace` a ref points at it."""
    descriptors = []
    for item in layers:
        digest, _ = store.blobs.put(item.data)
        descriptors.append(Descriptor(MEDIA_LAYER, digest, len(item.data), item.annotations))
    config = build_config(diff_ids=[item.diff_id for item in layers], labels={})
    digest, _ = store.blobs.put(config)
    manifest = build_manifest(
        config=Descriptor(MEDIA_CONFIG, digest, len(config)), layers=descriptors, annotations={"dev.mothball.format": "1"}
    )
    digest, _ = store.blobs.put(manifest)
    if workspace is not None:
        refs = store.refs(workspace)
        refs.prepare()
        refs.take_fence(1, "job")
        refs.publish(ref, digest, len(manifest), {"dev.mothball.workspace": workspace}, fence=1, job="job")
    return digest


def damage(store: Store, digest: str, at: int = -1, *, flip: int = 1, size: int | None = None) -> None:
    """Flip bits of one byte of a blob in place, or cut it to `size`."""
    path = store.blobs.path(digest)
    data = bytearray(path.read_bytes())
    if size is not None:
        del data[size:]
    else:
        data[at] ^= flip
    path.write_bytes(data)
