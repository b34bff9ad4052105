"""Collection through the registry: the job, the sweep, the commands, and what evidence a layout ends on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.exceptions import Ignore

from mothball.errors import Corrupt, InvalidParams, NotFound
from mothball.registry.standing import StoreFacts
from mothball.settings import Settings
from mothball.store import Ref
from mothball.store.blobs import file_lock
from mothball.store.refs import RELEASED
from mothball.store.trash import Trash
from tasks import collect as jobs
from tests.commands import Answer, beside_jobs
from tests.conftest import NO_REDIS
from tests.integration.test_snapshot_jobs import ID, Here
from workers.redis_server import RedisServer

DAY = 86_400.0


@pytest.fixture
def here(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Here]:
    found = Here(
        make_settings(
            fsync=False, redis_timeout=1.0, capture_time_limit=10, transfer_time_limit=10, collect_grace_seconds=60,
            trash_seconds=3600, tombstone_seconds=60, reserve_bytes=4096,
        ),
        tmp_path / "tree",
    )  # fmt: skip
    yield found
    found.close()


@pytest.fixture
def mothball(here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    return beside_jobs(here.settings, monkeypatch, capsys)


def age(here: Here, seconds: float = DAY) -> None:
    """What lies in the store is older by `seconds`."""
    for path in here.store.root.rglob("*"):
        found = path.lstat()
        os.utime(path, (found.st_atime - seconds, found.st_mtime - seconds), follow_symlinks=False)


def collect(here: Here, **args: Any) -> dict[str, Any]:
    return here.run("store.collect", host=here.settings.host, **args)


def forgotten(here: Here) -> str:
    """A captured workspace whose first capture was a snapshot and is forgotten; the digest of that."""
    here.run("workspace.capture")
    digest = here.run("workspace.snapshot")["digest"]
    (here.folder / "a.txt").write_text("second\n" * 100)
    here.run("workspace.capture", full=True)
    here.run("workspace.forget", snapshots=["snap-1"])
    return str(digest)


def test_a_collection_counts_what_it_freed_and_tells_of_it(here: Here) -> None:
    forgotten(here)
    assert collect(here)["waiting_blobs"] == 3
    assert here.registry.events.list(kind="store.collected") == []
    age(here, 100)
    moved = collect(here)
    assert (moved["moved_blobs"], moved["trash_blobs"], moved["reserve_bytes"]) == (3, 3, 4096)
    [mine] = [usage for usage in moved["workspaces"] if usage["name"] == ID]
    assert mine["reclaimable"] == moved["moved_bytes"]
    assert mine["stored"] == mine["exclusive"] > mine["shared"] == 0
    assert mine["logical"] == 7 * 100 + len("other\n")
    assert [freed["bytes"] for freed in moved["freed"]] == [moved["moved_bytes"]]
    emptied = collect(here, empty_trash=True)
    assert (emptied["deleted_blobs"], emptied["deleted_bytes"]) == (3, moved["moved_bytes"])
    counters = here.counters()
    assert (counters["collections"], counters["collect_moved_blobs"], counters["collect_freed_blobs"]) == (3, 3, 3)
    assert counters["collect_freed_bytes"] == counters["collect_moved_bytes"] == moved["moved_bytes"]
    told = here.registry.events.list(kind="store.collected")
    assert [event.fields["freed_blobs"] for event in told] == ["3", "0"]
    assert told[0].fields["host"] == here.settings.host


def test_a_dry_run_counts_nothing_and_never_joins_the_real_one(here: Here) -> None:
    forgotten(here)
    age(here, 100)
    assert collect(here, dry_run=True)["moved_blobs"] == 3
    assert "collections" not in here.counters()
    host = here.settings.host
    real = here.fleet.collect(host)
    assert here.fleet.collect(host).id == real.id
    others = {here.fleet.collect(host, **flag).id for flag in ({"dry_run": True}, {"empty_trash": True})}  # type: ignore[arg-type]
    assert len(others | {real.id}) == 3
    assert here.fleet.job_record(real.id).args["dry_run"] is False


def test_the_sweep_asks_each_host_that_is_online_once(here: Here) -> None:
    here.registry.hosts.heartbeat("h2", {})
    from tasks import services

    assert jobs.collect_all(services.current()) == {"asked": 2, "joined": 0, "failed": 0}
    assert jobs.collect_all(services.current())["joined"] == 2
    assert {job.host for job in here.registry.jobs.list(state="queued")} == {"h2", here.settings.host}


def test_a_second_collection_is_busy_and_tried_again(here: Here) -> None:
    here.store.prepare()
    with file_lock(here.store.root / "collect.lock", "it"), pytest.raises(Ignore, match="retried"):
        collect(here)
    [job] = here.registry.jobs.list()
    assert (job.state, job.error_code) == ("queued", "busy")


def test_a_damaged_index_fails_the_job_and_names_itself(here: Here) -> None:
    forgotten(here)
    (here.store.refs(ID).folder / "index.json").write_bytes(b"{")
    age(here)
    before = sorted(path.name for path in here.store.blobs.folder.iterdir())
    with pytest.raises(Corrupt, match="nothing was collected"):
        collect(here)
    assert sorted(path.name for path in here.store.blobs.folder.iterdir()) == before


def test_a_cancelled_collection_stops(here: Here) -> None:
    forgotten(here)
    job = here.submit("store.collect", host=here.settings.host)
    claimed: list[bool] = []

    def cancel(self: Any, name: str, **_: Any) -> None:
        claimed.append(here.registry.jobs.cancel(job.id).cancelled)
        here.registry.jobs.checkpoint(job.id, self.fence, {})

    from tasks.context import JobContext

    original, JobContext.checkpoint = JobContext.checkpoint, cancel  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(Ignore):
            here.deliver(job)
    finally:
        JobContext.checkpoint = original  # type: ignore[method-assign]
    assert claimed
    assert here.registry.jobs.get(job.id).state == "cancelled"


def test_arguments_are_checked(here: Here) -> None:
    for args in ({"forget_orphans": ["x"] * 101}, {"grace": 0}, {"dry_run": "yes"}):
        with pytest.raises(InvalidParams):
            collect(here, **args)
    with pytest.raises(InvalidParams):
        here.run("store.undelete", host=here.settings.host, workspace="../x")


# -- evidence ----------------------------------------------------------------------------------------------------------


def test_what_the_registry_says_of_a_workspace(here: Here) -> None:
    facts = StoreFacts(here.registry.workspaces, here.settings.host, here.registry.crashes)
    assert [facts.standing(each) for each in (ID, "never/was#1", "by:nobody")] == ["known", "unknown", "unknown"]
    assert list(facts.registered()) == [(ID, None)]
    here.run("workspace.capture")
    assert list(facts.registered()) == [(ID, here.record.digest)]
    here.registry.workspaces.release(ID)
    assert (facts.standing(ID), list(facts.registered())) == ("gone", [])
    assert list(StoreFacts(here.registry.workspaces, "elsewhere", here.registry.crashes).registered()) == []


def test_a_released_workspace_leaves_the_store_when_its_tombstone_does_and_can_be_brought_back(here: Here) -> None:
    here.run("workspace.capture")
    digest = here.record.digest
    assert here.registry.workspaces.release(ID)
    assert collect(here)["released"] == [ID]
    mark = here.store.refs(ID).folder / RELEASED
    raw = redis.Redis.from_url(here.settings.registry_url)
    assert raw.delete(f"{here.settings.namespace}:ws:gone:{ID}") == 1
    assert collect(here)["removed"] == []
    said = json.loads(mark.read_text())
    mark.write_text(json.dumps({**said, "at": said["at"] - 120_000}))
    age(here, 100)
    assert collect(here)["removed"] == [ID]
    age(here, 100)
    assert collect(here)["moved_blobs"] == 3
    back = here.run("store.undelete", host=here.settings.host, workspace=ID)
    ref = {"was": "latest", "name": "latest", "digest": digest, "problem": ""}
    assert back == {"workspace": ID, "refs": [ref], "refs_more": 0, "registered": False}
    assert collect(here)["orphans"] == [ID]
    event = here.registry.events.list(kind="workspace.undeleted")[0]
    assert (event.fields["workspace"], event.fields["refs"]) == (ID, '["latest"]')


def test_a_registry_that_lost_everything_empties_no_store(here: Here) -> None:
    here.run("workspace.capture")
    digest = here.record.digest
    redis.Redis.from_url(here.settings.registry_url).flushall()
    here.registry.hosts.heartbeat(here.settings.host, {})
    for _ in range(3):
        age(here)
        report = collect(here)
        assert (report["orphans"], report["moved_blobs"], report["removed"]) == ([ID], 0, [])
    assert here.store.refs(ID).get().digest == digest
    assert collect(here, forget_orphans=[ID])["released"] == [ID]


def test_undelete_tells_the_registry_how_many_snapshots_there_are(here: Here) -> None:
    digest = forgotten(here)
    assert here.record.snapshots == 0
    age(here, 100)
    collect(here)
    back = here.run("store.undelete", host=here.settings.host, workspace=ID, ref="snap-1")
    assert (back["refs"][0]["digest"], back["registered"]) == (digest, True)
    assert here.record.snapshots == 1
    with pytest.raises(NotFound, match="snap-9"):
        here.run("store.undelete", host=here.settings.host, workspace=ID, ref="snap-9")
    assert not (here.store.refs(ID).folder / RELEASED).exists()


def test_an_undelete_of_thousands_has_an_outcome_that_can_be_recorded(here: Here) -> None:
    forgotten(here)
    trash, ref = Trash(here.store), here.store.refs(ID).get()
    for number in range(2, 2600):
        trash.bury_ref(ID, Ref(f"snap-{number}", ref.digest, ref.size), "test", number)
    back = here.run("store.undelete", host=here.settings.host, workspace=ID)
    assert len(back["refs"]) + back["refs_more"] == 2599
    assert here.record.snapshots == 2599


def test_captures_that_a_workspace_left_behind_on_this_host_are_reported_and_can_be_given_up(here: Here) -> None:
    """Released and registered on another host before a collection saw it: they would stay here for ever, and nobody would know."""
    here.run("workspace.capture")
    here.registry.workspaces.release(ID)
    here.registry.hosts.heartbeat("another", {})
    here.registry.workspaces.register(ID, host="another", path=str(here.folder))
    report = collect(here)
    assert (report["orphans"], report["released"], report["removed"]) == ([ID], [], [])
    assert collect(here, forget_orphans=[ID])["released"] == [ID]
    assert here.store.refs(ID).exists
    mark = here.store.refs(ID).folder / RELEASED
    noted = json.loads(mark.read_bytes())
    age(here, 3 * 86_400)
    mark.write_text(json.dumps({**noted, "at": 1}))
    assert collect(here)["removed"] == [ID]
    assert here.registry.workspaces.get(ID).host == "another"


# -- commands ----------------------------------------------------------------------------------------------------------


def test_the_commands_collect_and_bring_back(here: Here, mothball: Callable[..., Answer]) -> None:
    digest = forgotten(here)
    age(here, 100)
    told = mothball("collect", "--dry-run")
    assert (told.code, told.err) == (0, "")
    assert "would go" in told.out
    assert Trash(here.store).runs() == []
    done = mothball("collect", "--json")
    assert done.json()["moved_blobs"] == 3
    text = mothball("collect").out
    assert "that `mothball undelete` can bring back" in text
    assert "RECLAIMABLE" in text
    listed = mothball("undelete", "--json").json()
    assert [(each["workspace"], each["name"], each["digest"]) for each in listed] == [(ID, "snap-1", digest)]
    assert "snap-1" in mothball("undelete").out
    back = mothball("undelete", ID, "snap-1")
    assert (back.code, back.out, back.err) == (0, f"snap-1  {digest}\n", "")
    again = mothball("undelete", ID, "snap-1", "--json")
    assert again.json()["refs"][0]["name"] == "snap-1"
    assert mothball("undelete", ID, "snap-7").code == 1
    assert here.counters()["collections"] == 2


def test_the_command_brings_back_what_it_can_and_says_what_is_lost(here: Here, mothball: Callable[..., Answer]) -> None:
    lost = forgotten(here)
    (here.folder / "more").write_text("second")
    here.run("workspace.capture")
    kept = here.run("workspace.snapshot")
    here.run("workspace.forget", snapshots=[kept["name"]])
    here.store.blobs.path(lost).unlink()
    said = mothball("undelete", ID)
    assert (said.code, said.out) == (1, f"{kept['name']}  {kept['digest']}\n")
    assert lost in said.err
    assert "1 of 2 captures cannot come back" in said.err
    refs = mothball("undelete", ID, "--json").json()["refs"]
    assert [(each["was"], each["name"], bool(each["problem"])) for each in refs] == [
        ("snap-1", "", True), (kept["name"], kept["name"], False),
    ]  # fmt: skip


def test_the_commands_say_what_is_wrong(here: Here, mothball: Callable[..., Answer]) -> None:
    here.run("workspace.capture")
    assert mothball("collect", "--no-wait").code == 2
    assert mothball("undelete", "--host", "h").code == 2
    assert mothball("collect", "--host", "nowhere").code == 69
    unknown = mothball("collect", "--forget-orphan", ID)
    assert (unknown.code, "is no orphan" in unknown.err) == (1, True)
    with file_lock(here.store.root / "collect.lock", "it"):
        assert mothball("collect").code == 75
    manifest = here.record.digest or ""
    lost = next(path for path in here.store.blobs.folder.iterdir() if path.name != manifest[7:])
    lost.unlink()
    missing = mothball("collect", "--json")
    assert (missing.code, missing.json()["missing"][0][0]) == (1, f"sha256:{lost.name}")


def test_without_redis_blobs_are_collected_and_layouts_left_alone(
    here: Here, mothball: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten(here)
    here.registry.workspaces.release(ID)
    age(here, 100)
    monkeypatch.setenv("MOTHBALL_REDIS_URL", NO_REDIS)
    done = mothball("collect", "--json")
    assert (done.code, done.json()["moved_blobs"], done.json()["released"]) == (0, 3, [])
    assert "layouts of released workspaces are left alone" in done.err
    back = mothball("undelete", ID, "snap-1")
    assert back.code == 0
    assert "the registry does not know" in back.err
