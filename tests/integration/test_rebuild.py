"""Redis was lost: the records come back from the store, and the next capture goes on where the last one stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis

import tasks.capture
import tasks.snapshot  # noqa: F401  # declares workspace.snapshot
from mothball.doctor.layouts import read_layout
from mothball.doctor.rebuild import Rebuilt, rebuild
from mothball.errors import InvalidParams, LeaseLost
from mothball.reclaim import Reclaimer
from mothball.registry import Recovered, Registry, Workspace
from mothball.registry.kept import KEPT
from mothball.registry.rebuild import NEVER_KNOWN
from mothball.registry.standing import StoreFacts
from mothball.settings import Settings
from mothball.store import Ref, RefIndex, Store
from mothball.store.collect import CollectReport, collect
from mothball.store.manifest import PREFIX
from mothball.store.snapshots import add_snapshot
from tasks import services
from tasks.job import SPECS, execute
from tasks.transfer import _annotations as pulled_annotations
from workers.redis_server import RedisServer

NAME = "owner/repo#12"
SAID: dict[str, Any] = {
    "title": "Fix \u2603", "mode": "ephemeral", "agent_id": "a-1", "intent": "do it", "changeset_id": "c9", "base_commit": "abc",
    "pinned": True, "expires_in_ms": 3_600_000, "policy": {"capture": {"profile": "light"}},
}  # fmt: skip


class World:
    """One host, in this process: its registry, its store, and jobs that run at once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.store_dir)
        self.raw: Any = redis.Redis.from_url(settings.registry_url, decode_responses=True)
        self.registry.hosts.heartbeat(settings.host, {})

    @property
    def registry(self) -> Registry:
        return services.current().registry

    def workspace(self, name: str = NAME, **said: Any) -> Path:
        folder = self.settings.workspace_roots[0] / "trees" / name.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a").write_text(name)
        self.registry.workspaces.register(name, host=self.settings.host, path=str(folder), **said)
        return folder

    def run(self, task: str, name: str = NAME, **args: Any) -> dict[str, Any]:
        """The outcome of a job that this process runs as a worker would."""
        job = self.registry.jobs.submit(task, {"workspace": name, **args}, workspace=name).job
        request = SimpleNamespace(id=job.id, hostname="w@h", mothball=1)
        celery = SimpleNamespace(
            request=request, update_state=lambda **_: None, backend=SimpleNamespace(), send_event=lambda *_: None
        )
        outcome: dict[str, Any] = execute(celery, SPECS[task], (), {})
        return outcome

    def lose_redis(self) -> None:
        self.raw.flushall()
        self.registry.hosts.heartbeat(self.settings.host, {})

    def rebuild(self, **options: Any) -> dict[str, Rebuilt]:
        found = rebuild(self.registry, self.store, self.settings.host, **options)
        return {each.workspace or each.folder: each for each in found}

    def get(self, name: str = NAME) -> Workspace:
        return self.registry.workspaces.get(name)

    def annotate(self, name: str = NAME, **notes: str | None) -> None:
        """Change what the refs say, as an older version or a hand would; None takes a note away."""

        def change(refs: list[Ref]) -> list[Ref]:
            return [msgspec.structs.replace(ref, annotations=noted(ref.annotations)) for ref in refs]

        def noted(old: dict[str, str]) -> dict[str, str]:
            merged: dict[str, str | None] = {**old, **{PREFIX + key: value for key, value in notes.items()}}
            return {key: value for key, value in merged.items() if value is not None}

        RefIndex(self.store.root, name).replace(change)


@pytest.fixture
def world(private_redis: RedisServer, make_settings: Callable[..., Settings]) -> Iterator[World]:
    services.configure(make_settings(fsync=False))
    found = World(services.settings())
    yield found
    found.raw.close()
    services.renew()
    services._settings = None


