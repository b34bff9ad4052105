"""Maintenance of the fleet: doorbells for jobs that wait for one, and a look at who is still there."""

from __future__ import annotations

from typing import Any

import structlog
from billiard.exceptions import SoftTimeLimitExceeded

from mothball.errors import Unavailable
from mothball.settings import Settings
from tasks.services import Services
from tasks.sweep import sweep_task

log = structlog.stdlib.get_logger("mothball.sweep")

RING_BATCH = 500
"""Most doorbells of one sweep; the rest waits for the next (a sweep is bounded, or it would outlive its slot)."""

_GIVE_UP_AFTER = 2
"""Doorbells in a row that may find no broker: each waits seconds, and the next sweep comes anyway."""


@sweep_task(name="maintenance.ring", every=lambda settings: settings.ring_seconds, soft_time_limit=45, time_limit=60)
def ring(here: Services) -> dict[str, Any]:
    """Ring for due retries, for leases that ran out, for jobs queued too long and for waiters whose lease is gone.

    This is what makes a lost message, a killed worker or an emptied broker cost seconds and never a job (design, 4).
    """
    rung = failed = in_a_row = 0
    for doorbell in here.registry.jobs.ring(limit=RING_BATCH):
        try:
            here.ringer.ring(doorbell)
            rung, in_a_row = rung + 1, 0
        except Unavailable as error:
            failed, in_a_row = failed + 1, in_a_row + 1
            log.warning("doorbell not rung", ringing=doorbell.job, error=error.message)
            if in_a_row >= _GIVE_UP_AFTER:
                break
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:  # whatever is wrong with one job, the others must be rung
            failed += 1
            log.error("doorbell not rung", ringing=doorbell.job, error=f"{type(error).__name__}: {error}"[:500])
    return {"rung": rung, "failed": failed}


def check_hosts_seconds(settings: Settings) -> int:
    """Interval of the host check: a third of the silence that makes a host offline, so the news is never much late."""
    return max(1, settings.host_offline_seconds // 3)


@sweep_task(name="maintenance.check_hosts", every=check_hosts_seconds, soft_time_limit=45, time_limit=60)
def check_hosts(here: Services) -> dict[str, Any]:
    """Note which hosts fell silent and which came back; the registry writes one event per change."""
    checked = here.registry.hosts.check()
    return {"went_offline": list(checked.went_offline), "came_back": list(checked.came_back)}
