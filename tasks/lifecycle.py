"""The sweeps that reclaim workspaces: expiry, cap and budget; stale and stranded ones; runtimes that died unseen.

Each asks the planner what is due, page by page, and acts: one compare-and-set script per effect, so that however many sweeps run at
once, each effect happens once (design, section 7). A sweep is bounded by time, others are served between its pages, and one bad
workspace never ends it.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from functools import partial
from typing import Any, Final

import structlog
from billiard.exceptions import SoftTimeLimitExceeded

from mothball.errors import HostOffline, InvalidParams, MothballError, Unavailable
from mothball.reclaim import RETRY_MS, Kind, Limit, Planned, Reclaimer, Seen, stops_first
from mothball.registry.facts import HOST_GONE_MS
from mothball.registry.policies import PolicyBook
from mothball.sweeping import effect
from tasks.hosts import Bells, ask_hosts
from tasks.services import Services
from tasks.sweep import sweep_task

log = structlog.stdlib.get_logger("mothball.sweep")

BY: Final = "policy"
NOTICE_TASK, RECONCILE_TASK, RECONCILE_LANE = "workspace.notice", "runtime.reconcile", "reconcile"
MOST_SECONDS: Final = 60.0
"""A sweep takes half its interval and never more than this; what is left waits for the next one."""
LIMITS_PART: Final = 0.25
"""Part of that time that is left for cap and budget."""
_SOFT_SECONDS, _HARD_SECONDS = 150, 180
_GIVE_UP_AFTER = 2
"""Calls in a row that may find no Redis: each waits seconds, and the next sweep comes anyway."""
_SHOWN_PROBLEMS = 20
NOTICE_AGAIN_MS: Final = 3_600_000
"""For how long after an announcement a sweep that comes by sees to it that the hook was asked; its job is remembered for longer."""
NEVER_HEARD: Final = 1 << 62


@sweep_task(
    name="maintenance.sweep", every=lambda settings: settings.sweep_seconds, soft_time_limit=_SOFT_SECONDS, time_limit=_HARD_SECONDS
)
def sweep_expired(here: Services) -> dict[str, Any]:
    """Evict what has expired, what is above the cap and what the budget has no room for (B-70 to B-77, D-15, D-17, Q-20)."""
    run = _Run(here, "evict", here.settings.sweep_seconds)
    run.all_due()
    run.all_above_limits()
    return run.result("evicted", "stopping", "purging")


@sweep_task(
    name="maintenance.stop_stale",
    every=lambda settings: settings.stop_stale_seconds,
    soft_time_limit=_SOFT_SECONDS,
    time_limit=_HARD_SECONDS,
)
def stop_stale(here: Services) -> dict[str, Any]:
    """Have idle ones stopped by their hosts (N-30 to N-33), strand missed ones, abandon those nobody resumed (D-71, D-72)."""
    run = _Run(here, "stop", here.settings.stop_stale_seconds)
    run.all_due()
    return run.result("stopping", "stranded", "abandoned")


@sweep_task(name="maintenance.reconcile", every=lambda settings: settings.reconcile_seconds, soft_time_limit=45, time_limit=60)
def reconcile(here: Services) -> dict[str, Any]:
    """Ask every host that is online which of its active workspaces lost their runtime (N-34)."""
    return ask_hosts(here, RECONCILE_TASK, {}, RECONCILE_LANE)


class _GiveUp(Exception):
    """The registry does not answer any more; the next sweep goes on."""


class _Run:
    """One run of a sweep of one kind."""

    def __init__(self, here: Services, kind: Kind, every: int) -> None:
        self.here = here
        self.registry = here.registry
        self.kind = kind
        self.reclaimer = Reclaimer(here.registry, here.settings)
        self.bells = Bells(here)
        self.seen = Seen()
        self.done: dict[str, Counter[str]] = {}
        self.noticed = 0
        self._later: list[tuple[str, int, int | None]] = []
        self._unavailable = 0
        span = min(every / 2, MOST_SECONDS)
        self._end = time.monotonic() + span
        # The limits come last, and a part of the time is theirs however much is due.
        self._due_end = self._end - (span * LIMITS_PART if kind == "evict" else 0)
        # The time of Redis, once: what becomes due while this runs is the next one's, so this one ends.
        self.now = self.registry.time_ms()
        self._hosts: dict[str, int] | None = None
        self._heal(every)

    def _heal(self, every: int) -> None:
        """Go on with the walk through all records that a new policy begins, for a part of the time."""
        end = time.monotonic() + min(every / 2, MOST_SECONDS) / 4
        try:
            while self.registry.policies.heal()["walking"] and time.monotonic() < end:
                pass
        except (SoftTimeLimitExceeded, Unavailable):
            raise
        except Exception:  # the walk repairs; what is due does not depend on it
            log.exception("the walk through all records cannot go on; it is tried again by the next sweep")

    def _book(self) -> PolicyBook | None:
        """The policies as they are now; None when they cannot be read."""
        try:
            return self.registry.policies.book()
        except InvalidParams as error:
            # Fail closed: a policy that nobody can read reclaims nothing.
            log.error("the policies cannot be read; nothing is reclaimed until they are set again", error=error.message)
            self.seen.skipped["policy"] = self.registry.lifecycle.due_count(self.kind, self.now)
            return None

    @property
    def late(self) -> bool:
        """True when this run has had its time."""
        return time.monotonic() >= self._end

    def all_due(self) -> None:
        """Judge and act, page by page, until nothing is due or the time is over."""
        size = self.here.settings.sweep_batch
        try:
            # Read for each page: a policy that is set meanwhile counts from the next one on.
            while (book := self._book()) is not None:
                due = self.registry.lifecycle.due(self.kind, size, self.now)
                page = self.reclaimer.judge(self.kind, due, book, self.now)
                self.seen.add(page)
                self._later += page.later
                try:
                    for planned in page.notices:
                        self._try(self._announce, planned)
                    for planned in page.given:
                        self._try(self._ask_hook, planned)
                    for planned in page.acts:
                        self._try(self._act, planned)
                finally:
                    self._put_off(book.version)
                if len(due) < size or time.monotonic() >= self._due_end:
                    return
        except _GiveUp:
            log.warning("the registry does not answer; the next sweep goes on")

    def all_above_limits(self) -> None:
        """Cap, then budget: the oldest and the least used go until the limit is kept, asked again before each one."""
        if (book := self._book()) is None:
            return
        try:
            for limit in self.reclaimer.limits(book):
                for planned in self.reclaimer.walk(limit, book, self.now, partial(self._left, limit), self.seen):
                    self._try(self._act, planned)
        except _GiveUp:
            log.warning("the registry does not answer; the next sweep goes on")

    def _left(self, limit: Limit) -> int:
        return 0 if self.late else self.reclaimer.exceeded(limit) - sum(limit.size(each) for each in self.seen.ending)

    def result(self, *names: str) -> dict[str, Any]:
        """What came of it (B-73): counts by rule, what was skipped and why, and how many are due that nobody looked at."""
        for id, problem in self.seen.problems[:_SHOWN_PROBLEMS]:  # noqa: A001
            log.error("kept, because it cannot be judged", workspace=id, error=problem)
        out: dict[str, Any] = {name: dict(sorted(self.done.get(name, Counter()).items())) for name in names}
        if "stopping" in out:
            # Each is a job of its host: it is stopped when that has ended.
            out = {"stopped": sum(out.pop("stopping").values()), **out}
        return {
            **out, "noticed": self.noticed, "skipped": dict(sorted(self.seen.skipped.items())),
            "remaining": self.registry.lifecycle.due_count(self.kind, self.now),
        }  # fmt: skip

    # -- one workspace ----------------------------------------------------------------------------------------------

    def _try(self, act: Any, planned: Planned) -> None:
        """`act` upon one; whatever is wrong with it is counted and costs no other."""
        id = planned.facts.id  # noqa: A001
        try:
            at = act(planned)
            self._unavailable = 0
        except SoftTimeLimitExceeded:
            raise
        except Unavailable as error:
            self._unavailable += 1
            self.seen.skip(id, error.code)
            if self._unavailable >= _GIVE_UP_AFTER:
                raise _GiveUp from None
            return
        except MothballError as error:
            self.seen.skip(id, error.code)
            log.warning("kept", workspace=id, action=planned.decision.action, code=error.code, error=error.message)
            at = self.now + RETRY_MS
        except Exception as error:  # a bug met one workspace; the others must not wait for its repair
            self.seen.skip(id, "failed")
            log.exception("kept", workspace=id, action=planned.decision.action, error=f"{type(error).__name__}: {error}"[:500])
            at = self.now + RETRY_MS
        if at is not None and planned.score is not None:
            self._later.append((id, planned.score, at))

    def _act(self, planned: Planned) -> int | None:
        """Do what was decided; when to look again, None when the effect's own script has said so."""
        facts, action = planned.facts, planned.decision.action
        if self.reclaimer.refused(planned, self.now):
            self.seen.skip(facts.id, "purge_refused")
            return self.now + RETRY_MS
        gone = self._silence(facts.host) > HOST_GONE_MS
        if action == "stop" or (action == "evict" and (planned.policy.purge or (stops_first(facts) and not gone))):
            self._host_is_there(facts.host)
        name, answer, request = effect(self.registry, planned, BY, host_gone=gone)
        if request is not None:
            try:
                self._submit(request.task, request.args, request.lane)
            except (HostOffline, Unavailable) as error:
                if name != "stranded":
                    raise
                log.warning("stranded without a capture", workspace=facts.id, error=error.message)
        if name == "purging" or (name == "stopping" and action == "evict"):
            self.seen.ending.append(facts)
        if answer == "done":
            self.done.setdefault(name, Counter())[planned.decision.rule] += 1
        else:
            self.seen.skip(facts.id, answer)
        if answer == "changed":  # by somebody who was quicker: the next sweep sees what it is now
            return self.now + 1
        return self.now + RETRY_MS if answer == "busy" or name in {"stopping", "purging"} else None

    def _announce(self, planned: Planned) -> None:
        facts, decision = planned.facts, planned.decision
        if decision.notice is None:
            return
        action, due = decision.notice
        rule, detail = _announced(planned, due)
        if self.registry.lifecycle.noticed(facts, action, due, rule=rule, detail=detail):
            self.noticed += 1
            self._submit_notice(planned, action, due)

    def _ask_hook(self, planned: Planned) -> None:
        """The hook is asked even if the sweep that announced it died, or lost Redis, before it came to that."""
        due = planned.facts.noticed[self.kind]
        if due - (planned.policy.notice_before or 0) > self.now - NOTICE_AGAIN_MS:
            self._submit_notice(planned, self.kind, due)

    def _submit_notice(self, planned: Planned, action: str, due: int) -> None:
        if not self.here.settings.notice_hook:
            return
        facts, (rule, detail) = planned.facts, _announced(planned, due)
        # One job per announcement, whoever submits it how often.
        job = str(uuid.uuid5(uuid.NAMESPACE_URL, f"mothball:notice:{facts.id}:{facts.registration}:{action}:{due}"))
        args = {"workspace": facts.id, "action": action, "due": due, "rule": rule, "detail": detail}
        self._submit(NOTICE_TASK, args, None, job_id=job, queue="control")

    def _submit(self, task: str, args: dict[str, Any], lane: str | None, **fields: str) -> None:
        submitted = self.registry.jobs.submit(task, args, workspace=args["workspace"], lane=lane, origin="beat", **fields)
        if submitted.ring:
            self.bells.ring(submitted.job)

    def _host_is_there(self, host: str) -> None:
        """Raise `HostOffline` unless a worker on `host` was heard lately: a job that waits for a dead host helps nobody."""
        if 0 < self._silence(host) < NEVER_HEARD:
            raise HostOffline(f"host {host!r} is offline; what is to be done there waits until it is back", host=host)

    def _silence(self, host: str) -> int:
        """For how long an offline host was silent, ms; 0 when it is online, `NEVER_HEARD` when nobody knows it (any more)."""
        if self._hosts is None:
            hosts = self.registry.hosts.list()
            self._hosts = {each.host: 0 if each.online else max(1, self.now - each.last_seen) for each in hosts}
        return self._hosts.get(host, NEVER_HEARD)

    def _put_off(self, version: int) -> None:
        later, self._later = self._later, []
        if later:
            self.registry.lifecycle.rescore(self.kind, later, version=version)


def _announced(planned: Planned, due: int) -> tuple[str, str]:
    """The rule and the detail of what is announced for `due`."""
    why = next((each for each in planned.decision.rules if each.at == due and each.result == "later"), None)
    return (why.rule, why.detail) if why is not None else ("", "")