def test_after_redis_is_lost_records_come_back_and_captures_go_on(world: World) -> None:
    folder = world.workspace(**SAID)
    world.run("workspace.capture")
    (folder / "b").write_text("two")
    world.run("workspace.capture")
    world.run("workspace.snapshot", label="before")
    before = world.get()
    world.lose_redis()
    found = world.rebuild()[NAME]
    after = world.get()
    assert (found.status, found.generation, found.snapshots, found.path_exists, found.damaged) == ("rebuilt", 2, 1, True, {})
    for field in (*KEPT, "id", "host", "generation", "digest", "bytes", "files", "snapshots"):
        assert getattr(after, field) == getattr(before, field), field
    assert found.unknown == after.unknown == sorted(NEVER_KNOWN)
    assert after.rebuilt_at is not None
    assert abs((after.last_good_at or 0) - (before.last_good_at or 0)) < 5_000
    assert after.fence > before.fence
    assert [event.kind for event in world.registry.events.list(workspace=NAME)] == ["workspace.rebuilt"]
    (folder / "c").write_text("three")
    assert world.run("workspace.capture")["generation"] == 3
    assert world.run("workspace.snapshot")["name"] == "snap-2", "a number is never given twice"
    assert world.get().generation == 3
    assert [each.id for each in world.registry.workspaces.list(repo="owner/repo", host=world.settings.host)] == [NAME]


def test_a_dry_run_says_the_same_and_writes_nothing(world: World) -> None:
    world.workspace(**SAID)
    world.run("workspace.capture")
    world.lose_redis()
    before = sorted(world.raw.scan_iter("*"))
    planned = world.rebuild(dry_run=True)[NAME]
    assert sorted(world.raw.scan_iter("*")) == before
    done = world.rebuild()[NAME]
    assert (planned.status, done.status) == ("missing", "rebuilt")
    assert msgspec.structs.replace(planned, status="rebuilt") == done


def test_what_is_known_is_never_overwritten_and_asking_again_changes_nothing(world: World) -> None:
    world.workspace("o/here#1")
    world.workspace("o/lost#2")
    for name in ("o/here#1", "o/lost#2"):
        world.run("workspace.capture", name)
    world.raw.delete(f"{world.settings.namespace}:ws:o/lost#2")
    before = world.get("o/here#1")
    assert {name: each.status for name, each in world.rebuild().items()} == {"o/here#1": "exists", "o/lost#2": "rebuilt"}
    first = world.get("o/lost#2")
    assert {each.status for each in world.rebuild().values()} == {"exists"}
    assert (world.get("o/here#1"), world.get("o/lost#2")) == (before, first)
    assert world.registry.counters.all()["workspaces_rebuilt"] == 1


def test_many_at_once_make_each_record_once(world: World) -> None:
    names = [f"o/r#{number}" for number in range(6)]
    for name in names:
        world.workspace(name)
        world.run("workspace.capture", name)
    world.lose_redis()
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: world.rebuild(), range(4)))
    for name in names:
        assert sorted(run[name].status for run in runs) == ["exists", "exists", "exists", "rebuilt"]
    assert world.registry.counters.all()["workspaces_rebuilt"] == len(names)


def test_a_released_workspace_stays_released(world: World) -> None:
    """By its tombstone while that stands, by the mark in its layout when the tombstone went with Redis."""
    world.workspace("o/r#1")
    world.run("workspace.capture", "o/r#1")
    world.registry.workspaces.release("o/r#1")
    assert world.rebuild()["o/r#1"].status == "gone"
    layout = world.store.refs("o/r#1").folder
    at = world.registry.time_ms() + 1000
    (layout / "released").write_text(json.dumps({"workspace": "o/r#1", "at": at, "reason": "released"}))
    world.lose_redis()
    assert world.rebuild()["o/r#1"].status == "released"
    assert world.registry.workspaces.list() == []


def test_a_workspace_that_was_registered_again_after_its_release_comes_back(world: World) -> None:
    """A collector has not yet taken the old mark away, but a job began here since."""
    world.workspace("o/r#1")
    world.run("workspace.capture", "o/r#1")
    at = world.registry.time_ms()
    (world.store.refs("o/r#1").folder / "released").write_text(json.dumps({"workspace": "o/r#1", "at": at, "reason": "x"}))
    world.registry.workspaces.release("o/r#1")
    world.workspace("o/r#1")
    world.run("workspace.capture", "o/r#1")
    world.lose_redis()
    assert world.rebuild()["o/r#1"].status == "rebuilt"


