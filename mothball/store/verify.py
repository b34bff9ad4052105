"""Checking a store: is everything there that the captures refer to, and is it what was written?

Always: layouts, refs, manifests, configs, the number of diff ids, sizes, tables of contents, and the digest of every blob.
Deep: every layer is decompressed as well, its tar compared member by member with its table of contents, every file with its
sha256, the whole with its diff id, and the merged tree of every capture is walked; blobs that nothing refers to are hashed.
Memory is bounded by a frame and a table's blocks. One damaged blob never hides the next.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from mothball.errors import Corrupt, MothballError, NotFound
from mothball.store import Ref, RefIndex, Store
from mothball.store.blobs import check_digest
from mothball.store.content import compare_content
from mothball.store.manifest import PREFIX, Manifest, diff_ids, load_manifest
from mothball.store.read import Layer
from mothball.store.tree import Tree, open_layer

Progress = Callable[..., None]
"""Called with ``blobs=`` (checked so far) and ``bytes=`` (read so far), often; what it raises ends the check."""

MAX_PROBLEMS: Final = 10_000
_WORKSPACE = PREFIX + "workspace"
_HEX = re.compile(r"[0-9a-f]{64}\Z")


class Problem(msgspec.Struct, frozen=True):
    """One damaged blob (`digest` is ``""`` when it is no blob) and the captures, ``workspace:ref``, that it harms."""

    digest: str
    refs: list[str]
    reason: str


class VerifyReport(msgspec.Struct, frozen=True):
    """`checked` blobs of `bytes` bytes; `refs` is how many captures were looked at. Whole when `problems` is empty."""

    checked: int
    bytes: int
    refs: int
    problems: list[Problem]


def verify(store: Store, workspace_id: str | None = None, deep: bool = False, progress: Progress | None = None) -> VerifyReport:
    """Check the captures of one workspace, or the whole store. Damage is reported, not raised.

    `NotFound` when the workspace has no captures here. Nothing is written or repaired.
    """
    return _Check(store, deep, progress or (lambda **_: None)).run(workspace_id)


class _Check:
    def __init__(self, store: Store, deep: bool, progress: Progress) -> None:
        self._store = store
        self._deep = deep
        self._report = progress
        self._users: dict[str, list[str]] = defaultdict(list)
        self._problems: dict[tuple[str, str], list[str]] = {}
        self._checked: dict[str, bool] = {}
        self._bad: set[str] = set()
        self._diff_ids: dict[str, str] = {}
        self._bytes = 0
        self._unpacked = 0
        self._refs = 0

    def run(self, workspace_id: str | None) -> VerifyReport:
        captures = list(self._captures(workspace_id))
        manifests: dict[str, Manifest | None] = {}
        for label, ref in captures:
            if ref.digest not in manifests:
                manifests[ref.digest] = self._manifest(ref, label)
            self._claim(label, ref, manifests[ref.digest])
        for digest, manifest in manifests.items():
            if manifest is not None:
                self._image(digest, manifest)
        if self._deep and workspace_id is None:
            self._unused()
        problems = [
            Problem(digest, sorted(set(refs) | set(self._users.get(digest, ()))), reason)
            for (digest, reason), refs in self._problems.items()
        ]
        return VerifyReport(len(self._checked), self._bytes, self._refs, problems)

    # -- refs ----------------------------------------------------------------------------------------------------------

    def _captures(self, workspace_id: str | None) -> Iterator[tuple[str, Ref]]:
        """(``workspace:ref``, ref) of everything that is named; each is one capture to check."""
        if workspace_id is not None:
            index = self._store.refs(workspace_id)
            if not index.exists:
                raise NotFound(f"workspace {workspace_id!r} has no captures on this host", what="workspace", id=workspace_id)
            folders = [index.folder]
        else:
            folders = self._store.workspaces()
        for folder in folders:
            index = RefIndex(self._store.root, workspace_id or "unknown")
            index.folder = folder
            with self._guard("", [folder.name]):
                self._layout(folder)
                refs = index.list()
                for ref in refs:
                    self._refs += 1
                    yield f"{ref.annotations.get(_WORKSPACE) or folder.name}:{ref.name}", ref

    def _layout(self, folder: Path) -> None:
        """The fixed parts by which other tools recognise an image layout."""
        try:
            version = json.loads((folder / "oci-layout").read_bytes())["imageLayoutVersion"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            version = None
        if version != "1.0.0":
            self._problem("", [folder.name], "its oci-layout file is missing or damaged")
        try:
            same = (folder / "blobs").samefile(self._store.root / "blobs")
        except OSError:
            same = False
        if not same:
            self._problem("", [folder.name], "its blobs folder does not lead to the blobs of this store")

    def _manifest(self, ref: Ref, label: str) -> Manifest | None:
        if not _is_digest(ref.digest):
            self._problem("", [label], f"it names {ref.digest[:100]!r}, which is no sha256 digest")
            return None
        with self._guard(ref.digest, [label]):
            if not self._blob(ref.digest, ref.size, label):
                return None
            manifest = load_manifest(self._store.blobs, ref.digest)
            for descriptor in (manifest.config, *manifest.layers):
                if not _is_digest(descriptor.digest):
                    raise Corrupt(what=f"manifest {ref.digest}", reason="it names a blob that is no sha256 digest")
            return manifest
        return None

    def _claim(self, label: str, ref: Ref, manifest: Manifest | None) -> None:
        """Note that `label` needs these blobs, before any of them is looked at."""
        digests = [ref.digest]
        if manifest is not None:
            digests += [manifest.config.digest, *(layer.digest for layer in manifest.layers)]
        for digest in digests:
            self._users[digest].append(label)

    # -- blobs ---------------------------------------------------------------------------------------------------------

    def _image(self, digest: str, manifest: Manifest) -> None:
        known: list[str] | None = None
        with self._guard(manifest.config.digest):
            if self._blob(manifest.config.digest, manifest.config.size):
                known = diff_ids(self._store.blobs, manifest)
        for number, descriptor in enumerate(manifest.layers):
            with self._guard(descriptor.digest):
                fresh = descriptor.digest not in self._checked
                if self._blob(descriptor.digest, descriptor.size):
                    layer = open_layer(self._store, descriptor, number)
                    try:
                        self._layer(layer, known[number] if known else None, fresh=fresh)
                    finally:
                        layer.file.close()
        if self._deep and self._bad.isdisjoint([digest, *(layer.digest for layer in manifest.layers)]):
            with self._guard(digest), Tree.open(self._store, digest) as tree:
                for _ in tree.walk():
                    pass

    def _blob(self, digest: str, size: int | None, label: str = "") -> bool:
        """Size and digest of one blob, hashed once however often it is used; False when it is damaged."""
        path = self._store.blobs.path(digest)
        try:
            found = path.lstat()
        except FileNotFoundError:
            self._problem(digest, [label] if label else [], "it is missing from the store")
            self._checked[digest] = False
            return False
        if not stat.S_ISREG(found.st_mode):
            self._problem(digest, [label] if label else [], "it is not a regular file")
            self._checked[digest] = False
            return False
        if size is not None and found.st_size != size:
            self._problem(digest, [label] if label else [], f"it has {found.st_size} bytes, {size} are expected")
            return False
        if digest not in self._checked:
            self._checked[digest] = False
            self._bytes += self._store.blobs.check(digest)
            self._checked[digest] = True
            self._report(blobs=len(self._checked), bytes=self._bytes + self._unpacked)
        return self._checked[digest]

    def _layer(self, layer: Layer, diff_id: str | None, *, fresh: bool) -> None:
        if fresh and not self._deep:
            for number in range(len(layer.toc.blocks)):
                layer.toc.block(number)
        if not self._deep:
            return
        if fresh:
            self._diff_ids[layer.digest], size = compare_content(layer, self._unpacking)
            self._unpacked += size
        found = self._diff_ids.get(layer.digest)
        if found is not None and diff_id is not None and found != diff_id:
            raise Corrupt(what=f"layer {layer.digest}", reason=f"its content has the diff id {found}, its config says {diff_id}")

    def _unpacking(self, size: int) -> None:
        self._report(blobs=len(self._checked), bytes=self._bytes + self._unpacked + size)

    def _unused(self) -> None:
        """Blobs that no capture refers to are legal, and still have to be what their name says: a writer may reuse them."""
        try:
            names = sorted(os.listdir(self._store.blobs.folder))  # noqa: PTH208 -- names are all that is needed
        except FileNotFoundError:
            return
        for name in names:
            digest = f"sha256:{name}"
            if not _HEX.match(name):
                self._problem("", [], f"the blobs folder holds {name[:100]!r}, which is no blob")
            elif digest not in self._checked and digest not in self._bad:
                with self._guard(digest):
                    self._blob(digest, None)

    # -- problems ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _guard(self, digest: str, refs: list[str] | None = None) -> Iterator[None]:
        """Turn what is raised about damage into a problem; what the progress callback raises goes through."""
        try:
            yield
        except Corrupt as error:
            named = error.fields.get("digest") or digest
            self._problem(str(named), refs or [], error.message)
        except OSError as error:
            self._problem(digest, refs or [], f"cannot be read: {error.strerror}")

    def _problem(self, digest: str, refs: list[str], reason: str) -> None:
        self._bad.add(digest)
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.setdefault((digest, reason), []).extend(refs)


def _is_digest(digest: str) -> bool:
    try:
        check_digest(digest)
    except MothballError:
        return False
    return True
