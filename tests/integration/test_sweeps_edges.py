"""What would lose work or leave something behind: changes between the parts of a sweep, damage, and policies nobody can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tasks.lifecycle
from mothball import admission
from mothball.errors import Unavailable
from tests.integration.sweeping import DAY, HOUR, MINUTE, Sweeping

KIB = 1024


def store(fleet: Sweeping, ident: str, size: int) -> None:
    """A capture of `size` bytes."""
    job = fleet.registry.jobs.submit("workspace.capture", {}, workspace=ident).job.id
    claim = fleet.registry.jobs.claim(job, host="h1", worker="h1/1", lease_ms=30_000)
    fields = {"generation": 1, "digest": "sha256:" + "ab" * 32, "bytes": size, "stored_bytes": size}
    fleet.registry.jobs.finish(job, claim.fence, {}, fields)


def test_q12_the_budget_takes_nobody_who_stores_nothing(fleet: Sweeping) -> None:
    """Their eviction would make no room."""
    fleet.add("empty", 9 * HOUR)
    fleet.add("small", 8 * HOUR)
    fleet.add("big", 7 * HOUR)
    store(fleet, "small", 10 * KIB)
    store(fleet, "big", 100 * KIB)
    fleet.policy(budget="100KiB", ttl="never")
    done = fleet.sweep()
    assert done["evicted"] == {"budget": 1}, done
    assert fleet.ids() == ["empty", "big"]


def test_q13_one_damaged_record_does_not_keep_others_from_making_room(fleet: Sweeping) -> None:
    for name in ("damaged", "old", "new"):
        fleet.add(name, 9 * HOUR)
    store(fleet, "damaged", 10 * KIB)
    store(fleet, "old", 10 * KIB)
    fleet.raw.hset(fleet.key("ws:damaged"), "created_at", "yesterday")
    job = fleet.registry.jobs.submit("workspace.capture", {}, workspace="new").job.id
    claim = fleet.registry.jobs.claim(job, host="h1", worker="h1/1", lease_ms=30_000)
    room = admission.admit(fleet.registry, job=job, fence=claim.fence, workspace="new", need=5 * KIB, limit=20 * KIB)
    assert room.evicted == ["old"]
    assert fleet.raw.exists(fleet.key("ws:damaged"))


def test_d70_a_repo_whose_policy_cannot_be_read_keeps_its_own_and_stops_nobody_elses_sweep(fleet: Sweeping) -> None:
    fleet.add("acme/a#1", 25 * HOUR)
    fleet.add("other", 25 * HOUR)
    fleet.raw.hset(fleet.key("policies"), "repo:acme/a", '{"from_a_newer_version": 1}')
    done = fleet.sweep()
    assert (done["evicted"], done["skipped"]) == ({"ttl": 1}, {"policy": 1})
    assert fleet.ids() == ["acme/a#1"]
    fleet.registry.policies.set_repo("acme/a", {"ttl": "3d"})
    assert fleet.registry.policies.book().of(fleet.facts("acme/a#1")).ttl == 3 * DAY


def test_d70_a_repo_named_none_is_not_the_repo_of_those_that_have_none(fleet: Sweeping) -> None:
    fleet.add("plain", 25 * HOUR)
    fleet.raw.hset(fleet.key("policies"), "repo:None", "{")
    assert fleet.sweep()["evicted"] == {"ttl": 1}


def test_another_setting_of_the_policy_makes_the_sweeps_look_at_every_workspace(make_fleet: Callable[..., Sweeping]) -> None:
    """Those of ttl=never have no time at which to look, those of ttl=30d one that is far away."""
    for before, after in (("ttl=never", "ttl=1h"), ("ttl=30d", "ttl=1h")):
        fleet = make_fleet(policy=before)
        fleet.add("w", 2 * HOUR)
        assert fleet.sweep()["evicted"] == {}
        fleet.close()
        fleet = make_fleet(policy=after, namespace=fleet.settings.namespace)
        fleet.raw.hdel(fleet.key("policies"), "setting_at")  # another setting some minutes ago is another test
        # The first one walks and the second one looks, unless all of the first lies in one millisecond.
        done = [fleet.sweep()["evicted"] for _ in range(3)]
        assert done in ([{}, {"ttl": 1}, {}], [{"ttl": 1}, {}, {}])


def test_workers_with_different_settings_do_not_make_each_other_look_at_everything_all_the_time(
    make_fleet: Callable[..., Sweeping],
) -> None:
    ours, theirs = make_fleet(policy="ttl=2d"), make_fleet(policy="ttl=3d")
    theirs.registry.policies._settings = theirs.settings
    walks = 0
    for fleet in (ours, theirs) * 5:
        if fleet.registry.policies.heal()["seen"]:
            walks += 1
        while fleet.registry.policies.heal()["walking"]:
            pass
    assert walks <= 2


@pytest.mark.parametrize("dies", ["before the job", "before the announcement"])
def test_an_announcement_that_was_cut_short_still_asks_the_hook(
    make_fleet: Callable[..., Sweeping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """The event and the job are two writes: whichever the sweep did not come to, the next one does, and neither twice."""
    fleet = make_fleet(notice_hook="/bin/true")
    fleet.policy(ttl="10h", notice_before="30m")
    fleet.add("w", 9 * HOUR + 45 * MINUTE)
    room = fleet.registry.jobs if dies == "before the job" else fleet.registry.lifecycle
    name = "submit" if dies == "before the job" else "noticed"

    def away(*_: Any, **__: Any) -> Any:
        raise Unavailable(what="redis", reason="gone for a moment")

    with monkeypatch.context() as patch:
        patch.setattr(room, name, away)
        fleet.sweep()
    for _ in range(3):
        fleet.sweep()
    assert len(fleet.jobs("workspace.notice")) == 1
    assert len(fleet.events("workspace.notice")) == 1


def test_who_registers_a_workspace_again_is_not_evicted_for_idleness_in_that_moment(fleet: Sweeping) -> None:
    """The agent was told that the workspace is there: what was decided before does not count any more."""
    fleet.policy(ttl="never", idle_ttl="2h")
    fleet.add("w", 3 * HOUR)
    [planned] = fleet.plan("evict").items
    record, created = fleet.registry.workspaces.register("w", host="h1", path="/srv/w")
    assert (created, record.last_signal) == (False, "register")
    assert fleet.registry.lifecycle.evict(planned.facts, rule="idle_ttl") == "changed"
    assert fleet.sweep()["evicted"] == {}


def test_what_expired_does_not_take_all_the_time_of_the_limits(
    make_fleet: Callable[..., Sweeping], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of policy in a large fleet: there is more to look at than one sweep, or ten, can do."""
    fleet = make_fleet(sweep_batch=1)
    fleet.add("stored", HOUR)
    store(fleet, "stored", 10 * KIB)
    fleet.policy(budget="5KiB")
    for number in range(100):
        fleet.add(f"w{number}", 25 * HOUR)
    clock, due = SimpleNamespace(now=0.0), fleet.registry.lifecycle.due

    def a_second_each(*args: Any) -> Any:
        clock.now += 1.0
        return due(*args)

    monkeypatch.setattr(fleet.registry.lifecycle, "due", a_second_each)
    monkeypatch.setattr(tasks.lifecycle, "time", SimpleNamespace(monotonic=lambda: clock.now))
    done = fleet.sweep()
    assert done["evicted"] == {"budget": 1, "ttl": 45}
    assert done["remaining"] == 55


