"""Kills in the middle of captures, twenty of each kind: every job succeeds once, one generation, no lease left, a clean store."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mothball.registry import Job
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.acceptance.fleet import FleetRun, Process
from workers.redis_server import RedisServer

ROUNDS = 20
FILES = 24
QUICK: dict[str, Any] = {
    "lease_seconds": 3, "redis_timeout": 1.5, "ring_seconds": 1, "queued_ring_after_seconds": 2, "heartbeat_seconds": 1,
}  # fmt: skip
# Slow on purpose: a kill must find the capture at work, so about a second of compression in small frames.
SLOW: dict[str, Any] = {"zstd_level": 19, "frame_bytes": 128 * 1024, "capture_threads": 1}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def start(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Callable[..., Captures]]:
    """`start(**overrides)`: a fleet with two workers of one pool process each, and beat."""
    runs: list[FleetRun] = []

    def begin(**overrides: Any) -> Captures:
        fixed = {"worker_concurrency": 1, "max_deliveries": 100, "log_format": "json"}
        run = FleetRun(make_settings(**{**SLOW, **fixed, **overrides}), tmp_path / "fleet", slow=False)
        runs.append(run)
        return Captures(run, private_redis)

    yield begin
    for run in runs:
        run.__exit__(None, None, None)


class Captures:
    """A fleet at work on captures, and what must hold at the end."""

    def __init__(self, fleet: FleetRun, server: RedisServer) -> None:
        self.fleet = fleet
        self.server = server
        self.jobs: dict[str, str] = {}
        self.workers: dict[str, Process] = {}
        self.struck: set[str] = set()

    def worker(self, *, ready: bool = True) -> Process:
        """One more worker, with a name of its own."""
        name = f"w{len(self.fleet.processes)}"
        self.workers[name] = self.fleet.worker(name, ready=ready)
        return self.workers[name]

    def submit(self, count: int) -> None:
        """Register `count` more workspaces with content of their own and ask for a capture of each."""
        for _ in range(count):
            number = len(self.jobs)
            folder = self.fleet.folder / "trees" / f"t{number}"
            self._grow(folder, number)
            workspace = self.fleet.workspace(f"chaos/r#{number}", path=folder)
            self.jobs[self.fleet.submit("workspace.capture", workspace=workspace)] = workspace

    def _grow(self, folder: Path, seed: int) -> None:
        rng = random.Random(seed)
        words = [rng.randbytes(6).hex() for _ in range(500)]
        (folder / "sub" / "empty").mkdir(parents=True)
        for number in range(FILES):
            (folder / ("sub" if number % 2 else ".") / f"f{number}.txt").write_text(" ".join(rng.choices(words, k=4000)))
        (folder / "link").symlink_to("f0.txt")

    def in_the_middle(self) -> Job:
        """A job that is writing its layer right now, and was not struck before."""

        def find() -> Job | None:
            for job in self.fleet.registry.jobs.list(state="running"):
                fresh = job.id in self.jobs and job.id not in self.struck
                if (
                    fresh
                    and job.progress.get("step") == "write"
                    and psutil.pid_exists(int((job.worker or "/0").rpartition("/")[2]))
                ):
                    return job
            return None

        found = self.fleet.until(find, "a capture is being written", seconds=60, every=0.01)
        assert found is not None
        return found

    def hit(self, job: Job) -> bool:
        """Whether the strike came before the run ended; counts the job as struck."""
        self.struck.add(job.id)
        return self.fleet.job(job.id).state != "succeeded"

    def all_well(self, *, seconds: float = 120) -> None:
        """Every job succeeded once, one generation each, nothing left behind, and the store holds exactly the trees."""
        for job_id in self.jobs:
            job = self.fleet.finished(job_id, seconds=seconds)
            assert job.state == "succeeded", (job, self.fleet.processes[-1].tail())
        self.fleet.until(lambda: self.fleet.leases() == [], "no lease is left", seconds=10)
        registry = self.fleet.registry
        counters = registry.counters.all()
        assert counters["jobs_succeeded:workspace.capture"] == len(self.jobs), counters
        assert counters["captures"] == len(self.jobs), counters
        # Only these: the sweeps of a fleet ask its host for upkeep of the store meanwhile.
        unfinished = registry.jobs.list(state="running") + registry.jobs.list(state="queued")
        assert not [job for job in unfinished if job.task == "workspace.capture"]
        events = registry.events.list(limit=10_000, kind="job.succeeded")
        succeeded = [event.fields["job"] for event in events if event.fields["task"] == "workspace.capture"]
        assert sorted(succeeded) == sorted(self.jobs)
        store = Store(self.fleet.settings.store_dir)
        for job_id, workspace in self.jobs.items():
            record = registry.workspaces.get(workspace)
            refs = store.refs(workspace).list()
            assert [(ref.name, ref.generation, ref.digest) for ref in refs] == [("latest", 1, record.digest)], (workspace, refs)
            assert record.generation == 1, record
            outcome = self.fleet.job(job_id).outcome or {}
            assert (outcome["digest"], outcome["generation"]) == (record.digest, 1), outcome
            self._is_the_tree(store, record.digest, Path(record.path))
        report = verify(store, level="content")
        assert (report.problems, report.refs) == ([], len(self.jobs))

    def _is_the_tree(self, store: Store, digest: str, folder: Path) -> None:
        with Tree.open(store, digest) as tree:
            stored = {entry.path: entry for entry in tree.walk() if entry.path not in {"", "."}}
            real = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
            assert set(stored) == set(real)
            for name, path in real.items():
                if path.is_file() and not path.is_symlink():
                    assert tree.read(name) == path.read_bytes(), name


def test_sigkill_of_the_pool_process_twenty_times(start: Callable[..., Captures]) -> None:
    """The out-of-memory killer takes the process that captures."""
    captures = start(**QUICK)
    captures.worker()
    captures.worker()
    captures.fleet.beat()
    captures.submit(4)
    hits = 0
    while hits < ROUNDS:
        captures.submit(1)
        job = captures.in_the_middle()
        os.kill(int((job.worker or "").rpartition("/")[2]), signal.SIGKILL)
        hits += captures.hit(job)
    captures.all_well()
    assert all(worker.alive for worker in captures.workers.values())
    assert sum(captures.fleet.job(job).deliveries for job in captures.jobs) >= len(captures.jobs) + ROUNDS


def test_sigkill_of_the_whole_worker_twenty_times(start: Callable[..., Captures]) -> None:
    """The container dies; another one is already there or comes up."""
    captures = start(**QUICK)
    captures.worker()
    captures.worker()
    captures.fleet.beat()
    captures.submit(3)
    hits = 0
    while hits < ROUNDS:
        captures.submit(1)
        job = captures.in_the_middle()
        captures.workers[(job.worker or "").partition("@")[0]].kill()
        captures.worker(ready=False)
        hits += captures.hit(job)
    captures.all_well()
    assert sum(captures.fleet.job(job).deliveries for job in captures.jobs) >= len(captures.jobs) + ROUNDS


def test_sigkill_of_redis_twenty_times(start: Callable[..., Captures]) -> None:
    """Redis dies and comes back on its append-only file: the captures go on, or are repeated; nothing is doubled."""
    captures = start(**QUICK)
    captures.worker()
    captures.worker()
    captures.fleet.beat()
    captures.submit(3)
    for _ in range(ROUNDS):
        captures.submit(1)
        captures.struck.add(captures.in_the_middle().id)
        captures.server.kill()
        captures.server.start()
    captures.all_well()
    assert all(worker.alive for worker in captures.workers.values())


def test_a_worker_paused_past_its_lease_publishes_nothing(start: Callable[..., Captures]) -> None:
    """SIGSTOP in the middle of a capture, longer than the lease: its successor publishes, it does not, also when it wakes up."""
    captures = start(**QUICK)
    paused = captures.worker()
    captures.fleet.beat()
    for _ in range(3):
        captures.submit(1)
        job = captures.in_the_middle()
        paused.signal_all(signal.SIGSTOP)
        successor = captures.worker()
        captures.all_well(seconds=60)
        done = captures.fleet.job(job.id)
        assert (done.worker or "").startswith(f"{successor.name}@")
        assert done.fence > job.fence
        before = captures.fleet.registry.workspaces.get(captures.jobs[job.id])
        paused.signal_all(signal.SIGCONT)
        captures.fleet.until(lambda log=paused: "lease lost" in log.text(), "the paused run learns it was replaced", seconds=20)
        assert captures.fleet.registry.workspaces.get(captures.jobs[job.id]) == before
        captures.all_well()
        paused.kill()
        paused = successor


def test_with_the_default_settings_a_killed_worker_costs_less_than_a_minute(start: Callable[..., Captures]) -> None:
    """Lease 30 s, ring 10 s: from the kill to the outcome, the capture itself included."""
    captures = start()
    settings = captures.fleet.settings
    assert (settings.lease_seconds, settings.ring_seconds) == (30, 10)
    captures.worker()
    captures.fleet.beat()
    captures.submit(1)
    job = captures.in_the_middle()
    killed = time.monotonic()
    captures.workers[(job.worker or "").partition("@")[0]].kill()
    assert captures.hit(job)
    captures.worker(ready=False)
    captures.all_well(seconds=60)
    assert time.monotonic() - killed < 60


def test_with_the_default_settings_a_killed_pool_process_costs_less_than_a_minute(start: Callable[..., Captures]) -> None:
    """Without a lease to wait for: the main process gives it back. No beat runs here, so nothing else can bring it back."""
    captures = start()
    captures.worker()
    captures.submit(1)
    job = captures.in_the_middle()
    killed = time.monotonic()
    os.kill(int((job.worker or "").rpartition("/")[2]), signal.SIGKILL)
    assert captures.hit(job)
    captures.all_well(seconds=60)
    assert time.monotonic() - killed < 25
