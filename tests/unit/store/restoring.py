"""What the tests of restore share: a rich tree, all facts of a folder, restores of what `build` makes."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from mothball.store import Store
from mothball.store.restore import RestoreResult, restore
from mothball.store.tree import Tree

AS_ROOT = os.geteuid() == 0
OUTSIDE = "outside, never to be touched"


def rich_tree(root: Path) -> None:
    """Everything a capture can hold."""
    raw = os.fsencode(root)
    for name in ("empty", "src/deep/er", "shut"):
        (root / name).mkdir(parents=True)
    (root / "src" / "main.py").write_text("print('hello')\n")
    (root / "src" / "tool").write_text("#!/bin/sh\n")
    (root / "src" / "tool").chmod(0o755)
    (root / "none").write_bytes(b"")
    (root / "large").write_bytes(bytes(range(256)) * 2048)  # over several frames
    (root / "shut" / "secret").write_text("x")
    (root / "shut" / "secret").chmod(0o400)
    (root / "suid").write_text("s")
    (root / "suid").chmod(0o4755)
    Path(os.fsdecode(raw + b"/\xff\xfe name\n\x1b[2J")).write_bytes(b"odd")
    (root / "link").symlink_to("src/main.py")
    (root / "out").symlink_to("/etc/passwd")
    (root / "nowhere").symlink_to("../../gone")
    (root / "src" / "deep" / "er" / "second").hardlink_to(root / "src" / "main.py")
    (root / "again").hardlink_to(root / "src" / "main.py")
    fd = os.open(root / "sparse", os.O_WRONLY | os.O_CREAT, 0o644)
    os.pwrite(fd, b"begin", 0)
    os.pwrite(fd, b"middle", 700_000)
    os.ftruncate(fd, 1_500_000)
    os.close(fd)
    (root / "shut").chmod(0o500)
    (root / "empty").chmod(0o2775 if AS_ROOT else 0o775)


def facts(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """Type, mode, owner, mtime, content and number of names of everything below `root`, and of `root`."""
    base = os.fsencode(root)
    found = {}
    for folder, folders, files in os.walk(base):
        for name in [b"", *folders, *files]:
            path = os.path.join(folder, name).rstrip(b"/")
            there = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(there.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(there.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
            names = there.st_nlink if stat.S_ISREG(there.st_mode) else 1
            found[os.path.relpath(path, base)] = (there.st_mode, there.st_uid, there.st_gid, there.st_mtime_ns, content, names)
    return found


def contents(root: Path) -> dict[str, str]:
    """Text of every file, target of every link, ``/`` for folders."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = f"-> {path.readlink()}" if path.is_symlink() else "/" if path.is_dir() else path.read_text()
    return found


def bring_back(store: Store, digest: str, target: Path, **options: Any) -> RestoreResult:
    """Open the capture and restore it."""
    with Tree.open(store, digest) as tree:
        return restore(tree, target, **options)


def leftovers(folder: Path) -> list[str]:
    """Names below `folder` that only a restore makes."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".mothball-restore" in path.name)
