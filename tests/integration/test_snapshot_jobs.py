"""The jobs of snapshots on a real Redis and a real store, without worker processes: what each run leaves behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.cli.app import run
from mothball.client import Fleet
from mothball.errors import Cancelled, InvalidParams, LeaseLost, MothballError, NotFound
from mothball.registry import Job, Workspace
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.snapshots import add_snapshot, mark, snapshots
from mothball.store.trash import Trash
from mothball.store.tree import Tree
from tasks import services
from tasks import snapshot as jobs
from tasks.context import JobContext
from tests.conftest import NO_REDIS
from tests.integration.delivery import deliver
from workers.main import build
from workers.redis_server import RedisServer

ID = "o/r#1"
DAY = 86_400_000


class Here:
    """One worker's services, a registered workspace with two files, and short ways to run jobs."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        services.configure(settings)
        self.settings = settings
        self.fleet = Fleet(settings=settings)
        self.registry = services.current().registry
        self.registry.hosts.heartbeat(settings.host, {})
        self.store = Store(settings.store_dir)
        self.folder = folder
        folder.mkdir()
        (folder / "a.txt").write_text("first\n")
        (folder / "b.txt").write_text("other\n")
        self.fleet.register(ID, folder)

    def close(self) -> None:
        self.fleet.close()
        services.renew()
        services._settings = None

    @property
    def record(self) -> Workspace:
        return self.registry.workspaces.get(ID)

    def submit(self, task: str, **args: Any) -> Job:
        args = {"workspace": ID, **args} if "host" not in args else args
        owner = {"workspace": None, "host": args["host"]} if "host" in args else {"workspace": args["workspace"]}
        return self.registry.jobs.submit(task, args, **owner).job

    def deliver(self, job: Job) -> dict[str, Any]:
        """The job's message reaches this worker."""
        return deliver(job)

    def run(self, task: str, **args: Any) -> dict[str, Any]:
        return self.deliver(self.submit(task, **args))

    def names(self, workspace: str = ID) -> list[str]:
        return [each.name for each in snapshots(self.store.refs(workspace))]

    def counters(self) -> dict[str, int]:
        return self.registry.counters.all()

    def aged(self, *days: float, workspace: str = ID) -> None:
        """Snapshots that are this old, beside what jobs make."""
        refs = self.store.refs(workspace)
        fence = int((refs.folder / "fence").read_text())
        for age in days:
            at = self.registry.time_ms() - int(age * DAY)
            add_snapshot(refs, fence=fence, job=f"aged-{time.monotonic_ns()}", at_ms=at)


@pytest.fixture
def here(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Here]:
    found = Here(make_settings(retention="last=1", fsync=False, redis_timeout=1.0), tmp_path / "tree")
    yield found
    found.close()


def test_b41_a_snapshot_answers_with_an_address_and_never_with_content(here: Here) -> None:
    """And it counts. The reference locked everything for one big tar, and handed that out."""
    here.run("workspace.capture")
    result = here.run("workspace.snapshot", label="first", note="why", keep=True)
    assert (result["name"], result["digest"], result["captured"]) == ("snap-1", here.record.digest, None)
    assert (result["files"], result["bytes"], result["generation"]) == (2, 12, 1)
    assert (result["label"], result["note"], result["keep"]) == ("first", "why", True)
    assert len(json.dumps(result)) < 2000
    assert here.run("workspace.snapshot")["name"] == "snap-2"
    assert (here.record.snapshots, here.counters()["snapshots"]) == (2, 2)


def test_b41_an_unknown_workspace_is_not_found_and_so_is_one_without_a_capture(here: Here) -> None:
    with pytest.raises(NotFound):
        here.submit("workspace.snapshot", workspace="o/r#404")
    with pytest.raises(NotFound, match="--fresh"):
        here.run("workspace.snapshot")
    assert not here.store.refs(ID).folder.exists()
    assert "snapshots" not in here.counters()
    assert here.record.last_good_at is None


def test_b40_a_snapshot_is_stored_content_and_no_live_object(here: Here) -> None:
    """Edits, later captures and even the end of the workspace change nothing in it."""
    here.run("workspace.capture")
    digest = here.run("workspace.snapshot")["digest"]
    (here.folder / "a.txt").write_text("edited\n")
    (here.folder / "b.txt").unlink()
    here.run("workspace.capture")
    assert here.registry.workspaces.release(ID)
    with Tree.open(here.store, here.store.refs(ID).get("snap-1").digest) as tree:
        assert (tree.read("a.txt"), tree.read("b.txt")) == (b"first\n", b"other\n")
    assert here.store.refs(ID).get("snap-1").digest == digest


