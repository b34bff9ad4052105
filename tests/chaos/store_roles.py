"""What the processes of the store's chaos test do, each in a loop until it is killed. Imported by a fork server."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from mothball.capture import CaptureRequest, capture_workspace
from mothball.errors import Busy, Corrupt, NotFound, TransientFailure
from mothball.settings import Settings
from mothball.store import Ref, Store
from mothball.store.collect import collect
from mothball.store.manifest import load_manifest
from mothball.store.restore import Overwrite, discard, restore
from mothball.store.snapshots import add_snapshot, forget, snapshots
from mothball.store.trash import Trash, undelete
from mothball.store.tree import Tree

WORKSPACES = ("chaos/one#1", "chaos/one#2", "chaos/two#1")
GRACE, WINDOW = 5.0, 3.0
FILES = 14
KEPT = 4
"""Snapshots of a workspace that the forgetter leaves."""


def content(number: int, seed: int) -> bytes:
    """The content of one file: a function of what the capture's own list says."""
    size = 200 + (seed * 7919 + number * 104_729) % 30_000
    block = hashlib.sha256(b"%d %d" % (number, seed)).digest()
    return (block * (size // 32 + 1))[:size]


def name_of(number: int) -> str:
    """Where it lies."""
    return f"d{number % 3}/f{number}"


def is_whole(folder: Path) -> bool:
    """True when a directory is exactly what its own list says."""
    seeds = json.loads((folder / "list.json").read_bytes())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"list.json"}
    return files == {name_of(int(number)) for number in seeds} and all(
        (folder / name_of(int(number))).read_bytes() == content(int(number), seed) for number, seed in seeds.items()
    )


def reads_whole(store: Store, digest: str) -> bool:
    """The same for a capture, read without restoring it."""
    with Tree.open(store, digest) as tree:
        seeds = json.loads(tree.read("list.json"))
        return all(tree.read(name_of(int(number))) == content(int(number), seed) for number, seed in seeds.items())


class Role(ABC):
    """One process: its store, its random numbers, and the file in which it counts what it did."""

    def __init__(self, base: Path, name: str, seed: int) -> None:
        self.base = base
        self.rng = random.Random(seed)
        self.store = Store(base / "data" / "store")
        self.log = base / "log" / name

    def count(self, what: str) -> None:
        """One line, whole or not at all."""
        fd = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, what.encode() + b"\n")
        os.close(fd)

    @abstractmethod
    def step(self) -> None:
        """One thing of what this role does."""


