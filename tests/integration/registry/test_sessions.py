"""Sessions: the eight keys, their order, who is excluded, and how many are active."""

from __future__ import annotations

import json

import pytest

from mothball import policy
from mothball.errors import InvalidParams
from mothball.registry.sessions import RESTING, SESSION_KEYS
from tests.integration.registry.support import Bench


def test_d01_a_session_has_exactly_eight_keys(bench: Bench) -> None:
    bench.workspace("o/r#1", agent_id="a-1", agent_name="ada", intent="fix the parser", changeset_id="c-9")
    (session,) = bench.registry.sessions.list("o/r")
    assert list(session) == [
        "session_id", "agent_id", "agent_name", "intent", "repo_id", "changeset_id", "state", "elapsed_secs",
    ] == list(SESSION_KEYS)  # fmt: skip
    assert session == {
        "session_id": "o/r#1", "agent_id": "a-1", "agent_name": "ada", "intent": "fix the parser", "repo_id": "o/r",
        "changeset_id": "c-9", "state": "active", "elapsed_secs": 0,
    }  # fmt: skip


def test_d01_what_an_agent_did_not_say_is_null_and_the_rest_is_json(bench: Bench) -> None:
    bench.workspace("o/r#1")
    (session,) = bench.registry.sessions.list("o/r")
    assert (session["agent_id"], session["intent"], session["changeset_id"]) == (None, None, None)
    assert session["agent_name"] == "agent-1"
    assert json.loads(json.dumps(session)) == session


