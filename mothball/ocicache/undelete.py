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
from mothball.durations import quote
from mothball.errors import InvalidParams
from mothball.ocicache import aside as asides
from mothball.ocicache.aside import TREE
from mothball.ocicache.place import Place, locked, open_place
from mothball.ocicache.recognise import open_below
from mothball.ocicache.scan import digest_of
from mothball.ocicache.settle import put_back
from mothball.ocicache.types import Problem, Tick, UndeleteResult, printable

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

    Raises as `prune` does; nothing in quarantine is an empty result, and for `digests` a reason each.
    """
    started = time.monotonic()
    if wrong := [each for each in digests if not _DIGEST.match(each)]:
        raise InvalidParams(f"{quote(wrong[0])} is no digest; write sha256: and 64 hex digits")
    out = UndeleteResult(cache_dir=cache.path, host=host)
    wanted = _Wanted(digests)

    def note(path: str, reason: str) -> None:
        if len(out.left) < _MAX_LEFT:
            out.left.append(Problem(printable(path), reason))

    def again(path: str, reason: str) -> None:
        if len(out.notes) < _MAX_LEFT:
            out.notes.append(f"{printable(path)}: {reason}")

    def foreign(name: str, owner: int) -> None:
        note(name, f"a prune by user {owner} put it into quarantine; run this as user {owner} or root")

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
        for each in asides.found(place, where, foreign):
            if each is None:
                note(cache.path, "another process works with what is in quarantine there; run this again when it is done")
                continue
            state = each.state()
            if state is not None and state.stage == "full":
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
                blobs, size = put_back(each, f"{TREE}/{state.folder}".rstrip("/"), pool, wanted, note, again=again)
            finally:
                os.close(pool)
            out.asides += blobs > 0
            out.blobs += blobs
            out.bytes += size
            each.drop()
    for digest in sorted(wanted.missing):
        note(digest, "it is not in quarantine: its time there is over, or it never went; pull it again if it is missed")
    out.seconds = round(time.monotonic() - started, 6)
    return out


class _Wanted:
    """Says of names whether they are to come back, and keeps what it was not asked about."""

    def __init__(self, digests: Sequence[str]) -> None:
        self._all = not digests
        self._digests = frozenset(digests)
        self.missing = set(digests)

    def __call__(self, name: str) -> bool:
        if self._all:
            return True
        digest = digest_of(name)
        self.missing.discard(digest)
        return digest in self._digests


def _pool(place: Place, folder: str) -> int | None:
    if place.fd is None:
        return None
    try:
        return open_below(place.fd, folder)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return None
        raise
