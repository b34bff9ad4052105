"""Policies by level, and the walk that makes a new one count for every workspace and repairs the indexes (6.3)."""

from __future__ import annotations

from typing import Any

import pytest

from mothball.errors import InvalidParams, NotFound
from mothball.policy import Facts
from tests.integration.registry.support import HOST, Bench

HOUR = 3_600_000


def facts(bench: Bench, ident: str = "o/r#1") -> Facts:
    found = bench.registry.lifecycle.facts([ident])[0]
    assert found is not None
    return found


def walk(bench: Bench, limit: int = 5000) -> dict[str, int]:
    """The walk to its end."""
    out = {"seen": 0, "repaired": 0}
    for _ in range(1000):
        step = bench.registry.policies.heal(limit)
        out = {name: out[name] + step[name] for name in out}
        if not step["walking"]:
            return out
    raise AssertionError("the walk has no end")


def older(bench: Bench, *idents: str) -> None:
    """Records younger than a minute are left alone by repairs."""
    for ident in idents:
        bench.raw.hincrby(bench.key(f"ws:{ident}"), "created_at", -120_000)
        if bench.raw.zscore(bench.key("ws:by:created"), ident) is not None:
            bench.raw.zincrby(bench.key("ws:by:created"), -120_000, ident)


def indexes(bench: Bench) -> dict[str, Any]:
    """Everything below ``ws:`` but the due times."""
    read = {
        "hash": bench.raw.hgetall,
        "zset": lambda key: bench.raw.zrange(key, 0, -1, withscores=True),
        "set": lambda key: sorted(bench.raw.smembers(key)),
    }
    found = {key: read[bench.raw.type(key)](key) for key in bench.raw.scan_iter(bench.key("ws:*"))}
    return {key: value for key, value in found.items() if not key.startswith(bench.key("ws:due:"))}


def settle(bench: Bench) -> None:
    for kind in ("evict", "stop"):
        places = bench.registry.lifecycle.due(kind, 1000)
        bench.registry.lifecycle.rescore(kind, [(*place, 10**13 - 1) for place in places])


def test_the_closest_level_wins_field_by_field(bench: Bench) -> None:
    policies = bench.registry.policies
    bench.workspace("o/r#1", policy={"retention": "last=2"})
    bench.workspace("plain")
    assert policies.book().of(facts(bench)).ttl == 24 * HOUR
    policies.set_fleet({"ttl": "5h", "cap": 7}, by="me")
    policies.set_repo("o/r", {"ttl": "4h"})
    record = policies.set_workspace("o/r#1", {"ttl": "3h"}, by="me")
    assert record.policy == {"retention": "last=2", "ttl": "3h"}
    book = policies.book()
    assert (book.of(facts(bench)).ttl, book.of(facts(bench)).cap) == (3 * HOUR, 7)
    assert (book.of(facts(bench, "plain")).ttl, book.fleet_policy().cap) == (5 * HOUR, 7)
    assert policies.set_workspace("o/r#1", None).policy == {"retention": "last=2"}
    assert policies.book().of(facts(bench)).ttl == 4 * HOUR
    policies.set_repo("o/r", None)
    assert policies.book().of(facts(bench)).ttl == 5 * HOUR
    policies.set_fleet(None)
    assert policies.book().of(facts(bench)).ttl == 24 * HOUR
    assert bench.registry.retentions.set("o/r#1", None).policy == {}


