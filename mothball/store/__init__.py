"""The store of one host: blobs shared by all its workspaces, and an OCI image layout per workspace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mothball.store.blobs import BlobStore
from mothball.store.refs import LATEST, Ref, RefIndex

if TYPE_CHECKING:
    from mothball.store.tree import Tree

__all__ = ["BlobStore", "Ref", "RefIndex", "Store"]


class Store:
    """`root` is ``<data_dir>/store``. Cheap to build; `prepare` makes the folders before the first write."""

    def __init__(self, root: Path, *, fsync: bool = True) -> None:
        self.root = root
        self.fsync = fsync
        self.blobs = BlobStore(root, fsync=fsync)
        self.cache = root / "cache"

    def prepare(self) -> None:
        self.blobs.prepare()
        for folder in (self.root / "workspaces", self.cache):
            folder.mkdir(mode=0o700, exist_ok=True)

    def refs(self, workspace: str) -> RefIndex:
        return RefIndex(self.root, workspace, fsync=self.fsync)

    def tree(self, workspace: str, ref: str = LATEST) -> Tree:
        """The capture `ref` (a name or a digest) of a workspace, open for reading: use it in a ``with`` block.

        What has a path there raises one set of errors: `InvalidParams` for what is no path or not of the kind that the call needs,
        `NotFound` for what is not there, `Corrupt` (which names the blob) for what cannot be trusted. A capture never changes:
        there is nothing to write with (B-82 to B-86, B-90), and whatever happens to the ref, an open tree stays readable (B-91).
        """
        from mothball.store.tree import Tree

        return Tree.open(self, self.refs(workspace).get(ref).digest)

    def workspaces(self) -> list[Path]:
        """The layouts' folders, by name."""
        folder = self.root / "workspaces"
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
