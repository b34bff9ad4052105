"""cleanup_disconnected (D-16): a list of live workspaces strands the others only when it can be believed."""

from __future__ import annotations

from typing import Any

import pytest

from mothball.errors import InvalidParams
from tests.integration.registry.support import Bench


def fleet(bench: Bench) -> int:
    """Three workspaces, and a moment after which nothing was heard of them."""
    for n in (1, 2, 3):
        bench.workspace(f"o/r#{n}")
    return bench.registry.time_ms()


def later(bench: Bench, active: list[str], as_of: int, **scope: Any) -> dict[str, Any]:
    with bench.at(as_of + 5000) as registry:
        return registry.lifecycle.cleanup_disconnected(active, as_of=as_of, **scope)


def states(bench: Bench) -> dict[str, str]:
    return {record.id: record.state for record in bench.registry.workspaces.list()}


def test_d16_whoever_a_complete_list_leaves_out_is_stranded_and_not_destroyed(bench: Bench) -> None:
    as_of = fleet(bench)
    assert later(bench, ["o/r#1"], as_of, by="me") == {"stranded": ["o/r#2", "o/r#3"], "kept": {"live": 1}}
    assert states(bench) == {"o/r#1": "active", "o/r#2": "stranded", "o/r#3": "stranded"}
    assert bench.counter("stranded:cleanup_disconnected") == 2
    assert bench.registry.events.list(kind="workspace.stranded")[0].fields["by"] == "me"
    assert later(bench, ["o/r#1"], as_of) == {"stranded": [], "kept": {"live": 1, "stranded": 2}}


@pytest.mark.parametrize("active", [[], ["o/r#1", "never"], "o/r#1", ["a b"]])
def test_d16_a_list_that_cannot_be_believed_changes_nothing(bench: Bench, active: Any) -> None:
    as_of = fleet(bench)
    with pytest.raises(InvalidParams):
        later(bench, active, as_of)
    assert set(states(bench).values()) == {"active"}


def test_d16_an_empty_list_needs_force(bench: Bench) -> None:
    as_of = fleet(bench)
    assert later(bench, [], as_of, force=True)["stranded"] == ["o/r#1", "o/r#2", "o/r#3"]


@pytest.mark.parametrize("force", [False, True])
def test_d16_a_list_that_leaves_out_somebody_who_is_present_is_partial(bench: Bench, force: bool) -> None:
    as_of = fleet(bench)
    bench.registry.presence.heartbeat("o/r#3", "p", 600_000)
    with pytest.raises(InvalidParams) as caught:
        later(bench, ["o/r#1"], bench.registry.time_ms() + 1, force=force)
    assert "o/r#3" in caught.value.message
    assert set(states(bench).values()) == {"active"}
    assert as_of > 0


@pytest.mark.parametrize("offset", [6000, -600_001])
def test_d16_a_list_of_another_time_is_refused(bench: Bench, offset: int) -> None:
    now = fleet(bench)
    with bench.at(now) as registry, pytest.raises(InvalidParams):
        registry.lifecycle.cleanup_disconnected(["o/r#1"], as_of=now + offset)
    assert set(states(bench).values()) == {"active"}


def test_d16_what_protects_a_workspace_protects_it_here_too(bench: Bench) -> None:
    bench.workspace("persistent", mode="persistent")
    bench.workspace("pinned", pinned=True)
    bench.workspace("held")
    bench.registry.lifecycle.hold("held", "x")
    bench.workspace("leased")
    bench.run("leased", origin="beat")
    bench.workspace("queued")
    bench.submit("queued")
    bench.workspace("submitted")
    bench.registry.lifecycle.transition("submitted", "submitted")
    bench.workspace("live")
    as_of = bench.registry.time_ms()
    with bench.at(as_of + 1) as registry:
        registry.workspaces.register("newer", host="h1", path="/n")
    assert later(bench, ["live"], as_of) == {
        "stranded": [],
        "kept": {"persistent": 1, "pin": 1, "hold": 1, "lease": 2, "submitted": 1, "live": 1, "newer": 1},
    }


def test_d16_a_list_speaks_for_its_host_or_repo_only(bench: Bench) -> None:
    bench.workspace("o/a#1")
    bench.workspace("o/a#2", host="h2")
    bench.workspace("o/b#1")
    as_of = bench.registry.time_ms()
    assert later(bench, [], as_of, host="h2", force=True)["stranded"] == ["o/a#2"]
    with pytest.raises(InvalidParams):
        later(bench, ["o/b#1"], as_of, repo="o/a")
    assert later(bench, ["o/b#1"], as_of, host="h1")["stranded"] == ["o/a#1"]


def test_d16_a_damaged_record_stays_and_keeps_no_other_from_being_stranded(bench: Bench) -> None:
    as_of = fleet(bench)
    bench.raw.hset(bench.key("ws:o/r#2"), "created_at", "yesterday")
    assert later(bench, [], as_of, force=True) == {"stranded": ["o/r#1", "o/r#3"], "kept": {"unreadable": 1}}
    assert later(bench, ["o/r#2"], as_of)["stranded"] == []
