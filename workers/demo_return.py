"""The demo's way back: a snapshot, what the edit changed, and the tree as it was before, compared with its capture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mothball.cli.text import human_bytes, printable
from workers import demo_tree

if TYPE_CHECKING:
    from mothball.client import Fleet
    from mothball.settings import Settings
    from mothball.store.snapshots import SnapshotResult
    from mothball.store.tree import Tree
    from workers.demo import Demo
    from workers.local import LocalFleet

LABEL = "before the edit"
DIFFERENCES_SHOWN = 3


class WayBack:
    """`demo` says, checks and counts; the work is done by the fleet, the comparison here."""

    def __init__(self, demo: Demo, fleet: Fleet, local: LocalFleet, workspace: str, seconds: float) -> None:
        """`seconds`: longest wait for one job."""
        self._demo = demo
        self._fleet = fleet
        self._local = local
        self._workspace = workspace
        self._seconds = seconds
        self._target: Path = demo.tree.parent / "restored"

    @property
    def _settings(self) -> Settings:
        return self._local.settings

    def snapshot(self, digest: str) -> SnapshotResult:
        """Number the capture of `digest`, so that it can be gone back to."""
        started = time.monotonic()
        job = self._fleet.snapshot(self._workspace, label=LABEL, keep=True)
        made = job.wait(self._seconds, on_poll=self._demo.watch(self._local))
        self._demo.expect(made.name == "snap-1", f"the first snapshot is {made.name}")
        self._demo.expect(made.digest == digest, "the snapshot is not of the latest capture")
        self._demo.say(f"snapshot: {made.name}, {LABEL!r}, kept by retention")
        self._demo.add("snapshot", started, 0, made.digest, f"{made.name}: one more name for the capture, no bytes")
        return made

    def diff(self, before: str, after: str, edited: list[str], deleted: str) -> None:
        """What the edit changed, by the two captures alone; and that the directory is what the last one says."""
        from mothball.store.diff import diff

        started = time.monotonic()
        with self._demo.open(self._settings, before) as old, self._demo.open(self._settings, after) as new:
            content = [change for change in diff(old, new) if change.kind in {"added", "deleted", "changed", "type"}]
            seconds = time.monotonic() - started
            found = {(change.kind, change.path) for change in content}
            self._demo.expect(
                found == {("deleted", deleted), *(("changed", name) for name in edited)},
                f"the captures differ in {len(found)} files",
            )
            for kind, path in sorted(found):
                self._demo.say(printable(f"  {kind:<8} {path}"))
            there = self._differences(new, self._demo.tree)
        self._demo.expect(not there, f"the directory differs from its latest capture: {there[:DIFFERENCES_SHOWN]}")
        self._demo.say(
            f"diff of the captures: exactly the edit, {seconds * 1000:.0f} ms; the directory on disk is the latest capture"
        )
        self._demo.add("diff", started, None, after, f"{len(edited)} changed and 1 deleted, and nothing else")

    def restore(self, snapshot: SnapshotResult) -> None:
        """The tree as it was before the edit, as a new directory beside it."""
        started = time.monotonic()
        self._demo.say(f"restoring {snapshot.name} to {self._target}")
        job = self._fleet.restore(self._workspace, str(self._target), ref=snapshot.name)
        done = job.wait(self._seconds, on_poll=self._demo.watch(self._local))
        self._demo.expect(self._target.is_dir(), "the restored directory is not there")
        self._demo.say(f"  {done.files:,} files, {human_bytes(done.bytes)}, each verified by sha256 while it was written")
        self._demo.add("restore", started, done.bytes, snapshot.digest, f"{done.files:,} files, verified while written")

    def compare(self, snapshot: SnapshotResult, hashes: dict[str, str]) -> None:
        """Every name, mode, time and byte of the restored directory beside its capture; `hashes` are from before the edit."""
        started = time.monotonic()
        with self._demo.open(self._settings, snapshot.digest) as tree:
            found = self._differences(tree, self._target)
        self._demo.expect(not found, f"the restored directory differs from its capture: {found[:DIFFERENCES_SHOWN]}")
        for name, sha256 in hashes.items():
            same = demo_tree.sha256(self._target / name) == sha256
            self._demo.expect(same, printable(f"{name} is not what it was before the edit"))
        self._demo.say(
            f"compared: every name, mode, time and byte is the capture's, and the {len(hashes)} files are as before the edit"
        )
        self._demo.add("compare", started, snapshot.bytes, snapshot.digest, "names, modes, times and content equal")
        demo_tree.remove_tree(self._target)

    def _differences(self, tree: Tree, folder: Path) -> list[str]:
        """What makes the directory `folder` differ from the capture `tree`."""
        from mothball.capture import CaptureOptions
        from mothball.capture.disk import compare_with_disk
        from mothball.store import Store

        options = CaptureOptions.merge(self._settings, {})
        with compare_with_disk(
            tree, str(folder), self._settings, options, store=Store(self._settings.store_dir), workspace=self._workspace,
            progress=lambda *_: self._demo.check(),
        ) as disk:  # fmt: skip
            return [printable(f"{change.kind} {change.path}") for change in disk.changes()]