@pytest.mark.parametrize("resumed", [False, True])
def test_b72_the_cap_does_not_take_back_at_once_what_a_person_brought_back(fleet: Sweeping, resumed: bool) -> None:
    """It is the oldest again, so it would be the first to go; there is a day to resume, pin or hold it."""
    fleet.policy(ttl="never", cap=2)
    for age, name in ((9, "oldest"), (8, "old"), (7, "new")):
        fleet.add(name, age * HOUR)
    assert fleet.sweep()["evicted"] == {"cap": 1}
    fleet.registry.lifecycle.undelete("oldest")
    if resumed:
        fleet.registry.lifecycle.resume("oldest")
    assert fleet.sweep()["evicted"] == {"cap": 1}
    assert fleet.ids() == ["oldest", "new"]
    fleet.add("newest")
    fleet.age("oldest", 25 * HOUR)
    fleet.sweep()
    assert fleet.ids() == ["new", "newest"]


@pytest.mark.parametrize("text", ["{", "[]", '{"all": true}', '{"all": true, "cursor": 0, "todo": 5}'])
def test_a_walk_that_nobody_can_read_begins_again(fleet: Sweeping, text: str) -> None:
    fleet.add("w", 25 * HOUR)
    fleet.raw.zrem(fleet.key("ws:due:evict"), "w")
    fleet.raw.hset(fleet.key("policies"), "walk", text)
    assert [fleet.sweep()["evicted"] for _ in range(2)] == [{}, {"ttl": 1}]
    assert not fleet.registry.policies.walking()