def test_a_retention_and_a_policy_do_not_overwrite_each_other(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.registry.policies.set_workspace("o/r#1", {"idle_ttl": "1h"})
    bench.registry.retentions.set("o/r#1", "last=3")
    assert bench.registry.workspaces.get("o/r#1").policy == {"idle_ttl": "1h", "retention": "last=3"}
    bench.registry.policies.set_workspace("o/r#1", {"idle_ttl": "2h"})
    assert bench.registry.workspaces.get("o/r#1").policy == {"idle_ttl": "2h", "retention": "last=3"}


@pytest.mark.parametrize(
    "raw",
    [
        {"ttl": "0s"}, {"ttl": "-1h"}, {"ttl": 5}, {"nonsense": 1}, {"stop_after": "25h"}, {"cap": 0}, "ttl=1h",
        {"notice_before": "2d"},
    ],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused_and_changes_nothing(bench: Bench, raw: Any) -> None:
    bench.workspace("o/r#1")
    for call in (
        lambda: bench.registry.policies.set_fleet(raw),
        lambda: bench.registry.policies.set_repo("o/r", raw),
        lambda: bench.registry.policies.set_workspace("o/r#1", raw),
    ):
        with pytest.raises(InvalidParams):
            call()
    assert bench.raw.exists(bench.key("policies")) == 0
    assert bench.registry.workspaces.get("o/r#1").policy == {}


@pytest.mark.parametrize("raw", [{"ttl": "0s"}, {"nonsense": 1}, {"cap": 5}, {"budget": "1GiB"}])
def test_a_workspace_is_not_registered_with_a_policy_that_nobody_can_read(bench: Bench, raw: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        bench.workspace("o/r#1", policy=raw)
    assert bench.registry.workspaces.count() == 0


def test_d70_a_policy_that_cannot_be_read_is_an_error_and_never_the_default(bench: Bench) -> None:
    bench.workspace("o/r#1")
    for text in ("{", '{"ttl": "soon"}', '{"from_a_newer_version": 1}'):
        bench.raw.hset(bench.key("policies"), "fleet", text)
        with pytest.raises(InvalidParams):
            bench.registry.policies.book()
    bench.raw.hdel(bench.key("policies"), "fleet")
    bench.raw.hset(bench.key("ws:o/r#1"), "policy", '{"from_a_newer_version":1}')
    with pytest.raises(InvalidParams):
        bench.registry.policies.book().of(facts(bench))


def test_a_change_is_one_event_and_one_version_and_saying_it_again_is_none(bench: Bench) -> None:
    policies = bench.registry.policies
    versions = [policies.set_fleet({"ttl": "5h"}, by="me").version for _ in range(2)]
    versions.append(policies.set_repo("o/r", {"ttl": "5h"}).version)
    assert versions == [1, 1, 2]
    found = [each.fields for each in bench.registry.events.list(kind="policy.changed")]
    assert [(each["level"], each["by"]) for each in found] == [("repo:o/r", ""), ("fleet", "me")]
    with pytest.raises(InvalidParams):
        policies.set_repo("no repo", {})
    with pytest.raises(NotFound):
        policies.set_workspace("never", {})


# -- the walk -------------------------------------------------------------------------------------------------------


def test_a_new_policy_makes_the_sweeps_look_at_every_workspace_however_young(bench: Bench) -> None:
    for n in range(30):
        bench.workspace(f"w{n}")
    walk(bench)
    settle(bench)
    assert bench.registry.lifecycle.due("evict", 100) == []
    bench.registry.policies.set_fleet({"ttl": "5h"})
    assert bench.registry.policies.walking()
    walk(bench, limit=1)
    for kind in ("evict", "stop"):
        assert len(bench.registry.lifecycle.due(kind, 100)) == 30
    assert not bench.registry.policies.walking()


def test_a_walk_is_bounded_and_goes_on_where_it_stood(bench: Bench) -> None:
    for n in range(1500):
        bench.raw.hset(
            bench.key(f"ws:w{n}"), mapping={"id": f"w{n}", "host": HOST, "path": "/p", "created_at": "1000", "last_active": "1000"}
        )
    bench.registry.policies.set_fleet({"ttl": "5h"})
    steps = 0
    while bench.registry.policies.heal(500)["walking"]:
        steps += 1
    assert steps >= 2
    assert bench.registry.workspaces.count() == 1500


def test_a_new_policy_begins_the_walk_again_and_the_old_walk_gives_way(bench: Bench) -> None:
    for n in range(20):
        bench.workspace(f"w{n}")
    policies = bench.registry.policies
    policies.set_fleet({"ttl": "5h"})
    before = bench.raw.hget(bench.key("policies"), "walk")
    walk(bench)
    settle(bench)
    policies.set_fleet({"ttl": "6h"})
    # A process that is late writes where it stood: nothing comes of it.
    assert bench.registry.slots._scripts.run("walk", before + "x", "", 1000) == 0
    assert policies.walking()
    walk(bench)
    assert len(bench.registry.lifecycle.due("evict", 100)) == 20


def test_6_3_the_walk_repairs_what_came_apart_and_leaves_the_rest(bench: Bench) -> None:
    for n in range(4):
        bench.workspace(f"o/r#{n}", expires_in_ms=60_000)
    older(bench, "o/r#0", "o/r#1", "o/r#2")
    whole = indexes(bench)
    # One lost its indexes, one is named by them and does not exist, one moved.
    lost = ("ws:by:created", "ws:by:active", "ws:by:deadline", "ws:due:evict", "ws:due:stop")
    for index in lost:
        bench.raw.zrem(bench.key(index), "o/r#0")
        bench.raw.zadd(bench.key(index), {"ghost": 1})
    for index in (f"ws:host:{HOST}", "ws:repo:o/r"):
        bench.raw.srem(bench.key(index), "o/r#0")
        bench.raw.sadd(bench.key(index), "ghost")
    bench.raw.sadd(bench.key("ws:host:h9"), "o/r#1")
    bench.raw.sadd(bench.key("ws:repo:o/x"), "o/r#1")
    bench.raw.sadd(bench.key("ws:state:stopped"), "o/r#1")
    bench.raw.zadd(bench.key("ws:good:h9:o/r"), {"o/r#1": 5})
    assert walk(bench)["repaired"] > 0
    assert indexes(bench) == whole
    assert bench.raw.zcard(bench.key("ws:due:evict")) == bench.raw.zcard(bench.key("ws:due:stop")) == 4
    bench.raw.hdel(bench.key("policies"), "walked_at")
    assert walk(bench)["repaired"] == 0


def test_6_3_what_is_younger_than_a_minute_is_not_repaired(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.raw.zrem(bench.key("ws:by:created"), "o/r#1")
    bench.raw.zadd(bench.key("ws:by:active"), {"coming": bench.registry.time_ms()})
    walk(bench)
    assert bench.raw.zscore(bench.key("ws:by:created"), "o/r#1") is None
    assert bench.raw.zscore(bench.key("ws:by:active"), "coming") is not None


def test_a_walk_begins_once_a_day_by_itself(bench: Bench) -> None:
    bench.workspace("o/r#1")
    assert walk(bench)["seen"] > 0
    assert bench.registry.policies.heal() == {"walking": False, "seen": 0, "repaired": 0}
    bench.raw.hincrby(bench.key("policies"), "walked_at", -86_399_000)
    assert bench.registry.policies.heal()["seen"] == 0
    bench.raw.hincrby(bench.key("policies"), "walked_at", -2000)
    assert walk(bench)["seen"] > 0


def test_records_of_an_older_version_are_found_by_the_first_walk(bench: Bench) -> None:
    old = {"id": "old", "host": HOST, "path": "/p", "repo": "", "state": "active", "created_at": "1000", "last_active": "2000",
           "last_signal": "touch", "expires_at": "", "fence": "3", "generation": "2", "holds": "[]", "digest": "sha256:" + "0" * 64,
           "pinned": "0", "runtime": "{}", "policy": "{}", "stored_bytes": "5", "registration": "1000:0"}  # fmt: skip
    bench.raw.hset(bench.key("ws:old"), mapping=old)
    bench.raw.zadd(bench.key("ws:by:created"), {"old": 1000})
    walk(bench)
    assert bench.registry.lifecycle.due("evict", 10) == [("old", bench.registry.lifecycle.due_at("evict", "old"))]
    seen = facts(bench, "old")
    assert (seen.state_since, seen.holds, seen.digest) == (1000, [], "sha256:" + "0" * 64)
    assert bench.registry.lifecycle.evict(seen, rule="ttl") == "done"
    assert bench.registry.lifecycle.undelete("old").digest == "sha256:" + "0" * 64


@pytest.mark.parametrize("level", ["fleet", "repo:o/r"])
@pytest.mark.parametrize("text", ["{", '{"ttl": "soon"}', "[]"])
def test_a_policy_that_cannot_be_read_can_be_set_again(bench: Bench, level: str, text: str) -> None:
    """The error tells the operator to do just that."""
    bench.workspace("o/r#1")
    bench.raw.hset(bench.key("policies"), level, text)
    policies = bench.registry.policies
    with pytest.raises(InvalidParams, match="policy set"):
        policies.book().of(facts(bench))
    for raw, ttl in (({"ttl": "3h"}, 3 * HOUR), (None, 24 * HOUR)):
        bench.raw.hset(bench.key("policies"), level, text)
        if level == "fleet":
            policies.set_fleet(raw)
        else:
            policies.set_repo("o/r", raw)
        assert policies.book().of(facts(bench)).ttl == ttl
