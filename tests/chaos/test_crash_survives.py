"""A worker that is killed in the middle of a crash report: the job is run again, and nothing is doubled or left behind."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.client import Fleet
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.artifact import find_report, load_report
from mothball.store.verify import verify
from tests.acceptance.fleet import FleetRun
from workers.redis_server import RedisServer

ID = "chaos/r#1"
FILES, WORDS = 400, 12_000
STEPS = ("write", "learn", "pack", "scan", "publish")
TOKEN = "gh" + "p_" + "Ch40sCanary" * 3
QUICK: dict[str, Any] = {
    "lease_seconds": 3, "redis_timeout": 1.5, "ring_seconds": 1, "queued_ring_after_seconds": 2, "heartbeat_seconds": 1,
    "worker_concurrency": 1, "max_deliveries": 100, "log_format": "json", "crash_window_seconds": 0, "capture_threads": 1,
}  # fmt: skip

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def fleet(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[FleetRun]:
    """A beat, and a workspace that takes a moment to package."""
    with FleetRun(make_settings(**QUICK), tmp_path / "fleet", slow=False) as run:
        words = [random.Random(1).randbytes(4).hex() for _ in range(500)]
        folder = run.folder / "trees" / "a"
        folder.mkdir(parents=True)
        for number in range(FILES):
            rng = random.Random(number)
            (folder / f"f{number}.txt").write_text(" ".join(rng.choices(words, k=WORDS)))
            if number % 50 == 0:
                (folder / f"s{number}.txt").write_text(f"token {TOKEN}\n")
        run.workspace(ID, path=folder)
        run.beat()
        yield run


def kill_at(fleet: FleetRun, step: str, number: int) -> tuple[str, bool]:
    """File a report and kill its worker at `step`; the job, and whether the strike came before its end."""
    worker = fleet.worker(f"w{number}")
    with Fleet(settings=fleet.settings) as client:
        job = client.crash_report(ID, f"failure number {number} {TOKEN}", exit_code=1, command=["make", "test"]).id

    def there() -> bool:
        record = fleet.job(job)
        return record.progress.get("step") == step or record.state == "succeeded"

    fleet.until(there, f"the report is at {step}", seconds=60, every=0.002)
    worker.kill()
    hit = fleet.job(job).state != "succeeded"
    fleet.worker(f"w{number}-next", ready=False)
    record = fleet.finished(job, seconds=90)
    assert record.state == "succeeded", (record, fleet.processes[-1].tail())
    assert (record.deliveries > 1) is hit
    fleet.processes[-1].kill()
    return job, hit


def test_sigkill_of_the_worker_at_every_step_of_a_report(fleet: FleetRun) -> None:
    jobs, hits = [], 0
    for number, step in enumerate(STEPS):
        (fleet.folder / "trees" / "a" / "changing.txt").write_text(f"{number}\n" * 1000)
        job, hit = kill_at(fleet, step, number)
        jobs.append(job)
        hits += hit
    assert hits >= len(STEPS) - 2, "most strikes came in the middle"
    registry = fleet.registry
    reports = registry.crashes.list()
    assert sorted(report.job for report in reports) == sorted(jobs)
    counters = registry.counters.all()
    assert counters["crash_reports"] == len(jobs)
    assert counters["jobs_succeeded:workspace.crash_report"] == len(jobs)
    assert len(registry.events.list(limit=10_000, kind="workspace.crashed")) == len(jobs)
    # The captures: one generation for each change, whoever made it.
    assert registry.workspaces.get(ID).generation == len(STEPS)
    crash_dir, store = fleet.settings.crash_dir, Store(fleet.settings.store_dir)
    assert sorted(path.name for path in crash_dir.iterdir()) == sorted(f"{report.id}.tar" for report in reports)
    refs = [ref.name for ref in store.refs(ID).list()]
    assert sorted(refs) == sorted(["latest", *(report.id for report in reports)])
    for report in reports:
        assert TOKEN.encode() not in Path(report.path).read_bytes()
        with tarfile.open(report.path) as tar:
            member = tar.extractfile("report.json")
            assert member is not None
            document = member.read()
            files = [each for each in tar if each.isfile() and each.name.startswith("rootfs/workspace/")]
        assert document == load_report(store, find_report(store, ID, report.id).digest)
        assert len(files) == report.files == json.loads(document)["package"]["files"]
    fleet.until(lambda: fleet.leases() == [], "no lease is left", seconds=10)
    assert verify(store, level="content").problems == []
