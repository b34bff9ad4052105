"""What would happen to which workspace, and why: one planner for the sweeps, their dry run, `forecast` and `explain`.

It reads the registry, asks `policy.decide` and writes nothing, so what a dry run prints is what a sweep would have done. A
workspace that cannot be read, or whose policy cannot, is kept and counted (fail closed, D-70).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from mothball import policy
from mothball.errors import InvalidParams
from mothball.policy import Decision, Facts, Policy
from mothball.registry import Registry
from mothball.registry.policies import PolicyBook
from mothball.settings import Settings

if TYPE_CHECKING:
    from mothball.explain import Explanation

Kind = Literal["evict", "stop"]
Place = tuple[str, int]
"""An id and its score in an index."""
KINDS: Final[tuple[Kind, ...]] = ("evict", "stop")
RETRY_MS: Final = 60_000
"""When a sweep looks again at one it could not judge or act upon."""
PURGE_TASK: Final = "workspace.purge"
PURGE_AGAIN_MS: Final = 3_600_000
PAGE: Final = 500
"""Workspaces read at a time by plans and walks; sweeps have a setting for it."""
_FIRING: Final[dict[Kind, frozenset[str]]] = {
    "evict": frozenset({"abandoned", "deadline", "max_age", "ttl", "idle_ttl"}),
    "stop": frozenset({"auto_ttl", "heartbeats", "stop_after"}),
}
"""The rules whose time had come for a workspace that another rule keeps: that one is counted as the reason."""


def stops_first(facts: Facts) -> bool:
    """True when its processes may run: they are stopped, with a last capture, before its record goes and nobody knows of them."""
    return facts.state == "active" and facts.driver != "none"


class Limit(NamedTuple):
    """A limit on all workspaces together: most of them (of `repo`; None: of the fleet), or most bytes of their captures."""

    kind: Literal["cap", "budget"]
    most: int
    repo: str | None = None

    def size(self, facts: Facts) -> int:
        """How much room one takes."""
        return facts.stored_bytes if self.kind == "budget" else int(self.repo in {None, facts.repo})


class Planned(NamedTuple):
    """One workspace and what is to happen to it. `score` is that of the index it was found by, None when a walk found it."""

    facts: Facts
    policy: Policy
    decision: Decision
    score: int | None = None
    limit: Limit | None = None
    """The limit that this eviction makes room for."""

    def to_dict(self) -> dict[str, Any]:
        """What a dry run shows of it, in JSON types."""
        facts, decision = self.facts, self.decision
        return {
            "workspace": facts.id, "repo": facts.repo, "host": facts.host, "state": facts.state, "action": decision.action,
            "rule": decision.rule, "detail": decision.detail, "purge": self.policy.purge and decision.action == "evict",
            "stop_first": decision.action == "evict" and not self.policy.purge and stops_first(facts),
        }  # fmt: skip


class Page(NamedTuple):
    """Some workspaces of a due index, judged. `found` is how many the index gave; fewer than asked for means: no more."""

    found: int
    acts: list[Planned]
    notices: list[Planned]
    """Kept for now, but those who care are to be told: `decision.notice` says of what, and for when."""
    given: list[Planned]
    """Kept for now, and announced by a look before this one."""
    later: list[tuple[str, int, int | None]]
    """Nothing to do: id, score seen, time to look again (None: only when something changes)."""
    skipped: list[tuple[str, str, str]]
    """Kept although their time had come: id, reason, and what an operator has to put right ('' nothing)."""


class Plan(NamedTuple):
    """What the sweeps would do at `now` (ms of Redis TIME)."""

    now: int
    items: list[Planned]
    notices: list[Planned]
    skipped: dict[str, int]
    problems: list[tuple[str, str]]
    remaining: int
    """Due ones beyond the limit that nobody looked at."""

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON types."""
        notices = [
            {"workspace": each.facts.id, "action": each.decision.notice[0], "due": each.decision.notice[1]}
            for each in self.notices
            if each.decision.notice is not None
        ]
        return {
            "now": self.now, "items": [each.to_dict() for each in self.items], "notices": notices, "skipped": self.skipped,
            "problems": [{"workspace": each, "reason": reason} for each, reason in self.problems], "remaining": self.remaining,
        }  # fmt: skip


