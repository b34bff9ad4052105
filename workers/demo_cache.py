"""The demo's part about image caches: a pull cache that it fills, what a prune would free, the prune, and everything back.

The cache is as crane writes one, so that no other tool is needed: its blobs are those of the captures.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mothball import cache_fields
from mothball.cli.text import human_bytes, printable
from mothball.errors import InvalidParams, PathNotAllowed
from mothball.settings import Settings
from workers import demo_tree

if TYPE_CHECKING:
    from mothball.client import Fleet
    from mothball.handles import JobHandle
    from workers.demo import Demo
    from workers.local import LocalFleet

NAME = "pull-cache"
POLICY = "older_than=30d,grace=0"
OLD_DAYS = 40
MOST_BYTES = 64 * 1024**2
MOST_BLOBS = 60
FEWEST_BLOBS = 6
WAIT_SECONDS = 60.0


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of the part: a cache in `folder`; without one where the path of `folder` cannot be declared.

    However full the disk is, nothing else prunes the cache meanwhile.
    """
    text = f"{folder / NAME},{POLICY}"
    try:
        found = cache_fields.declared(text)
        cache_fields.check_place(found[0].path, roots=[], data_dir=str(folder / "data"))
    except (InvalidParams, PathNotAllowed):
        return {}
    if [cache.path for cache in found] != [str(folder / NAME)]:
        return {}
    return {"image_caches": text, "cache_high_percent": 100.0}


class PullCache:
    """`demo` says, checks and counts; the worker prunes."""

    def __init__(self, demo: Demo, fleet: Fleet, local: LocalFleet) -> None:
        self._demo = demo
        self._fleet = fleet
        self._local = local
        self._folder = demo.folder / NAME
        self._host = local.settings.host

    def run(self) -> None:
        """Fill it, ask what would go, prune it, bring back what went."""
        if not self._local.settings.caches:
            self._demo.say(printable(f"no cache can be declared in {self._demo.folder}: the part about image caches is left out"))
            self._demo.add("cache", time.monotonic(), None, "", "left out: set TMPDIR to a plainer path")
            return
        old, young = self._fill()
        used = old.pop()
        self._fleet.cache_used(self._host, str(self._folder), [used])
        self._demo.say(f"  one of the old ones is said to be in use: {used[:19]}")
        promised = self._dry_run(old)
        self._prune(promised, {used, *young})
        self._undelete(promised, {used, *young, *old})

    def _fill(self) -> tuple[list[str], list[str]]:
        """Copy blobs of the store; the digests of what was last used long ago, and of the rest."""
        self._folder.mkdir()
        chosen = _blobs(self._local.settings)
        self._demo.expect(len(chosen) >= FEWEST_BLOBS, f"the store has only {len(chosen)} blobs")
        digests = [f"sha256:{path.name}" for path in chosen]
        old, young = digests[len(digests) // 3 :], digests[: len(digests) // 3]
        then = time.time() - OLD_DAYS * 86_400
        for path, digest in zip(chosen, digests, strict=True):
            shutil.copyfile(path, self._folder / digest)
            if digest in old:
                os.utime(self._folder / digest, (then, then))
        self._demo.say(f"a pull cache as crane writes it, filled with {len(digests)} blobs of the captures")
        self._demo.say(f"  {len(old)} of them were last used {OLD_DAYS} days ago; its policy: {POLICY}")
        self._demo.say("  (default: grace=10m, which keeps what was just written, as all of this was)")
        return old, young

    def _dry_run(self, old: list[str]) -> dict[str, Any]:
        started = time.monotonic()
        before = _times(self._folder)
        told = self._wait(self._fleet.cache_prune(self._host, str(self._folder), dry_run=True))
        self._demo.expect(told["blobs_freed"] == len(old), f"{len(old)} blobs are old, and {told['blobs_freed']} would go")
        self._demo.expect(_times(self._folder) == before, "the dry run changed the cache")
        self._demo.say(f"  dry run: would free {human_bytes(told['bytes_freed'])} across {told['blobs_freed']} blob(s)")
        shows = f"{told['blobs_freed']} blobs would go; nothing is changed, no time of a file either"
        self._demo.add("cache dry run", started, told["bytes_freed"], "", shows)
        return told

    def _prune(self, promised: dict[str, Any], kept: set[str]) -> None:
        started = time.monotonic()
        done = self._wait(self._fleet.cache_prune(self._host, str(self._folder)))
        figures = [(each["bytes_freed"], each["blobs_freed"]) for each in (promised, done)]
        self._demo.expect(figures[0] == figures[1], f"the dry run said {figures[0]}, the prune freed {figures[1]}")
        self._demo.expect(set(_times(self._folder)) == kept, "the prune left something else than what is in use")
        why = ", ".join(f"{count} {reason}" for reason, count in done["kept"].items())
        self._demo.say(f"  prune: freed {human_bytes(done['bytes_freed'])} across {done['blobs_freed']} blob(s); kept: {why}")
        self._demo.add("cache prune", started, done["bytes_freed"], "", f"exactly what the dry run said; kept: {why}")

    def _undelete(self, promised: dict[str, Any], names: set[str]) -> None:
        started = time.monotonic()
        back = self._wait(self._fleet.cache_undelete(self._host, str(self._folder)))
        figures = (back["bytes"], back["blobs"])
        self._demo.expect(figures == (promised["bytes_freed"], promised["blobs_freed"]), f"{figures[1]} blobs came back")
        self._demo.expect(set(_times(self._folder)) == names, "the cache does not hold what it held before")
        for name in names:
            same = f"sha256:{demo_tree.sha256(self._folder / name)}" == name
            self._demo.expect(same, f"{name} came back with other content")
        self._demo.say(f"  undelete: {figures[1]} blob(s) came back out of quarantine, each with its content")
        self._demo.add("cache undelete", started, figures[0], "", "out of quarantine, every blob's sha256 is its name")

    def _wait(self, job: JobHandle[dict[str, Any]]) -> dict[str, Any]:
        found = job.wait(WAIT_SECONDS, on_poll=self._demo.watch(self._local))
        self._demo.expect(not found.get("errors"), f"errors: {found.get('errors')}")
        return found


def _blobs(settings: Settings) -> list[Path]:
    """The smallest blobs of the store, as many as a demo should copy."""
    from mothball.store import Store

    found = sorted(Store(settings.store_dir).blobs.folder.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    chosen: list[Path] = []
    size = 0
    for path in found[:MOST_BLOBS]:
        size += path.stat().st_size
        if size > MOST_BYTES and len(chosen) >= FEWEST_BLOBS:
            break
        chosen.append(path)
    return chosen


def _times(folder: Path) -> dict[str, tuple[int, int]]:
    """What is in the cache, and when each was written and used."""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_atime_ns) for path in folder.iterdir()}