def test_d01_elapsed_are_whole_seconds_and_never_less_than_none(bench: Bench) -> None:
    bench.workspace("o/r#1")
    now = bench.registry.time_ms()
    for created, least in ((now - 59_999, 59), (now + 3_600_000, 0), (now - 2**40, 2**40 // 1000)):
        bench.raw.hset(bench.key("ws:o/r#1"), "created_at", created)
        (session,) = bench.registry.sessions.list("o/r")
        assert least <= session["elapsed_secs"] <= least + 30
        assert isinstance(session["elapsed_secs"], int)
    bench.raw.hset(bench.key("ws:o/r#1"), "created_at", bench.registry.time_ms() - 500_500)
    (session,) = bench.registry.sessions.list("o/r")
    assert session["elapsed_secs"] == 500, "half a second more is no second more"


def test_d14_sessions_are_sorted_by_age_then_id(bench: Bench) -> None:
    for n in (3, 1, 4, 2):
        bench.workspace(f"o/r#{n}")
    for n, created in ((1, 5000), (2, 4000), (3, 5000), (4, 3000)):
        bench.raw.hset(bench.key(f"ws:o/r#{n}"), "created_at", created)
    assert [each["session_id"] for each in bench.registry.sessions.list("o/r")] == ["o/r#4", "o/r#2", "o/r#1", "o/r#3"]


def test_d14_only_the_sessions_of_the_repo_are_listed_and_one_may_be_excluded(bench: Bench) -> None:
    for ident in ("o/r#1", "o/r#2", "o/other#1"):
        bench.workspace(ident)
    bench.workspace("lonely")
    sessions = bench.registry.sessions
    assert [each["session_id"] for each in sessions.list("o/r", exclude="o/r#1")] == ["o/r#2"]
    assert len(sessions.list("o/r", exclude="nobody")) == 2
    assert sessions.list("o/none") == []
    assert (sessions.active_count("o/r"), sessions.active_count("o/other"), sessions.active_count("o/none")) == (2, 1, 0)
    assert sessions.total_active() == 4
    with pytest.raises(InvalidParams):
        sessions.list("no repo")


def test_d05_agent_names_come_in_the_order_of_their_sessions_each_once(bench: Bench) -> None:
    for n in range(1, 13):
        bench.workspace(f"o/r#{n}")
        bench.raw.hset(bench.key(f"ws:o/r#{n}"), "created_at", 1000 + n)
    bench.workspace("o/r#13", agent_name="agent-2")
    names = bench.registry.sessions.agent_names("o/r", exclude="o/r#1")
    assert names == [f"agent-{n}" for n in range(2, 13)]


def test_d05_numbers_of_agents_are_counted_per_repo_and_never_given_twice(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.workspace("o/other#1")
    bench.registry.workspaces.release("o/r#1")
    bench.workspace("o/r#1")
    sessions = bench.registry.sessions
    assert (sessions.agent_names("o/r"), sessions.agent_names("o/other")) == (["agent-2"], ["agent-1"])


def test_a_session_that_is_released_while_it_is_listed_is_left_out(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.workspace("o/r#2")
    bench.raw.delete(bench.key("ws:o/r#1"))
    assert [each["session_id"] for each in bench.registry.sessions.list("o/r")] == ["o/r#2"]


def test_d14_counting_costs_the_same_among_many(bench: Bench) -> None:
    """No question about one repo, and no count, looks at the records of the others."""
    bench.workspace("o/r#1")
    sessions = bench.registry.sessions

    def commands() -> int:
        before = int(bench.raw.info("stats")["total_commands_processed"])
        sessions.total_active()
        sessions.active_count("o/r")
        sessions.list("o/r")
        return int(bench.raw.info("stats")["total_commands_processed"]) - before

    few = commands()
    for n in range(300):
        bench.workspace(f"o/many#{n}")
    assert commands() == few
    assert sessions.total_active() == 301


def test_d03_every_state_but_active_has_a_count_of_its_own(bench: Bench) -> None:
    assert list(bench.registry.sessions.states()) == ["active", *RESTING]
    assert set(bench.registry.sessions.states().values()) == {0}


def test_d14_counts_follow_every_change_of_state(bench: Bench) -> None:
    assert set(RESTING) | {"active"} == set(policy.STATES)
    for n in range(1, 7):
        bench.workspace(f"o/r#{n}", agent_id="ada")
    registry = bench.registry
    sessions, life = registry.sessions, registry.lifecycle

    def facts(ident: str) -> policy.Facts:
        (found,) = life.facts([ident])
        assert found is not None
        return found

    life.transition("o/r#1", "submitted")
    life.transition("o/r#2", "submitted")
    life.transition("o/r#2", "merged")
    life.strand(facts("o/r#3"), reason="heartbeats")
    life.strand(facts("o/r#4"), reason="heartbeats")
    life.abandon(facts("o/r#4"), reason="auto_ttl")
    claim = bench.run("o/r#5")
    assert claim.job is not None
    life.stopped("o/r#5", job=claim.job.id, fence=claim.fence, rule="stop_after")
    assert sessions.states() == {"active": 1, "submitted": 1, "merged": 1, "stopped": 1, "stranded": 1, "abandoned": 1}
    assert (sessions.active_count("o/r"), sessions.total_active()) == (1, 1)
    assert [each["session_id"] for each in sessions.active("o/r")] == ["o/r#6"]
    assert sessions.agent_names("o/r") == ["agent-6"]
    assert {each["session_id"]: each["state"] for each in sessions.list("o/r")} == {
        "o/r#1": "submitted", "o/r#2": "merged", "o/r#3": "stranded", "o/r#4": "abandoned", "o/r#5": "stopped", "o/r#6": "active",
    }  # fmt: skip
    registry.jobs.finish(claim.job.id, claim.fence, {})
    assert life.resume("o/r#3", agent_id="ada").outcome == "ok"
    assert life.resume("o/r#5").outcome == "ok"
    assert sessions.total_active() == 3
    assert life.evict(facts("o/r#4"), rule="abandoned") == "done"
    assert life.evict(facts("o/r#2"), rule="ttl") == "done"
    assert life.evict(facts("o/r#6"), rule="ttl") == "done"
    life.undelete("o/r#6")
    assert sessions.states() == {"active": 2, "submitted": 1, "merged": 0, "stopped": 1, "stranded": 0, "abandoned": 0}
    for n in range(1, 7):
        registry.workspaces.release(f"o/r#{n}")
    assert set(sessions.states().values()) == {0}
    assert [*bench.raw.scan_iter(bench.key("ws:state:*"))] == []
