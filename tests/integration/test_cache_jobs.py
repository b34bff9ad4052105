"""Image caches through the registry: jobs on real folders, sweeps, the producers' calls and the commands; N-01 to N-13."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import Ignore

from mothball import pruning
from mothball.client import Fleet
from mothball.errors import HostOffline, InvalidParams, PathNotAllowed, Unavailable
from mothball.pruning import PRUNE_TASK, CacheRun, lane_of
from mothball.registry import Job
from mothball.registry.caches import offset_ms
from mothball.settings import Settings
from tasks import image_cache as jobs
from tasks import services
from tests.commands import Answer, beside_jobs
from tests.conftest import NO_REDIS
from tests.integration.delivery import deliver
from tests.support import not_permitted
from workers.cache_disks import CacheDisks
from workers.redis_server import RedisServer

KIB = 1024
DAY_S = 86_400
MINUTE_MS = 60_000


class Caches:
    """A worker on host h1 that declares two flat caches, and hands to fill them."""

    def __init__(self, settings: Settings, flat: Path, other: Path) -> None:
        services.configure(settings)
        self.settings = settings
        self.flat, self.other = flat, other
        self.fleet = Fleet(settings=settings)
        self.here = services.current()
        self.registry = self.here.registry
        self.announce()

    def announce(self, **more: Any) -> None:
        """The heartbeat of a worker with these settings."""
        told = CacheDisks(self.settings).look()
        high = self.settings.cache_high_percent
        self.registry.hosts.heartbeat(self.settings.host, {"image_caches": told, "image_cache_high": high, **more})

    def close(self) -> None:
        self.fleet.close()
        services.renew()
        services._settings = None

    def blob(self, text: str, *, days: float = 0, size: int = 8 * KIB, folder: Path | None = None) -> str:
        """A blob that was written, and used last, `days` ago; its digest."""
        data = (text.encode() * size)[:size]
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        path = (folder or self.flat) / digest
        path.write_bytes(data)
        if days:
            then = time.time() - days * DAY_S
            os.utime(path, (then, then))
        return digest

    def names(self, folder: Path | None = None) -> set[str]:
        return {each.name for each in (folder or self.flat).iterdir()}

    def submit(self, task: str, **args: Any) -> Job:
        full = {"host": self.settings.host, "dir": str(self.flat), **args}
        return self.registry.jobs.submit(task, full, workspace=None, host=self.settings.host).job

    def run(self, task: str = PRUNE_TASK, **args: Any) -> dict[str, Any]:
        return deliver(self.submit(task, **args))

    def queued(self) -> list[Job]:
        return self.registry.jobs.list(state="queued")


@pytest.fixture
def caches(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Caches]:
    flat, other = tmp_path / "flat", tmp_path / "other"
    flat.mkdir()
    other.mkdir()
    # Blobs of these tests have just been written, whatever their mtime says: a grace would keep them all.
    made = make_settings(
        host="h1", redis_timeout=1.0, image_caches=f"{flat};{other},kind=flat,older_than=7d",
        image_cache_policy="older_than=30d,grace=0", workspace_roots=(tmp_path / "ws",),
    )  # fmt: skip
    found = Caches(made, flat, other)
    yield found
    found.close()


@pytest.fixture
def mothball(caches: Caches, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    return beside_jobs(caches.settings, monkeypatch, capsys)


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_n01_a_prune_by_policy_frees_what_nobody_used_and_says_what_stayed(caches: Caches) -> None:
    old, young = caches.blob("a", days=40), caches.blob("b", days=3)
    result = caches.run()
    assert (result["blobs_freed"], result["bytes_freed"]) == (1, 8 * KIB)
    assert (result["cache_dir"], result["host"], result["kind"], result["dry_run"]) == (str(caches.flat), "h1", "flat", False)
    assert result["kept"] == {"used": 1}
    assert (result["errors"], result["leaked_asides"]) == ([], 0)
    assert caches.names() == {young}
    assert old not in caches.names()
    counters = caches.registry.counters.all()
    assert (counters["cache_prunes"], counters["cache_freed_blobs"], counters["cache_freed_bytes"]) == (1, 1, 8 * KIB)
    [event] = caches.registry.events.list(kind="cache.pruned")
    assert (event.fields["dir"], event.fields["reason"]) == (str(caches.flat), "asked")
    last = caches.registry.caches.last("h1", str(caches.flat))
    assert last is not None
    assert last.result["blobs_freed"] == 1


def test_n09_a_dry_run_says_the_same_numbers_and_leaves_no_trace(caches: Caches) -> None:
    caches.blob("a", days=40)
    caches.blob("b", days=50)
    before = {path.name: path.stat() for path in caches.flat.iterdir()}
    told = caches.run(dry_run=True)
    after = {path.name: path.stat() for path in caches.flat.iterdir()}
    assert {name: (each.st_mtime_ns, each.st_atime_ns) for name, each in before.items()} == {
        name: (each.st_mtime_ns, each.st_atime_ns) for name, each in after.items()
    }
    assert "cache_prunes" not in caches.registry.counters.all()
    assert caches.registry.caches.last("h1", str(caches.flat)) is None
    done = caches.run()
    assert (told["bytes_freed"], told["blobs_freed"]) == (done["bytes_freed"], done["blobs_freed"]) == (16 * KIB, 2)


def test_n06_everything_empties_the_cache_and_its_folder_stays(caches: Caches) -> None:
    caches.flat.chmod(0o750)
    for text in "abc":
        caches.blob(text)
    result = caches.run(everything=True)
    assert (result["blobs_freed"], result["bytes_freed"]) == (3, 24 * KIB)
    assert caches.names() == set()
    assert caches.flat.stat().st_mode & 0o777 == 0o750
    assert sorted(each.name for each in caches.flat.parent.iterdir() if "aside" in each.name) == []


def test_n08_a_cache_that_is_not_there_is_all_zeros(caches: Caches) -> None:
    caches.flat.rmdir()
    result = caches.run(everything=True)
    assert (result["bytes_freed"], result["blobs_freed"], result["errors"]) == (0, 0, [])
    assert not caches.flat.exists()


def test_n10_what_a_pull_reported_as_used_stays_whatever_its_file_times_say(caches: Caches) -> None:
    used, unused = caches.blob("a", days=40), caches.blob("b", days=40)
    assert caches.fleet.cache_used("h1", str(caches.flat), [used]) == 1
    assert caches.run()["blobs_freed"] == 1
    assert caches.names() == {used}
    assert unused not in caches.names()


def test_n10_words_of_a_request_count_over_those_of_the_cache(caches: Caches) -> None:
    caches.blob("a", days=3)
    assert caches.run()["blobs_freed"] == 0
    assert caches.run(policy={"older_than": "2d"}, dry_run=True)["blobs_freed"] == 1
    assert caches.run(policy={"older_than": "2d", "keep": ["*"]})["blobs_freed"] == 0
    assert caches.run(policy={"older_than": "2d"})["blobs_freed"] == 1
    kept = caches.blob("b", days=8, folder=caches.other)
    assert caches.run(dir=str(caches.other), policy={"older_than": "never"})["blobs_freed"] == 0
    assert caches.run(dir=str(caches.other))["blobs_freed"] == 1
    assert kept not in caches.names(caches.other)


def test_n07_a_lease_makes_a_full_prune_busy_and_keeps_what_is_used_since(caches: Caches) -> None:
    old = caches.blob("a", days=40)
    with caches.fleet.cache_lease("h1", str(caches.flat), by="build-7") as lease:
        with pytest.raises(Ignore, match="retried"):
            caches.run(everything=True)
        [job] = caches.queued()
        assert (job.error_code, job.state) == ("busy", "queued")
        assert "build-7" in (job.error or "")
        lease.used([old])
        assert caches.run()["blobs_freed"] == 0
        assert caches.names() == {old}
    caches.registry.jobs.cancel(job.id)
    assert caches.run(everything=True)["blobs_freed"] == 1


def test_undelete_brings_back_what_a_policy_took_and_says_so(caches: Caches) -> None:
    old = caches.blob("a", days=40)
    assert caches.run()["quarantined_bytes"] == 8 * KIB
    assert caches.names().isdisjoint({old})
    back = caches.run("image.cache.undelete")
    assert (back["blobs"], back["left"]) == (1, [])
    assert (caches.flat / old).read_bytes() == b"a" * 8 * KIB
    [event] = caches.registry.events.list(kind="cache.undeleted")
    assert (event.fields["blobs"], event.fields["dir"]) == ("1", str(caches.flat))
    assert caches.run("image.cache.undelete")["blobs"] == 0
    assert len(caches.registry.events.list(kind="cache.undeleted")) == 1


def test_n04_verify_deletes_what_is_not_what_its_name_says(caches: Caches) -> None:
    good, bad = caches.blob("a"), f"sha256:{'b' * 64}"
    (caches.flat / bad).write_bytes(b"half of a layer")
    told = caches.run("image.cache.verify", delete=False)
    assert (told["blobs"], told["bad"], told["deleted"]) == (2, 1, 0)
    done = caches.run("image.cache.verify")
    assert (done["bad"], done["deleted"], done["bad_digests"]) == (1, 1, [bad])
    assert caches.names() == {good}


def test_ls_measures_a_cache_and_changes_nothing(caches: Caches) -> None:
    caches.blob("a", days=40)
    caches.blob("b", days=3)
    found = caches.run("image.cache.ls")
    assert (found["count"], found["size"], found["kind"], found["exists"]) == (2, 16 * KIB, "flat", True)
    assert (found["unused"], found["unused_for"]) == (1, "30d")
    assert caches.run("image.cache.ls", unused_for="2d")["unused"] == 2
    assert abs(found["oldest_ms"] - 40 * DAY_S * 1000) < MINUTE_MS
    assert abs(found["newest_ms"] - 3 * DAY_S * 1000) < MINUTE_MS
    assert len(caches.names()) == 2


def test_n12_only_declared_caches_are_touched(caches: Caches, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    caches.blob("a", days=400, folder=stranger)
    for wrong in (str(stranger), "/", str(tmp_path), f"{caches.flat}/.."):
        for task in (PRUNE_TASK, "image.cache.verify", "image.cache.undelete", "image.cache.ls"):
            with pytest.raises((PathNotAllowed, InvalidParams)):
                caches.run(task, dir=wrong)
    assert len(caches.names(stranger)) == 1
    with pytest.raises(PathNotAllowed, match="not declared as an image cache of host h1"):
        caches.run(dir=str(stranger))


def test_n12_what_is_no_cache_is_refused_and_the_message_says_what_was_found(caches: Caches) -> None:
    caches.blob("a", days=40)
    (caches.flat / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidParams, match=r"thesis\.txt"):
        caches.run(everything=True)
    assert len(caches.names()) == 2


@pytest.mark.parametrize(
    "args",
    [
        {"policy": {"age": "3d"}}, {"policy": {"older_than": "3"}}, {"policy": "older_than=3d"}, {"dry_run": "yes"}, {"dir": ""},
        {"everything": True, "pressure": True}, {"everything": True, "policy": {"older_than": "1d"}}, {"reason": "boredom"},
        {"policy": {"reserve": "2GiB", "max_bytes": "1GiB"}}, {"unknown": 1}, {"dir": "relative"},
    ],
)  # fmt: skip
def test_arguments_of_a_prune_are_checked(caches: Caches, args: dict[str, Any]) -> None:
    old = caches.blob("a", days=40)
    with pytest.raises(InvalidParams):
        caches.run(**args)
    assert caches.names() == {old}


def test_arguments_of_the_other_jobs_are_checked(caches: Caches) -> None:
    for task, args in (
        ("image.cache.ls", {"unused_for": "3"}), ("image.cache.ls", {"unused_for": "never"}),
        ("image.cache.undelete", {"digests": ["x"] * 1001}), ("image.cache.verify", {"delete": 1}),
    ):  # fmt: skip
        with pytest.raises(InvalidParams):
            caches.run(task, **args)


# -- joining -----------------------------------------------------------------------------------------------------------


def test_n13_a_same_request_joins_the_one_that_waits_and_another_does_not(caches: Caches) -> None:
    flat = str(caches.flat)
    first = caches.fleet.cache_prune("h1", flat, "older_than=7d")
    assert caches.fleet.cache_prune("h1", flat + "/", {"older_than": "7d"}).id == first.id
    others = [
        caches.fleet.cache_prune("h1", flat),
        caches.fleet.cache_prune("h1", flat, "older_than=8d"),
        caches.fleet.cache_prune("h1", flat, "older_than=7d", dry_run=True),
        caches.fleet.cache_prune("h1", flat, everything=True),
        caches.fleet.cache_prune("h1", str(caches.other), "older_than=7d"),
    ]
    assert len({first.id, *(each.id for each in others)}) == 6
    assert caches.fleet.job_record(first.id).args["dry_run"] is False


def test_n13_a_same_request_while_it_runs_gets_its_result(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    caches.blob("a", days=40)
    job = caches.fleet.cache_prune("h1", str(caches.flat))
    running, go = threading.Event(), threading.Event()
    real = pruning.CacheRun.prune

    def slow(self: pruning.CacheRun, *args: Any, **more: Any) -> dict[str, Any]:
        running.set()
        assert go.wait(30)
        return real(self, *args, **more)

    monkeypatch.setattr(pruning.CacheRun, "prune", slow)
    worker = threading.Thread(target=deliver, args=(caches.fleet.job_record(job.id),))
    worker.start()
    try:
        assert running.wait(30)
        second = caches.fleet.cache_prune("h1", str(caches.flat))
        assert (second.id, second.joined) == (job.id, True)
        assert caches.fleet.cache_prune("h1", str(caches.flat), dry_run=True).id != job.id
    finally:
        go.set()
        worker.join(30)
    assert second.wait(10)["blobs_freed"] == 1
    assert caches.fleet.cache_prune("h1", str(caches.flat)).id != job.id


def test_the_lane_of_a_request_does_not_depend_on_why_it_was_asked_or_on_defaults_that_were_said() -> None:
    bare = {"host": "h1", "dir": "/a"}
    assert lane_of(bare) == lane_of({**bare, "reason": "schedule", "policy": {}, "dry_run": False, "pressure": False})
    assert len({lane_of({**bare, **more}) for more in ({}, {"dry_run": True}, {"pressure": True}, {"policy": {"grace": "0"}})}) == 4


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_the_daily_sweep_asks_each_cache_of_each_host_once_a_day_however_many_beats_there_are(caches: Caches) -> None:
    caches.registry.hosts.heartbeat("h2", {"image_caches": [{"dir": "/var/cache/oci"}]})
    caches.registry.hosts.heartbeat("none", {})
    assert jobs.prune_caches(caches.here) == {"asked": 3, "joined": 0, "failed": 0, "quarantines": 0}
    asked = {(job.host, job.args["dir"], job.args["reason"]) for job in caches.queued()}
    mine = {("h1", str(caches.flat), "schedule"), ("h1", str(caches.other), "schedule")}
    assert asked == {*mine, ("h2", "/var/cache/oci", "schedule")}
    for _ in range(3):
        assert jobs.prune_caches(caches.here) == {"asked": 0, "joined": 0, "failed": 0, "quarantines": 0}


def test_the_daily_sweep_is_late_by_a_small_part_of_the_day_at_most(caches: Caches) -> None:
    assert jobs.turn_seconds(caches.settings) == 3600
    assert jobs.turn_seconds(Settings.load(cache_seconds=10)) == 1
    assert 0 <= offset_ms("h1", DAY_S * 1000) < DAY_S * 1000


def test_a_host_whose_announcement_cannot_be_read_does_not_stop_the_others(caches: Caches) -> None:
    for n, odd in enumerate(("x", [3], [{"dir": 3}], {"dir": "/x"}, None)):
        caches.registry.hosts.heartbeat(f"a-odd{n}", {"image_caches": odd})
    assert jobs.prune_caches(caches.here)["asked"] == 2
    assert jobs.prune_full_disks(caches.here) == {"asked": 0, "joined": 0, "failed": 0}


def test_a_turn_of_a_host_that_could_not_be_asked_is_not_lost(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    real = caches.registry.jobs.submit

    def refuse(*args: Any, **more: Any) -> Any:
        raise InvalidParams("not now")

    monkeypatch.setattr(caches.registry.jobs, "submit", refuse)
    assert jobs.prune_caches(caches.here) == {"asked": 0, "joined": 0, "failed": 1, "quarantines": 0}
    monkeypatch.setattr(caches.registry.jobs, "submit", real)
    assert jobs.prune_caches(caches.here)["asked"] == 2


def test_what_a_policy_removed_leaves_the_disk_soon_after_its_quarantine_and_not_with_the_next_day(caches: Caches) -> None:
    assert jobs.prune_caches(caches.here)["asked"] == 2
    for job in caches.queued():
        deliver(job)
    caches.blob("a", days=40)
    caches.blob("b", days=40, folder=caches.other)
    kept = caches.blob("c", days=40)
    assert caches.run(policy={"quarantine": "1s", "keep": [kept]})["quarantined_bytes"] == 8 * KIB
    assert caches.run(dir=str(caches.other))["quarantined_bytes"] == 8 * KIB
    assert jobs.prune_caches(caches.here)["quarantines"] == 0
    time.sleep(1.1)
    assert jobs.prune_caches(caches.here) == {"asked": 0, "joined": 0, "failed": 0, "quarantines": 1}
    [job] = caches.queued()
    result = deliver(job)
    assert (result["expired_bytes"], result["bytes_freed"], result["blobs_freed"]) == (8 * KIB, 0, 0)
    assert caches.names() == {kept}
    assert jobs.prune_caches(caches.here)["quarantines"] == 0
    assert sum("aside" in each.name for each in caches.flat.parent.iterdir()) == 1


def test_a_quarantine_of_a_host_that_is_offline_waits_for_it(caches: Caches) -> None:
    caches.registry.caches.quarantined("h2", "/a:b", 0)
    time.sleep(0.01)
    assert jobs.prune_caches(caches.here)["quarantines"] == 0
    caches.registry.hosts.heartbeat("h2", {})
    assert jobs.prune_caches(caches.here)["quarantines"] == 1
    [job] = [job for job in caches.queued() if job.host == "h2"]
    assert (job.args["dir"], job.args["reason"]) == ("/a:b", "quarantine")
    assert caches.registry.caches.over() == []


def full(caches: Caches, percent: float, **more: Any) -> None:
    told = [{"dir": str(caches.flat), "used_percent": percent}, {"dir": str(caches.other), "used_percent": 1.0}]
    caches.registry.hosts.heartbeat("h1", {"image_caches": told, "image_cache_high": 85, **more})


def test_pressure_asks_for_the_caches_of_full_disks_only(caches: Caches) -> None:
    full(caches, 85.0)
    assert jobs.prune_full_disks(caches.here)["asked"] == 0
    full(caches, 85.1)
    assert jobs.prune_full_disks(caches.here) == {"asked": 1, "joined": 0, "failed": 0}
    [job] = caches.queued()
    assert (job.args["dir"], job.args["pressure"], job.args["reason"]) == (str(caches.flat), True, "pressure")
    assert jobs.prune_full_disks(caches.here) == {"asked": 0, "joined": 1, "failed": 0}


def test_pressure_goes_by_the_mark_of_the_host_that_has_the_disk(caches: Caches) -> None:
    full(caches, 60.0, image_cache_high=50)
    assert jobs.prune_full_disks(caches.here)["asked"] == 1
    full(caches, 90.0, image_cache_high="x")
    assert jobs.prune_full_disks(caches.here)["joined"] == 1


def test_a_disk_that_its_caches_cannot_empty_is_said_and_not_asked_about_every_minute(
    caches: Caches, make_settings: Callable[..., Settings]
) -> None:
    caches.blob("a", days=40)
    tight = {"cache_high_percent": 0.002, "cache_low_percent": 0.001}
    services.configure(caches.settings.model_copy(update=tight))
    result = caches.run(pressure=True, reason="pressure")
    assert result["blobs_freed"] == 1
    assert result["quarantined_bytes"] == 0
    [event] = caches.registry.events.list(kind="cache.disk_full")
    assert event.fields["dir"] == str(caches.flat)
    full(caches, 99.0)
    assert jobs.prune_full_disks(caches.here)["asked"] == 0
    assert caches.registry.events.list(kind="cache.pruned")[0].fields["reason"] == "pressure"


def test_pressure_leaves_a_cache_alone_while_another_one_of_its_disk_is_pruned(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "WAIT_SECONDS", 0.1)
    old = caches.blob("a", days=40)
    services.configure(caches.settings.model_copy(update={"cache_high_percent": 0.002, "cache_low_percent": 0.001}))
    with CacheRun(caches.settings, str(caches.other), None)._one_per_disk():
        result = caches.run(pressure=True, reason="pressure")
    assert (result["blobs_freed"], caches.names()) == (0, {old})
    assert "another cache of this disk is being pruned" in result["policy"]
    assert caches.registry.events.list(kind="cache.disk_full") == []
    assert not caches.registry.caches.calmed("h1", str(caches.flat))
    assert caches.run(pressure=True, reason="pressure")["blobs_freed"] == 1


def test_pressure_prunes_a_disk_that_has_no_room_for_a_lock(caches: Caches, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        not_permitted("mount a file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=8", "tmpfs", str(disk)], check=True)
    try:
        folder = disk / "cache"
        folder.mkdir()
        (disk / "data").mkdir()
        for number in range(5):
            caches.blob(str(number), days=40 + number, folder=folder)
        with pytest.raises(OSError, match="No space"):
            (disk / "more").mkdir()
        more = {"data_dir": disk / "data", "image_caches": str(folder), "cache_high_percent": 0.002, "cache_low_percent": 0.001}
        found = CacheRun(Settings(**{**caches.settings.model_dump(), **more}), str(folder), None).prune(pressure=True)
        assert (found["blobs_freed"], caches.names(folder)) == (5, set())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_result_with_long_paths_is_noted_all_the_same(caches: Caches) -> None:
    result = caches.run()
    long = [{"path": "p" * 4000, "reason": "r" * 2000}] * 50
    run = CacheRun(caches.settings, str(caches.flat), caches.registry)
    run.note({**result, "errors": long, "notes": ["n" * 9000] * 30}, "run", reason="asked")
    last = caches.registry.caches.last("h1", str(caches.flat))
    assert last is not None
    assert len(last.result["errors"]) == pruning.RESULT_ERRORS


def test_an_empty_word_of_a_command_is_refused_and_not_left_out(caches: Caches, mothball: Callable[..., Answer]) -> None:
    old = caches.blob("a", days=40)
    answer = mothball("image", "cache", "prune", "--max-bytes", "")
    assert answer.code != 0
    assert caches.names() == {old}


def test_pressure_below_the_high_mark_frees_nothing(caches: Caches) -> None:
    old = caches.blob("a", days=3)
    services.configure(caches.settings.model_copy(update={"cache_high_percent": 100.0}))
    assert caches.run(pressure=True)["blobs_freed"] == 0
    assert caches.names() == {old}
    assert caches.registry.events.list(kind="cache.disk_full") == []


# -- the producers' calls ----------------------------------------------------------------------------------------------


def test_the_caches_of_the_fleet_with_disk_policy_leases_and_last_prune(caches: Caches) -> None:
    caches.blob("a", days=40)
    caches.run()
    with caches.fleet.cache_lease("h1", str(caches.flat), by="me"):
        flat, other = caches.fleet.caches()
    assert (flat["host"], flat["online"], flat["dir"], other["kind"]) == ("h1", True, str(caches.flat), "flat")
    assert [each["by"] for each in flat["leases"]] == ["me"]
    assert flat["last"]["result"]["blobs_freed"] == 1
    assert other["last"] is None
    assert "older_than=7d" in other["policy"]
    assert flat["total_bytes"] > flat["free_bytes"] > 0
    assert caches.fleet.caches(host="h1")[0]["leases"] == []


def test_a_lease_is_renewed_for_as_long_as_its_block_runs(caches: Caches) -> None:
    with caches.fleet.cache_lease("h1", str(caches.flat), seconds=1) as lease:
        time.sleep(2.5)
        [held] = caches.registry.caches.leases("h1", str(caches.flat))
        assert held.id == lease.id
        assert held.age >= 2_000
        assert not lease.lost
    assert caches.registry.caches.leases("h1", str(caches.flat)) == []
    with pytest.raises(InvalidParams, match="entered once"):
        lease.__enter__()
    with pytest.raises(InvalidParams, match="not held"):
        lease.used([])


def test_a_lease_that_was_lost_says_so_and_is_taken_again(caches: Caches) -> None:
    with caches.fleet.cache_lease("h1", str(caches.flat), seconds=1) as lease:
        caches.registry.caches.drop("h1", str(caches.flat), lease.id)
        until = time.monotonic() + 10
        while not (lease.lost and caches.registry.caches.leases("h1", str(caches.flat))):
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_cache_that_nobody_declares_cannot_be_leased_or_used(caches: Caches) -> None:
    for call in (lambda: caches.fleet.cache_used("h1", "/var/cache/x", []), lambda: caches.fleet.cache_lease("h1", "/var/cache/x")):
        with pytest.raises(PathNotAllowed, match="not an image cache of host h1"):
            call()
    with pytest.raises(HostOffline):
        caches.fleet.cache_lease("nowhere", str(caches.flat))
    with pytest.raises(HostOffline):
        caches.fleet.cache_prune("nowhere", str(caches.flat))
    with pytest.raises(InvalidParams):
        caches.fleet.cache_prune("h1", str(caches.flat), "older_than=7d", everything=True)
    with pytest.raises(InvalidParams):
        caches.fleet.cache_undelete("h1", str(caches.flat), "sha256:abc")
    assert caches.queued() == []


# -- commands ----------------------------------------------------------------------------------------------------------


def test_n11_the_command_prints_one_line_per_cache_as_the_reference_words_it(
    caches: Caches, mothball: Callable[..., Answer]
) -> None:
    for n in range(3):
        caches.blob(f"a{n}", days=40, size=1024 * KIB // 2)
    told = mothball("image", "cache", "prune", "--dry-run")
    assert (told.code, told.err) == (0, "")
    assert told.out.splitlines() == [
        f"would free 1.5 MiB across 3 blob(s) in {caches.flat}", f"would free 0 B across 0 blob(s) in {caches.other}"
    ]  # fmt: skip
    done = mothball("image", "cache", "prune", "--dir", str(caches.flat))
    assert (done.code, done.out) == (0, f"freed 1.5 MiB across 3 blob(s) in {caches.flat}\n")
    assert "quarantine" in done.err
    assert caches.registry.counters.all()["cache_freed_blobs"] == 3
    back = mothball("image", "cache", "undelete", "--dir", str(caches.flat))
    assert (back.code, back.out) == (0, f"brought back 1.5 MiB across 3 blob(s) in {caches.flat}\n")


def test_a_prune_of_which_nothing_comes_says_why_everything_stays(caches: Caches, mothball: Callable[..., Answer]) -> None:
    caches.blob("a", days=3)
    caches.blob("b", days=4)
    done = mothball("image", "cache", "prune", "--dir", str(caches.flat))
    assert (done.code, done.out) == (0, f"freed 0 B across 0 blob(s) in {caches.flat}\n")
    assert done.err == f"note: {caches.flat}: everything stays: 2 used lately enough (policy: older_than=30d,grace=0)\n"
    assert mothball("image", "cache", "prune", "--dir", str(caches.flat), "--older-than", "2d", "--dry-run").err == ""


def test_the_command_changes_words_for_one_run_and_all_empties(caches: Caches, mothball: Callable[..., Answer]) -> None:
    caches.blob("a", days=3)
    keep = caches.blob("b", days=3)
    flat = ("--dir", str(caches.flat))
    assert mothball("image", "cache", "prune", *flat, "--older-than", "2d", "--keep", keep, "--json").json()[0]["blobs_freed"] == 1
    assert caches.names() == {keep}
    assert mothball("image", "cache", "prune", *flat, "--all").out == f"freed 8.0 KiB across 1 blob(s) in {caches.flat}\n"
    assert caches.names() == set()


def test_the_command_asks_another_host_by_a_job_per_cache(caches: Caches, mothball: Callable[..., Answer]) -> None:
    caches.blob("a", days=40)
    asked = mothball("image", "cache", "prune", "--host", "h1", "--no-wait", "--json")
    assert asked.code == 0
    found = caches.queued()
    assert {job.args["dir"] for job in found} == {str(caches.flat), str(caches.other)}
    workers = [threading.Thread(target=deliver, args=(job,)) for job in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert caches.registry.counters.all()["cache_freed_blobs"] == 1


def test_ls_and_verify_print_what_they_found(caches: Caches, mothball: Callable[..., Answer]) -> None:
    caches.blob("a", days=40)
    (caches.flat / f"sha256:{'b' * 64}").write_bytes(b"half")
    listed = mothball("image", "cache", "ls")
    assert listed.code == 0
    assert "40d" in listed.out
    assert str(caches.other) in listed.out
    both = mothball("image", "cache", "ls", "--json").json()
    assert [each["count"] for each in both] == [2, 0]
    told = mothball("image", "cache", "verify", "--dry-run", "--dir", str(caches.flat))
    assert told.out == f"2 blob(s) read, 1 bad, 0 deleted in {caches.flat}\n"
    assert len(caches.names()) == 2
    assert mothball("image", "cache", "verify", "--dir", str(caches.flat), "--json").json()[0]["deleted"] == 1


def test_hosts_shows_how_many_caches_there_are_and_how_full_their_disk_is(caches: Caches, mothball: Callable[..., Answer]) -> None:
    full(caches, 91.5)
    assert "2, disk 91.5 % full" in mothball("hosts").out
    assert mothball("hosts", "--json").json()[0]["info"]["image_caches"][0]["dir"] == str(caches.flat)
    caches.registry.hosts.heartbeat("h1", {"image_caches": [{"dir": "/x", "problem": "gone"}]})
    assert "1 of them with a problem" in mothball("hosts").out


def test_use_runs_a_command_under_a_lease_and_notes_what_it_touched(caches: Caches, mothball: Callable[..., Answer]) -> None:
    old, untouched = caches.blob("a", days=40), caches.blob("b", days=40)
    done = mothball("image", "cache", "use", str(caches.flat), "--", "sh", "-c", f"cat {caches.flat}/{old} >/dev/null; exit 3")
    assert (done.code, done.err) == (3, "")
    assert caches.registry.caches.leases("h1", str(caches.flat)) == []
    ages = caches.registry.caches.ages("h1", str(caches.flat), [old, untouched])
    assert ages[0] is not None and ages[1] is None
    assert caches.run()["blobs_freed"] == 1
    assert caches.names() == {old}
    assert mothball("image", "cache", "use", str(caches.flat), "--", "no-such-program").code == 127
    assert mothball("image", "cache", "use", str(caches.flat), "--", "/etc/passwd").code == 126
    assert mothball("image", "cache", "use", "/var/cache/x", "--", "true").code == 1


def test_use_keeps_the_fleets_password_to_itself(caches: Caches, mothball: Callable[..., Answer], tmp_path: Path) -> None:
    told = tmp_path / "env"
    assert mothball("image", "cache", "use", str(caches.flat), "--", "sh", "-c", f"env > {told}").code == 0
    assert "MOTHBALL_" not in told.read_text()


def test_without_redis_this_hosts_caches_can_be_pruned_all_the_same(
    caches: Caches, mothball: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches.blob("a", days=40)
    monkeypatch.setenv("MOTHBALL_REDIS_URL", NO_REDIS)
    done = mothball("image", "cache", "prune", "--dir", str(caches.flat))
    assert (done.code, done.out) == (0, f"freed 8.0 KiB across 1 blob(s) in {caches.flat}\n")
    assert "leases are not known" in done.err
    assert mothball("image", "cache", "use", str(caches.flat), "--", "true").code == 69


def test_the_commands_say_what_is_wrong(caches: Caches, mothball: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    prune = ("image", "cache", "prune")
    for wrong in (("--no-wait",), ("--older-than", "3"), ("--all", "--older-than", "3d"), ("--min-free", "200%"), ("--keep", "x")):
        assert mothball(*prune, *wrong).code == 2
    refused = mothball(*prune, "--dir", "/srv/nothing")
    assert (refused.code, refused.out) == (1, "")
    assert "not declared" in refused.err
    assert mothball(*prune, "--host", "nowhere").code == 69
    (caches.other / "mine.txt").write_text("x")
    partly = mothball(*prune)
    assert (partly.code, partly.out) == (1, f"freed 0 B across 0 blob(s) in {caches.flat}\n")
    assert "mine.txt" in partly.err
    as_json = mothball(*prune, "--json")
    assert [("error" in each) for each in as_json.json()] == [False, True]
    monkeypatch.setenv("MOTHBALL_IMAGE_CACHES", "")
    nothing = mothball(*prune)
    assert (nothing.code, nothing.out) == (0, "")
    assert "declares no image cache" in nothing.err


def test_a_lost_redis_in_the_middle_of_a_sweep_ends_it(caches: Caches, private_redis: RedisServer) -> None:
    private_redis.stop()
    with pytest.raises(Unavailable):
        jobs.prune_caches(caches.here)
