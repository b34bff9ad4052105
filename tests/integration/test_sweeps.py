"""maintenance.sweep on a real Redis: what expires, what stays, and what is said of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import Ignore

from mothball.errors import Gone
from tasks import services
from tasks.sweep import SWEEPS, sweep
from tests.integration.sweeping import DAY, HOUR, MINUTE, Sweeping, tree
from workers.app import app
from workers.schedule import beat_schedule

# -- the seven tests of the original (B-77), on a fleet ----------------------------------------------------------------


def test_b77_one_of_25_hours_goes_and_a_fresh_one_stays(fleet: Sweeping) -> None:
    fleet.add("old", 25 * HOUR)
    fleet.add("fresh")
    assert fleet.sweep() == {"evicted": {"ttl": 1}, "stopped": 0, "purging": {}, "noticed": 0, "skipped": {}, "remaining": 0}
    assert fleet.ids() == ["fresh"]
    with pytest.raises(Gone, match="ttl"):
        fleet.registry.workspaces.get("old")


def test_b77_20_above_the_cap_become_exactly_the_cap(fleet: Sweeping) -> None:
    for number in range(120):
        fleet.add(f"w{number:03}", (200 - number) * MINUTE)
    assert fleet.sweep()["evicted"] == {"cap": 20}
    assert fleet.ids() == [f"w{number:03}" for number in range(20, 120)]


def test_b77_of_one_above_the_cap_the_oldest_goes_and_the_newest_stays(fleet: Sweeping) -> None:
    fleet.policy(cap=3)
    for name, age in (("middle", 2), ("newest", 1), ("oldest", 9), ("older", 5)):
        fleet.add(name, age * MINUTE)
    fleet.sweep()
    assert fleet.ids() == ["older", "middle", "newest"]


def test_b77_the_sweep_says_how_many_went_by_ttl_and_cap_together(fleet: Sweeping) -> None:
    fleet.policy(cap=1)
    for name, age in (("a", 30 * HOUR), ("b", 25 * HOUR), ("c", 2 * HOUR), ("d", HOUR)):
        fleet.add(name, age)
    done = fleet.sweep()
    assert done["evicted"] == {"cap": 1, "ttl": 2}
    assert sum(done["evicted"].values()) == 3
    assert fleet.ids() == ["d"]


def test_b77_the_defaults_are_24_hours_and_100(fleet: Sweeping) -> None:
    rules = fleet.registry.policies.book().fleet_policy()
    assert (rules.ttl, rules.cap) == (24 * HOUR, 100)
    assert fleet.settings.sweep_seconds == 300


def test_b77_without_a_policy_in_the_registry_the_setting_counts(make_fleet: Callable[..., Sweeping]) -> None:
    fleet = make_fleet(policy="ttl=1h,cap=2")
    for name, age in (("a", 2), ("b", 50), ("c", 40), ("d", 30)):
        fleet.add(name, age * (HOUR if name == "a" else MINUTE))
    assert fleet.sweep()["evicted"] == {"cap": 1, "ttl": 1}
    assert fleet.ids() == ["c", "d"]


def test_b77_b75_a_sweep_that_has_nothing_to_do_ends_and_so_does_one_that_overlaps(fleet: Sweeping) -> None:
    """In place of Start then Stop: no loop to start twice, one winner per slot."""
    assert sweep(SWEEPS["maintenance.sweep"])["remaining"] == 0
    fleet.add("old", 25 * HOUR)
    with pytest.raises(Ignore, match="slot"):
        sweep(SWEEPS["maintenance.sweep"])
    assert fleet.ids() == ["old"]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_b70_n31_d18_the_sweeps_are_in_beat_and_every_entry_is_a_task_of_the_workers(fleet: Sweeping) -> None:
    schedule = beat_schedule(fleet.settings)
    seconds = {name: schedule[f"maintenance.{name}"]["schedule"] for name in ("sweep", "stop_stale", "reconcile")}
    assert seconds == {"sweep": 300, "stop_stale": 60, "reconcile": 300}
    assert set(schedule) <= set(app.tasks), "an entry that no worker knows sweeps nothing (N-22)"
    for name, every in seconds.items():
        assert schedule[f"maintenance.{name}"]["options"]["expires"] < every, "late ticks are dropped (D-74)"


def test_b71_age_at_the_limit_stays_and_a_millisecond_later_goes(fleet: Sweeping) -> None:
    fleet.add("w")
    created = fleet.registry.workspaces.get("w").created_at
    assert fleet.plan(now=created + 24 * HOUR).items == []
    [item] = fleet.plan(now=created + 24 * HOUR + 1).items
    assert (item.facts.id, item.decision.action, item.decision.rule) == ("w", "evict", "ttl")


def test_b72_ties_go_by_id_and_the_exempt_count_but_stay(fleet: Sweeping) -> None:
    fleet.policy(cap=4)
    for name in ("b", "a", "d", "c"):
        fleet.add(name, HOUR)
    same = fleet.now - HOUR
    for name in ("b", "a", "d", "c"):
        fleet.set(name, created_at=same)
    fleet.add("pinned", 3 * HOUR, pinned=True)
    fleet.add("stays", 2 * HOUR, mode="persistent")
    fleet.add("held", 4 * HOUR)
    fleet.registry.lifecycle.hold("held", "evidence of a fault", "ann")
    done = fleet.sweep()
    assert done["evicted"] == {"cap": 3}
    assert done["skipped"] == {"hold": 1, "none": 1, "pin": 1}, "none: no rule asks for a persistent one"
    assert [each for each, _ in fleet.evicted()] == ["a", "b", "c"]
    assert fleet.ids() == ["held", "pinned", "stays", "d"]


def test_b72_a_cap_of_a_repo_counts_that_repo_only(fleet: Sweeping) -> None:
    fleet.registry.policies.set_repo("o/r", {"cap": 2})
    for number in range(4):
        fleet.add(f"o/r#{number}", (9 - number) * MINUTE)
        fleet.add(f"o/other#{number}", (9 - number) * MINUTE)
    assert fleet.sweep()["evicted"] == {"cap": 2}
    assert sorted(fleet.ids()) == ["o/other#0", "o/other#1", "o/other#2", "o/other#3", "o/r#2", "o/r#3"]


def test_b72_those_that_expire_make_room_before_the_cap_takes_others(fleet: Sweeping) -> None:
    """The oldest by creation is kept by its policy; the expired one is not the oldest."""
    fleet.policy(cap=2)
    fleet.add("oldest", 3 * HOUR)
    fleet.add("expired", 2 * HOUR, policy={"ttl": "1h"})
    fleet.add("young", HOUR)
    assert fleet.sweep()["evicted"] == {"ttl": 1}
    assert fleet.ids() == ["oldest", "young"]


def test_b73_each_eviction_is_one_counter_one_event_and_one_tombstone_with_its_reason(fleet: Sweeping) -> None:
    fleet.add("old", 25 * HOUR, repo="o/r")
    fleet.sweep()
    assert fleet.counters("evicted:") == {"evicted:ttl": 1}
    [event] = fleet.events("workspace.evicted")
    assert (event.fields["workspace"], event.fields["reason"], event.fields["by"]) == ("old", "ttl", "policy")
    assert "ttl=1d" in event.fields["detail"] or "ttl=24h" in event.fields["detail"]
    tomb = fleet.registry.lifecycle.tombstone("old")
    assert tomb is not None
    assert tomb["reason"] == "ttl"


def test_b74_the_directory_stays_and_a_purge_is_asked_for_only_where_the_policy_says_so(fleet: Sweeping, tmp_path: Path) -> None:
    kept, purged = tree(tmp_path / "workspaces" / "kept"), tree(tmp_path / "workspaces" / "purged")
    fleet.add("kept", 25 * HOUR, path=str(kept))
    fleet.add("purged", 25 * HOUR, path=str(purged), policy={"purge": True})
    done = fleet.sweep()
    assert (done["evicted"], done["purging"]) == ({"ttl": 1}, {"ttl": 1})
    assert (kept / "file").read_text() == (purged / "file").read_text() == "text"
    [job] = fleet.jobs("workspace.purge")
    assert (job.queue, job.args["workspace"], job.args["rule"], job.origin) == ("host.h1", "purged", "ttl", "beat")
    assert fleet.ids() == ["purged"], "its record goes when its directory has gone"
    assert fleet.sweep()["purging"] == {}, "it is under way"


def test_b74_a_purge_that_was_refused_is_not_asked_for_each_sweep_and_the_cap_takes_the_next(fleet: Sweeping) -> None:
    fleet.policy(cap=1, purge=True)
    fleet.add("refused", 3 * HOUR)
    fleet.add("next", 2 * HOUR)
    fleet.add("young", HOUR)
    assert fleet.sweep()["purging"] == {"cap": 2}
    for job in fleet.jobs("workspace.purge"):
        claim = fleet.registry.jobs.claim(job.id, host="h1", worker="h1/1", lease_ms=30_000)
        fleet.registry.jobs.fail(job.id, claim.fence, code="busy", message="unpushed commits", retryable=False)
    fleet.raw.zadd(fleet.key("ws:due:evict"), {"refused": fleet.now - 1, "next": fleet.now - 1})
    again = fleet.sweep()
    assert again["purging"] == {"cap": 1}, "only the youngest was not refused"
    assert again["skipped"] == {"purge_refused": 2}


def test_b76_what_is_pinned_leased_queued_held_present_or_submitted_survives_and_says_why(fleet: Sweeping) -> None:
    for name in ("pinned", "leased", "queued", "held", "present", "submitted"):
        fleet.add(name, 25 * HOUR)
    lifecycle, jobs = fleet.registry.lifecycle, fleet.registry.jobs
    fleet.registry.workspaces.pin("pinned", "a demo", "ann")
    running = jobs.submit("workspace.capture", {"workspace": "leased"}, workspace="leased").job
    assert jobs.claim(running.id, host="h1", worker="h1/1", lease_ms=30_000).status == "run"
    jobs.submit("workspace.capture", {"workspace": "queued"}, workspace="queued")
    lifecycle.hold("held", "evidence", "ann")
    fleet.registry.presence.heartbeat("present", "agent-1", 60_000)
    lifecycle.transition("submitted", "submitted", by="ann", reason="review")
    done = fleet.sweep()
    assert done["evicted"] == {}
    assert done["skipped"] == {"hold": 1, "lease": 1, "pin": 1, "presence": 1, "queued": 1, "submitted": 1}
    assert len(fleet.ids()) == 6
    assert fleet.evicted() == []


def test_b76_a_lease_that_ended_protects_no_longer(fleet: Sweeping) -> None:
    fleet.add("w", 25 * HOUR)
    job = fleet.registry.jobs.submit("workspace.capture", {"workspace": "w"}, workspace="w", origin="beat").job
    claim = fleet.registry.jobs.claim(job.id, host="h1", worker="h1/1", lease_ms=30_000)
    assert fleet.sweep()["skipped"] == {"lease": 1}
    fleet.registry.jobs.finish(job.id, claim.fence, {})
    fleet.age("w", 2 * MINUTE)  # the sweep looks again when the lease would have run out
    assert fleet.sweep()["evicted"] == {"ttl": 1}


def test_d15_a_deadline_removes_at_its_millisecond_whatever_the_mode_and_nothing_without_one(fleet: Sweeping) -> None:
    for mode in ("ephemeral", "persistent"):
        fleet.add(mode, mode=mode, expires_in_ms=HOUR)
    fleet.add("none", mode="persistent")
    first, second = (fleet.registry.workspaces.get(mode).expires_at or 0 for mode in ("ephemeral", "persistent"))
    assert 0 < first <= second
    assert [item.facts.id for item in fleet.plan("evict", now=first - 1).items] == []
    assert "ephemeral" in {item.facts.id for item in fleet.plan("evict", now=first).items}
    assert {item.facts.id for item in fleet.plan("evict", now=second).items} == {"ephemeral", "persistent"}
    for name in ("ephemeral", "persistent", "none"):
        fleet.age(name, 2 * HOUR)
    assert fleet.sweep()["evicted"] == {"deadline": 2}
    assert fleet.ids() == ["none"]


def test_d17_idle_and_max_age_each_say_so_and_a_persistent_one_is_exempt_from_idle(fleet: Sweeping) -> None:
    fleet.policy(ttl="never", idle_ttl="30m", max_age="4h")
    fleet.add("idle", HOUR)
    fleet.add("aged", 5 * HOUR, idle=MINUTE)
    fleet.add("used", HOUR, idle=29 * MINUTE)
    fleet.add("persistent-idle", HOUR, mode="persistent")
    fleet.add("persistent-aged", 5 * HOUR, idle=MINUTE, mode="persistent")
    assert fleet.sweep()["evicted"] == {"idle_ttl": 1, "max_age": 2}
    assert dict(fleet.evicted()) == {"idle": "idle_ttl", "aged": "max_age", "persistent-aged": "max_age"}
    assert sorted(fleet.ids()) == ["persistent-idle", "used"]


def test_q20_an_idle_one_goes_after_30_minutes_when_the_policy_says_so(fleet: Sweeping) -> None:
    """The original had the setting and nobody who read it."""
    fleet.policy(idle_ttl="30m")
    fleet.add("w")
    active = fleet.registry.workspaces.get("w").last_active
    assert fleet.plan(now=active + 30 * MINUTE).items == []
    assert [item.decision.rule for item in fleet.plan(now=active + 30 * MINUTE + 1).items] == ["idle_ttl"]
    fleet.age("w", 31 * MINUTE)
    assert fleet.sweep()["evicted"] == {"idle_ttl": 1}


def test_the_budget_takes_the_least_recently_used_until_it_fits_and_passes_the_pinned_over(fleet: Sweeping) -> None:
    for name, idle in (("recent", 1), ("pinned", 50), ("least", 40), ("less", 30)):
        fleet.add(name, HOUR, idle=idle * MINUTE)
        job = fleet.registry.jobs.submit("workspace.capture", {"workspace": name}, workspace=name, origin="beat").job
        claim = fleet.registry.jobs.claim(job.id, host="h1", worker="h1/1", lease_ms=30_000)
        record = {"generation": 1, "digest": "sha256:0", "bytes": 100, "stored_bytes": 100}
        fleet.registry.jobs.finish(job.id, claim.fence, {}, record)
        fleet.set(name, last_active=fleet.now - idle * MINUTE)
    fleet.registry.workspaces.pin("pinned")
    fleet.registry.policies.set_fleet({"budget": "300"})
    assert fleet.sweep()["evicted"] == {"budget": 1}
    assert fleet.evicted() == [("least", "budget")]
    fleet.registry.policies.set_fleet({"budget": "100"})
    done = fleet.sweep()
    assert done["evicted"] == {"budget": 2}
    assert fleet.ids() == ["pinned"]
    assert fleet.registry.budget.state(100).loaded == 100


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_the_sweeps_then_do_and_writes_nothing(fleet: Sweeping) -> None:
    fleet.policy(cap=3, stop_after="2h")
    for number in range(3):
        fleet.add(f"expired{number}", 25 * HOUR)
    for number in range(5):
        fleet.add(f"young{number}", (50 - number) * MINUTE)
    fleet.add("stale", 3 * HOUR, mode="persistent")
    fleet.add("pinned", 30 * HOUR, idle=MINUTE, pinned=True)
    before = fleet.dump()
    plan = fleet.plan()
    assert fleet.dump() == before
    assert fleet.plan().to_dict()["items"] == plan.to_dict()["items"]
    planned = sorted((item.facts.id, item.decision.action, item.decision.rule) for item in plan.items)
    assert plan.skipped["pin"] == 1
    fleet.sweep()
    fleet.stale()
    done = [(each, "evict", rule) for each, rule in fleet.evicted()]
    done += [(job.args["workspace"], "stop", job.args["rule"]) for job in fleet.jobs("workspace.stop")]
    assert planned == sorted(done)
    assert len(done) == 3 + 4 + 1


def test_a_forecast_is_a_plan_for_another_time_and_a_job_that_waits_has_run_by_then(fleet: Sweeping) -> None:
    fleet.add("w")
    fleet.registry.jobs.submit("workspace.capture", {"workspace": "w"}, workspace="w")
    before = fleet.dump()
    assert fleet.plan(now=fleet.now + HOUR).items == []
    [item] = fleet.plan(now=fleet.now + 2 * DAY).items
    assert (item.facts.id, item.decision.rule) == ("w", "ttl")
    assert fleet.dump() == before


def test_a_limited_plan_says_how_many_it_did_not_look_at(fleet: Sweeping) -> None:
    for number in range(7):
        fleet.add(f"w{number}", 25 * HOUR)
    plan = fleet.plan("evict", limit=3)
    assert (len(plan.items), plan.remaining) == (3, 4)


def test_explain_names_state_signals_rules_levels_and_what_comes_next(fleet: Sweeping) -> None:
    fleet.registry.policies.set_fleet({"stop_after": "2h"})
    fleet.registry.policies.set_repo("o/r", {"ttl": "12h"})
    fleet.add("o/r#1", 3 * HOUR, idle=HOUR, policy={"idle_ttl": "8h"})
    said = explained(fleet, "o/r#1")
    assert said["state"] == "active"
    signals = {each["signal"]: each["age_ms"] // HOUR for each in said["signals"]}
    assert signals["touch"] == 1
    found = said["policy"]
    assert (found["stop_after"]["value"], found["stop_after"]["from"]) == ("2h", "fleet")
    assert (found["ttl"]["value"], found["ttl"]["from"]) == ("12h", "repo o/r")
    assert (found["idle_ttl"]["from"], found["cap"]["from"], found["max_age"]["from"]) == ("workspace", "setting", "default")
    assert said["next"]["action"] == "stop"
    assert 0 < said["next"]["in_ms"] <= HOUR + 1
    rules = {rule["rule"]: rule for rule in said["rules"]}
    assert rules["ttl"]["result"] == rules["stop_after"]["result"] == "later"
    assert (rules["hold"]["result"], rules["max_age"]["result"]) == ("off", "off")
    fleet.registry.lifecycle.hold("o/r#1", "a trial", "ann")
    held = explained(fleet, "o/r#1")
    assert (held["action"], held["rule"]) == ("keep", "hold")
    assert "a trial" in held["detail"]


def test_explain_knows_of_a_cap_that_is_exceeded_and_why_an_evicted_one_went(fleet: Sweeping) -> None:
    fleet.policy(cap=2)
    for name, age in (("a", 30), ("b", 20), ("c", 10)):
        fleet.add(name, age * MINUTE)
    assert [explained(fleet, name)["action"] for name in "abc"] == ["evict", "keep", "keep"]
    assert explained(fleet, "a")["rule"] == "cap"
    fleet.sweep()
    with pytest.raises(Gone, match="cap"):
        explained(fleet, "a")


def explained(fleet: Sweeping, ident: str) -> dict[str, Any]:
    from mothball.reclaim import Reclaimer

    return Reclaimer(services.current().registry, fleet.settings).explain(ident).to_dict()
