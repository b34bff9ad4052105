"""The store of one host: blobs shared by all its workspaces, and an OCI image layout per workspace."""

from __future__ import annotations

from pathlib import Path

from mothball.store.blobs import BlobStore
from mothball.store.refs import Ref, RefIndex

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

    def workspaces(self) -> list[Path]:
        """The layouts' folders, by name."""
        folder = self.root / "workspaces"
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
