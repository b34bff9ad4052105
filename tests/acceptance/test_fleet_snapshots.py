"""Snapshots through a fleet: the command line, a plain producer, and the sweep that forgets by rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mothball.client import Fleet
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.snapshots import add_snapshot, snapshots
from tests.acceptance.fleet import FleetRun
from tests.commands import Answer, beside_jobs
from workers.redis_server import RedisServer

ID = "owner/repo#7"
DAY = 86_400_000


@pytest.fixture
def fleet(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[FleetRun]:
    """As in conftest.py, with a retention that keeps one snapshot, and one workspace."""
    settings = make_settings(
        lease_seconds=3, ring_seconds=1, queued_ring_after_seconds=1, heartbeat_seconds=1, soft_shutdown_seconds=1,
        worker_concurrency=1, redis_timeout=1.5, retention="last=1",
    )  # fmt: skip
    with FleetRun(settings, tmp_path / "fleet") as run:
        tree = run.folder / "trees" / "a"
        tree.mkdir(parents=True)
        (tree / "a.txt").write_text("one\n")
        run.workspace(ID, path=tree)
        yield run


@pytest.fixture
def mothball(fleet: FleetRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`mothball(...)` with the fleet's settings, in this process."""
    return beside_jobs(fleet.settings, monkeypatch, capsys)


def names(fleet: FleetRun) -> list[str]:
    return [each.name for each in snapshots(Store(fleet.settings.store_dir).refs(ID))]


def test_the_command_line_from_a_snapshot_to_its_end(fleet: FleetRun, mothball: Callable[..., Answer]) -> None:
    """snapshot, snapshots, keep, forget, retention, retain: here and as a job of the host."""
    fleet.worker()
    done = mothball("snapshot", ID)
    assert (done.code, done.out) == (1, "")
    assert "--fresh" in done.err
    first = mothball("snapshot", ID, "--fresh", "--label", "begin", "--json").json()["result"]
    assert (first["name"], first["label"], first["captured"]["files"]) == ("snap-1", "begin", 1)
    said = mothball("snapshot", ID, "--label", "again", "--keep")
    assert said.out.splitlines() == [f"snap-2  {first['digest']}", "again: generation 1, 1 file, 4 B, kept"]
    assert mothball("snapshot", ID, "--no-wait").out.startswith("job ")
    fleet.until(lambda: len(names(fleet)) == 3, "the third snapshot")

    listed = {each["name"]: each for each in mothball("snapshots", ID, "--json").json()}
    assert [listed[name]["retention"]["keep"] for name in ("snap-1", "snap-2", "snap-3")] == [False, True, True]
    assert listed["snap-1"]["retention"]["reasons"] == ["not among the last 1"]
    shown = mothball("snapshots", ID)
    assert "goes: not among the last 1" in shown.out
    assert "retention: last=1" in shown.err

    dry = mothball("retain", ID, "--dry-run").out
    assert "snap-1" in dry
    assert "1 snapshot would go, 2 stay, in 1 workspace" in dry
    by_job = mothball("retain", "--dry-run", "--host", fleet.settings.host, "--json").json()
    assert [each["name"] for each in by_job["result"]["taken"]] == ["snap-1"]
    assert len(names(fleet)) == 3

    assert mothball("retention", ID, "last=2,daily=3").code == 0
    assert mothball("retention", ID, "--json").json() == {"workspace": ID, "retention": "last=2,daily=3", "own": True}
    assert mothball("retention", ID, "last=0").code == 2
    assert mothball("retain").out.splitlines()[-1] == "1 snapshot forgotten, 2 stay, in 1 workspace"
    assert (names(fleet), fleet.registry.workspaces.get(ID).snapshots) == (["snap-2", "snap-3"], 2)

    assert mothball("forget", ID, "snap-2").code == 2
    assert mothball("keep", ID, "snap-2", "--off").out == "snap-2: kept no longer\n"
    assert mothball("forget", ID, "snap-2", "--reason", "tidy").out == "forgotten: snap-2\n"
    assert mothball("forget", ID, "snap-2").out == "had gone before: snap-2\n"
    missing = mothball("forget", ID, "snap-9", "--json")
    assert (missing.code, json.loads(missing.err)["error"]["code"]) == (1, "not_found")
    assert names(fleet) == ["snap-3"]
    assert mothball("files", ID, "--at", "snap-3").out == "a.txt\n"


def test_a_producer_with_and_without_our_client(fleet: FleetRun) -> None:
    fleet.worker()
    fleet.finished(fleet.submit("workspace.capture", workspace=ID))
    plain = fleet.producer().send_task("workspace.snapshot", kwargs={"workspace": ID, "label": "plain"}, queue="dispatch")
    assert plain.get(timeout=30)["name"] == "snap-1"
    with Fleet(settings=fleet.settings) as client:
        made = client.snapshot(ID, fresh=True, label="ours", note="n", keep=True).wait(30)
        assert (made.name, made.workspace, made.label, made.keep) == ("snap-2", ID, "ours", True)
        assert made.captured is not None
        assert made.captured["changed"] is False
        assert client.keep(ID, ["snap-2"], keep=False).wait(30)["snapshots"] == ["snap-2"]
        assert client.forget(ID, ["snap-1"]).wait(30)["forgotten"] == ["snap-1"]
        assert client.retain(fleet.settings.host).wait(30)["kept"] == 1


def test_the_sweep_forgets_what_no_rule_keeps(fleet: FleetRun) -> None:
    """Beat asks the host by itself; what went is an event with its reason, and the files of the workspace are not touched."""
    fleet.worker()
    fleet.finished(fleet.submit("workspace.capture", workspace=ID))
    refs = Store(fleet.settings.store_dir).refs(ID)
    for number in (3, 2, 1):
        at = fleet.registry.time_ms() - number * DAY
        fence = int((refs.folder / "fence").read_text())
        add_snapshot(refs, fence=fence, job=f"old-{number}", at_ms=at, keep=number == 3)
    fleet.beat()
    fleet.until(lambda: names(fleet) == ["snap-1", "snap-3"], "retention takes snap-2", seconds=30)
    fleet.until(lambda: fleet.registry.workspaces.get(ID).snapshots == 2, "the record knows")
    (event,) = fleet.registry.events.list(kind="workspace.snapshots_forgotten")
    assert (event.fields["workspace"], event.fields["snapshots"], event.fields["reason"]) == (ID, "snap-2", "retention last=1")
    (job,) = [job for job in fleet.registry.jobs.list() if job.task == "store.retain"]
    assert (job.origin, job.workspace, job.queue) == ("beat", None, f"host.{fleet.settings.host}")
    assert refs.get("latest").digest == refs.get("snap-3").digest
