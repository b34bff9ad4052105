"""What the tests of crash packages share: a real capture of a real folder, a package of it, and what is in that."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

from mothball.capture import CaptureRequest, capture_workspace
from mothball.crash.facts import Packaged, PackageFacts
from mothball.crash.package import write_package
from mothball.package.bundle_spec import runtime_spec
from mothball.redact.engine import Redactor
from mothball.redact.rules import Rules
from mothball.settings import Settings
from mothball.store import Store

KEY = b"a key of the fleet, 32 bytes long"
NAME = "crash-repo-issue-7-20261121-101500Z-0a1b2c3d"
TOKEN = b"ghp_" + b"q7Rk2LmX9vTz4WbN6cYp1HsD8fGj3KaE5uQo"
SECRET = b"Zx81-qwVerty-77ab-Lm0p"


def redactor(key: bytes | None = KEY) -> Redactor:
    return Redactor(key, Rules.default())


def take(root: Path, tree: Path, *, fence: int = 1) -> tuple[Store, str]:
    """(store, digest of the capture of `tree`)."""
    settings = Settings.load(data_dir=root, workspace_roots=(tree.parent,), host="test", fsync=False)
    store = Store(settings.store_dir, fsync=False)
    store.prepare()
    refs = store.refs("w")
    refs.prepare()
    refs.take_fence(fence, "job")
    found = capture_workspace(CaptureRequest(workspace="w", path=str(tree), host="test", job="job", fence=fence), settings)
    return store, found.digest


def report_of(facts: PackageFacts) -> bytes:
    return json.dumps({"schema": "dev.mothball.crash-report/1", "package": facts.to_dict()}, sort_keys=True).encode()


def pack(store: Store, digest: str, folder: Path, **options: Any) -> Packaged:
    values: dict[str, Any] = {
        "report": report_of, "config": runtime_spec(args=["sh", "-c", "exit 3"]), "redactor": redactor(), "folder": folder,
        "name": NAME, **options,
    }  # fmt: skip
    return write_package(store, digest, **values)


def members(path: str | Path) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """Name -> (header, content), in the order of the archive; twice the same name is an error."""
    out: dict[str, tuple[tarfile.TarInfo, bytes]] = {}
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            assert member.name not in out
            file = tar.extractfile(member) if member.isreg() else None
            out[member.name] = member, file.read() if file else b""
    return out


def content(path: str | Path, name: str) -> bytes:
    return members(path)[f"rootfs/workspace/{name}"][1]


def tree_of(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """Everything below `root`: kind, mode, whole seconds, content or target, and which names are one file."""
    out: dict[bytes, tuple[Any, ...]] = {}
    first: dict[int, bytes] = {}
    for folder, names, files in os.walk(os.fsencode(root)):
        for name in sorted([*names, *files]):
            path = os.path.join(folder, name)
            now = os.lstat(path)
            short = path[len(os.fsencode(root)) + 1 :]
            if os.path.islink(path):
                out[short] = ("l", os.readlink(path))
            elif os.path.isdir(path):
                out[short] = ("d", now.st_mode & 0o1777, now.st_mtime_ns)
            else:
                with open(path, "rb") as file:
                    out[short] = ("f", now.st_mode & 0o777, now.st_mtime_ns, file.read(), first.setdefault(now.st_ino, short))
    return out


def left_in(folder: Path) -> list[str]:
    """What lies in `folder`, hidden files included."""
    return sorted(os.listdir(folder)) if folder.exists() else []