class Reclaimer:
    """The planner of one process. `now` everywhere is ms of Redis TIME; None asks Redis."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.registry = registry
        self.settings = settings

    # -- one page of what is due ------------------------------------------------------------------------------------

    def judge(self, kind: Kind, due: Sequence[Place], book: PolicyBook, now: int, *, ahead: bool = False) -> Page:
        """The due ones of `kind` as `now` finds them; `ahead`: as they will be when nobody does anything until then."""
        page = Page(len(due), [], [], [], [], [])
        for (id, score), facts in zip(due, self.registry.lifecycle.readable([id for id, _ in due]), strict=True):  # noqa: A001
            if facts is None:  # gone meanwhile, or an index entry without a record: the entry goes
                page.later.append((id, score, None))
                continue
            reason, problem = "unreadable", facts
            if not isinstance(facts, str):
                try:
                    known = msgspec.structs.replace(facts, queued=0) if ahead else facts
                    _sort(page, kind, self._decide(known, book, now, score), now)
                    continue
                except InvalidParams as error:
                    reason, problem = "policy", error.message
            page.skipped.append((id, reason, str(problem)))
            page.later.append((id, score, now + RETRY_MS))
        return page

    def _decide(self, facts: Facts, book: PolicyBook, now: int, score: int | None = None) -> Planned:
        rules = book.of(facts)
        return Planned(facts, rules, policy.decide(facts, rules, now), score)

    def refused(self, planned: Planned, now: int) -> bool:
        """True when this eviction is to be a purge, and a purge of the workspace was refused less than an hour ago.

        Whatever was missing then has to be put right by a person; asking each sweep again would only fill the list of jobs.
        """
        if not (planned.policy.purge and planned.decision.action == "evict"):
            return False
        jobs = self.registry.jobs.list(workspace=planned.facts.id, limit=20)
        last = next((job for job in jobs if job.task == PURGE_TASK), None)
        return last is not None and last.state in {"failed", "dead"} and (last.finished_at or 0) > now - PURGE_AGAIN_MS

    # -- cap and budget ---------------------------------------------------------------------------------------------

    def limits(self, book: PolicyBook) -> list[Limit]:
        """Every limit that is set: the caps of repos, the fleet's, the budget."""
        found: list[Limit] = []
        for repo in sorted(book.repos):
            cap = book.repos[repo].get("cap")
            if isinstance(cap, int) and not isinstance(cap, bool):
                found.append(Limit("cap", cap, repo))
        fleet = book.fleet_policy()
        if fleet.cap is not None:
            found.append(Limit("cap", fleet.cap))
        return found if fleet.budget is None else [*found, Limit("budget", fleet.budget)]

    def exceeded(self, limit: Limit) -> int:
        """By how much a limit is exceeded now. All workspaces count, whether a rule exempts them or not (B-72, Q-08)."""
        if limit.kind == "budget":
            return self.registry.budget.state(limit.most).over
        return max(0, self.registry.workspaces.count(limit.repo) - limit.most)

    def walk(self, limit: Limit, book: PolicyBook, now: int, left: Callable[[], int], seen: Seen) -> Iterator[Planned]:
        """Those that may go for `limit`, one after the other while `left()` says that it is exceeded by so much.

        For a cap the oldest by creation come first (B-72), for the budget the least recently used (Q-12).
        """
        over = {"over_budget": True} if limit.kind == "budget" else {"over_cap": True}
        after: Place | None = None
        while left() > 0 and (found := self._page(limit, after)):
            after = found[-1]
            ids = [each for each, _ in found if each not in seen.ids]
            for id, facts in zip(ids, self.registry.lifecycle.readable(ids), strict=True):  # noqa: A001 - the record's own name for it
                if isinstance(facts, str):
                    seen.skip(id, "unreadable", facts)
                if not isinstance(facts, Facts) or limit.size(facts) <= 0:  # who takes no room makes none
                    continue
                try:
                    planned = self._decide(msgspec.structs.replace(facts, **over), book, now)._replace(limit=limit)
                except InvalidParams as error:
                    seen.skip(id, "policy", error.message)
                    continue
                if planned.decision.action != "evict":
                    seen.skip(id, planned.decision.rule)
                    if (planned.policy.purge or stops_first(facts)) and planned.decision.rule in {"lease", "queued"}:
                        seen.ending.append(facts)
                        if left() <= 0:
                            return
                elif self.refused(planned, now):
                    seen.skip(id, "purge_refused")
                else:
                    seen.ids.add(id)
                    yield planned
                    if left() <= 0:
                        return

    def _page(self, limit: Limit, after: Place | None) -> list[Place]:
        lifecycle = self.registry.lifecycle
        return lifecycle.least_active(PAGE, after) if limit.kind == "budget" else lifecycle.oldest(PAGE, after, limit.repo)

    def explain(self, id: str, *, now: int | None = None) -> Explanation:  # noqa: A002
        """See `mothball.explain.explain`."""
        from mothball.explain import explain

        return explain(self, id, now=now)

    # -- plans ------------------------------------------------------------------------------------------------------

    def plan(self, kinds: Sequence[Kind] = KINDS, *, now: int | None = None, limit: int = 1000) -> Plan:
        """What the sweeps of `kinds` would do at `now` with the first `limit` that are due, cap and budget too. Writes nothing.

        For a later time it is a forecast of what happens when nobody does anything until then: no touch, no heartbeat, no new
        job; those that wait now have run, and notices whose time came were given.
        """
        at = self.registry.time_ms()
        ahead = now is not None and now > at
        at = at if now is None else now
        book = self.registry.policies.book()
        seen, items, notices, remaining = Seen(), list[Planned](), list[Planned](), 0
        for kind in kinds:
            due = self.registry.lifecycle.due(kind, limit, at)
            remaining += max(0, self.registry.lifecycle.due_count(kind, at) - len(due))
            for start in range(0, len(due), PAGE):
                page = self.judge(kind, due[start : start + PAGE], book, at, ahead=ahead)
                notices += page.notices
                seen.add(page)
                for planned in page.acts:
                    if planned.facts.id in seen.ids:
                        continue
                    if self.refused(planned, at):
                        seen.skip(planned.facts.id, "purge_refused")
                        continue
                    seen.ids.add(planned.facts.id)
                    items.append(planned)
        if "evict" in kinds:
            items += islice(self.making_room(book, at, tuple(items), seen), limit)
        return Plan(at, items, notices, dict(sorted(seen.skipped.items())), seen.problems, remaining)

    def making_room(self, book: PolicyBook, now: int, items: Sequence[Planned] = (), seen: Seen | None = None) -> Iterator[Planned]:
        """What the limits would evict beside `items`, one after the other."""
        seen = Seen() if seen is None else seen
        gone = [each.facts for each in items if each.decision.action == "evict"]
        for limit in self.limits(book):
            room = _Room(self.exceeded(limit), limit, gone, seen)
            for planned in self.walk(limit, book, now, room.left, seen):
                gone.append(planned.facts)
                yield planned


