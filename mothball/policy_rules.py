"""The rules of `mothball.policy`, one small function each, as lines of time: from when and until when a rule speaks.

Times are ms of Redis TIME. A line's `starts` is the first ms at which it speaks, `ends` the first at which it no longer does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from mothball import sizes
from mothball.durations import ago, show
from mothball.policy_fields import ALWAYS_COUNT, SIGNALS, Policy

QUEUED_LOOK_MS = 60_000
"""How long a workspace with a queued job is left alone before it is looked at again."""
NEVER_SIGNALS = ("stats", "health", "ping", "ports")
"""Looking at a workspace is no sign of its life (N-32), whatever a record says."""
_LOST = ("pinned", "policy")
"""What must be known before anything is reclaimed."""
STATES = ("active", "submitted", "merged", "stopped", "stranded", "abandoned")
"""States of a record."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that `decide` may know of a workspace. Times are ms of Redis TIME, None or absent when there is none.

    `signals` are the last times of the named signs of life, `noticed` the times that were announced per action, `queued` how many
    of its jobs wait, `present_until` the latest end among holders that did not say goodbye, `seen` the raw fields of the record
    that an effect compares before it acts.
    """

    id: str
    host: str
    state: str
    created_at: int
    last_active: int
    repo: str | None = None
    registration: str = ""
    mode: str = "ephemeral"
    last_signal: str = ""
    state_since: int = 0
    state_reason: str = ""
    expires_at: int | None = None
    extended_until: int | None = None
    extensions: int = 0
    noticed: dict[str, int] = {}
    pinned: bool = False
    pin_reason: str = ""
    holds: list[dict[str, Any]] = []
    lease_until: int | None = None
    lease_job: str = ""
    queued: int = 0
    present_until: int | None = None
    present_by: str = ""
    driver: str = "none"
    generation: int = 0
    digest: str | None = None
    stored_bytes: int = 0
    signals: dict[str, int] = {}
    policy: dict[str, Any] = {}
    unknown: tuple[str, ...] = ()
    """Fields that a record made again after a loss of Redis does not know."""
    over_cap: bool = False
    over_budget: bool = False
    seen: tuple[tuple[str, str], ...] = ()


class Line(NamedTuple):
    """One rule: it speaks for `action` at ``starts <= t < ends``, never when `starts` is None; `idle` says why not then.

    `since` is the start of its clock when it is a rule by time, which is announced when the policy asks for notices.
    """

    rule: str
    action: Literal["keep", "stop", "strand", "abandon", "evict"]
    starts: int | None
    ends: int | None
    detail: str
    idle: Literal["later", "off", "exempt"] = "later"
    since: int | None = None


class Notice(NamedTuple):
    """What has to be announced for the actions of `kind`: from `opens` on, that they do not come before `due`."""

    kind: str
    opens: int
    due: int
    given: bool


def lines_of(facts: Facts, policy: Policy, now: int) -> list[Line]:
    """All rules, in the order in which they are asked. `now` only bounds how long a queued job keeps a workspace."""
    return [rule(facts, policy, now) for rule in _RULES]


def notices_of(facts: Facts, policy: Policy, now: int, lines: list[Line]) -> list[Notice]:
    """One notice per action that time brings and that has to be announced.

    An announcement is a promise: what was announced for a later time than it would come now waits for that time. What was announced
    for an earlier time (it was put off since, by a sign of life or an extension) is announced again. The warning is never longer
    than the limit that it announces, and what could not be announced in time (nobody looked, or something protected the workspace)
    waits until its warning has been as long as asked for.
    """
    if policy.notice_before is None:
        return []
    out = []
    free = _unprotected(lines, now)
    for kind in ("evict", "stop"):
        timed = [line for line in lines if line.action == kind and line.since is not None and line.starts is not None]
        if not timed:
            continue
        first = min(timed, key=lambda line: line.starts or 0)
        starts, since = first.starts or 0, first.since or 0
        if (warning := min(policy.notice_before, starts - since)) <= 0:  # a deadline that had passed before it began
            continue
        if (promised := facts.noticed.get(kind)) is not None and promised >= starts:
            out.append(Notice(kind, starts - warning, promised, True))
        else:
            out.append(Notice(kind, starts - warning, max(starts, free + warning), False))
    return out


def _unprotected(lines: list[Line], now: int) -> int:
    """The first ms from `now` on at which nothing keeps the workspace; `now` when something always does."""
    keeping = [line for line in lines if line.action == "keep" and line.starts is not None]
    if any(line.ends is None for line in keeping):
        return now
    return max([now, *(line.ends for line in keeping if line.ends is not None)])


def last_sign(facts: Facts, policy: Policy) -> tuple[int, str]:
    """When the workspace last gave a sign of life that its policy counts, and which.

    A sign with a name that is not known here counts: to take work for idleness is the worse mistake.
    """
    best, name = facts.created_at, "register"
    signs = dict(facts.signals)
    signs[facts.last_signal] = max(facts.last_active, signs.get(facts.last_signal, 0))
    for signal, at in signs.items():
        ignored = signal in NEVER_SIGNALS or (signal in SIGNALS and signal not in policy.signals)
        if at > best and (signal in ALWAYS_COUNT or not ignored):
            best, name = at, signal or "touch"
    return best, name


def _absent(rule: str, detail: str) -> Line:
    """A protection that this workspace does not have."""
    return Line(rule, "keep", None, None, detail, "off")


def _hold(facts: Facts, _policy: Policy, _now: int) -> Line:
    if not facts.holds:
        return _absent("hold", "nobody holds it")
    reasons = "; ".join(str(hold.get("reason") or hold.get("id") or "no reason given") for hold in facts.holds)
    return Line("hold", "keep", 0, None, f"held: {reasons}")


def _pin(facts: Facts, _policy: Policy, _now: int) -> Line:
    if not facts.pinned:
        return _absent("pin", "not pinned")
    return Line("pin", "keep", 0, None, f"pinned: {facts.pin_reason}" if facts.pin_reason else "pinned")


def _unknown(facts: Facts, _policy: Policy, _now: int) -> Line:
    lost = [name for name in _LOST if name in facts.unknown]
    if lost:
        return Line("unknown", "keep", 0, None, f"its {' and '.join(lost)} was lost with the registry; set it again")
    if facts.state not in STATES:
        return Line("unknown", "keep", 0, None, f"its state {facts.state!r} is not known to this version")
    return _absent("unknown", "everything that matters is known")


def _lease(facts: Facts, _policy: Policy, _now: int) -> Line:
    if facts.lease_until is None:
        return _absent("lease", "no job works on it")
    return Line("lease", "keep", 0, facts.lease_until + 1, f"job {facts.lease_job or '?'} works on it")


def _queued(facts: Facts, _policy: Policy, now: int) -> Line:
    if facts.queued <= 0:
        return _absent("queued", "no job waits for it")
    return Line("queued", "keep", 0, now + QUEUED_LOOK_MS, f"{facts.queued} of its jobs wait to run")


def _presence(facts: Facts, policy: Policy, _now: int) -> Line:
    if facts.present_until is None:
        return _absent("presence", "nobody says that they work in it")
    ends, detail = facts.present_until + 1, f"{facts.present_by or 'somebody'} works in it"
    if policy.presence_limit is not None:
        ends = min(ends, facts.created_at + policy.presence_limit + 1)
        detail += f", which protects it until it is {show(policy.presence_limit)} old"
    return Line("presence", "keep", 0, ends, detail)


def _submitted(facts: Facts, _policy: Policy, _now: int) -> Line:
    if facts.state != "submitted":
        return _absent("submitted", "its work waits for nobody's verdict")
    return Line("submitted", "keep", 0, None, "its work is submitted and waits for a verdict")


def _auto_ttl(facts: Facts, policy: Policy, _now: int) -> Line:
    if facts.state != "stranded":
        return Line("auto_ttl", "abandon", None, None, f"only for stranded ones; it is {facts.state}", "exempt")
    if policy.stranded_for is None:
        return Line("auto_ttl", "abandon", None, None, "stranded_for=never", "off")
    why = f" ({facts.state_reason})" if facts.state_reason else ""
    detail = f"stranded{why}; abandoned when nobody resumes it for {show(policy.stranded_for)}"
    return Line("auto_ttl", "abandon", facts.state_since + policy.stranded_for + 1, None, detail)


def _stranded(facts: Facts, _policy: Policy, _now: int) -> Line:
    if facts.state != "stranded":
        return _absent("stranded", f"it is {facts.state}")
    return Line("stranded", "keep", 0, None, "stranded: it is resumed or abandoned, and nothing else happens to it")


def _heartbeats(facts: Facts, _policy: Policy, _now: int) -> Line:
    if facts.state != "active":
        return Line("heartbeats", "strand", None, None, f"only for active ones; it is {facts.state}", "exempt")
    if facts.present_until is None:
        return Line("heartbeats", "strand", None, None, "nobody's heartbeats are expected")
    detail = f"heartbeats of {facts.present_by or 'somebody'} that end without goodbye"
    return Line("heartbeats", "strand", facts.present_until + 1, None, detail)


def _abandoned(facts: Facts, _policy: Policy, _now: int) -> Line:
    if facts.state != "abandoned":
        return Line("abandoned", "evict", None, None, f"only for abandoned ones; it is {facts.state}", "exempt")
    why = f" ({facts.state_reason})" if facts.state_reason else ""
    return Line("abandoned", "evict", 0, None, f"abandoned{why}")


def _deadline(facts: Facts, _policy: Policy, _now: int) -> Line:
    if facts.expires_at is None:
        return Line("deadline", "evict", None, None, "it has no deadline", "off")
    starts = max(facts.expires_at, facts.extended_until or 0)
    detail = f"its deadline{_extended(facts, facts.expires_at)}, {ago(facts.expires_at - facts.created_at)} after it was registered"
    return Line("deadline", "evict", starts, None, detail, since=facts.created_at)


def _max_age(facts: Facts, policy: Policy, now: int) -> Line:
    return _limit(facts, "max_age", "evict", policy.max_age, (facts.created_at, f"it is {ago(now - facts.created_at)} old"))


def _ttl(facts: Facts, policy: Policy, now: int) -> Line:
    if facts.mode != "ephemeral":
        return Line("ttl", "evict", None, None, f"only for ephemeral ones; it is {facts.mode}", "exempt")
    return _limit(facts, "ttl", "evict", policy.ttl, (facts.created_at, f"it is {ago(now - facts.created_at)} old"))


def _idle_ttl(facts: Facts, policy: Policy, now: int) -> Line:
    if facts.mode != "ephemeral":
        return Line("idle_ttl", "evict", None, None, f"only for ephemeral ones; it is {facts.mode}", "exempt")
    return _limit(facts, "idle_ttl", "evict", policy.idle_ttl, _idle(facts, policy, now))


def _stop_after(facts: Facts, policy: Policy, now: int) -> Line:
    if facts.state != "active":
        return Line("stop_after", "stop", None, None, f"only for active ones; it is {facts.state}", "exempt")
    return _limit(facts, "stop_after", "stop", policy.stop_after, _idle(facts, policy, now))


def _idle(facts: Facts, policy: Policy, now: int) -> tuple[int, str]:
    since, signal = last_sign(facts, policy)
    return since, f"its last sign of life ({signal}) was {ago(now - since)} ago"


def _limit(facts: Facts, rule: str, action: Literal["stop", "evict"], limit: int | None, clock: tuple[int, str]) -> Line:
    """A rule that fires strictly after `limit` ms of its clock, and after what it was extended to."""
    if limit is None:
        return Line(rule, action, None, None, f"{rule}=never", "off")
    since, measured = clock
    starts = max(since + limit, facts.extended_until or 0) + 1
    return Line(rule, action, starts, None, f"{measured}, {rule}={show(limit)}{_extended(facts, since + limit)}", since=since)


def _extended(facts: Facts, at: int) -> str:
    if facts.extended_until is None or facts.extended_until <= at:
        return ""
    return f" (extended by {ago(facts.extended_until - at)})"


def _cap(facts: Facts, policy: Policy, _now: int) -> Line:
    if facts.mode != "ephemeral":
        return Line("cap", "evict", None, None, f"only for ephemeral ones; it is {facts.mode}", "exempt")
    if facts.over_cap:
        # What was brought back is the oldest again: without a pause the next sweep would take it from whoever did that.
        starts = (facts.extended_until or 0) if facts.state_reason in ("undelete", "resume", "rebuild") else 0
        return Line("cap", "evict", starts, None, "more workspaces than the cap allows, and it is the oldest of them")
    if policy.cap is None:
        return Line("cap", "evict", None, None, "cap=never", "off")
    return Line("cap", "evict", None, None, f"when there are more than {policy.cap} and it is the oldest")


def _budget(facts: Facts, policy: Policy, _now: int) -> Line:
    if facts.over_budget:
        return Line("budget", "evict", 0, None, "the budget has no room, and it is the least recently used")
    if policy.budget is None:
        return Line("budget", "evict", None, None, "budget=never", "off")
    return Line("budget", "evict", None, None, f"when captures need more than {sizes.show(policy.budget)} and it is the least used")


_RULES: tuple[Callable[[Facts, Policy, int], Line], ...] = (
    _hold, _pin, _unknown, _lease, _queued, _presence, _submitted,
    _auto_ttl, _stranded, _heartbeats, _abandoned,
    _deadline, _max_age, _ttl, _idle_ttl, _stop_after, _cap, _budget,
)  # fmt: skip
RULES = tuple(rule.__name__[1:] for rule in _RULES)
"""Names of the rules, in their order."""
