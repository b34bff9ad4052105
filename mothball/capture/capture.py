"""One capture, start to finish: walk, compare, pack, publish (design.md, sections 5 and 6)."""

from __future__ import annotations

import gc
import json
import os
import posixpath
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from mothball.capture.baseline import Baseline, drop_other_indexes, load_index, save_index
from mothball.capture.changes import Changes, Comparison
from mothball.capture.gitstate import git_states
from mothball.capture.labels import image_labels, same_labels
from mothball.capture.listing import RESULT_BYTES, fitting, listed
from mothball.capture.need import need
from mothball.capture.notes import ref_notes, refresh
from mothball.capture.pack import Packer
from mothball.capture.reading import Reader
from mothball.capture.root import open_root
from mothball.capture.types import CaptureOptions, CaptureRequest, CaptureResult, Checkpoint, Entry, Omission, printable
from mothball.capture.walk import Found, Walker
from mothball.errors import Corrupt, InvalidParams
from mothball.names import check_workspace_id
from mothball.settings import Settings
from mothball.store import Ref, RefIndex, Store
from mothball.store.blobs import full_disk_is_no_space
from mothball.store.layer import LayerWriter
from mothball.store.manifest import (
    FORMAT,
    LAYER_CONTENT,
    MEDIA_CONFIG,
    PREFIX,
    Descriptor,
    Manifest,
    build_config,
    build_manifest,
    diff_ids,
    load_config,
    load_manifest,
)
from mothball.store.refs import LATEST
from mothball.store.toc import sort_key
from mothball.store.tree import Tree

MAX_REMOVED, MAX_REMOVED_BYTES = 1_000_000, 32 * 1024**2
"""Names that one layer's table of contents may take away; more are cheaper in a fresh layer, and its limits stay far."""


class Parent(NamedTuple):
    """The generation a capture builds on."""

    digest: str
    manifest: Manifest
    diff_ids: list[str]
    baseline: Baseline

    @property
    def content(self) -> int:
        """Bytes of file content in all its layers, dead ones included."""
        return sum(int(layer.annotations.get(LAYER_CONTENT, "0")) for layer in self.manifest.layers)


def capture_workspace(
    request: CaptureRequest, settings: Settings, *, checkpoint: Checkpoint = lambda _name, _data: None
) -> CaptureResult:
    """Capture `request.path` into the store of this host and point the workspace's ``latest`` at it.

    Raises `SourceMissing`, `PathNotAllowed`, `InvalidParams`, `Oversize`, `NoSpace`, `Busy`, `LeaseLost`, and what `checkpoint`
    raises. On every error the store is as before but for a blob that nothing refers to, which the collector takes.
    """
    check_workspace_id(request.workspace)
    again_paths(request)
    options = CaptureOptions.merge(settings, request.options)
    store = Store(settings.store_dir, fsync=settings.fsync)
    with open_root(request.path, settings.workspace_roots) as root_fd, full_disk_is_no_space(store.root), _no_cycle_collection():
        store.prepare()
        store.blobs.sweep_temp()
        return _Capture(request, settings, options, store, root_fd, checkpoint).run()


