"""A capture that a run notes on its way: once, under its fence, whatever becomes of the run."""

from __future__ import annotations

from typing import Any

import pytest

from mothball.errors import LeaseLost
from tests.integration.registry.support import Bench

DIGEST = f"sha256:{'ab' * 32}"
MADE: dict[str, Any] = {"generation": 1, "digest": DIGEST, "bytes": 12, "files": 2, "stored_bytes": 500}


def test_a_noted_capture_stands_in_the_record_at_once_and_counts_once_however_often_it_is_noted(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job = bench.submit("o/r#1")
    claim = bench.claim(job.id)
    for _ in range(3):
        bench.registry.jobs.captured(job.id, claim.fence, MADE)
    record = bench.registry.workspaces.get("o/r#1")
    assert (record.generation, record.digest, record.bytes, record.files, record.stored_bytes) == (1, DIGEST, 12, 2, 500)
    assert record.high_water_bytes == 12
    counters = bench.registry.counters.all()
    assert (counters["captures"], counters["capture_stored_bytes"]) == (1, 500)
    assert len(bench.registry.events.list(kind="workspace.captured")) == 1
    bench.registry.jobs.fail(job.id, claim.fence, code="operation_failed", message="no", retryable=False)
    assert bench.registry.workspaces.get("o/r#1").generation == 1


def test_q15_what_a_run_noted_is_loaded_in_the_budget(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job = bench.submit("o/r#1")
    claim = bench.claim(job.id)
    before = bench.registry.budget.state(None).loaded
    bench.registry.jobs.captured(job.id, claim.fence, MADE)
    bench.registry.jobs.captured(job.id, claim.fence, {**MADE, "generation": 2, "stored_bytes": 20})
    assert bench.registry.budget.state(None).loaded == before + 520


def test_a_run_that_lost_its_lease_or_is_behind_notes_nothing(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job = bench.submit("o/r#1")
    claim = bench.claim(job.id)
    bench.registry.jobs.captured(job.id, claim.fence, {**MADE, "generation": 5})
    with pytest.raises(LeaseLost):
        bench.registry.jobs.captured(job.id, claim.fence, {**MADE, "generation": 4})
    bench.registry.jobs.release_lost(job.id, claim.fence)
    with pytest.raises(LeaseLost):
        bench.registry.jobs.captured(job.id, claim.fence, {**MADE, "generation": 6})
    assert bench.registry.workspaces.get("o/r#1").generation == 5
