"""Bringing back what a prune moved into quarantine."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mothball.cache_fields import Cache
from mothball.errors import InvalidParams
from mothball.ocicache import aside as asides
from mothball.ocicache.aside import TREE
from mothball.ocicache.place import Place, locked, open_place
from mothball.ocicache.recognise import open_below
from mothball.ocicache.scan import digest_of
from mothball.ocicache.settle import put_back
from mothball.ocicache.types import Problem, Tick, UndeleteResult

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_MAX_LEFT = 50


def undelete(
    cache: Cache,
    *,
    data_dir: Path,
    roots: Sequence[Path] = (),
    host: str = "",
    digests: Sequence[str] = (),
    tick: Tick | None = None,
    wait_s: float = 0.0,
) -> UndeleteResult:
    """Move back what is in quarantine, all of it or `digests` (``sha256:<hex>``); never over what was pulled again.

    Raises as `prune` does; nothing in quarantine is an empty result.
    """
    started = time.monotonic()
    if wrong := [each for each in digests if not _DIGEST.match(each)]:
        raise InvalidParams(f"{wrong[0]!r} is no digest; write sha256: and 64 hex digits")
    out = UndeleteResult(cache_dir=cache.path, host=host)
    chosen = frozenset(digests)

    def wanted(name: str) -> bool:
        return not chosen or digest_of(name) in chosen

    def note(path: str, reason: str) -> None:
        if len(out.left) < _MAX_LEFT:
            out.left.append(Problem(path, reason))

    with (
        open_place(cache.path, data_dir=data_dir, roots=roots) as place,
        locked(cache.path, data_dir, wait_s),
        ExitStack() as stack,
    ):
        place.open()
        where = list(asides.pools(place, None))
        for folder in ("blobs/sha256", "sha256"):  # on a file system of their own they have their asides in them
            if (pool := _pool(place, folder)) is not None:
                stack.callback(os.close, pool)
                where += asides.pools(place, pool, inside=False)
        for each in asides.found(place, where):
            state = None if each is None else each.state()
            if each is None or (state is not None and state.stage == "full"):
                continue
            if state is None:
                each.drop()
                continue
            if tick is not None:
                tick(out.blobs)
            pool = _pool(place, state.folder)
            if pool is None:
                note(
                    each.name, f"the folder {state.folder or cache.path!r} is not there to put it back; make it and run this again"
                )
                continue
            try:
                blobs, size = put_back(each, f"{TREE}/{state.folder}".rstrip("/"), pool, wanted, note, again=note)
            finally:
                os.close(pool)
            out.asides += blobs > 0
            out.blobs += blobs
            out.bytes += size
            each.drop()
    out.seconds = round(time.monotonic() - started, 6)
    return out


def _pool(place: Place, folder: str) -> int | None:
    if place.fd is None:
        return None
    try:
        return open_below(place.fd, folder)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return None
        raise
