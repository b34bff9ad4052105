"""Checking a store: is everything there that the captures refer to, and is it what was written?

What is looked at grows with the level. ``structure``: layouts, refs, manifests and configs by digest, the size of every blob, every
table of contents. ``sample``: also the digest of a random share of the layers' bytes. ``deep``: the digest of every blob, of
those that nothing refers to as well. ``content``: every layer is decompressed too, its tar compared member by member with its
table of contents, every file with its sha256, the whole with its diff id, and the merged tree of every capture is walked.
Memory is bounded by a frame and a table's blocks. One damaged blob never hides the next, and what is forgotten and collected
while the check runs is no damage.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec

from mothball.errors import Corrupt, InvalidParams, MothballError, NotFound
from mothball.store import Ref, RefIndex, Store
from mothball.store.blobs import is_digest, read_regular
from mothball.store.content import check_diff_id, compare_layer
from mothball.store.foreign import read_json
from mothball.store.hashing import rehash
from mothball.store.manifest import PREFIX, Descriptor, Manifest, diff_ids, load_manifest, wanted_subject
from mothball.store.tree import Tree, open_layer

Level = Literal["structure", "sample", "deep", "content"]
Progress = Callable[..., None]
"""Called with ``blobs=`` (looked at so far) and ``bytes=`` (read so far), often; what it raises ends the check."""

MAX_PROBLEMS: Final = 10_000
_ENTRIES: Final = 1024
DEFAULT_SAMPLE: Final = 5.0
_WORKSPACE = PREFIX + "workspace"
_HEX = re.compile(r"[0-9a-f]{64}\Z")


class Problem(msgspec.Struct, frozen=True):
    """One damaged blob (`digest` is ``""`` when it is no blob) and the captures, ``workspace:ref``, that it harms."""

    digest: str
    refs: list[str]
    reason: str


class VerifyReport(msgspec.Struct, frozen=True):
    """`checked` blobs of `bytes` bytes, of which `hashed` with `hashed_bytes` were read again; `refs` counts the captures.

    Whole when `problems` is empty. Of level ``sample``: `seed` and `sample` (per cent) choose the same blobs of a store again.
    """

    checked: int
    bytes: int
    refs: int
    problems: list[Problem]
    level: Level = "structure"
    hashed: int = 0
    hashed_bytes: int = 0
    sample: float | None = None
    seed: int | None = None


def verify(
    store: Store,
    workspace_id: str | None = None,
    level: Level = "structure",
    *,
    sample: float = DEFAULT_SAMPLE,
    seed: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check the captures of one workspace, or the whole store. Damage is reported, not raised; nothing is written or repaired.

    `sample` is the share of the layers' bytes in per cent that level ``sample`` hashes; whole blobs are taken at random by `seed`.
    `NotFound` when the workspace has no captures here, `InvalidParams` for an unknown level or a share outside 0 to 100.
    """
    if level not in get_args(Level):
        raise InvalidParams(f"{level!r} is no level of verification; there are {', '.join(get_args(Level))}")
    if not 0 < sample <= 100:  # noqa: PLR2004  # per cent
        raise InvalidParams(f"a sample of {sample:g} % cannot be taken; it is more than 0 and at most 100")
    if seed is None:
        seed = secrets.randbelow(2**32)
    return _Check(store, level, sample, seed, progress or (lambda **_: None)).run(workspace_id)


