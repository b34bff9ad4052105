"""Which snapshots are kept, and why: one pure function, so that a sweep, a dry run and a listing can never disagree.

The semantics are restic's, in UTC: a rule ``hourly=24`` keeps the newest snapshot of each of the 24 newest hours that have
one, and rules add up. Two things differ: ``within`` counts from now instead of from the newest snapshot, and the newest
snapshot is kept whatever the rules say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from mothball import durations
from mothball.errors import InvalidParams

COUNTED = ("last", "hourly", "daily", "weekly", "monthly")
"""Rules with a number of snapshots."""
RULES = ("last", "within", "hourly", "daily", "weekly", "monthly")
MAX_COUNT = 1_000_000
FUTURE_MS = 3_600_000
"""Two primaries of a registry may differ by seconds; a snapshot that is dated further ahead was dated by a clock that was wrong."""
_END_OF_TIME_MS = 253_402_300_800_000
"""The year 10000, where calendars end."""
_COUNT = re.compile(r"-?[0-9]{1,18}\Z")
_EXAMPLE = "last=10,within=7d,hourly=24,daily=14,weekly=8"


class Dated(Protocol):
    """What a decision needs to know of a snapshot. `at` is ms since 1970, 0 when nobody knows it."""

    @property
    def name(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def at(self) -> int: ...
    @property
    def keep(self) -> bool: ...


class Decision(NamedTuple):
    """What happens to one snapshot. `reasons` say why, one per rule."""

    name: str
    keep: bool
    reasons: list[str]
    due_at: int | None
    """ms since 1970 from which it goes when nothing else happens; None: time alone never takes it, as far as one can
    say of a snapshot that is dated in the future."""


class Policy(NamedTuple):
    """Rules of retention; a rule that is 0 does not exist. `parse` is the way to make one."""

    last: int = 0
    within_ms: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    all: bool = False

    @classmethod
    def parse(cls, given: object) -> Policy:
        """A policy from ``last=10,within=7d``, ``all``, or a mapping such as ``{"last": 10, "within": "7d"}``.

        Empty, unknown, doubled, zero and negative rules are `InvalidParams`: each of them would quietly keep nothing.
        """
        if isinstance(given, str):
            pairs = _pairs(given)
        elif isinstance(given, Mapping):
            pairs = [(str(name), value) for name, value in given.items()]
        else:
            raise InvalidParams(f"a retention policy is a text such as {_EXAMPLE}, or a mapping, not {type(given).__name__}")
        if not pairs:
            raise InvalidParams(f"an empty retention policy would keep nothing; write for example {_EXAMPLE}, or all")
        names = [name for name, _ in pairs]
        for name in names:
            if name not in (*RULES, "all"):
                raise InvalidParams(f"retention: unknown rule {name[:50]!r}; known are {', '.join(RULES)} and all")
            if names.count(name) > 1:
                raise InvalidParams(f"retention: {name} is given twice")
        found = dict(pairs)
        if "all" in found:
            if len(found) > 1 or found["all"] is not True:
                raise InvalidParams("retention: `all` keeps every snapshot and stands alone, without a value or other rules")
            return cls(all=True)
        within = _within(found["within"]) if "within" in found else 0
        last, hourly, daily, weekly, monthly = (_count(name, found[name]) if name in found else 0 for name in COUNTED)
        return cls(last=last, within_ms=within, hourly=hourly, daily=daily, weekly=weekly, monthly=monthly)

    @property
    def text(self) -> str:
        """The policy as `parse` reads it."""
        if self.all:
            return "all"
        rules = {"last": self.last, "within": durations.show(self.within_ms) if self.within_ms else 0, "hourly": self.hourly}
        rules |= {"daily": self.daily, "weekly": self.weekly, "monthly": self.monthly}
        return ",".join(f"{name}={value}" for name, value in rules.items() if value)


def _pairs(text: str) -> list[tuple[str, Any]]:
    if not text.strip():
        return []
    out: list[tuple[str, Any]] = []
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name == "all" and not equals:
            out.append((name, True))
        elif not name or (name in RULES and not value):
            raise InvalidParams(f"retention: {part.strip()[:50]!r} is not a rule; write for example {_EXAMPLE}")
        else:
            out.append((name, int(value) if name in COUNTED and _COUNT.match(value) else value))
    return out


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParams(f"retention: {name} must be a whole number, not {str(value)[:50]!r}")
    if not 1 <= value <= MAX_COUNT:
        raise InvalidParams(f"retention: {name}={value} must be from 1 to {MAX_COUNT}; leave the rule out when it should not count")
    return value


def _within(value: object) -> int:
    if (found := durations.parse(value, "retention: within")) is None:
        raise InvalidParams("retention: within=never says nothing; leave the rule out, or write all to keep every snapshot")
    return found


def _calendar(at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, UTC)


_BUCKETS: dict[str, tuple[str, Callable[[datetime], tuple[int, ...]]]] = {
    "hourly": ("hour", lambda time: (time.year, time.month, time.day, time.hour)),
    "daily": ("day", lambda time: (time.year, time.month, time.day)),
    # The ISO week, with the year it belongs to: the last days of December may be in week 1 of the next year.
    "weekly": ("week", lambda time: tuple(time.isocalendar()[:2])),
    "monthly": ("month", lambda time: (time.year, time.month)),
}


def decide(policy: Policy, snapshots: Sequence[Dated], now_ms: int) -> list[Decision]:
    """What `policy` does with `snapshots` at `now_ms` (ms since 1970), one decision each, in the order given.

    Kept are the newest, those with the `keep` flag, those whose time is unknown or still to come (nobody can say that they are
    old; they take no room from others, for a clock that was wrong once must not cost the true ones), and what any rule holds.
    The same arguments give the same answer, and taking away what goes changes no other decision.
    """
    kept: dict[str, list[str]] = {snapshot.name: [] for snapshot in snapshots}
    gone: dict[str, list[str]] = {snapshot.name: [] for snapshot in snapshots}
    if snapshots:
        kept[max(snapshots, key=lambda snapshot: snapshot.number).name].append("newest")
    for snapshot in snapshots:
        if snapshot.keep:
            kept[snapshot.name].append("keep flag")
        if policy.all:
            kept[snapshot.name].append("all")
        elif (wrong := _undated(snapshot.at, now_ms)) is not None:
            kept[snapshot.name].append(wrong)
    if not policy.all:
        dated = [snapshot for snapshot in snapshots if _undated(snapshot.at, now_ms) is None]
        dated.sort(key=lambda snapshot: (snapshot.at, snapshot.number), reverse=True)
        _apply_last(policy, dated, kept, gone)
        _apply_within(policy, dated, now_ms, kept, gone)
        for rule in _BUCKETS:
            _apply_bucket(rule, getattr(policy, rule), dated, kept, gone)
    return [_decision(snapshot, policy, now_ms, kept[snapshot.name], gone[snapshot.name]) for snapshot in snapshots]


def _undated(at: int, now_ms: int) -> str | None:
    """Why the time `at` says nothing, None when it does."""
    if not 0 < at < _END_OF_TIME_MS:
        return "time unknown"
    return "dated in the future" if at > now_ms + FUTURE_MS else None


def _decision(snapshot: Dated, policy: Policy, now_ms: int, kept: list[str], gone: list[str]) -> Decision:
    if not kept:
        return Decision(snapshot.name, False, gone, now_ms)
    only_young = len(kept) == 1 and kept[0].startswith("within=")
    return Decision(snapshot.name, True, kept, snapshot.at + policy.within_ms if only_young else None)


def _apply_last(policy: Policy, dated: list[Dated], kept: dict[str, list[str]], gone: dict[str, list[str]]) -> None:
    if not policy.last:
        return
    for place, snapshot in enumerate(dated):
        if place < policy.last:
            kept[snapshot.name].append(f"last={policy.last}")
        else:
            gone[snapshot.name].append(f"not among the last {policy.last}")


def _apply_within(policy: Policy, dated: list[Dated], now_ms: int, kept: dict[str, list[str]], gone: dict[str, list[str]]) -> None:
    if not policy.within_ms:
        return
    text = durations.show(policy.within_ms)
    for snapshot in dated:
        if now_ms - snapshot.at < policy.within_ms:
            kept[snapshot.name].append(f"within={text}")
        else:
            gone[snapshot.name].append(f"not younger than {text}")


def _apply_bucket(rule: str, room: int, dated: list[Dated], kept: dict[str, list[str]], gone: dict[str, list[str]]) -> None:
    if not room:
        return
    word, bucket_of = _BUCKETS[rule]
    limit, bucket, holder = room, None, ""
    for snapshot in dated:
        found = bucket_of(_calendar(snapshot.at))
        if room and found != bucket:
            bucket, holder, room = found, snapshot.name, room - 1
            kept[snapshot.name].append(f"{rule}={limit}")
        elif found == bucket:
            gone[snapshot.name].append(f"{holder} stands for its {word}")
        else:
            gone[snapshot.name].append(f"{limit} newer {word}s are kept")
