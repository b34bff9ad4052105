"""Two beats and two workers reclaim what nobody uses and leave alone what somebody does; each effect once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mothball import runtime
from mothball.client import Fleet
from mothball.errors import Gone
from mothball.registry import Event, Job
from mothball.settings import Settings
from tests.acceptance.fleet import FleetRun
from tests.integration.runtime.containers import Runc
from workers.redis_server import RedisServer

HOUR = 3_600_000
TREE = "trap '' TERM; sleep 1000 & (trap '' TERM; sleep 1000 & sleep 1000 & wait) & wait"
"""Processes that do not end when they are asked to: a shell, a subshell, and what they started."""


class Life:
    """The fleet of this test: everything by name, and what is known of each name."""

    def __init__(self, run: FleetRun) -> None:
        self.run = run
        self.registry = run.registry
        self.producer = Fleet(settings=run.settings)

    def add(self, name: str, policy: dict[str, Any] | None = None, *, content: bytes = b"text\n", **fields: Any) -> str:
        folder = self.run.folder / "trees" / name.replace("/", "-").replace("#", "-")
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(content)
        self.registry.workspaces.register(name, host=self.run.settings.host, path=str(folder), policy=policy, **fields)
        return name

    def events(self, kind: str) -> list[Event]:
        return self.registry.events.list(limit=100_000, kind=kind)[::-1]

    def reasons(self, kind: str) -> dict[str, list[str]]:
        """Reasons of the events of `kind`, by workspace."""
        found: dict[str, list[str]] = {}
        for event in self.events(kind):
            found.setdefault(event.fields["workspace"], []).append(event.fields["reason"])
        return found

    def evicted(self, name: str) -> str | None:
        """The reason for which it is gone, None while it is there."""
        try:
            self.registry.workspaces.get(name)
        except Gone:
            tomb = self.registry.lifecycle.tombstone(name)
            return str(tomb["reason"]) if tomb else "?"
        return None

    def state(self, name: str) -> str:
        return self.registry.workspaces.get(name).state

    def jobs(self, task: str, name: str) -> list[Job]:
        return [job for job in self.registry.jobs.list(workspace=name, limit=1000) if job.task == task]

    def captured(self, *names: str) -> None:
        """Capture them one after the other: the run of a job for a producer is a sign of life, and the budget goes by these."""
        for name in names:
            job = self.producer.submit("workspace.capture", {"workspace": name}, workspace=name).job
            assert self.run.finished(job.id).state == "succeeded"


@pytest.fixture
def life(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Life]:
    quick: dict[str, Any] = {
        "lease_seconds": 5, "ring_seconds": 1, "queued_ring_after_seconds": 1, "heartbeat_seconds": 1, "soft_shutdown_seconds": 1,
        "worker_concurrency": 3, "log_format": "json", "redis_timeout": 2.0, "fsync": False, "events_max": 100_000,
        "sweep_seconds": 1, "stop_stale_seconds": 1, "reconcile_seconds": 2, "sweep_batch": 5, "policy": "ttl=never,cap=never",
    }  # fmt: skip
    with FleetRun(make_settings(**quick), tmp_path / "fleet") as run:
        found = Life(run)
        yield found
        found.producer.close()


@pytest.fixture
def runc(tmp_path: Path) -> Iterator[Runc]:
    found = Runc(tmp_path / "runc")
    yield found
    found.end()


@pytest.fixture
def tree() -> Iterator[subprocess.Popen[bytes]]:
    """A process with children and grandchildren in a session of its own."""
    process = subprocess.Popen(["/bin/sh", "-c", TREE], start_new_session=True, stdin=subprocess.DEVNULL)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def family(pid: int) -> list[int]:
    """`pid` and all below it that run."""
    found = psutil.Process(pid)
    return [pid, *(child.pid for child in found.children(recursive=True))]


def running(pids: list[int]) -> list[int]:
    """Those of `pids` that have not ended (a zombie has)."""
    out = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                out.append(pid)
    return out


def test_two_beats_and_two_workers_reclaim_what_nobody_uses_and_leave_alone_what_somebody_does(
    life: Life, runc: Runc, tree: subprocess.Popen[bytes]
) -> None:
    run, registry = life.run, life.registry
    run.worker("w1")
    run.worker("w2")

    # Sweeps of an interval of five minutes: what they do now, they do because they were started.
    life.add("start/expired#1", {"ttl": "1s"})
    life.add("start/missed#1")
    registry.presence.heartbeat("start/missed#1", "agent", 500)
    time.sleep(1.2)
    started = time.monotonic()
    first = run.beat("beat-0", sweep_seconds=300, stop_stale_seconds=300, reconcile_seconds=300)
    run.until(lambda: life.evicted("start/expired#1") == "ttl", "the sweep at start evicts")
    run.until(lambda: life.state("start/missed#1") == "stranded", "the stop-stale sweep at start strands")
    assert time.monotonic() - started < 60
    first.kill()

    # The bytes of the budget's phase below: the first registered are the least recently used.
    blobs = random.Random(4)
    for number in (1, 2, 3):
        life.add(f"budget/b#{number}", content=blobs.randbytes(400_000))
    life.captured("budget/b#1", "budget/b#2", "budget/b#3")

    # What somebody uses or wants to keep, each with a TTL that is long over at the end.
    short = {"ttl": "2s"}
    life.add("keep/pinned#1", short, pinned=True)
    life.add("keep/held#1", short)
    registry.lifecycle.hold("keep/held#1", "evidence of a fault", "ann")
    life.add("keep/leased#1", short)
    slow = run.submit("probe.slow", workspace="keep/leased#1", seconds=90, effects=str(run.folder / "effects"))
    life.add("keep/submitted#1", short)
    registry.lifecycle.transition("keep/submitted#1", "submitted", by="ann", reason="review")
    life.add("keep/present#1", short)
    life.add("keep/persistent#1", short, mode="persistent")
    survivors = [f"keep/{name}#1" for name in ("pinned", "held", "leased", "submitted", "present", "persistent")]
    run.running(slow)

    pids = family(tree.pid)
    assert len(pids) >= 5
    stale = {"stop_after": "3s", "stop_grace": "1s"}
    with life.producer.active("keep/present#1", timeout=3.0):
        run.beat("beat-1")
        run.beat("beat-2")
        life.add("go/ttl#1", short)
        life.add("go/idle#1", {"idle_ttl": "2s"})
        life.add("go/age#1", {"max_age": "3s"}, mode="persistent")
        life.add("go/deadline#1", mode="persistent", expires_in_ms=2500)
        registry.policies.set_repo("go/cap", {"cap": 2})
        for number in (1, 2, 3, 4):
            life.add(f"go/cap#{number}")
        life.add("stop/tree#1", stale, runtime=runtime.handle_of_pid(tree.pid))
        container = runc.start("trap '' TERM; sleep 1000 & wait")
        life.add("stop/runc#1", stale, runtime=runc.handle(container))
        life.add("strand/lost#1")
        registry.presence.heartbeat("strand/lost#1", "agent-7", 1500)
        life.add("strand/left#1")
        registry.presence.heartbeat("strand/left#1", "agent-8", 1500)
        registry.presence.goodbye("strand/left#1", "agent-8")

        gone = {"go/ttl#1": "ttl", "go/idle#1": "idle_ttl", "go/age#1": "max_age", "go/deadline#1": "deadline", "go/cap#1": "cap",
                "go/cap#2": "cap"}  # fmt: skip
        for name, rule in gone.items():
            run.until(lambda name=name: life.evicted(name), f"{name} is evicted", seconds=40)
            assert life.evicted(name) == rule
        run.until(lambda: life.state("stop/tree#1") == "stopped", "the process tree is stopped", seconds=40)
        run.until(lambda: life.state("stop/runc#1") == "stopped", "the container is stopped", seconds=40)
        assert running(pids) == []
        assert runc.status(container) == "stopped"
        run.until(lambda: life.state("strand/lost#1") == "stranded", "the lost heartbeats strand")
        run.until(lambda: registry.workspaces.get("strand/lost#1").generation == 1, "what was left behind is captured")
        assert life.state("strand/left#1") == "active"
        for name in ("stop/tree#1", "stop/runc#1"):
            assert registry.workspaces.get(name).generation == 1, "nothing is stopped without a capture"

        # Undelete: back as stopped, and not taken again although its TTL is over.
        registry.lifecycle.undelete("go/ttl#1", "ann")
        assert life.state("go/ttl#1") == "stopped"

        # The budget, once everything is captured: one of the three large ones is too much.
        run.until(lambda: not [job for job in registry.jobs.list(state="running") if job.id != slow], "no capture runs")
        loaded = registry.budget.state().loaded
        assert loaded > 1_200_000
        registry.policies.set_fleet({"ttl": "never", "cap": "never", "budget": str(loaded - 100_000)})
        run.until(lambda: life.evicted("budget/b#1") == "budget", "the least recently used makes room")
        time.sleep(3.5)  # several sweeps of both beats, which must find nothing more to do

        for name in survivors:
            assert life.evicted(name) is None, name
        assert life.state("keep/present#1") == "active"

    # Each effect exactly once, in events and in counters.
    evicted = {"start/expired#1": ["ttl"], "budget/b#1": ["budget"], **{name: [rule] for name, rule in gone.items()}}
    stranded = {"start/missed#1": ["heartbeats"], "strand/lost#1": ["heartbeats"]}
    stopped = {"stop/tree#1": ["stop_after"], "stop/runc#1": ["stop_after"]}
    assert life.reasons("workspace.evicted") == evicted
    assert life.reasons("workspace.stranded") == stranded
    assert life.reasons("workspace.stopped") == stopped
    assert [event.fields["workspace"] for event in life.events("workspace.undeleted")] == ["go/ttl#1"]
    expected = Counter(
        [f"evicted:{rule}" for [rule] in evicted.values()]
        + [f"stranded:{rule}" for [rule] in stranded.values()]
        + [f"stopped:{rule}" for [rule] in stopped.values()]
    )
    counters = registry.counters.all()
    assert {name: n for name, n in counters.items() if name.partition(":")[0] in {"evicted", "stranded", "stopped"}} == expected
    for name in stopped:
        assert [job.state for job in life.jobs("workspace.stop", name)] == ["succeeded"], name
    for name in stranded:
        assert [job.state for job in life.jobs("workspace.crash_report", name)] == ["succeeded"], name
    assert registry.jobs.list(state="dead") == registry.jobs.list(state="failed") == []
    assert life.evicted("budget/b#2") is None
    assert registry.jobs.get(slow).state == "running"