def test_b42_to_b44_release_count_and_signs_of_life(here: Here) -> None:
    """Neither a snapshot nor reading one renews the life of a workspace; releasing twice is no error; the count follows."""
    here.run("workspace.capture")
    before = here.record
    assert here.registry.workspaces.count() == 1
    here.run("workspace.snapshot")
    with Tree.open(here.store, before.digest or "") as tree:
        tree.read("a.txt")
    after = here.record
    times = [(each.created_at, each.last_active, each.last_signal, each.expires_at, each.last_good_at) for each in (before, after)]
    assert times[0] == times[1]
    assert (here.registry.workspaces.release(ID), here.registry.workspaces.release(ID)) == (True, False)
    assert here.registry.workspaces.count() == 0
    assert (here.folder / "a.txt").exists()


@pytest.mark.parametrize("told", [False, True])
def test_a_forget_that_died_before_or_after_it_told_the_registry_counts_once(
    here: Here, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    here.run("workspace.capture")
    here.run("workspace.snapshot")
    job = here.submit("workspace.forget", snapshots=["snap-1"])
    real = jobs._note

    class Killed(BaseException):
        pass

    def die(*args: Any, **fields: Any) -> None:
        if told:
            real(*args, **fields)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_note", die)
        with pytest.raises(Killed):
            here.deliver(job)
    here.registry.jobs.release_lost(job.id, here.registry.jobs.get(job.id).fence)
    result = here.deliver(job)
    assert (result["forgotten"], result["already"]) == (["snap-1"], [])
    assert (here.counters()["snapshots_forgotten"], here.record.snapshots) == (1, 0)
    assert len(here.registry.events.list(kind="workspace.snapshots_forgotten")) == 1


def test_the_capture_of_an_earlier_life_in_another_directory_is_not_numbered_as_this_ones(here: Here, tmp_path: Path) -> None:
    here.run("workspace.capture")
    here.registry.workspaces.release(ID)
    other = tmp_path / "another"
    other.mkdir()
    (other / "c.txt").write_text("third\n")
    here.fleet.register(ID, other)
    with pytest.raises(NotFound, match="--fresh"):
        here.run("workspace.snapshot")
    assert here.run("workspace.snapshot", fresh=True)["files"] == 1


def test_a_fresh_snapshot_captures_first_and_records_both(here: Here) -> None:
    first = here.run("workspace.snapshot", fresh=True)
    assert (first["name"], first["captured"]["generation"], first["captured"]["changed"]) == ("snap-1", 1, True)
    record = here.record
    assert (record.generation, record.digest, record.files, record.snapshots) == (1, first["digest"], 2, 1)
    assert (here.counters()["captures"], here.counters()["snapshots"]) == (1, 1)
    same = here.run("workspace.snapshot", fresh=True)
    assert (same["name"], same["digest"], same["captured"]["changed"]) == ("snap-2", first["digest"], False)
    (here.folder / "a.txt").write_text("edited\n")
    third = here.run("workspace.snapshot", fresh=True, full=True, options={"exclude_caches": True})
    assert (third["generation"], third["captured"]["layers"]) == (2, 1)


@pytest.mark.parametrize("extra", [{"full": True}, {"verify": True}, {"paths": ["a.txt"]}, {"options": {"max_files": 1}}])
def test_how_to_capture_means_nothing_without_a_capture(here: Here, extra: dict[str, Any]) -> None:
    here.run("workspace.capture")
    with pytest.raises(InvalidParams, match="fresh"):
        here.run("workspace.snapshot", **extra)
    assert here.names() == []


def test_a_label_that_cannot_be_is_refused_before_the_capture(here: Here) -> None:
    with pytest.raises(InvalidParams, match="label"):
        here.run("workspace.snapshot", fresh=True, label="two\nlines")
    assert not here.store.refs(ID).exists


def test_a_run_that_died_after_its_snapshot_makes_no_second_one(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the ref and the answer: the next run finds its own work, also when the directory changed meanwhile."""
    job = here.submit("workspace.snapshot", fresh=True, label="once")

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_note", die)
        with pytest.raises(Killed):
            here.deliver(job)
    assert here.names() == ["snap-1"]
    running = here.registry.jobs.get(job.id)
    here.registry.jobs.release_lost(job.id, running.fence)
    (here.folder / "a.txt").write_text("edited meanwhile\n")
    result = here.deliver(job)
    assert (result["name"], result["label"], here.names()) == ("snap-1", "once", ["snap-1"])
    with Tree.open(here.store, result["digest"]) as tree:
        assert tree.read("a.txt") == b"first\n"
    assert (here.record.snapshots, here.counters()["snapshots"], here.record.generation) == (1, 1, 2)


def test_a_worker_that_slept_past_its_lease_numbers_nothing(here: Here) -> None:
    here.run("workspace.capture")
    job = here.submit("workspace.snapshot")
    claim = here.registry.jobs.claim(job.id, host=here.settings.host, worker="slow", lease_ms=30_000)
    here.registry.jobs.release_lost(job.id, claim.fence)
    assert here.deliver(job)["name"] == "snap-1"
    sleeper = JobContext(settings=here.settings, registry=here.registry, job=job, fence=claim.fence)
    with pytest.raises(LeaseLost):
        jobs.snapshot(sleeper, jobs.SnapshotArgs(workspace=ID))
    with pytest.raises(LeaseLost):
        jobs.forget(sleeper, jobs.ForgetArgs(workspace=ID, snapshots=["snap-1"]))
    assert here.names() == ["snap-1"]


def test_keep_and_forget(here: Here) -> None:
    here.run("workspace.capture")
    here.aged(3, 2, 1)
    assert here.run("workspace.keep", snapshots=["snap-1", "snap-3"], label="L") == {
        "workspace": ID,
        "snapshots": ["snap-1", "snap-3"],
    }
    with pytest.raises(InvalidParams, match="snap-1"):
        here.run("workspace.forget", snapshots=["snap-2", "snap-1"])
    assert here.run("workspace.keep", snapshots=["snap-1"], keep=False)["snapshots"] == ["snap-1"]
    assert here.run("workspace.keep", snapshots=["snap-1"], keep=None, note="N")["snapshots"] == ["snap-1"]
    first = snapshots(here.store.refs(ID))[0]
    assert (first.keep, first.label, first.note) == (False, "L", "N")
    assert here.run("workspace.forget", snapshots=["snap-2", "snap-1"], reason="tidy")["forgotten"] == ["snap-1", "snap-2"]
    again = here.run("workspace.forget", snapshots=["snap-2"])
    assert (again["forgotten"], again["already"]) == ([], ["snap-2"])
    assert (here.record.snapshots, here.counters()["snapshots_forgotten"]) == (1, 2)
    (event,) = here.registry.events.list(kind="workspace.snapshots_forgotten")
    assert (event.fields["snapshots"], event.fields["reason"]) == ("snap-1 snap-2", "forgotten: tidy")
    for wrong in ([], ["latest"], ["snap-9"], ["x"] * 1001):
        with pytest.raises(MothballError) as caught:
            here.run("workspace.forget", snapshots=wrong)
        assert caught.value.code in {"invalid_params", "not_found"}
    assert here.names() == ["snap-3"]
    # A mistyped name says nothing of the workspace: its captures are as good as before.
    assert (here.record.last_error, here.record.retry_count) == ("", 0)


def test_retention_of_a_host_follows_each_workspaces_policy_and_says_why(here: Here) -> None:
    for number, policy in ((2, {"retention": "all"}), (3, {"retention": {"within": "36h"}}), (4, None)):
        folder = here.folder.parent / f"tree-{number}"
        folder.mkdir()
        (folder / "f").write_text("x")
        here.fleet.register(f"o/r#{number}", folder, policy=policy)
    for number in range(1, 5):
        here.run("workspace.capture", workspace=f"o/r#{number}")
        here.aged(3, 2, 1, workspace=f"o/r#{number}")
    here.registry.workspaces.release("o/r#4")
    host = here.settings.host
    dry = here.run("store.retain", host=host, dry_run=True)
    assert all(here.names(f"o/r#{number}") == ["snap-1", "snap-2", "snap-3"] for number in range(1, 5))
    assert "snapshots_forgotten" not in here.counters()
    real = here.run("store.retain", host=host)
    assert (real["removed"], real["taken"], real["failed"]) == (dry["removed"], dry["taken"], [])
    assert {(each["workspace"], each["name"]): each["reasons"] for each in real["taken"]} == {
        (ID, "snap-1"): ["not among the last 1"],
        (ID, "snap-2"): ["not among the last 1"],
        ("o/r#3", "snap-1"): ["not younger than 36h"],
        ("o/r#3", "snap-2"): ["not younger than 36h"],
    }
    assert (real["workspaces"], real["kept"]) == (3, 5)
    assert here.names("o/r#2") == here.names("o/r#4") == ["snap-1", "snap-2", "snap-3"]
    assert (here.record.snapshots, here.registry.workspaces.get("o/r#2").snapshots) == (1, 3)
    assert here.counters()["snapshots_forgotten"] == 4
    assert len(Trash(here.store).buried()) == 4
    again = here.run("store.retain", host=host)
    assert (again["removed"], here.counters()["snapshots_forgotten"]) == (0, 4)


def test_retention_of_one_workspace_leaves_the_others(here: Here) -> None:
    here.run("workspace.capture")
    here.aged(4, 3, 2, 1)
    mark(here.store.refs(ID), "snap-1", keep=True)
    other = here.folder.parent / "other"
    other.mkdir()
    here.fleet.register("o/r#2", other)
    here.run("workspace.capture", workspace="o/r#2")
    here.aged(3, 2, 1, workspace="o/r#2")
    done = here.run("store.retain", host=here.settings.host, workspace=ID)
    assert ([each["name"] for each in done["taken"]], here.names()) == (["snap-2", "snap-3"], ["snap-1", "snap-4"])
    assert here.names("o/r#2") == ["snap-1", "snap-2", "snap-3"]
    with pytest.raises(NotFound):
        here.run("store.retain", host=here.settings.host, workspace="o/r#404")


def test_retention_stops_between_two_workspaces_when_it_is_cancelled(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    here.run("workspace.capture")
    here.aged(3, 2)
    job = here.submit("store.retain", host=here.settings.host)
    claim = here.registry.jobs.claim(job.id, host=here.settings.host, worker="w", lease_ms=30_000)
    here.registry.jobs.cancel(job.id)
    context = JobContext(settings=here.settings, registry=here.registry, job=job, fence=claim.fence)
    with pytest.raises(Cancelled):
        jobs.retain_store(context, jobs.RetainArgs(host=here.settings.host))
    assert here.names() == ["snap-1", "snap-2"]


def test_the_sweep_asks_each_host_and_a_request_for_all_joins_it(here: Here) -> None:
    assert jobs.retain_all(services.current()) == {"asked": 1, "joined": 0, "failed": 0}
    assert here.fleet.retain(here.settings.host).joined
    dry = here.fleet.retain(here.settings.host, dry_run=True)
    one = here.fleet.retain(here.settings.host, workspace=ID)
    assert (dry.joined, one.joined) == (False, False)
    queued = here.registry.jobs.list(state="queued")
    assert sorted((job.args["dry_run"], job.args.get("workspace")) for job in queued if job.id != one.id) == [
        (False, None),
        (True, None),
    ]


def test_snapshots_can_be_listed_when_redis_is_gone(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What retention would do is unknown then, and said to be."""
    with pytest.raises(InvalidParams):
        here.run("workspace.snapshot", fresh=True, label="turned\u202e")
    here.run("workspace.snapshot", fresh=True, label="plain")
    monkeypatch.setenv("MOTHBALL_DATA_DIR", str(here.settings.data_dir))
    monkeypatch.setenv("MOTHBALL_REDIS_URL", NO_REDIS)
    monkeypatch.setenv("MOTHBALL_HOST", here.settings.host)
    capsys.readouterr()
    assert run(build(), ["snapshots", ID]) == 0
    printed = capsys.readouterr()
    assert "snap-1" in printed.out
    assert "plain" in printed.out
    assert "cannot be reached" in printed.err
    assert run(build(), ["snapshots", ID, "--json"]) == 0
    assert [(each["name"], each["retention"]) for each in json.loads(capsys.readouterr().out)] == [("snap-1", None)]
    assert run(build(), ["retain"]) == 69