def test_what_cannot_be_known_is_marked_and_nothing_is_swept_for_it(world: World) -> None:
    """A capture of an older version kept no record: mode, pin and the rest are unknown, so the workspace is persistent."""
    world.workspace(**SAID)
    world.run("workspace.capture")
    world.annotate(record=None)
    world.lose_redis()
    found = world.rebuild()[NAME]
    record = world.get()
    assert found.status == "rebuilt"
    assert set(found.unknown) == {*NEVER_KNOWN, *KEPT} - {"path", "repo", "number"}
    assert (record.mode, record.pinned, record.expires_at, record.title) == ("persistent", False, None, None)
    assert (record.repo, record.number, record.path) == ("owner/repo", 12, found.path)
    assert record.created_at > 0


def test_what_was_held_or_submitted_before_the_loss_is_not_swept_before_anybody_can_say_so_again(world: World) -> None:
    world.workspace(**{**SAID, "pinned": False, "mode": "ephemeral"})
    world.run("workspace.capture")
    world.lose_redis()
    assert world.rebuild()[NAME].status == "rebuilt"
    now, day = world.registry.time_ms(), 86_400_000
    world.registry.policies.set_fleet({"ttl": "1h", "cap": 1}, "a test")
    world.registry.workspaces.register("younger", host=world.settings.host, path="/srv/younger", mode="persistent")

    def expected(later: int) -> list[str]:
        return [item.facts.id for item in Reclaimer(world.registry, world.settings).plan(now=now + later).items]

    assert expected(6 * day) == []
    assert expected(8 * day) == [NAME]


def test_what_a_hand_wrote_into_the_store_is_not_believed(world: World) -> None:
    world.workspace(**SAID)
    world.run("workspace.capture")
    wrong: dict[str, Any] = {
        "path": str(world.settings.workspace_roots[0]), "repo": "../etc", "number": "7", "title": ["x"], "mode": "eternal",
        "created_at": None, "expires_at": -5, "intent": "\ud800",
        "pinned": "yes", "pin_reason": "x" * 5000, "policy": [], "agent_name": "agent-7",
    }  # fmt: skip
    world.annotate(record=json.dumps(wrong), repo="")
    world.lose_redis()
    found = world.rebuild()[NAME]
    assert found.status == "rebuilt"
    assert set(found.unknown) >= set(wrong) - {"path", "agent_name"}
    record = world.get()
    assert (record.agent_name, record.repo, record.mode, record.policy) == ("agent-7", None, "persistent", {})


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/nul\0", "", 7, "/" + "x" * 5000, "/\ud800"])
def test_a_path_that_can_be_none_is_said_and_gets_no_record(world: World, path: Any) -> None:
    world.workspace()
    world.run("workspace.capture")
    world.annotate(record=json.dumps({"path": path}), path=None)
    world.lose_redis()
    for dry_run in (True, False):
        found = world.rebuild(dry_run=dry_run)[NAME]
        assert (found.status, found.reason != "") == ("impossible", True)
    assert world.registry.workspaces.count() == 0


def test_a_workspace_whose_directory_is_gone_comes_back_and_it_is_said(world: World) -> None:
    folder = world.workspace()
    world.run("workspace.capture")
    world.lose_redis()
    (folder / "a").unlink()
    folder.rmdir()
    found = world.rebuild()[NAME]
    assert (found.status, found.path, found.path_exists) == ("rebuilt", str(folder), False)


def test_damage_is_named_and_hides_nothing_else(world: World) -> None:
    for name in ("o/index#1", "o/blob#2", "o/whole#3", "o/fence#4"):
        world.workspace(name)
        world.run("workspace.capture", name)
    broken = world.store.refs("o/index#1")
    (broken.folder / "index.json").write_text('{"manifests": [')
    digest = world.store.refs("o/blob#2").get().digest
    world.store.blobs.path(digest).unlink()
    (world.store.refs("o/fence#4").folder / "fence").write_text("many")
    world.lose_redis()
    found = world.rebuild()
    assert found[broken.folder.name].status == "impossible"
    assert "index.json" in found[broken.folder.name].problems[0]
    assert found["o/blob#2"].status == "rebuilt"
    assert digest in found["o/blob#2"].damaged["latest"]
    assert (found["o/whole#3"].status, found["o/whole#3"].problems, found["o/whole#3"].damaged) == ("rebuilt", [], {})
    assert found["o/fence#4"].status == "rebuilt"
    assert "fence" in found["o/fence#4"].problems[0]
    assert world.run("workspace.capture", "o/blob#2")["generation"] == 1
    assert world.rebuild()["o/blob#2"].damaged == {}, "the same content was written again, under the same digest"


