"""The baseline: what the parent generation knows of every path, and the stat index that makes knowing it cheap.

The stat index is a file in the store's ``cache`` folder, named by the manifest it belongs to. It holds, for every path of
that generation, the signature of the file on disk and its sha256. It may be deleted at any time: then the baseline comes
from the layers' tables of contents, no signature matches, and every file is hashed again.

A file whose times are as young as the capture that wrote the index may change again without its stat showing it; it is
stored with a ctime of 0, matches nothing, and is read again next time.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from operator import itemgetter
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFREG

import msgspec

from mothball.capture.types import Entry, Signature
from mothball.store import Store
from mothball.store.blobs import replace_file
from mothball.store.tree import Tree

_VERSION = 1
RACY_NS = 2_000_000_000
"""Nanoseconds before a capture's start within which a change may share a timestamp with what was read (coarse clocks)."""
_KINDS = {"file": S_IFREG, "hardlink": S_IFREG, "dir": S_IFDIR, "symlink": S_IFLNK}
_SHA = 32
_NO_SHA = bytes(_SHA)
_encoder = msgspec.msgpack.Encoder()


class _File(msgspec.Struct, array_like=True):
    version: int
    manifest: str
    owner: str
    paths: bytes
    columns: list[bytes]
    hashes: bytes
    links: dict[bytes, bytes]


class Baseline:
    """Signatures and hashes by path. `links`: other names of a file -> its first name."""

    def __init__(self, paths: list[str], signatures: list[Signature], hashes: bytes, links: dict[str, str]) -> None:
        self.signatures: dict[str, Signature] = dict(zip(paths, signatures, strict=True))
        self.links = links
        self._hashes = hashes
        self._paths = paths
        self._position: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.signatures)

    def sha(self, path: str) -> bytes:
        """sha256 of a file's content or of a link's target; empty for a folder."""
        if self._position is None:
            self._position = dict(zip(self._paths, range(len(self._paths)), strict=True))
        at = self._position[path] * _SHA
        return self._hashes[at : at + _SHA]

    @classmethod
    def from_tree(cls, tree: Tree) -> Baseline:
        """What the layers say: no signature of it equals one on disk, except those of folders."""
        paths, signatures, hashes, links = [], [], bytearray(), {}
        for entry in chain((tree.find(""),), tree.walk()):
            kind = _KINDS[entry.type]
            paths.append(entry.path)
            size = entry.size if kind == S_IFREG else 0
            signatures.append((kind | entry.mode, entry.uid, entry.gid, size, entry.mtime_ns, 0, 0))
            if entry.type == "symlink":
                hashes += hashlib.sha256(os.fsencode(entry.link or "")).digest()
            else:
                hashes += bytes.fromhex(entry.sha256) if entry.sha256 else bytes(_SHA)
            if entry.type == "hardlink":
                links[entry.path] = entry.link or ""
        return cls(paths, signatures, bytes(hashes), links)


def _path(store: Store, name: str, manifest: str) -> Path:
    return store.cache / name / f"{manifest[7:]}.idx"


def load_index(store: Store, name: str, manifest: str, owner: str) -> Baseline | None:
    """The stat index of `manifest`; None when there is none that can be trusted."""
    try:
        data = _path(store, name, manifest).read_bytes()
        if hashlib.sha256(data[_SHA:]).digest() != data[:_SHA]:
            return None
        found = msgspec.msgpack.decode(memoryview(data)[_SHA:], type=_File)
    except (OSError, msgspec.DecodeError):
        return None
    if (found.version, found.manifest, found.owner) != (_VERSION, manifest, owner):
        return None
    paths = os.fsdecode(found.paths).split("\0")
    columns = [array(code, column) for code, column in zip("qqqqqqQ", found.columns, strict=True)]
    if any(len(column) != len(paths) for column in columns) or len(found.hashes) != _SHA * len(paths):
        return None
    links = {os.fsdecode(path): os.fsdecode(first) for path, first in found.links.items()}
    return Baseline(paths, list(zip(*columns, strict=True)), found.hashes, links)


def save_index(
    store: Store, name: str, manifest: str, owner: str, entries: Sequence[Entry], shas: Iterable[bytes], links: dict[str, str],
    started_ns: int,
) -> None:  # fmt: skip
    """Write the stat index of `manifest`. `shas`: one per entry, empty for folders. `started_ns`: clock at the walk's start."""
    racy = started_ns - RACY_NS
    # Column by column: a list of seven-tuples beside the entries would double the memory of a capture.
    columns: list[array[int]] = [array("q", list(map(itemgetter(field), entries))) for field in range(1, 7)]
    columns.append(array("Q", [entry[7] for entry in entries]))
    columns[5] = array("q", [0 if e[6] >= racy or (e[6] and e[5] >= racy) else e[6] for e in entries])
    document = _File(
        _VERSION, manifest, owner, os.fsencode("\0".join([entry.path for entry in entries])),
        [column.tobytes() for column in columns], b"".join([sha or _NO_SHA for sha in shas]),
        {os.fsencode(path): os.fsencode(first) for path, first in links.items()},
    )  # fmt: skip
    body = bytearray(_SHA)
    _encoder.encode_into(document, body, _SHA)
    with memoryview(body) as view:
        body[:_SHA] = hashlib.sha256(view[_SHA:]).digest()
    target = _path(store, name, manifest)
    target.parent.mkdir(mode=0o700, exist_ok=True)
    replace_file(target, body, store.blobs.temp, sync=False)


def drop_other_indexes(store: Store, name: str, manifest: str) -> None:
    """Only the latest generation's index is of use."""
    keep = _path(store, name, manifest).name
    with suppress(FileNotFoundError):  # the cache may be deleted at any time
        for path in (store.cache / name).iterdir():
            if path.name != keep:
                path.unlink(missing_ok=True)
