"""Jobs of a host: what is done to a host's store as a whole, not to one workspace.

Such a job holds no workspace's lease. Whatever it must not share with another run on that host, it locks itself (a file lock in
the store); whatever it changes of one workspace, it changes under that workspace's index lock.
"""

from __future__ import annotations

from typing import Any

import structlog
from billiard.exceptions import SoftTimeLimitExceeded
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mothball.errors import InvalidParams, Unavailable
from mothball.names import check_host
from mothball.registry import Doorbell, Job
from tasks.services import Services

log = structlog.stdlib.get_logger("mothball.sweep")

_GIVE_UP_AFTER = 2
"""Calls in a row that may find no Redis: each waits seconds, and the next sweep comes anyway."""


class HostArgs(BaseModel):
    """Arguments of a job of a host; tasks that need more inherit from it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    host: str = Field(description="the host that does it")

    @field_validator("host")
    @classmethod
    def _is_a_host(cls, value: str) -> str:
        try:
            return check_host(value)
        except InvalidParams as error:
            raise ValueError(error.message) from None


def ask_hosts(here: Services, task: str, args: dict[str, Any], lane: str) -> dict[str, Any]:
    """Submit `task` with `args` and its host to every host that is online; for sweeps. One bad host never ends it.

    Returns how many hosts were `asked` (a job was made), had one queued already (`joined`), or `failed`. Hosts that are offline
    are left out: the sweep after their return asks them. Raises `Unavailable` when the registry cannot be reached at all.
    """
    bells = Bells(here)
    asked = joined = failed = in_a_row = 0
    for host in (each.host for each in here.registry.hosts.list() if each.online):
        try:
            submitted = here.registry.jobs.submit(task, {**args, "host": host}, workspace=None, host=host, lane=lane, origin="beat")
            in_a_row = 0
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:  # whatever is wrong with one host (a record nobody can read, a forgotten name)
            failed, in_a_row = failed + 1, in_a_row + 1
            log.warning("host not asked", asking=task, host=host, error=f"{type(error).__name__}: {error}"[:500])
            if isinstance(error, Unavailable) and in_a_row >= _GIVE_UP_AFTER:
                break
            continue
        asked, joined = asked + (not submitted.joined), joined + submitted.joined
        if submitted.ring:
            bells.ring(submitted.job)
    return {"asked": asked, "joined": joined, "failed": failed}


class Bells:
    """Doorbells of one sweep. The jobs are recorded: what cannot be rung now, maintenance.ring rings."""

    def __init__(self, here: Services) -> None:
        self._here = here
        self._silent = 0

    def ring(self, job: Job) -> None:
        """Ring for `job`; after a few that found no broker none is tried any more. Never raises but for a time limit."""
        if self._silent >= _GIVE_UP_AFTER:
            return
        try:
            self._here.ringer.ring(Doorbell(job=job.id, task=job.task, queue=job.queue))
            self._silent = 0
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:  # as in maintenance.ring: one doorbell, not the sweep
            self._silent += 1
            log.warning("doorbell not rung", ringing=job.id, error=f"{type(error).__name__}: {error}"[:500])
