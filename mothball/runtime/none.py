"""Driver `none`: nobody said what runs in the workspace, so nothing is ended and nothing is claimed dead."""

from __future__ import annotations

from mothball.errors import NotRunning
from mothball.runtime.driver import Alive, Listener, Stats, Stopped, Tick
from mothball.runtime.usage import stats_of


class NoneDriver:
    """A workspace without a runtime."""

    name = "none"

    def alive(self) -> Alive:
        """Not known, and said so: never a sure death."""
        return Alive(alive=False, reason="no runtime is recorded for this workspace", sure=False)

    def stop(self, grace_s: float, tick: Tick) -> Stopped:
        """There is nothing to end."""
        return Stopped(how="was_dead", facts={"reason": "no runtime is recorded for this workspace"})

    def stats(self, path: str | None) -> Stats:
        """The bytes of the directory; no process is known."""
        return stats_of([], path)

    def ports(self) -> list[Listener]:
        """None can be known. Raises `NotRunning`."""
        raise NotRunning("no runtime is recorded for this workspace: its ports are not known", what="the runtime")
