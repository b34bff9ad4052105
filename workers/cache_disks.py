"""How full the disks of this host's image caches are, for its heartbeats; a file system that hangs delays none of them."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Final

from mothball import cache_fields
from mothball.settings import Settings

FIRST_WAIT_SECONDS: Final = 0.2
"""How long the first heartbeat waits for figures, so that a host is announced with them."""
HANGING_SECONDS: Final = 10.0
"""After this a file system that does not answer is called so."""


class CacheDisks:
    """The declared caches with the last figures of their disks. One thread per disk asks, and at most one at a time."""

    def __init__(self, settings: Settings) -> None:
        default = cache_fields.parse_text(settings.image_cache_policy)
        self._caches = [_Disk(cache, cache_fields.to_dict(cache.policy(default))) for cache in settings.caches]
        self._first = True

    def look(self) -> list[dict[str, Any]]:
        """What a heartbeat says of each cache, in JSON types; asks anew in the background. Never blocks and never raises."""
        for each in self._caches:
            each.ask()
        if self._first:
            self._first = False
            end = time.monotonic() + FIRST_WAIT_SECONDS
            for each in self._caches:
                each.wait(max(0.0, end - time.monotonic()))
        return [each.say() for each in self._caches]


class _Disk:
    def __init__(self, cache: cache_fields.Cache, policy: dict[str, Any]) -> None:
        self._about = {"dir": cache.path, "kind": cache.kind, "layouts": len(cache.layouts), "policy": _short(policy)}
        self._path = cache.path
        self._found: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._asked = 0.0

    def ask(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        self._asked = time.monotonic()
        self._thread = threading.Thread(target=self._look, name="mothball-cache-disk", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def say(self) -> dict[str, Any]:
        silent = time.monotonic() - self._asked
        if self._thread is not None and self._thread.is_alive() and silent > HANGING_SECONDS:
            # Old figures would have the cache pruned, or not, for what the disk was long ago.
            return {**self._about, "problem": f"the file system has not answered for {int(silent)} s"}
        return {**self._about, **self._found}

    def _look(self) -> None:
        try:
            self._found = _figures(self._path)
        except OSError as error:
            self._found = {"problem": error.strerror or type(error).__name__}


def _figures(path: str) -> dict[str, Any]:
    """Of the file system that holds `path`, or will hold it once somebody pulls: counted as ``df`` does."""
    there, place = True, path
    while True:
        try:
            found = os.statvfs(place)
            break
        except FileNotFoundError:
            there, place = False, os.path.dirname(place)  # noqa: PTH120 - a text, as often as there are heartbeats
    used = found.f_blocks - found.f_bfree
    return {
        "exists": there,
        "total_bytes": found.f_blocks * found.f_frsize,
        "free_bytes": found.f_bavail * found.f_frsize,
        "used_percent": round(100 * used / max(used + found.f_bavail, 1), 1),
    }


def _short(policy: dict[str, Any]) -> str:
    """The words that say something; digests to keep are only counted, for heartbeats have a limit."""
    silent = {"never", "0", ""}
    words = [f"{name}={value}" for name, value in policy.items() if name != "keep" and value not in silent]
    return ",".join([*words, *([f"keep={len(policy['keep'])} patterns"] if policy["keep"] else [])])