@contextmanager
def _no_cycle_collection() -> Iterator[None]:
    """A capture makes a million small objects and no cycles; looking for cycles among them took a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Capture:
    def __init__(
        self, request: CaptureRequest, settings: Settings, options: CaptureOptions, store: Store, root_fd: int,
        checkpoint: Checkpoint,
    ) -> None:  # fmt: skip
        self.request = request
        self.settings = settings
        self.options = options
        self.store = store
        self.root_fd = root_fd
        self.checkpoint = checkpoint
        self.refs: RefIndex = store.refs(request.workspace)
        self.name = self.refs.folder.name
        self.started = time.monotonic()
        self.started_ns = time.time_ns()

    def run(self) -> CaptureResult:
        self.refs.prepare()
        self.refs.take_fence(self.request.fence, self.request.job)
        latest = self.refs.find(LATEST)
        own_store = self.store.root.stat()
        found = Walker(self.root_fd, self.options, self.checkpoint, skip=(own_store.st_dev, own_store.st_ino)).run()
        self.git = git_states(self.root_fd, self.request.path, found.repositories, self.settings.workspace_roots)
        with Reader(self.root_fd, clamp=self.options.owner == "clamp") as reader:
            parent = self._parent(latest, found)
            changes = Changes()
            if parent:
                changes = Comparison(parent.baseline, reader, again=again_paths(self.request), checkpoint=self.checkpoint).run(
                    found.entries
                )
                if latest and not changes.any and not self.request.full:
                    if changes.stale:
                        self._save_index(latest.digest, found.entries, parent.baseline, changes.hashes, parent.baseline.links)
                    omissions = found.omissions + changes.omissions
                    if not same_labels(load_config(self.store.blobs, parent.manifest), self._labels(omissions)):
                        latest = self._say_again(latest, parent, found, changes, omissions)
                    return self._unchanged(latest, parent.manifest, found.files, found.bytes, omissions)
            squash = bool(parent) and (self.request.full or self._should_squash(parent, found, changes))
            if squash or parent is None:
                parent, changes = None, _everything(found, changes if parent else None)
            return self._changed(latest, parent, found, changes, reader, squashed=squash and latest is not None)

    def _parent(self, latest: Ref | None, found: Found) -> Parent | None:
        """The generation to build on; None when there is none that is whole, then everything is captured afresh."""
        if latest:
            return self._load(latest.digest, self.name)
        if self.request.parent_candidate is None or self.request.full:
            return None
        try:
            candidate = self.store.refs(self.request.parent_candidate).find(LATEST)
        except Corrupt:  # another workspace's damage must not stop this one
            return None
        parent = self._load(candidate.digest, None) if candidate else None
        if parent is None:
            return None
        known = parent.baseline.signatures
        shared = sum(entry.size for entry in found.entries if entry.path in known and known[entry.path][3] == entry.size)
        return parent if 2 * shared >= found.bytes and shared else None

    def _load(self, digest: str, name: str | None) -> Parent | None:
        """`digest` as a parent, by its stat index when `name` has one; None when any blob of it is missing or cut."""
        blobs = self.store.blobs
        try:
            manifest = load_manifest(blobs, digest)
            # Touched, not only looked at: a collector leaves alone what was used just now.
            if not all(blobs.reuse(blob.digest, blob.size) for blob in (manifest.config, *manifest.layers)):
                return None
            below = diff_ids(blobs, manifest)
            baseline = load_index(self.store, name, digest, self.options.owner) if name else None
            if baseline is None:
                with Tree.open(self.store, digest) as tree:
                    baseline = Baseline.from_tree(tree)
        except Corrupt:
            return None
        return Parent(digest, manifest, below, baseline)

    def _should_squash(self, parent: Parent | None, found: Found, changes: Changes) -> bool:
        if parent is None:
            return False
        if len(parent.manifest.layers) + 1 > self.settings.max_layers:
            return True
        if sum(map(len, changes.gone)) + sum(map(len, changes.replaced)) > MAX_REMOVED_BYTES or len(changes.gone) > MAX_REMOVED:
            return True
        new = _totals([entry for entry in found.entries if entry.path in changes.emit])[1]
        return parent.content + new - found.bytes > found.bytes

    def _unchanged(self, latest: Ref, manifest: Manifest, files: int, size: int, omissions: list[Omission]) -> CaptureResult:
        """No layer, no generation, same digest. A run that died after publishing finds its own work here."""
        if (change := refresh(latest, self.request)) is not None:
            self.refs.replace(change, fence=self.request.fence, job=self.request.job)
        mine = latest.get("job") == self.request.job
        stats: dict[str, Any] = json.loads(latest.get("stats", "{}")) if mine else {}
        return CaptureResult(
            workspace=self.request.workspace,
            digest=latest.digest,
            parent=stats.get("parent") if mine else latest.digest,
            generation=max(latest.generation, self.request.generation_floor),
            changed=mine,
            files=files,
            bytes=size,
            stored_bytes=int(stats.get("stored_bytes", 0)),
            layers=len(manifest.layers),
            added=int(stats.get("added", 0)),
            modified=int(stats.get("modified", 0)),
            deleted=int(stats.get("deleted", 0)),
            squashed=bool(stats.get("squashed", False)),
            torn=list(stats.get("torn", [])),
            git=fitting(self.git, RESULT_BYTES),
            seconds=round(time.monotonic() - self.started, 6),
            **listed(omissions),
        )

    def _changed(
        self, latest: Ref | None, parent: Parent | None, found: Found, changes: Changes, reader: Reader, *, squashed: bool
    ) -> CaptureResult:
        blobs, settings = self.store.blobs, self.settings
        known = parent.baseline.signatures if parent else {}
        # Whoever minds a budget answers here, before anything is written.
        self.checkpoint("plan", {"need_bytes": need(self.root_fd, found.entries, changes.emit)})
        with LayerWriter(
            blobs, frame_bytes=settings.frame_bytes, level=settings.zstd_level, threads=settings.capture_threads
        ) as writer:
            packer = Packer(writer, reader, known=known, checkpoint=self.checkpoint)
            _pack(packer, found.entries, changes)
            removed = sorted({*map(os.fsencode, changes.gone), *map(os.fsencode, changes.replaced), *packer.removed}, key=sort_key)
            layer = writer.finish(packer.rows, removed, packer.content)
            packer.rows.clear()
        if self.request.verify:
            self.checkpoint("verify", {"stored_bytes": layer.descriptor.size})
            blobs.check(layer.descriptor.digest)
        omissions = found.omissions + changes.omissions + packer.omissions
        lost = {omission.path for omission in changes.omissions + packer.omissions}
        entries = found.entries
        if lost or packer.read:
            entries = [packer.read.get(entry.path, entry) for entry in entries if entry.path not in lost]
        files, size = _totals(entries)
        layers, ids = ([*parent.manifest.layers], [*parent.diff_ids]) if parent else ([], [])
        digest, manifest_size, new_bytes = self._write_image(
            [*layers, layer.descriptor], [*ids, layer.diff_id], parent.digest if parent else None, omissions, files, size
        )
        new_bytes += layer.descriptor.size if layer.new else 0
        if latest and latest.digest == digest:
            if latest.get("job") == self.request.job:
                return self._unchanged(latest, load_manifest(blobs, digest), found.files, size, omissions)
            generation, changed = latest.generation, False
        else:
            generation, changed = max(latest.generation if latest else 0, self.request.generation_floor) + 1, True
        result = CaptureResult(
            workspace=self.request.workspace,
            digest=digest,
            parent=latest.digest if latest else (parent.digest if parent else None),
            generation=generation,
            changed=changed,
            files=files,
            bytes=size,
            stored_bytes=new_bytes,
            layers=1 + (len(parent.manifest.layers) if parent else 0),
            added=changes.added,
            modified=changes.modified,
            deleted=changes.deleted,
            torn=fitting([printable(path) for path in packer.torn], RESULT_BYTES),
            git=fitting(self.git, RESULT_BYTES),
            squashed=squashed,
            **listed(omissions),
        )
        hashes = packer.hashes
        hashes.update(changes.hashes)
        links = dict(packer.links)
        if parent and parent.baseline.links:
            here = {entry.path for entry in entries} - changes.emit
            links.update((path, first) for path, first in parent.baseline.links.items() if path in here)
        torn = set(packer.torn)
        stable = [entry._replace(ctime_ns=0) if entry.path in torn else entry for entry in entries] if torn else entries
        self._save_index(digest, stable, parent.baseline if parent else None, hashes, links)
        return self._publish(result, manifest_size)

    def _say_again(self, latest: Ref, parent: Parent, found: Found, changes: Changes, omissions: list[Omission]) -> Ref:
        """The same layers under a manifest that says what is left out today; no generation. Returns ``latest`` as it is then.

        A restore that deletes what is foreign spares what the capture left out: an old list would not name what is left out
        only now.
        """
        below = parent.manifest.annotations.get(PREFIX + "parent")
        digest, size, _ = self._write_image(parent.manifest.layers, parent.diff_ids, below, omissions, found.files, found.bytes)
        self._save_index(digest, found.entries, parent.baseline, changes.hashes, parent.baseline.links)
        self.checkpoint("publish", {"files": found.files, "bytes": found.bytes})

        def change(refs: Sequence[Ref]) -> list[Ref]:
            return [msgspec.structs.replace(ref, digest=digest, size=size) if ref.name == LATEST else ref for ref in refs]

        after = self.refs.replace(change, fence=self.request.fence, job=self.request.job)
        drop_other_indexes(self.store, self.name, digest)
        return next((ref for ref in after if ref.name == LATEST), latest)

    def _labels(self, omissions: list[Omission]) -> dict[str, str]:
        return image_labels(self.git, omissions, self.options)

    def _write_image(
        self, layers: list[Descriptor], ids: list[str], below: str | None, omissions: list[Omission], files: int, size: int
    ) -> tuple[str, int, int]:
        """Config and manifest; returns the manifest's digest and size, and the bytes that are new in the store."""
        blobs = self.store.blobs
        config = build_config(diff_ids=ids, labels=self._labels(omissions))
        config_digest, config_new = blobs.put(config)
        notes = {PREFIX + "format": FORMAT, PREFIX + "files": str(files), PREFIX + "bytes": str(size)}
        notes |= {f"{PREFIX}omitted.{reason}": str(n) for reason, n in Counter(o.reason for o in omissions).items()}
        if below:
            notes[PREFIX + "parent"] = below
        manifest = build_manifest(config=Descriptor(MEDIA_CONFIG, config_digest, len(config)), layers=layers, annotations=notes)
        digest, manifest_new = blobs.put(manifest)
        return digest, len(manifest), len(config) * config_new + len(manifest) * manifest_new

    def _publish(self, result: CaptureResult, manifest_size: int) -> CaptureResult:
        """Move ``latest``, the last step that can be refused; the record follows when the job is finished."""
        self.checkpoint("publish", {"files": result.files, "bytes": result.bytes, "stored_bytes": result.stored_bytes})
        request = self.request
        result = msgspec.structs.replace(result, seconds=round(time.monotonic() - self.started, 6))
        if result.changed:
            notes = ref_notes(request, result)
            self.refs.publish(LATEST, result.digest, manifest_size, notes, fence=request.fence, job=request.job)
        drop_other_indexes(self.store, self.name, result.digest)
        return result

    def _save_index(
        self, digest: str, entries: list[Entry], old: Baseline | None, hashes: dict[str, bytes], links: dict[str, str]
    ) -> None:
        if old is None:
            shas = [hashes.get(entry.path, b"") for entry in entries]
        else:
            shas = [hashes.get(entry.path) or (b"" if stat.S_ISDIR(entry.mode) else old.sha(entry.path)) for entry in entries]
        save_index(self.store, self.name, digest, self.options.owner, entries, shas, links, self.started_ns)