def test_a_copied_layout_is_not_taken_for_the_workspace_it_names(world: World) -> None:
    world.workspace("o/r#1")
    world.run("workspace.capture", "o/r#1")
    real = world.store.refs("o/r#1").folder
    copy = real.parent / "copy-of-it"
    copy.mkdir()
    (copy / "index.json").write_bytes((real / "index.json").read_bytes())
    assert read_layout(world.store, copy).workspace is None
    world.lose_redis()
    assert world.rebuild()["copy-of-it"].status == "impossible"


def test_a_first_capture_that_failed_leaves_nothing_to_rebuild(world: World) -> None:
    world.store.prepare()
    world.store.refs("o/r#9").prepare()
    assert [each.status for each in world.rebuild().values()] == ["empty"]


def test_d05_a_name_that_was_given_to_an_agent_is_not_given_again(world: World) -> None:
    for number in (1, 2, 3):
        world.workspace(f"o/r#{number}")
        world.run("workspace.capture", f"o/r#{number}")
    assert world.get("o/r#3").agent_name == "agent-3"
    world.lose_redis()
    world.rebuild()
    assert world.get("o/r#3").agent_name == "agent-3"
    world.workspace("o/r#4")
    assert world.get("o/r#4").agent_name == "agent-4"


def test_a_run_that_outlived_the_old_registry_changes_nothing_in_the_new_one(world: World) -> None:
    """A worker was frozen while Redis was lost; it wakes up with a fence of the old time."""
    world.workspace("o/r#1")
    world.run("workspace.capture", "o/r#1")
    job = world.registry.jobs.submit("workspace.capture", {"workspace": "o/r#1"}, workspace="o/r#1").job
    old = world.registry.jobs.claim(job.id, host=world.settings.host, worker="w/1", lease_ms=60_000)
    refs = world.store.refs("o/r#1")
    refs.take_fence(old.fence, job.id)
    world.lose_redis()
    world.rebuild()
    with pytest.raises(LeaseLost):
        world.registry.jobs.finish(job.id, old.fence, {}, {"generation": 9, "digest": "sha256:" + "0" * 64})
    assert world.get("o/r#1").generation == 1
    world.run("workspace.capture", "o/r#1")
    with pytest.raises(LeaseLost):
        refs.replace(lambda found: found, fence=old.fence, job=job.id)


def test_a_fence_from_the_future_is_still_outnumbered(world: World) -> None:
    """The clock of the Redis that was lost ran ahead: without this, no job could ever write here again."""
    world.workspace("o/r#1")
    world.run("workspace.capture", "o/r#1")
    ahead = world.registry.time_ms() + 10**9
    world.store.refs("o/r#1").take_fence(ahead, "x")
    world.lose_redis()
    world.rebuild()
    assert world.get("o/r#1").fence > ahead
    assert world.run("workspace.capture", "o/r#1")["changed"] is False


@pytest.mark.parametrize("content", ["many", str(2**60)])
def test_a_fence_that_no_job_can_follow_says_what_to_delete_and_then_captures_go_on(world: World, content: str) -> None:
    world.workspace()
    world.run("workspace.capture")
    fence = world.store.refs(NAME).folder / "fence"
    fence.write_text(content)
    world.lose_redis()
    [problem] = world.rebuild()[NAME].problems
    assert f"delete {fence}" in problem
    fence.unlink()
    assert world.run("workspace.capture")["generation"] == 1