class _Room:
    """How far a limit is exceeded when those that are `gone`, and those that are ending, no longer count."""

    def __init__(self, above: int, limit: Limit, gone: list[Facts], seen: Seen) -> None:
        self._above, self._size = above, limit.size
        self._lists = (gone, seen.ending)
        self._counted = [0, 0]

    def left(self) -> int:
        """What is still too much; 0 or less: nothing."""
        for place, facts in enumerate(self._lists):
            self._above -= sum(self._size(each) for each in facts[self._counted[place] :])
            self._counted[place] = len(facts)
        return self._above


class Seen:
    """What a sweep or a plan has looked at: ids it acts upon, and why others stay."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.ending: list[Facts] = []
        """Those whose end is under way or may be: as good as gone for a limit, which must not take others in their place."""
        self.skipped: Counter[str] = Counter()
        self.problems: list[tuple[str, str]] = []
        self._counted: set[str] = set()

    def skip(self, id: str, reason: str, problem: str = "") -> None:  # noqa: A002 - the record's own name for it
        """Count `id` as kept because of `reason`, once however many rules and limits came upon it."""
        if id in self._counted:
            return
        self._counted.add(id)
        self.skipped[reason] += 1
        if problem:
            self.problems.append((id, problem))

    def add(self, page: Page) -> None:
        """Count what `page` skipped."""
        for id, reason, problem in page.skipped:  # noqa: A001
            self.skip(id, reason, problem)


def _sort(page: Page, kind: Kind, planned: Planned, now: int) -> None:
    """Put a judged one where it belongs."""
    facts, decision, score = planned.facts, planned.decision, planned.score
    if decision.notice is not None:
        page.notices.append(planned)
    elif facts.noticed.get(kind, 0) > now:
        page.given.append(planned)
    if policy.KIND_OF.get(decision.action) == kind:
        page.acts.append(planned)
        return
    if decision.action == "keep" and any(rule.result == "fires" and rule.rule in _FIRING[kind] for rule in decision.rules):
        page.skipped.append((facts.id, decision.rule, ""))
    # What was announced now is looked at again at once: its notice has changed what comes when.
    at = now + 1 if decision.notice is not None else decision.due[kind]
    page.later.append((facts.id, score or 0, at))