def _pack(packer: Packer, entries: list[Entry], changes: Changes) -> None:
    """Write what changed, in order; a folder's whiteouts stand right behind the folder, before its other content."""
    whiteouts: dict[str, list[str]] = {}
    for path in changes.gone:
        folder, _, name = path.rpartition("/")
        whiteouts.setdefault(folder, []).append(name)
    emit, times, add = changes.emit | _folders_above(changes), changes.times, packer.add
    for entry in entries:
        path = entry[0]
        if path in emit:
            add(entry)
        elif path in times:
            packer.mtime(entry)
        if path in whiteouts and stat.S_ISDIR(entry.mode):
            for name in sorted(whiteouts[path], key=os.fsencode):
                packer.whiteout(path, name)
    packer.finish()


def _folders_above(changes: Changes) -> set[str]:
    """The folders that lead to what a layer changes. A layer names them too, as every builder's does: an unpacker that
    applies layers side by side (overlay) would otherwise make them anew, with modes and times of its own."""
    above: set[str] = set()
    for path in (*changes.emit, *changes.gone):
        folder = path
        while folder:
            folder = folder.rpartition("/")[0]
            if folder in above:
                break
            above.add(folder)
    return above


def _everything(found: Found, compared: Changes | None) -> Changes:
    """A capture without parent: every entry; counts stay those of the comparison, if there was one."""
    paths = {entry.path for entry in found.entries}
    if compared is None:
        return Changes(emit=paths, added=len(paths) - 1)
    return Changes(emit=paths, added=compared.added, modified=compared.modified, deleted=compared.deleted)


def again_paths(request: CaptureRequest) -> tuple[str, ...]:
    """The paths to read again, relative to the workspace; raises `InvalidParams` for one that leads out of it."""
    found = []
    for path in request.paths or ():
        relative = posixpath.normpath(posixpath.relpath(path, request.path) if path.startswith("/") else path)
        if relative == ".." or relative.startswith("../") or "\0" in path:
            raise InvalidParams(f"path {printable(path)!r} is not in the workspace")
        found.append("" if relative == "." else relative)
    return tuple(found)


def _totals(entries: list[Entry]) -> tuple[int, int]:
    """(files, bytes); every name counts as a file, the bytes of hard links count once."""
    files = size = 0
    groups = set()
    for entry in entries:
        if stat.S_ISREG(entry.mode):
            files += 1
            if entry.group is None or entry.group not in groups:
                size += entry.size
                groups.add(entry.group)
    return files, size
