"""A workspace, a store and captures of the one into the other, in process."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mothball.capture import CaptureRequest, CaptureResult, capture_workspace
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.tree import Tree

OLD_NS = 1_600_000_000_000_000_000

Facts = tuple[str, int, int, Any]


def settle(root: Path, *, when_ns: int = OLD_NS) -> None:
    """Make every mtime old and different, so that none is racy and a moved one shows."""
    number = 0
    for folder, folders, files in os.walk(os.fsencode(root), topdown=False):
        for name in sorted(folders + files):
            number += 1
            stamp = when_ns + number * 1_000_000_007
            os.utime(os.path.join(folder, name), ns=(stamp, stamp), follow_symlinks=False)


def on_disk(root: Path) -> dict[str, Facts]:
    """(type, mode, mtime, content) of everything below `root`, but for what no layer holds."""
    found: dict[str, Facts] = {"": _facts(os.fsencode(root))}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in folders + files:
            path = os.path.join(folder, name)
            facts = _facts(path)
            if facts[0] != "special":
                found[os.fsdecode(os.path.relpath(path, os.fsencode(root)))] = facts
    return found


def _facts(path: bytes) -> Facts:
    st = os.lstat(path)
    mode = stat.S_IMODE(st.st_mode)
    if stat.S_ISDIR(st.st_mode):
        return ("dir", mode, st.st_mtime_ns, None)
    if stat.S_ISLNK(st.st_mode):
        return ("symlink", mode, st.st_mtime_ns, os.fsdecode(os.readlink(path)))
    if stat.S_ISREG(st.st_mode):
        return ("file", mode, st.st_mtime_ns, hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest())
    return ("special", mode, 0, None)


def in_store(store: Store, digest: str, *, read: bool = True) -> dict[str, Facts]:
    """The same facts of a capture; with `read`, every file is really read out of its frames."""
    found: dict[str, Facts] = {}
    with Tree.open(store, digest) as tree:
        for entry in [tree.find(""), *tree.walk()]:
            kind = "file" if entry.type == "hardlink" else entry.type
            content: Any = entry.link if kind == "symlink" else entry.sha256 if kind == "file" else None
            if read and kind == "file":
                assert hashlib.sha256(tree.read(entry.path)).hexdigest() == content
            found[entry.path] = (kind, entry.mode, entry.mtime_ns, content)
    return found


class Yard:
    """One host: settings, a store, and a folder for workspaces."""

    def __init__(self, base: Path, settings: Settings) -> None:
        self.base = base
        self.settings = settings
        self.root = settings.workspace_roots[0]
        self.store = Store(settings.store_dir)
        self.fence = 0

    def folder(self, name: str = "ws") -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def capture(
        self, name: str = "ws", *, path: Path | None = None, settings: Settings | None = None,
        checkpoint: Callable[[str, dict[str, Any]], None] = lambda _n, _d: None, **request: Any,
    ) -> CaptureResult:  # fmt: skip
        self.fence += 1
        given: dict[str, Any] = {"fence": self.fence, "job": f"job-{self.fence}", "host": "here", **request}
        wanted = CaptureRequest(workspace=name, path=str(path or self.root / name), **given)
        return capture_workspace(wanted, settings or self.settings, checkpoint=checkpoint)

    def facts(self, result: CaptureResult) -> dict[str, Facts]:
        return in_store(self.store, result.digest)

    def with_settings(self, **changes: Any) -> Settings:
        return Settings(**{**self.settings.model_dump(), **changes})

    def blob_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.store.blobs.folder.iterdir())

    def omissions(self, result: CaptureResult) -> dict[str, str]:
        return {item["path"]: item["reason"] for item in result.omissions}


def same_but(result: CaptureResult, **changes: Any) -> CaptureResult:
    return msgspec.structs.replace(result, **changes)
