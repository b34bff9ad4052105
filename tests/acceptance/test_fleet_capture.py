"""workspace.capture through the fleet: from a message to a generation in the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mothball.registry import Doorbell
from mothball.store import Store
from mothball.store.tree import Tree
from tests.acceptance.fleet import FleetRun


def tree_of(fleet: FleetRun, name: str = "r/a#1") -> Path:
    """A registered workspace with three files."""
    folder = fleet.folder / "trees" / "a"
    (folder / "src").mkdir(parents=True)
    for file in ("README.md", "src/one.py", "src/two.py"):
        (folder / file).write_text(f"content of {file}\n")
    fleet.workspace(name, path=folder)
    return folder


def test_a_plain_producer_captures_by_task_name_and_gets_the_outcome(fleet: FleetRun) -> None:
    """send_task to dispatch from another code base; AsyncResult has the digest; the store has the tree."""
    fleet.worker()
    folder = tree_of(fleet)
    producer = fleet.producer()
    first = producer.send_task("workspace.capture", kwargs={"workspace": "r/a#1"}, queue="dispatch").get(timeout=30)
    assert (first["generation"], first["changed"], first["files"]) == (1, True, 3)
    again = producer.send_task("workspace.capture", kwargs={"workspace": "r/a#1"}, queue="dispatch").get(timeout=30)
    assert (again["generation"], again["changed"], again["digest"]) == (1, False, first["digest"])
    (folder / "src" / "one.py").write_text("edited\n")
    (folder / "src" / "two.py").unlink()
    third = producer.send_task("workspace.capture", kwargs={"workspace": "r/a#1"}, queue="dispatch").get(timeout=30)
    assert (third["generation"], third["changed"], third["modified"], third["deleted"]) == (2, True, 1, 1)
    record = fleet.registry.workspaces.get("r/a#1")
    assert (record.generation, record.digest, record.files, record.last_error) == (2, third["digest"], 2, "")
    with Tree.open(Store(fleet.settings.store_dir), record.digest) as tree:
        assert tree.read("src/one.py") == b"edited\n"
        assert not tree.exists("src/two.py")
    counters = fleet.registry.counters.all()
    assert (counters["captures"], counters["captures_unchanged"]) == (2, 1)


def test_b31_a_capture_is_one_log_line_and_its_counters(fleet: FleetRun) -> None:
    """Issue number, repo, files, bytes, what was left out and the seconds: in the log, in the events, in the counters."""
    worker = fleet.worker(log_format="json")
    folder = tree_of(fleet, "r/a#31")
    (folder / ".mothballignore").write_text("*.py\n")
    fleet.finished(fleet.submit("workspace.capture", workspace="r/a#31"))
    lines = [json.loads(line) for line in worker.text().splitlines() if line.startswith("{") and '"captured"' in line]
    assert len(lines) == 1
    line = lines[0]
    assert (line["repo"], line["number"], line["workspace"], line["generation"]) == ("r/a", 31, "r/a#31", 1)
    assert (line["files"], line["omitted"]) == (2, {"ignored": 2})
    assert line["bytes"] > 0 < line["stored_bytes"]
    assert line["seconds"] > 0
    assert len(fleet.registry.events.list(kind="workspace.captured")) == 1
    counters = fleet.registry.counters.all()
    assert (counters["captures"], counters["capture_stored_bytes"]) == (1, line["stored_bytes"])


def test_joined_requests_run_once_with_the_arguments_of_the_record(fleet: FleetRun) -> None:
    """Three requests before the worker comes; the messages carry older arguments than the record, which counts (Q-31)."""
    fleet.registry.hosts.heartbeat(fleet.settings.host, {})
    tree_of(fleet)
    bells = []
    for paths, full in ((["README.md"], False), (["src/one.py"], False), (["src/one.py"], True)):
        args = {"workspace": "r/a#1", "paths": paths, "full": full}
        job = fleet.registry.jobs.submit("workspace.capture", args, workspace="r/a#1", lane="capture").job
        bells.append(Doorbell(job=job.id, task=job.task, queue=job.queue))
    for bell in bells:
        fleet.ringer.ring(bell)
    assert len({bell.job for bell in bells}) == 1
    fleet.worker()
    job = fleet.finished(bells[0].job)
    assert (job.state, job.deliveries, job.joined) == ("succeeded", 1, 2)
    assert job.args["paths"] == ["README.md", "src/one.py"]
    assert job.args["full"] is True
    assert fleet.registry.counters.all()["captures"] == 1


@pytest.mark.parametrize(
    ("place", "code"),
    [("outside", "path_not_allowed"), ("missing", "source_missing"), ("file", "source_missing"), ("link", "path_not_allowed")],
)
def test_a_path_that_cannot_be_captured_fails_with_its_code_and_leaves_no_store(fleet: FleetRun, place: str, code: str) -> None:
    """Outside the roots, missing, a file, a symlink: one clear error, no retry, nothing published."""
    fleet.worker(auto_crash_report="off")  # a report of the failure would hold the lease in its turn
    inside = fleet.folder / "trees"
    inside.mkdir()
    (inside / "file").write_text("x")
    (inside / "real").mkdir()
    (inside / "link").symlink_to("real")
    path = {"outside": "/usr/share", "missing": str(inside / "nothing")}.get(place, str(inside / place))
    fleet.registry.workspaces.register("r/bad#1", host=fleet.settings.host, path=path)
    job = fleet.finished(fleet.submit("workspace.capture", workspace="r/bad#1"))
    assert (job.state, job.error_code, job.attempts) == ("failed", code, 1), job
    record = fleet.registry.workspaces.get("r/bad#1")
    assert (record.generation, record.last_error != "") == (0, True)
    assert Store(fleet.settings.store_dir).refs("r/bad#1").list() == []
    assert fleet.leases() == []
