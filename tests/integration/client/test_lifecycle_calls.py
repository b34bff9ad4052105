"""Calls of the producers' API that must not lose what others do at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from mothball import Fleet, errors
from mothball.settings import Settings
from workers.redis_server import RedisServer

WORKSPACE = "owner/repo#1"


@pytest.fixture
def fleet(make_settings: Callable[..., Settings], redis_server: RedisServer) -> Iterator[Fleet]:
    """A fleet whose host has announced itself and has one workspace."""
    with Fleet(settings=make_settings()) as found:
        found.registry.hosts.heartbeat(found.settings.host, {})
        found.register(WORKSPACE, found.settings.workspace_roots[0])
        yield found


@pytest.mark.parametrize("scope", [{}, {"repo": "owner/repo"}, {"workspace": WORKSPACE}])
def test_those_who_change_one_policy_at_once_lose_no_change(fleet: Fleet, scope: dict[str, str]) -> None:
    fields = ("stop_after=1h", "idle_ttl=2h", "cpu_busy=7", "stop_grace=5s")
    with ThreadPoolExecutor(len(fields)) as pool:
        list(pool.map(lambda text: fleet.change_policy(text, **scope), fields))
    told = fleet.policy(repo="owner/repo")
    found = fleet.own_policy(WORKSPACE) if "workspace" in scope else told["repos"]["owner/repo"] if scope else told["fleet"]
    assert found == {"stop_after": "1h", "idle_ttl": "2h", "cpu_busy": 7, "stop_grace": "5s"}


def test_a_policy_that_others_changed_since_it_was_read_is_not_overwritten(fleet: Fleet) -> None:
    book = fleet.registry.policies.book()
    fleet.set_policy("ttl=2h", repo="owner/repo")
    with pytest.raises(errors.Busy):
        fleet.registry.policies.set_fleet({"ttl": "3h"}, version=book.version)
    assert fleet.policy()["fleet"] == {}
    fleet.registry.policies.set_fleet({"ttl": "3h"}, version=fleet.registry.policies.book().version)
    assert fleet.policy()["fleet"] == {"ttl": "3h"}


def test_set_policy_replaces_what_was_set_there_and_none_takes_it_away(fleet: Fleet) -> None:
    fleet.set_policy({"ttl": "2h", "cap": 5})
    fleet.set_policy("stop_after=1h")
    assert fleet.policy()["fleet"] == {"stop_after": "1h"}
    fleet.set_policy(None)
    assert fleet.policy()["fleet"] == {}
    with pytest.raises(errors.InvalidParams, match="not both"):
        fleet.set_policy("ttl=2h", repo="owner/repo", workspace=WORKSPACE)


def test_d16_a_list_of_live_ones_that_is_empty_or_partial_strands_nobody(fleet: Fleet) -> None:
    fleet.register("owner/repo#2", fleet.settings.workspace_roots[0])
    fleet.heartbeat("owner/repo#2", "me")
    for wrong in ([], ["nobody"], [WORKSPACE]):
        with pytest.raises(errors.InvalidParams):
            fleet.cleanup_disconnected(wrong, as_of=fleet.registry.time_ms())
    assert {record.state for record in fleet.list()} == {"active"}
    done = fleet.cleanup_disconnected(["owner/repo#2"], as_of=fleet.registry.time_ms(), repo="owner/repo")
    assert done["stranded"] == [WORKSPACE]


def test_an_eviction_that_a_sweep_was_quicker_with_says_that_it_is_gone(fleet: Fleet) -> None:
    fleet.evict(WORKSPACE, by="ann")
    with pytest.raises(errors.Gone, match="asked"):
        fleet.evict(WORKSPACE)
    assert fleet.undelete_workspace(WORKSPACE).state == "stopped"
    with pytest.raises(errors.InvalidTransition):
        fleet.undelete_workspace(WORKSPACE)


@pytest.mark.parametrize("scope", [{}, {"repo": "owner/repo"}, {"workspace": WORKSPACE}])
def test_what_cannot_be_read_is_replaced_by_what_is_set(fleet: Fleet, scope: dict[str, str]) -> None:
    raw = redis.Redis.from_url(fleet.settings.registry_url, decode_responses=True)
    key = f"ws:{WORKSPACE}" if "workspace" in scope else "policies"
    field = {"workspace": "policy", "repo": "repo:owner/repo"}.get(next(iter(scope), ""), "fleet")
    raw.hset(f"{fleet.settings.namespace}:{key}", field, '{"ttl": "5h", "from_a_newer_version": 1}')
    raw.close()
    fleet.change_policy("idle_ttl=2h", **scope)
    told = fleet.explain(WORKSPACE)
    assert (told.problem, told.policy.idle_ttl) == ("", 7_200_000)
