"""Image caches filled by real pulls from a real registry, pruned by beat and worker while the pulls go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.pruning import PRUNE_TASK
from mothball.registry import Event
from tests.acceptance.fleet import FleetRun
from tests.acceptance.pulls import LAYER_BYTES, SLOTS, LayoutPuller, Loop, Puller, SharedPuller, push_images, run
from tests.acceptance.registry import ImageRegistry, Middleman, Request
from tests.support import not_permitted, require_tool
from workers.config import settings_env

KIB = 1024
BUDGET = 5 * LAYER_BYTES
"""Three images that share a layer, and a little; a loop of pulls brings many times as much."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[ImageRegistry]:
    with ImageRegistry(tmp_path / "registry") as found:
        yield found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB in memory."""
    if os.geteuid() != 0:
        not_permitted("mount a file system")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run([require_tool("mount"), "-t", "tmpfs", "-o", "size=20M", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run([require_tool("umount"), "-l", str(folder)], check=True)


def disk_bytes(folder: Path) -> int:
    return sum(each.stat().st_blocks * 512 for each in folder.rglob("*") if each.is_file())


def used_percent(folder: Path) -> float:
    found = os.statvfs(folder)
    return 100 * (found.f_blocks - found.f_bfree) / found.f_blocks


def asides(*folders: Path) -> list[Path]:
    return [each for folder in folders for each in folder.rglob("*mothball-aside*")]


def pruned(fleet: FleetRun, folder: Path, *, reason: str = "schedule") -> list[Event]:
    """Events of prunes that freed something."""
    found = fleet.registry.events.list(limit=1000, kind="cache.pruned")
    return [
        each
        for each in found
        if each.fields["dir"] == str(folder) and each.fields["reason"] == reason and each.fields["freed_blobs"] != "0"
    ]


def freed(fleet: FleetRun, folder: Path, *, reason: str = "schedule") -> int:
    return sum(int(each.fields["freed_bytes"]) for each in pruned(fleet, folder, reason=reason))


def results(fleet: FleetRun) -> list[dict[str, Any]]:
    """What every prune so far gave."""
    jobs = [job for job in fleet.registry.jobs.list(limit=1000) if job.task == PRUNE_TASK]
    assert [(job.args, job.error) for job in jobs if job.state in {"failed", "dead"}] == []
    return [job.outcome for job in jobs if job.outcome is not None]


def until(fleet: FleetRun, probe: Callable[[], bool], *loops: Loop) -> None:
    """Wait until `probe` holds; a pull that failed fails the test at once."""
    deadline = time.monotonic() + 60
    while not probe():
        for loop in loops:
            loop.check()
        assert time.monotonic() < deadline, [each.tail() for each in fleet.processes]
        time.sleep(0.1)


@pytest.mark.timeout(240)
def test_caches_are_pruned_on_schedule_while_pulls_go_on_and_no_pull_and_no_image_is_lost(
    fleet: FleetRun, registry: ImageRegistry, tmp_path: Path
) -> None:
    images = push_images(registry.address, tmp_path / "made")
    layout, shared = LayoutPuller(images, tmp_path / "one"), SharedPuller(images, tmp_path / "two")
    layout.pull_next()
    shared.pull_next()
    words = f"older_than=never,max_bytes={BUDGET},grace=1s,quarantine=2s"
    declared = ";".join([
        f"{layout.cache},{words}", f"{shared.cache},layouts={shared.layouts},{words}",
        f"{shared.blob_info},older_than=never,max_bytes=1KiB,grace=0,quarantine=0",
    ])  # fmt: skip
    quick: dict[str, Any] = {"image_caches": declared, "cache_seconds": 10, "workspace_roots": (tmp_path / "ws",)}
    fleet.worker(worker_concurrency=2, **quick)
    fleet.beat(**quick)
    with Loop(layout.pull_next) as one, Loop(shared.pull_next) as two:

        def enough(puller: Puller) -> bool:
            return puller.pulled >= 10 and len(pruned(fleet, puller.cache)) >= 2 and freed(fleet, puller.cache) > BUDGET

        until(fleet, lambda: enough(layout) and enough(shared), one, two)
        one.stop()
        two.stop()
    for puller in (layout, shared):
        # What the last pulls left is pruned in the next turn.
        fleet.until(lambda where=puller.cache: disk_bytes(where) <= BUDGET, f"{puller.cache} is within its budget", seconds=90)
        assert len(puller.referred) == SLOTS
        for reference in puller.referred:
            puller.check(reference)
    # While a pull has its database open, the blob-info cache stays: every turn so far may have met one.
    fleet.until(lambda: bool(pruned(fleet, shared.blob_info)), "the blob-info cache is pruned", seconds=30)
    # What a pull may have counted on, because pulls overlapped for too long, stays for another minute and a turn.
    fleet.until(lambda: not asides(layout.home, shared.home), "what was in quarantine is gone", seconds=90)
    assert [each["errors"] for each in results(fleet) if each["errors"]] == []


def test_a_disk_that_fills_is_kept_below_its_high_mark_by_pressure_while_pulls_go_on(
    fleet: FleetRun, registry: ImageRegistry, small_disk: Path, tmp_path: Path
) -> None:
    images = push_images(registry.address, tmp_path / "made", count=16, layer=1024 * KIB)
    puller = LayoutPuller(images, small_disk / "caches", tmp_path / "work")
    puller.pull_next()
    quick: dict[str, Any] = {
        "image_caches": f"{puller.cache},older_than=never,grace=1s", "workspace_roots": (tmp_path / "ws",),
        "cache_pressure_seconds": 1, "cache_high_percent": 50, "cache_low_percent": 30,
    }  # fmt: skip
    fleet.worker(**quick)
    fleet.beat(**quick)

    def pull() -> None:
        puller.pull_next()
        # 10 MiB come in more time than heartbeat, sweep and prune take together, also when the machine has little else to do.
        time.sleep(0.6)

    with Loop(pull) as loop:
        until(fleet, lambda: len(pruned(fleet, puller.cache, reason="pressure")) >= 2, loop)
        loop.stop()
    fleet.until(lambda: used_percent(small_disk) <= 50, "the disk is below its high mark", seconds=20)
    # Without quarantine: what went is no longer on the disk.
    assert asides(small_disk) == []
    assert freed(fleet, puller.cache, reason="pressure") > 6 * 1024 * KIB
    for reference in puller.referred:
        puller.check(reference)
    assert fleet.registry.events.list(kind="cache.disk_full") == []
    assert [each["errors"] for each in results(fleet) if each["errors"]] == []


def test_a_pull_under_a_lease_that_waits_for_a_slow_registry_loses_nothing_that_it_counts_on(
    fleet: FleetRun, registry: ImageRegistry, tmp_path: Path
) -> None:
    made = push_images(registry.address, tmp_path / "made", count=2)
    own = [json.loads(registry.blob(digest).read_bytes())["layers"][-1]["digest"] for digest in made.values()]
    slow, waits, go_on = threading.Event(), threading.Event(), threading.Event()

    def wait(request: Request) -> None:
        if slow.is_set() and request.method == "GET" and any(each in request.path for each in own):
            waits.set()
            go_on.wait(30)

    with Middleman(registry.address, wait) as middle:
        images = {name.replace(registry.address, middle.address): digest for name, digest in made.items()}
        puller = LayoutPuller(images, tmp_path / "one")
        puller.pull_next()
        [reference] = puller.referred
        run("umoci", "rm", "--image", reference)
        puller.referred.clear()
        time.sleep(0.1)  # what is there was written before the lease begins
        quick: dict[str, Any] = {
            "image_caches": f"{puller.cache},older_than=never,max_bytes=1KiB,grace=0,quarantine=0",
            "workspace_roots": (tmp_path / "ws",),
        }  # fmt: skip
        worker = fleet.worker(**quick)
        puller.prefix = (sys.executable, "-m", "workers.main", "image", "cache", "use", str(puller.cache), "--")
        puller.env |= settings_env(fleet.with_settings(**quick))
        slow.set()
        with Loop(puller.pull_next, times=1) as pull:
            fleet.until(lambda: pull.check() and waits.is_set(), "the pull waits for its last layer")
            found = fleet.finished(fleet.submit(PRUNE_TASK, host=fleet.settings.host, dir=str(puller.cache)))
            assert found.state == "succeeded", worker.tail()
            go_on.set()
            pull.stop()
        assert puller.pulled == 2
        for reference in puller.referred:
            puller.check(reference)
        kept = results(fleet)[0]["kept"]
        assert kept.get("leased", 0) >= 3, kept
        # And when nobody pulls any more, what the first pull left goes.
        done = fleet.finished(fleet.submit(PRUNE_TASK, host=fleet.settings.host, dir=str(puller.cache)))
        assert done.outcome is not None
        assert done.outcome["blobs_freed"] == 4 - 1  # its manifest, configuration and own layer, not the common one
