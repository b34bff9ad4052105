"""Whatever happens in which order: sums, indexes and due times agree with the records, and nothing is forgotten by the sweeps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mothball import policy
from mothball.errors import MothballError
from mothball.registry import Claim
from mothball.settings import Settings
from tests.integration.sweeping import HOUR, MINUTE, Sweeping
from workers.redis_server import RedisServer

LOOK_MS = 61_000
"""A lease or a queued job that ends before it would have had to is seen at the time at which it would have."""
NAMES = ("o/a#1", "o/a#2", "o/b#1", "plain")
POLICIES = (
    {"ttl": "10h"}, {"ttl": "never", "idle_ttl": "5h"}, {"ttl": "never"}, {"ttl": "10h", "cap": 2},
    {"ttl": "10h", "stop_after": "2h"}, {"ttl": "10h", "stop_after": "2h", "notice_before": "30m"},
    {"ttl": "never", "budget": "200", "stranded_for": "1h"},
    {"ttl": "9h", "presence_limit": "3h", "max_age": "11h"},
)  # fmt: skip
OWN = (None, {"ttl": "7h"}, {"stop_after": "1h"}, {"max_age": "6h", "ttl": "5h"})


@pytest.fixture
def fleet(private_redis: RedisServer, make_settings: Callable[..., Settings]) -> Iterator[Sweeping]:
    found = Sweeping(make_settings(host="h1"))
    yield found
    found.close()


class Life:
    """One random event after the other; what an event may be refused for is no matter here."""

    def __init__(self, fleet: Sweeping, seed: int) -> None:
        self.fleet, self.registry, self.chance = fleet, fleet.registry, random.Random(seed)
        self.running: list[Claim] = []

    def step(self) -> str:
        name, ident = self.chance.choice([each for each in dir(self) if each.startswith("do_")]), self.chance.choice(NAMES)
        try:
            getattr(self, name)(ident)
        except MothballError as error:
            return f"{name} {ident}: {error.code}"
        return f"{name} {ident}"

    def facts(self, ident: str) -> Any:
        return self.registry.lifecycle.facts([ident])[0]

    def do_register(self, ident: str) -> None:
        more = {"expires_in_ms": 8 * HOUR} if self.chance.random() < 0.3 else {}
        mode: Any = self.chance.choice(("ephemeral", "ephemeral", "persistent"))
        self.registry.workspaces.register(ident, host="h1", path=f"/srv/{ident.replace('#', '-')}", mode=mode, **more)

    do_register_again = do_register_once_more = do_register

    def do_age(self, ident: str) -> None:
        self.fleet.age(ident, self.chance.choice((MINUTE, 40 * MINUTE, 3 * HOUR)))

    def do_touch(self, ident: str) -> None:
        self.registry.workspaces.touch(ident, self.chance.choice(("touch", "exec")))

    def do_heartbeat(self, ident: str) -> None:
        self.registry.presence.heartbeat(ident, self.chance.choice("ab"), self.chance.choice((60_000, HOUR)))

    def do_goodbye(self, ident: str) -> None:
        self.registry.presence.goodbye(ident, self.chance.choice("ab"))

    def do_pin(self, ident: str) -> None:
        self.chance.choice((self.registry.workspaces.pin, self.registry.workspaces.unpin))(ident)

    def do_hold(self, ident: str) -> None:
        self.registry.lifecycle.hold(ident, "look")

    def do_unhold(self, ident: str) -> None:
        self.registry.lifecycle.unhold(ident)

    def do_own_policy(self, ident: str) -> None:
        self.registry.policies.set_workspace(ident, self.chance.choice(OWN))

    def do_fleet_policy(self, _: str) -> None:
        self.fleet.policy(**self.chance.choice(POLICIES))

    def do_submit(self, ident: str) -> None:
        job = self.registry.jobs.submit("workspace.capture", {}, workspace=ident, lane="capture").job
        if self.chance.random() < 0.7:
            self.claim(job.id)

    def claim(self, job: str) -> None:
        claim = self.registry.jobs.claim(job, host="h1", worker="h1/1", lease_ms=self.chance.choice((1, 60_000)))
        if claim.status == "run":
            self.running.append(claim)

    do_submit_again = do_submit

    def do_reserve(self, _: str) -> None:
        if self.running:
            claim = self.chance.choice(self.running)
            self.registry.budget.reserve(claim.job.id, claim.fence, bytes=self.chance.randrange(100), limit=1000)

    def do_end(self, _: str) -> None:
        if not self.running:
            return
        claim = self.running.pop(self.chance.randrange(len(self.running)))
        ways = ("finish", "finish", "fail", "retry", "lost", "cancel", "forget")
        way, jobs, job = self.chance.choice(ways), self.registry.jobs, claim.job.id
        if way == "finish":
            known = self.facts(claim.job.workspace)
            generation = (known.generation if known else 0) + 1
            jobs.finish(job, claim.fence, {}, {"generation": generation, "digest": "sha256:" + "ab" * 32, "stored_bytes": 50})
        elif way in {"fail", "retry"}:
            jobs.fail(job, claim.fence, code="busy", message="x", retryable=way == "retry")
        elif way == "lost":
            jobs.release_lost(job, claim.fence)
        elif way == "cancel":
            jobs.cancel(job)
            jobs.finish_cancelled(job, claim.fence)
        # forget: the worker was killed; the ring finds out

    do_end_another = do_end

    def do_ring(self, _: str) -> None:
        for bell in self.registry.jobs.ring(100):
            self.claim(bell.job)

    def do_mark(self, ident: str) -> None:
        self.registry.lifecycle.transition(ident, self.chance.choice(("submitted", "merged", "active")))

    def do_stop(self, ident: str) -> None:
        job = self.registry.jobs.submit("workspace.stop", {}, workspace=ident).job
        claim = self.registry.jobs.claim(job.id, host="h1", worker="h1/1", lease_ms=60_000)
        if claim.status == "run":
            self.registry.lifecycle.stopped(ident, job=job.id, fence=claim.fence, rule="asked")
            self.registry.jobs.finish(job.id, claim.fence, {})

    def do_strand(self, ident: str) -> None:
        if (facts := self.facts(ident)) is not None:
            self.registry.lifecycle.strand(facts, reason="explicit")

    def do_abandon(self, ident: str) -> None:
        if (facts := self.facts(ident)) is not None:
            self.registry.lifecycle.abandon(facts, reason="explicit")

    def do_resume(self, ident: str) -> None:
        self.registry.lifecycle.resume(ident)

    def do_evict(self, ident: str) -> None:
        if (facts := self.facts(ident)) is not None:
            self.registry.lifecycle.evict(facts, rule="asked", force=self.chance.random() < 0.5)

    def do_release(self, ident: str) -> None:
        self.registry.workspaces.release(ident)

    def do_undelete(self, ident: str) -> None:
        self.registry.lifecycle.undelete(ident)

    def do_extend(self, ident: str) -> None:
        if (facts := self.facts(ident)) is not None:
            self.registry.lifecycle.extend(facts, self.fleet.now + HOUR)

    def do_sweep(self, _: str) -> None:
        self.fleet.sweep()

    def do_stale(self, _: str) -> None:
        self.fleet.stale()

    do_sweep_again, do_stale_again = do_sweep, do_stale

    # -- what is true at any time ------------------------------------------------------------------------------------

    def check(self) -> None:
        raw, key = self.fleet.raw, self.fleet.key
        records = {each: raw.hgetall(key(f"ws:{each}")) for each in NAMES if raw.exists(key(f"ws:{each}"))}
        kept = {name: int(value) for name, value in raw.hgetall(key("budget:retained")).items()}
        reserved = {job: int(value) for job, value in raw.hgetall(key("budget:reserved")).items()}
        state = self.registry.budget.state()
        assert state.loaded == sum(int(record.get("stored_bytes", 0)) for record in records.values())
        assert state.retained == sum(kept.values())
        assert state.reserved == sum(reserved.values())
        assert all(raw.hget(key(f"job:{job}"), "state") == "running" for job in reserved)
        for index in ("created", "active"):
            assert set(raw.zrange(key(f"ws:by:{index}"), 0, -1)) == set(records)
        for resting in policy.STATES[1:]:
            expected = {each for each, record in records.items() if record["state"] == resting}
            assert raw.smembers(key(f"ws:state:{resting}")) == expected
        assert {each for each in NAMES if raw.exists(key(f"presence:{each}"))} <= set(records)
        book, now = self.registry.policies.book(), self.fleet.now
        for ident in records:
            facts = self.facts(ident)
            decision = policy.decide(facts, book.of(facts), now)
            for kind, due in decision.due.items():
                at = self.registry.lifecycle.due_at(kind, ident)
                assert due is None or (at is not None and at <= max(due, now) + LOOK_MS), (ident, kind, at, due, now, decision)


@pytest.mark.parametrize("seed", range(6))
def test_sums_indexes_and_due_times_agree_with_the_records_whatever_happens(fleet: Sweeping, seed: int) -> None:
    life, told = Life(fleet, seed), list[str]()
    for _ in range(250):
        told.append(life.step())
        try:
            life.check()
        except AssertionError as error:
            pytest.fail(f"after {told[-15:]}: {error}")
    kinds = {event.kind for event in fleet.registry.events.list(limit=10_000) if event.kind.startswith("workspace.")}
    assert len(kinds) >= 8, "hardly anything happened"