def test_a_store_that_is_newer_than_the_host_that_rebuilt_first_says_so(world: World) -> None:
    folder = world.workspace()
    world.run("workspace.capture")
    left = Store(world.settings.data_dir / "left")
    shutil.copytree(world.store.root, left.root, symlinks=True)
    (folder / "b").write_text("made after it had moved")
    world.run("workspace.capture")
    world.lose_redis()
    [first] = rebuild(world.registry, left, "first-host")
    assert (first.status, first.generation) == ("rebuilt", 1)
    found = world.rebuild()[NAME]
    assert found.status == "other_host"
    assert "first-host with generation 1; this store is newer and has generation 2" in found.reason
    assert world.get().host == "first-host"


def test_a_workspace_that_was_registered_again_is_not_ended_by_its_release_when_redis_is_lost(world: World) -> None:
    def later(seconds: float) -> CollectReport:
        facts = StoreFacts(world.registry.workspaces, world.settings.host, world.registry.crashes)
        return collect(world.store, grace_s=1, trash_s=10**7, tombstone_s=60, facts=facts, clock=lambda: time.time() + seconds)

    world.workspace()
    world.run("workspace.capture")
    world.registry.workspaces.release(NAME)
    assert later(0).released == [NAME]
    (world.workspace() / "a").write_text("the new life")
    world.run("workspace.capture")
    world.run("workspace.snapshot", keep=True)
    world.lose_redis()
    assert (later(100).removed, later(100).orphans) == ([], [NAME])
    assert world.rebuild()[NAME].status == "rebuilt"


def test_a_workspace_that_moved_to_another_host_is_left_there(world: World) -> None:
    world.workspace("o/r#1")
    world.run("workspace.capture", "o/r#1")
    world.lose_redis()
    world.registry.workspaces.register("o/r#1", host="elsewhere", path="/srv/x")
    found = world.rebuild()["o/r#1"]
    assert (found.status, "elsewhere" in found.reason) == ("other_host", True)
    assert world.get("o/r#1").host == "elsewhere"


def test_a_time_from_the_future_is_cut_to_now(world: World) -> None:
    facts = Recovered(
        id="o/r#1", host="h", path="/srv/x", fence=0, generation=1, digest="sha256:" + "0" * 64, bytes=1, files=1,
        high_water_bytes=5, snapshots=0, crash_reports=0, last_good_at=10**13 - 1, created_at=10**13 - 1,
        kept={"repo": "o/r", "agent_name": "agent-12"},
    )  # fmt: skip
    record = world.registry.rebuilds.record(facts).record
    assert record is not None
    now = world.registry.time_ms()
    assert (record.created_at <= now, (record.last_good_at or 0) <= now, record.high_water_bytes) == (True, True, 5)
    assert world.registry.workspaces.latest_of_repo("o/r", "h") == "o/r#1"
    for wrong in ({"id": "../x"}, {"id": "by:x"}, {"host": "a b"}, {"path": "x"}):
        with pytest.raises(InvalidParams):
            world.registry.rebuilds.record(msgspec.structs.replace(facts, **wrong))


def test_a_workspace_that_only_has_what_was_pulled_comes_back_too(world: World) -> None:
    """It was registered on a new host, and its snapshot fetched from a registry; it was never captured there."""
    world.workspace("o/from#1")
    world.run("workspace.capture", "o/from#1")
    there = world.store.refs("o/from#1").get()
    folder = world.workspace("o/to#2", title="second")
    refs = world.store.refs("o/to#2")
    refs.prepare()
    refs.take_fence(5, "pull")
    notes = pulled_annotations(world.store, there.digest, world.get("o/to#2"))
    add_snapshot(refs, fence=5, job="pull", at_ms=1, source=Ref("", there.digest, there.size, notes))
    world.lose_redis()
    found = world.rebuild()["o/to#2"]
    record = world.get("o/to#2")
    assert (found.status, found.path, found.snapshots) == ("rebuilt", str(folder), 1)
    assert (record.title, record.digest, record.generation, record.agent_name) == ("second", None, 0, "agent-1")
    assert world.run("workspace.capture", "o/to#2")["generation"] == 1


def test_progress_is_told_for_every_layout(world: World) -> None:
    for number in (1, 2):
        world.workspace(f"o/r#{number}")
        world.run("workspace.capture", f"o/r#{number}")
    told: list[tuple[int, int]] = []
    world.rebuild(progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