class _Check:
    def __init__(self, store: Store, level: Level, sample: float, seed: int, progress: Progress) -> None:
        self._store = store
        self._level = level
        self._sample = sample
        self._seed = seed
        self._report = progress
        self._users: dict[str, list[str]] = defaultdict(list)
        self._origins: dict[str, list[tuple[Path, Ref]]] = defaultdict(list)
        self._problems: dict[tuple[str, str], list[str]] = {}
        self._sizes: dict[str, int] = {}
        self._layers: set[str] = set()
        self._bad: set[str] = set()
        self._hashed = 0
        self._read = 0
        self._hashed_bytes = 0
        self._refs = 0

    def run(self, workspace_id: str | None) -> VerifyReport:
        captures = list(self._captures(workspace_id))
        manifests: dict[str, Manifest | None] = {}
        for label, ref in captures:
            manifest = self._needed(manifests, ref.digest, ref.size, label)
            if (subject := self._subject(ref.digest, manifest, label)) is not None:
                image = self._needed(manifests, subject.digest, subject.size, label)
                if image is not None and image.is_artifact:
                    self._problem(ref.digest, [label], "its subject is not an image")
        images = {digest: manifest for digest, manifest in manifests.items() if manifest is not None}
        known = {digest: self._structure(manifest) for digest, manifest in images.items()}
        if self._level == "sample":
            self._rehash(self._chosen())
        elif self._level in {"deep", "content"}:
            self._rehash(sorted(self._layers - self._bad) + (self._unused() if workspace_id is None else []))
        if self._level == "content":
            self._content(images, known)
        sampled = self._level == "sample"
        return VerifyReport(
            checked=len(self._sizes),
            bytes=sum(self._sizes.values()),
            refs=self._refs,
            problems=self._confirmed(),
            level=self._level,
            hashed=self._hashed,
            hashed_bytes=self._hashed_bytes,
            sample=self._sample if sampled else None,
            seed=self._seed if sampled else None,
        )

    # -- refs ----------------------------------------------------------------------------------------------------------

    def _captures(self, workspace_id: str | None) -> Iterator[tuple[str, Ref]]:
        """(``workspace:ref``, ref) of everything that is named; each is one capture to check."""
        if workspace_id is not None:
            index = self._store.refs(workspace_id)
            if not index.exists:
                raise NotFound(f"workspace {workspace_id!r} has no captures on this host", what="workspace", id=workspace_id)
            folders = [index.folder]
        else:
            folders = self._folders()
        for folder in folders:
            with self._guard("", [folder.name]):
                self._layout(folder)
                names: set[str] = set()
                for ref in self._index(folder).list():
                    self._refs += 1
                    if ref.name in names:
                        self._problem("", [folder.name], f"its index has more than one capture with the name {ref.name[:100]!r}")
                    names.add(ref.name)
                    label = f"{ref.annotations.get(_WORKSPACE) or folder.name}:{ref.name}"
                    self._origins[label].append((folder, ref))
                    yield label, ref

    def _folders(self) -> list[Path]:
        """The layouts. A store that has blobs and no layouts at all has lost them: nothing to check is not the same as whole."""
        place = self._store.root / "workspaces"
        try:
            if not place.is_dir() and (os.path.lexists(place) or any(self._store.blobs.folder.iterdir())):
                self._problem("", [], f"{place} is not a folder, so nothing says which captures there are")
            return self._store.workspaces()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._problem("", [], f"{place} cannot be read: {error.strerror}")
            return []

    def _index(self, folder: Path) -> RefIndex:
        index = RefIndex(self._store.root, folder.name)
        index.folder = folder
        return index

    def _layout(self, folder: Path) -> None:
        """The fixed parts by which other tools recognise an image layout."""
        try:
            version = read_json(read_regular(folder / "oci-layout"), dict, "oci-layout").get("imageLayoutVersion")
        except (OSError, Corrupt):
            version = None
        if version != "1.0.0":
            self._problem("", [folder.name], "its oci-layout file is missing or damaged")
        try:
            same = (folder / "blobs").samefile(self._store.root / "blobs")
        except OSError:
            same = False
        if not same:
            self._problem("", [folder.name], "its blobs folder does not lead to the blobs of this store")

    def _manifest(self, digest: str, size: int, label: str) -> Manifest | None:
        if not is_digest(digest):
            self._problem("", [label], f"it names {digest[:100]!r}, which is no sha256 digest")
            return None
        with self._guard(digest, [label]):
            if not self._there(digest, size, label):
                return None
            manifest = load_manifest(self._store.blobs, digest)
            self._count_hashed(digest)
            for descriptor in (manifest.config, *manifest.layers):
                if not is_digest(descriptor.digest):
                    raise Corrupt(what=f"manifest {digest}", reason="it names a blob that is no sha256 digest")
            return manifest
        return None

    def _subject(self, digest: str, manifest: Manifest | None, label: str) -> Descriptor | None:
        """The capture that a crash report is about; None for a capture."""
        with self._guard(digest, [label]):
            return None if manifest is None else wanted_subject(digest, manifest)
        return None

    def _needed(self, manifests: dict[str, Manifest | None], digest: str, size: int, label: str) -> Manifest | None:
        """The manifest, read once; that `label` needs it and its blobs is noted before any of them is looked at."""
        if digest not in manifests:
            manifests[digest] = self._manifest(digest, size, label)
        manifest = manifests[digest]
        below = () if manifest is None else (manifest.config, *manifest.layers)
        for each in (digest, *(blob.digest for blob in below)):
            self._users[each].append(label)
        return manifest

    # -- structure -----------------------------------------------------------------------------------------------------

    def _structure(self, manifest: Manifest) -> list[str] | None:
        """Everything that can be known without reading content; returns the diff ids that the config says."""
        known: list[str] | None = None
        if manifest.is_artifact:
            for blob in (manifest.config, *manifest.layers):
                if self._there(blob.digest, blob.size):
                    self._layers.add(blob.digest)
            return None
        with self._guard(manifest.config.digest):
            fresh = manifest.config.digest not in self._sizes
            if self._there(manifest.config.digest, manifest.config.size):
                known = diff_ids(self._store.blobs, manifest)
                if fresh:
                    self._count_hashed(manifest.config.digest)
        for number, descriptor in enumerate(manifest.layers):
            with self._guard(descriptor.digest):
                fresh = descriptor.digest not in self._sizes
                if self._there(descriptor.digest, descriptor.size):
                    self._layers.add(descriptor.digest)
                    layer = open_layer(self._store, descriptor, number)
                    try:
                        for block in range(len(layer.toc.blocks) if fresh else 0):
                            layer.toc.block(block)
                            self._tell()
                    finally:
                        layer.file.close()
        return known

    def _there(self, digest: str, size: int | None, label: str = "") -> bool:
        """True when a blob is a file of the size that is expected of it (None: any)."""
        try:
            found = self._store.blobs.path(digest).lstat()
        except FileNotFoundError:
            self._problem(digest, [label] if label else [], "it is missing from the store")
            return False
        finally:
            self._sizes.setdefault(digest, 0)
            self._tell()
        if not stat.S_ISREG(found.st_mode):
            self._problem(digest, [label] if label else [], "it is not a regular file")
            return False
        self._sizes[digest] = found.st_size
        if size is not None and found.st_size != size:
            self._problem(digest, [label] if label else [], f"it has {found.st_size} bytes, {size} are expected")
            return False
        return True

    # -- content -------------------------------------------------------------------------------------------------------

    def _chosen(self) -> list[str]:
        """Layers at random until the share of bytes is reached; the one that would go over it is taken with the chance that keeps
        the share true on the average, or a store of one large layer would never, or always, be read."""
        dice = random.Random(self._seed)  # noqa: S311  # a sample that can be taken again, no secret
        pool = sorted(self._layers)
        dice.shuffle(pool)
        left = sum(self._sizes[digest] for digest in pool) * self._sample / 100
        chosen = []
        for digest in pool:
            size = self._sizes[digest]
            if size > left:
                if dice.random() * size < left:
                    chosen.append(digest)
                break
            chosen.append(digest)
            left -= size
        return [digest for digest in chosen if digest not in self._bad]

    def _unused(self) -> list[str]:
        """Blobs that no capture refers to are legal, and still have to be what their name says: a writer may reuse them."""
        try:
            names = sorted(os.listdir(self._store.blobs.folder))  # noqa: PTH208 -- names are all that is needed
        except FileNotFoundError:
            return []
        except OSError as error:
            self._problem("", [], f"{self._store.blobs.folder} cannot be read: {error.strerror}")
            return []
        found = []
        for name in names:
            digest = f"sha256:{name}"
            if not _HEX.match(name):
                self._problem("", [], f"the blobs folder holds {name[:100]!r}, which is no blob")
            elif digest not in self._sizes:
                with self._guard(digest):
                    if self._there(digest, None):
                        found.append(digest)
        return found

    def _rehash(self, digests: list[str]) -> None:
        for digest, error in rehash(self._store.blobs, digests, self._tell):
            if error is None:
                self._count_hashed(digest)
                continue
            with self._guard(digest):
                raise error
        self._read = sum(self._sizes[digest] for digest in digests)

    def _content(self, images: dict[str, Manifest], known: dict[str, list[str] | None]) -> None:
        found: dict[str, str] = {}
        for digest, manifest in images.items():
            if manifest.is_artifact:
                continue
            said = known[digest]
            for number, descriptor in enumerate(manifest.layers):
                if descriptor.digest in self._bad:
                    continue
                with self._guard(descriptor.digest):
                    if descriptor.digest not in found:
                        found[descriptor.digest], size = compare_layer(self._store, descriptor, number, self._tell)
                        self._read += size
                    if said is not None:
                        check_diff_id(descriptor, found[descriptor.digest], said[number])
            if self._bad.isdisjoint([digest, *(layer.digest for layer in manifest.layers)]):
                with self._guard(digest), Tree.open(self._store, digest) as tree:
                    for number, _ in enumerate(tree.below()):
                        if number % _ENTRIES == 0:
                            self._tell()

    def _tell(self, more: int = 0) -> None:
        """Report with `more` bytes of what is being read."""
        self._report(blobs=len(self._sizes), bytes=self._read + more)

    def _count_hashed(self, digest: str) -> None:
        self._hashed += 1
        self._hashed_bytes += self._sizes[digest]

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

    def _confirmed(self) -> list[Problem]:
        """The problems that still are: captures may be forgotten, and what only they needed be collected, while a check runs."""
        out = []
        gone: dict[str, bool] = {}
        for (digest, reason), named in self._problems.items():
            refs = sorted({*named, *self._users.get(digest, ())})
            for label in refs:
                if label not in gone:
                    gone[label] = self._gone(label)
            left = [label for label in refs if not gone[label]]
            # A blob that is still there and wrong is damage, whoever names it by now.
            if left or (digest and os.path.lexists(self._store.blobs.path(digest))) or not (digest or refs):
                out.append(Problem(digest, left or refs, reason))
        return out

    def _gone(self, label: str) -> bool:
        """True when the index no longer says what it said when the check began."""
        if label not in self._origins:
            return not (self._store.root / "workspaces" / label).is_dir()
        for folder, ref in self._origins[label]:
            try:
                if any((now.name, now.digest) == (ref.name, ref.digest) for now in self._index(folder).list()):
                    return False
            except (MothballError, OSError):
                return False
        return True
