"""What happens to messages: ours, other code bases', and those that no worker should believe."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from celery.exceptions import QueueNotFound

from tests.acceptance.fleet import FleetRun


def test_a_job_runs_once_and_its_outcome_is_in_the_record(fleet: FleetRun) -> None:
    """The plain way: submit, ring, run, finish; no lease stays behind."""
    fleet.worker()
    fleet.workspace("r/a#1")
    effects = fleet.folder / "effects"
    job = fleet.finished(fleet.submit("probe.slow", workspace="r/a#1", seconds=0.1, effects=str(effects)))
    assert (job.state, job.deliveries, job.attempts) == ("succeeded", 1, 0), job
    assert job.outcome == {"slept": 0.1, "fence": job.fence}
    assert effects.read_text().splitlines() == [f"{job.id} {job.fence}"]
    assert fleet.leases() == []
