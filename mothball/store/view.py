"""A store for looking only: what a dry run gets. Nothing here opens a file for writing, takes a lock, or removes anything."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import msgspec

from mothball.errors import InvalidParams, MothballError
from mothball.names import slug
from mothball.store import Ref, RefIndex, Store
from mothball.store.blobs import BlobStore, read_regular
from mothball.store.foreign import read_json
from mothball.store.manifest import PREFIX, Manifest, load_manifest
from mothball.store.refs import RELEASED
from mothball.store.trash import Buried, Trash

BLOB_NAME = re.compile(r"[0-9a-f]{64}\Z")
_WORKSPACE, _REPO = PREFIX + "workspace", PREFIX + "repo"


class Released(msgspec.Struct, frozen=True):
    """The file ``released`` of a layout: whose it was, when a collector saw that (ms, this host's clock), and how."""

    workspace: str
    at: int
    reason: str


class Layout(msgspec.Struct, frozen=True):
    """One workspace's folder in the store. `workspace` is None when nothing in it says whose it is."""

    folder: Path
    workspace: str | None
    repo: str
    refs: list[Ref]
    released: Released | None
    indexed: bool

    @property
    def name(self) -> str:
        """The workspace's id, or the folder's name when that is all there is."""
        return self.workspace or self.folder.name


class _OrTrash(BlobStore):
    """Blobs as they would be once those of the trash are put back. It is only ever read."""

    def __init__(self, root: Path, trash: Trash) -> None:
        super().__init__(root)
        self._trash = trash

    def path(self, digest: str) -> Path:
        """Where the blob is now."""
        path = super().path(digest)
        return path if path.exists() else self._trash.find(digest) or path


class StoreView:
    """What a store holds. Every method only reads."""

    def __init__(self, store: Store) -> None:
        self.root = store.root
        self.blobs_folder = store.blobs.folder
        self.temp = store.blobs.temp
        self.cache = store.cache
        self._store = store
        self._trash = Trash(store)
        self._blobs = _OrTrash(store.root, self._trash)

    def folders(self) -> list[Path]:
        """The layouts' folders, by name."""
        return self._store.workspaces()

    def layout(self, folder: Path) -> Layout:
        """What one layout says. Raises `Corrupt` when its index cannot be read, `OSError`."""
        index = RefIndex(self.root, "unknown")
        index.folder = folder
        indexed = index.exists
        refs = index.list()
        released = _released(folder)
        ids = {ref.annotations.get(_WORKSPACE, "") for ref in refs} | ({released.workspace} if released else set())
        # A folder that was copied or renamed by hand is not the workspace that its refs name.
        fitting = sorted(each for each in ids if each and _is_slug_of(folder.name, each))
        repo = next((text for ref in refs if (text := ref.annotations.get(_REPO))), "")
        return Layout(folder, fitting[0] if fitting else None, repo, refs, released, indexed)

    def manifest(self, digest: str) -> Manifest:
        """The manifest, also from the trash; raises `Corrupt`, `InvalidParams` for a digest that is none, `OSError`."""
        return load_manifest(self._blobs, digest)

    def has_blob(self, digest: str) -> bool:
        """True when the blob is in the store or in the trash."""
        try:
            return self._blobs.path(digest).is_file()
        except InvalidParams:
            return False

    def blobs(self) -> AbstractContextManager[Iterable[os.DirEntry[str]]]:
        """Everything in the blobs folder, in no order."""
        return _scan(self.blobs_folder)

    def runs(self) -> list[tuple[int, Path]]:
        """(ms, folder) of each earlier collection in the trash, oldest first."""
        return self._trash.runs()

    def in_run(self, folder: Path) -> AbstractContextManager[Iterable[os.DirEntry[str]]]:
        """What one of them moved there."""
        return _scan(folder)

    def buried(self, without: set[Path]) -> list[Buried]:
        """The refs that can be undeleted, but for those in the files `without`."""
        return self._trash.buried(without=without)

    def ref_files(self) -> Iterator[Path]:
        """Their files."""
        return self._trash.ref_files()


def _released(folder: Path) -> Released | None:
    try:
        return read_json(read_regular(folder / RELEASED), Released, RELEASED)
    except (FileNotFoundError, MothballError):  # it is no evidence then, and is written again
        return None


def _is_slug_of(name: str, workspace: str) -> bool:
    try:
        return slug(workspace) == name
    except MothballError:
        return False


def _scan(folder: Path) -> AbstractContextManager[Iterable[os.DirEntry[str]]]:
    # Not a generator: for a million names each step of one counts.
    try:
        return os.scandir(folder)
    except FileNotFoundError:
        return nullcontext(())
