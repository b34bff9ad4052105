"""What the registry knows of snapshots: how many there are, counters and events once per effect, whose retention counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mothball.errors import Gone, InvalidParams, NotFound
from mothball.retention import Policy
from tests.integration.registry.support import HOST, Bench

ID = "o/r#1"


def events(bench: Bench, kind: str) -> list[dict[str, str]]:
    return [event.fields for event in bench.registry.events.list(kind=kind)]


def test_b41_a_snapshot_counts_once_however_often_it_is_noted(bench: Bench) -> None:
    """The worker may ask again when the answer was lost; the record holds how many exist, the counter how many were made."""
    bench.workspace(ID)
    notes = bench.registry.workspaces
    for _ in range(2):
        assert notes.note_snapshots(ID, HOST, 1, made="snap-1", digest="sha256:1", job="j1")
    assert notes.note_snapshots(ID, HOST, 2, made="snap-2", digest="sha256:2", job="j2")
    assert notes.note_snapshots(ID, HOST, 2, made="snap-1", digest="sha256:1", job="j1")
    assert notes.get(ID).snapshots == 2
    assert bench.registry.counters.all()["snapshots"] == 2
    made = events(bench, "workspace.snapshotted")
    assert [(each["workspace"], each["snapshot"], each["digest"], each["job"]) for each in reversed(made)] == [
        (ID, "snap-1", "sha256:1", "j1"),
        (ID, "snap-2", "sha256:2", "j2"),
    ]


def test_what_was_forgotten_is_one_event_with_its_reason(bench: Bench) -> None:
    bench.workspace(ID)
    notes = bench.registry.workspaces
    assert notes.note_snapshots(ID, HOST, 1, forgotten=["snap-1", "snap-3"], reason="retention last=1")
    assert notes.note_snapshots(ID, HOST, 1)
    assert notes.get(ID).snapshots == 1
    assert bench.registry.counters.all()["snapshots_forgotten"] == 2
    (event,) = events(bench, "workspace.snapshots_forgotten")
    assert (event["snapshots"], event["reason"]) == ("snap-1 snap-3", "retention last=1")
    many = [f"snap-{number}" for number in range(1, 2001)]
    assert notes.note_snapshots(ID, HOST, 0, forgotten=many, reason="r")
    assert len(events(bench, "workspace.snapshots_forgotten")[0]["snapshots"]) == 4096


def test_a_workspace_that_is_elsewhere_or_gone_is_not_touched(bench: Bench) -> None:
    """A worker that was paused while the workspace moved must not write what it saw on its own disk."""
    bench.registry.hosts.heartbeat("h2", {})
    bench.workspace(ID, host="h2")
    notes = bench.registry.workspaces
    assert not notes.note_snapshots(ID, HOST, 5, made="snap-5", digest="d", job="j")
    assert notes.get(ID).snapshots == 0
    notes.release(ID)
    assert not notes.note_snapshots(ID, "h2", 5, made="snap-5", digest="d", job="j")
    assert not notes.note_snapshots("o/r#404", HOST, 5, forgotten=["snap-1"])
    assert not {"snapshots", "snapshots_forgotten"} & set(bench.registry.counters.all())


def test_each_workspace_of_a_host_has_its_own_retention_or_that_of_the_settings(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(retention="last=3")
    bench.registry.hosts.heartbeat("h2", {})
    bench.workspace("own", policy={"retention": {"daily": 2}})
    bench.workspace("text", policy={"retention": "all", "capture": {}})
    bench.workspace("none")
    bench.workspace("elsewhere", host="h2")
    bench.workspace("held")
    bench.raw.hset(bench.key("ws:held"), "holds", '["legal"]')
    bench.workspace("old")
    bench.raw.hset(bench.key("ws:old"), "policy", '{"retention":"keep_last=3"}')
    bench.workspace("lost")
    bench.raw.hset(bench.key("ws:lost"), "unknown", '["policy"]')
    found = dict(bench.registry.retentions.of_host(HOST))
    assert {name: policy for name, policy in found.items() if isinstance(policy, Policy)} == {
        "own": Policy(daily=2),
        "text": Policy(all=True),
        "none": Policy(last=3),
    }
    reasons = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    assert set(reasons) == {"held", "old", "lost"}
    assert "keep_last" in reasons["old"]
    assert dict(bench.registry.retentions.of_host(HOST, "own")) == {"own": Policy(daily=2)}
    assert "h2" in str(dict(bench.registry.retentions.of_host(HOST, "elsewhere"))["elsewhere"])
    with pytest.raises(NotFound):
        list(bench.registry.retentions.of_host(HOST, "unknown"))
    bench.registry.workspaces.release("own")
    with pytest.raises(Gone):
        list(bench.registry.retentions.of_host(HOST, "own"))


@pytest.mark.parametrize("retention", ["", "last=0", {}, {"keep_last": 3}, None, 7])
def test_a_retention_nobody_could_follow_is_refused_when_it_is_given(bench: Bench, retention: Any) -> None:
    with pytest.raises(InvalidParams, match="retention"):
        bench.workspace(ID, policy={"retention": retention})
    with pytest.raises(NotFound):
        bench.registry.workspaces.get(ID)


def test_the_retention_of_a_workspace_can_be_changed_and_taken_back(bench: Bench) -> None:
    """The rest of its policy stays as it was, empty lists included."""
    other = {"capture": {"ignore": [], "profile": "light"}}
    bench.workspace(ID, policy=other)
    retentions = bench.registry.retentions
    assert retentions.set(ID, {"last": 2, "within": "1w"}).policy == {**other, "retention": "last=2,within=7d"}
    assert retentions.of(bench.registry.workspaces.get(ID)) == Policy.parse("last=2,within=7d")
    with pytest.raises(InvalidParams):
        retentions.set(ID, "last=0")
    assert retentions.set(ID, None).policy == other
    assert [event["value"] for event in events(bench, "workspace.retention_changed")] == ["settings", "last=2,within=7d"]
    bench.raw.hset(bench.key(f"ws:{ID}"), "unknown", '["policy","title"]')
    assert isinstance(retentions.of(bench.registry.workspaces.get(ID)), str)
    record = retentions.set(ID, "all")
    assert (retentions.of(record), record.unknown) == (Policy(all=True), ["title"])
    with pytest.raises(NotFound):
        retentions.set("o/r#404", "all")
    bench.registry.workspaces.release(ID)
    with pytest.raises(Gone):
        retentions.set(ID, "all")


def test_a_change_of_somebody_else_is_never_overwritten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came between reading the policy and writing it."""
    bench.workspace(ID)
    retentions = bench.registry.retentions
    run = retentions._scripts.run
    late = ['{"capture":{"profile":"light"}}', '{"capture":{"profile":"full"}}']

    def meanwhile(name: str, *args: Any) -> Any:
        if name == "set_policy" and late:
            bench.raw.hset(bench.key(f"ws:{ID}"), "policy", late.pop(0))
        return run(name, *args)

    monkeypatch.setattr(retentions._scripts, "run", meanwhile)
    assert retentions.set(ID, "last=1").policy == {"capture": {"profile": "full"}, "retention": "last=1"}
