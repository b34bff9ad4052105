"""The registry: what the fleet knows, in one Redis primary, written only by documented Lua on Redis time.

`Registry.connect(settings)` is the way in. It opens no connection before the first call, holds one pool per process, and answers a
Redis that cannot be reached with `errors.Unavailable` within `settings.redis_timeout` seconds.
"""

from __future__ import annotations

from typing import Any, Self

from mothball.registry.budget import Budget, BudgetState, Reservation
from mothball.registry.caches import CacheLease, Caches, LastPrune
from mothball.registry.connection import Connection
from mothball.registry.counters import Counters
from mothball.registry.crashes import Crash, Crashes
from mothball.registry.events import Event, Events
from mothball.registry.hosts import Host, HostCheck, Hosts
from mothball.registry.jobs import Jobs
from mothball.registry.lifecycle import Lifecycle, ResumeResult
from mothball.registry.policies import Policies, PolicyBook
from mothball.registry.presence import Beat, Presence
from mothball.registry.rebuild import RebuildResult, Rebuilds, Recovered
from mothball.registry.records import (
    FINAL_STATES,
    STATES,
    Adopt,
    CancelResult,
    Claim,
    Doorbell,
    FailResult,
    Job,
    SubmitResult,
)
from mothball.registry.redaction import fleet_key
from mothball.registry.retentions import Retentions
from mothball.registry.runs import BACKOFF_MS, MAX_JITTER_PER_MILLE
from mothball.registry.scripts import Scripts
from mothball.registry.sessions import Sessions
from mothball.registry.slots import Slots
from mothball.registry.stats import LastStats
from mothball.registry.workspaces import TouchResult, Workspace, Workspaces
from mothball.settings import Settings

__all__ = [
    "BACKOFF_MS",
    "FINAL_STATES",
    "MAX_JITTER_PER_MILLE",
    "STATES",
    "Adopt",
    "Beat",
    "BudgetState",
    "CacheLease",
    "CancelResult",
    "Claim",
    "Crash",
    "Doorbell",
    "Event",
    "FailResult",
    "Host",
    "HostCheck",
    "Job",
    "LastPrune",
    "PolicyBook",
    "RebuildResult",
    "Recovered",
    "Registry",
    "Reservation",
    "ResumeResult",
    "SubmitResult",
    "TouchResult",
    "Workspace",
]


class Registry:
    """One handle for a process; threads may share it. Build a new one after a fork."""

    def __init__(self, settings: Settings) -> None:
        self._connection = Connection(settings)
        scripts = Scripts(self._connection, settings)
        self.settings = settings
        self.workspaces = Workspaces(self._connection, scripts, settings)
        self.retentions = Retentions(scripts, self.workspaces, settings)
        self.lifecycle = Lifecycle(self._connection, scripts, settings)
        self.presence = Presence(self._connection, scripts, settings)
        self.policies = Policies(self._connection, scripts, self.workspaces, settings)
        self.jobs = Jobs(self._connection, scripts, settings)
        self.hosts = Hosts(self._connection, scripts, settings)
        self.events = Events(self._connection, scripts, settings)
        self.counters = Counters(self._connection, settings)
        self.slots = Slots(scripts)
        self.stats = LastStats(self._connection, settings)
        self.rebuilds = Rebuilds(scripts, self.workspaces)
        self.crashes = Crashes(self._connection, scripts, settings)
        self.budget = Budget(self._connection, scripts, settings)
        self.caches = Caches(self._connection, scripts, settings)
        self.sessions = Sessions(self._connection, settings)

    @classmethod
    def connect(cls, settings: Settings) -> Registry:
        """A registry on `settings.registry_url`; nothing is sent before the first call."""
        return cls(settings)

    def time_ms(self) -> int:
        """Redis TIME in ms."""
        return self._connection.time_ms()

    def redaction_key(self) -> bytes:
        """The fleet's key for the pseudonyms of secrets, 32 bytes; made on first use. Raises `Unavailable`."""
        return fleet_key(self._connection, self.settings)

    def ping(self) -> bool:
        """True when Redis answers; raises `Unavailable` when it does not."""
        with self._connection.guard() as client:
            return bool(client.ping())

    def info(self) -> dict[str, Any]:
        """What the server says about itself (INFO); raises `Unavailable`."""
        with self._connection.guard() as client:
            return dict(client.info())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's connections."""
        self._connection.close()
