"""What every driver answers: is it alive, end it, what does it use, where does it listen.

A driver never starts anything. Each of its calls ends within a limit of its own (`TimedOut`), so that one runtime that hangs costs
its own item and not the sweep. Nothing here knows the registry: times of the fleet's clock are filled in by whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

from mothball.errors import NotRunning

Tick = Callable[[], None]
"""Called again and again while a driver waits; it may raise (a cancel, a lost lease), and then nothing more is signalled."""

KILL_SECONDS = 10.0
"""How long processes may take to die of SIGKILL before they are reported as left (a disk or a network share that hangs)."""


class Alive(msgspec.Struct, frozen=True):
    """Whether the runtime lives, in words, and what is known of its end (exit code, signal, oom)."""

    alive: bool
    reason: str
    facts: dict[str, Any] = {}
    sure: bool = True
    """False when the driver cannot see it from here. Missing is not dead: whoever acts on a death must ask for a sure one."""

    def require(self, what: str) -> None:
        """Raise `NotRunning` of `what` unless it lives."""
        if not self.alive:
            raise NotRunning(f"nothing runs: {self.reason}", what=what)


class Stopped(msgspec.Struct, frozen=True):
    """How a stop ended: nothing was alive, SIGTERM (or what the driver has for it) was enough, or SIGKILL was needed."""

    how: Literal["was_dead", "term", "kill"]
    facts: dict[str, Any] = {}
    left: list[dict[str, Any]] = []
    """Processes that live on all the same: pid, process, reason. Empty after a stop that worked."""


class Stats(msgspec.Struct, frozen=True):
    """What a workspace uses (N-24)."""

    cpu_seconds: float
    """Of the processes that live and of those they have waited for; a driver with an account of its own (cgroup) says all of it."""
    rss_bytes: int
    disk_bytes: int | None
    """Allocated bytes of the directory (blocks, not apparent sizes); None when nobody asked or it could not be read."""
    processes: int
    collected_at: int = 0
    """ms of Redis TIME; set by the job that asked."""
    stale: bool = False
    """True for the last known figures of a runtime that is dead or cannot be seen now."""
    disk_complete: bool = True
    """False when the directory was too large to be measured in time; `disk_bytes` is then what was seen."""


class Listener(msgspec.Struct, frozen=True, order=True):
    """One listening TCP port of the workspace (N-26)."""

    address: str
    port: int
    pid: int | None
    process: str
    started: int | None = None
    """Start time of the process in clock ticks: what else would say that `pid` is still the same one when its port is probed."""
    netns: str = ""
    """Network namespace (``net:[...]``) the port is in, for a workspace with one of its own; empty: that of the worker."""


class Driver(Protocol):
    """One runtime of one workspace, as the record's handle names it."""

    name: str

    def alive(self) -> Alive:
        """Whether anything of it runs. Raises `TimedOut`, `OperationFailed`."""

    def stop(self, grace_s: float, tick: Tick) -> Stopped:
        """End all of it: TERM, `grace_s` seconds, KILL until nothing is left.

        Raises `TimedOut`, `OperationFailed` and what `tick` raises.
        """

    def stats(self, path: str | None) -> Stats:
        """What it uses now, with the bytes of directory `path`. Raises `NotRunning`, `TimedOut`, `OperationFailed`."""

    def ports(self) -> list[Listener]:
        """Its listening TCP ports. Raises `NotRunning`, `TimedOut`, `OperationFailed`."""
