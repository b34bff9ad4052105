"""After blobs left a layout: what an index names by now comes back, until no pull can be counting on one of them any more.

A pull finds a blob, waits for its others, and names all of them at its end. So what went is given back when an index names it, and
it is not deleted before every process has ended that may have found it, and nothing else shows a pull.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from mothball.ocicache.openfiles import OpenFiles
from mothball.ocicache.pullers import Process, Pullers, ticks
from mothball.ocicache.sparing import Sparing
from mothball.ocicache.types import Tick

MOST_S: Final = 60.0
PRESSED_S: Final = 15.0
"""How long is waited at most; the disk is full then."""
HELD_MS: Final = 60_000
"""How long what went can be given back after that."""
_POLL_S: Final = 0.05
_SHARE: Final = 4
"""A look that takes long is followed by a pause that is so many times as long."""
_LONGEST_S: Final = 1.0
_EXPLAINED_S: Final = 0.5
"""A change is that of a pull that was seen so lately. Began it after the blobs went, it does not count on them."""


class Grace:
    """The wait of one prune. `pool`: the folder of the blobs."""

    def __init__(self, sparing: Sparing, pool: int, opened: OpenFiles, tick: Tick, give_back: Callable[[], None]) -> None:
        self._sparing = sparing
        self._pool = pool
        self._opened = opened
        self._tick = tick
        self._give_back = give_back
        self._pullers = Pullers(sparing.paths)
        self._seen = self._changed = 0.0

    def wait(self, *, settle_s: float, most_s: float) -> str:
        """Give back until it is over, at least for `settle_s`; what still shows a pull after `most_s`, empty when nothing does.

        Also a change that nobody explains is waited out for `settle_s`.
        """
        began = ticks()
        started = time.monotonic()
        self._changed = started
        waited = {each for each in self._pullers.look(files=True) if each.began <= began}
        stamp = self._stamp()
        while True:
            now = time.monotonic()
            self._tick(0)
            waited = {each for each in waited if each.runs()}
            if self._pullers.look():
                self._seen = now
            if stamp != self._stamp() and now - self._seen > _EXPLAINED_S:
                self._changed = now
            still = self._still(waited, now, settle_s)
            # What ended before that look has named by now all that it counts on.
            self._give_back()
            if not still and now - started >= settle_s:
                return ""
            if now - started >= most_s:
                return still
            stamp = self._stamp()
            time.sleep(min(max(_POLL_S, _SHARE * (time.monotonic() - now)), _LONGEST_S))

    def _still(self, waited: set[Process], now: float, settle_s: float) -> str:
        if waited:
            one = min(waited)
            return f"process {one.pid} names it or has something in it open, and began before"
        if self._pullers.hangs:
            return "the processes of this host cannot be looked at: /proc does not answer"
        if now - self._changed < settle_s:
            return "it keeps changing, and no process of this host says that it pulls into it"
        if now - self._seen > _EXPLAINED_S and (sign := self._sparing.pulling(self._opened, wait=False)) is not None:
            return f"{sign!r} is being written there"
        return ""

    def _stamp(self) -> tuple[int, ...]:
        return os.fstat(self._pool).st_mtime_ns, *self._sparing.changed()