class Capturer(Role):
    """Changes a workspace, captures it, and gives most captures a number."""

    def step(self) -> None:
        workspace = self.rng.choice(WORKSPACES)
        folder = self.base / "trees" / workspace.replace("/", "-")
        self._change(folder)
        fence = time.time_ns()
        request = CaptureRequest(
            workspace=workspace, path=str(folder), host="chaos", job=f"job-{fence}", fence=fence,
            repo=workspace.partition("#")[0], full=self.rng.random() < 0.1, parent_candidate=self.rng.choice(WORKSPACES),
        )  # fmt: skip
        settings = Settings(
            data_dir=self.base / "data", workspace_roots=(self.base,), max_layers=4, redis_url="redis://127.0.0.1:1", host="chaos"
        )
        try:
            capture_workspace(request, settings)
            self.count("captured")
            if self.rng.random() < 0.7:
                add_snapshot(self.store.refs(workspace), fence=fence, job=f"job-{fence}", at_ms=fence // 1_000_000)
                self.count("snapshotted")
        except TransientFailure:  # slower than the grace: refused, as it must be
            self.count("refused")

    def _change(self, folder: Path) -> None:
        ready = folder / "list.json"
        seeds: dict[str, int] = {}
        if ready.exists():
            seeds = json.loads(ready.read_bytes())
            ready.unlink()  # a kill from here on: the next one begins afresh
        elif folder.exists():
            shutil.rmtree(folder)
        for number in range(FILES):
            if str(number) not in seeds or self.rng.random() < 0.2:
                path = folder / name_of(number)
                path.parent.mkdir(parents=True, exist_ok=True)
                seeds[str(number)] = self.rng.randrange(10**6)
                path.write_bytes(content(number, seeds[str(number)]))
        if self.rng.random() < 0.3:
            gone = self.rng.choice(list(seeds))
            del seeds[gone]
            (folder / name_of(int(gone))).unlink()
        scratch = folder.with_suffix(".list")
        scratch.write_text(json.dumps(seeds))
        scratch.rename(ready)


class Restorer(Role):
    """Restores any ref, and looks whether it is what was captured. What a kill left unfinished it finishes first."""

    def step(self) -> None:
        slot = f"slot-{self.rng.randrange(3)}"
        target, plan = self.base / "restored" / slot, self.base / "log" / f"{slot}.plan"
        chosen = self._planned(plan) or _some_ref(self)
        if chosen is None:
            return
        workspace, ref = chosen
        plan.write_text(f"{workspace} {ref.digest}")
        try:
            with Tree.open(self.store, ref.digest) as tree:
                if target.exists() and self.rng.random() < 0.5:
                    shutil.rmtree(target)
                over: Overwrite | None = "always" if target.exists() else None
                restore(tree, target, overwrite=over, delete_extra=over is not None)
        except Corrupt:
            if ref in self.store.refs(workspace).list():
                raise
            self.count("forgotten meanwhile")
            return
        except Busy:  # one that was planned, and whose ref was forgotten since, waits unfinished
            discard(target, store=self.store.root)
            self.count("restore given up")
            return
        plan.unlink()
        if not is_whole(target):
            raise AssertionError(f"{workspace}:{ref.name} was restored as something else")
        self.count("restored")

    def _planned(self, plan: Path) -> tuple[str, Ref] | None:
        words = plan.read_text().split() if plan.exists() else []
        if len(words) != 2:
            return None
        found = next((ref for ref in self.store.refs(words[0]).list() if ref.digest == words[1]), None)
        return (words[0], found) if found else None


class Forgetter(Role):
    """Forgets snapshots, and changes its mind about some."""

    def step(self) -> None:
        workspace = self.rng.choice(WORKSPACES)
        found = snapshots(self.store.refs(workspace))
        loose = [each.name for each in found if not each.keep]
        if len(found) > KEPT:
            chosen = self.rng.sample(loose, min(len(loose), self.rng.randrange(1, 4))) or [each.name for each in found[:-KEPT]]
            forget(self.store, workspace, chosen, reason="chaos", at_ms=time.time_ns() // 1_000_000, force_keep=True)
            self.count("forgotten")
        if self.rng.random() < 0.5:
            self._undelete(workspace)
        time.sleep(self.rng.random() * 0.1)

    def _undelete(self, workspace: str) -> None:
        entries = Trash(self.store).buried(workspace)
        if not entries:
            return
        entry = self.rng.choice(entries)
        try:
            [back] = undelete(self.store, workspace, entry.ref.name, keep=self.rng.random() < 0.2)
        except NotFound:
            self.count("too late")
            return
        except Corrupt:
            if time.time() - entry.at / 1000 < WINDOW:
                raise
            self.count("too late")
            return
        if not reads_whole(self.store, back.digest):
            raise AssertionError(f"{workspace}:{back.name} came back as something else")
        self.count("undeleted")


class Collector(Role):
    """Collects, again and again."""

    def step(self) -> None:
        try:
            report = collect(
                self.store, grace_s=GRACE, trash_s=WINDOW, tombstone_s=60, dry_run=self.rng.random() < 0.2, reserve_bytes=1 << 16
            )
        except Busy:
            self.count("busy")
            return
        if report.missing:
            raise AssertionError(f"reachable blobs are missing: {report.missing}")
        self.count(f"collected {report.moved_blobs} {report.deleted_blobs} {report.put_back}")
        time.sleep(self.rng.random() * 0.2)


ROLES: dict[str, type[Role]] = {"capture": Capturer, "restore": Restorer, "forget": Forgetter, "collect": Collector}


def _some_ref(role: Role) -> tuple[str, Ref] | None:
    workspace = role.rng.choice(WORKSPACES)
    refs = role.store.refs(workspace).list()
    return (workspace, role.rng.choice(refs)) if refs else None


def blobs_of(store: Store, digest: str) -> set[str]:
    """Every blob that a capture needs."""
    manifest = load_manifest(store.blobs, digest)
    return {digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}


def main(name: str, base: Path, seed: int) -> None:
    """Work until killed; whatever goes wrong is written down and ends the process with 1."""
    kind: Callable[[Path, str, int], Role] = ROLES[name]
    role = kind(base, name, seed)
    try:
        while True:
            role.step()
    except BaseException:
        (base / "log" / f"{name}.error").write_text(traceback.format_exc())
        os._exit(1)
