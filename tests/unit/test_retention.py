"""Retention: the rules of restic, policies that cannot quietly keep nothing, and decisions that hold still."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.errors import ConfigError, InvalidParams
from mothball.retention import MAX_COUNT, Policy, decide
from mothball.settings import Settings

HOUR, DAY = 3_600_000, 86_400_000
NOW = 1_736_344_031_000  # 2025-01-08 13:47:11 UTC, a Wednesday
RESTIC = json.loads((Path(__file__).resolve().parents[1] / "data" / "restic" / "forget.json").read_text())


class Snap(NamedTuple):
    number: int
    at: int
    keep: bool = False

    @property
    def name(self) -> str:
        return f"snap-{self.number}"


def ages(*hours: float) -> list[Snap]:
    """Snapshots of these ages in hours, oldest first."""
    return [Snap(number, NOW - int(age * HOUR)) for number, age in enumerate(sorted(hours, reverse=True), 1)]


def kept(policy: str, snaps: list[Snap], now: int = NOW) -> list[int]:
    """Numbers of those that stay."""
    decisions = decide(Policy.parse(policy), snaps, now)
    return [snap.number for snap, decision in zip(snaps, decisions, strict=True) if decision.keep]


@pytest.mark.parametrize("policy", RESTIC["kept"])
def test_it_keeps_what_restic_keeps(policy: str) -> None:
    """Recorded from restic itself, across the turn of a year."""
    snaps = [Snap(number, at) for number, at in enumerate(RESTIC["times"], 1)]
    stay = set(kept(policy, snaps, now=max(RESTIC["times"]) + DAY))
    assert [snap.at for snap in snaps if snap.number in stay] == RESTIC["kept"][policy]


@pytest.mark.parametrize(
    ("policy", "hours", "numbers"),
    [
        # last: by time, newest first
        ("last=1", (1, 2, 3), [3]),
        ("last=2", (1, 2, 3), [2, 3]),
        ("last=9", (1, 2, 3), [1, 2, 3]),
        # within: strictly younger; the newest stays all the same
        ("within=2h", (1, 2, 3), [3]),
        ("within=2h", (1, 1.999, 3), [2, 3]),
        ("within=1h", (5, 6), [2]),
        # NOW is 13:47: ages 0.5 and 0.7 h are in hour 13, 1 h is in hour 12
        ("hourly=1", (0.5, 0.7, 1), [3]),
        ("hourly=2", (0.5, 0.7, 1, 1.5), [2, 4]),
        ("daily=2", (1, 2, 24, 25, 48), [3, 5]),
        # Wednesday: 3 days ago is Sunday of the week before
        ("weekly=2", (1, 25, 72, 96), [2, 4]),
        ("monthly=2", (1, 24, 24 * 9, 24 * 10), [2, 4]),
        # rules add up
        ("last=1,daily=2", (1, 2, 25, 49), [2, 4]),
        ("all", (1, 2, 99_999), [1, 2, 3]),
        ("last=1", (), []),
    ],
)
def test_rules(policy: str, hours: tuple[float, ...], numbers: list[int]) -> None:
    assert kept(policy, ages(*hours)) == numbers


def test_the_keep_flag_and_an_unknown_time_hold_a_snapshot_without_taking_room() -> None:
    snaps = [Snap(1, NOW - 9 * DAY, keep=True), Snap(2, 0), Snap(3, NOW - 8 * DAY), Snap(4, NOW - DAY), Snap(5, NOW)]
    assert kept("last=2", snaps) == [1, 2, 4, 5]
    assert kept("last=2", [snap._replace(keep=False) for snap in snaps]) == [2, 4, 5]
    far = [Snap(1, 10**16), Snap(2, NOW)]  # no calendar has that year
    assert kept("hourly=1", far) == [1, 2]


def test_the_newest_number_stays_also_when_the_clock_went_back() -> None:
    snaps = [Snap(1, NOW), Snap(2, NOW - DAY), Snap(3, NOW - 300 * DAY)]
    assert kept("last=1", snaps) == [1, 3]


def test_snapshots_from_the_future_stay_and_take_no_room_from_the_true_ones() -> None:
    """A primary whose clock was years ahead numbered ten snapshots; the rules go on counting those that have a true time."""
    ahead = [Snap(number, NOW + 900 * DAY + number * HOUR) for number in range(1, 11)]
    true = [Snap(number, NOW - (30 - number) * 8 * DAY) for number in range(11, 30)]
    for policy in ("last=10", "weekly=10", "daily=10"):
        assert kept(policy, ahead + true) == [*range(1, 11), *range(20, 30)]
    assert decide(Policy.parse("last=10"), ahead, NOW)[0].reasons == ["dated in the future"]
    assert kept("last=2", [Snap(1, NOW), Snap(2, NOW + 1000), Snap(3, NOW + 2000)]) == [2, 3]  # seconds are no wrong clock


def test_every_decision_has_its_reasons() -> None:
    snaps = ages(0.5, 0.7, 30, 300)
    by_name = {decision.name: decision for decision in decide(Policy.parse("last=1,within=2h,hourly=2,daily=1"), snaps, NOW)}
    assert by_name["snap-4"].reasons == ["newest", "last=1", "within=2h", "hourly=2", "daily=1"]
    assert by_name["snap-3"].reasons == ["within=2h"]
    assert by_name["snap-2"].reasons == ["hourly=2"]
    gone = by_name["snap-1"]
    assert not gone.keep
    assert gone.reasons == ["not among the last 1", "not younger than 2h", "2 newer hours are kept", "1 newer days are kept"]
    again = decide(Policy.parse("hourly=1"), ages(0.5, 0.7), NOW)[0]
    assert again.reasons == ["snap-2 stands for its hour"]


def test_due_at_is_the_moment_at_which_the_answer_changes() -> None:
    policy, snaps = Policy.parse("within=2h,last=1"), ages(0.5, 1)
    young = decide(policy, snaps, NOW)[0]
    assert young.due_at is not None
    assert decide(policy, snaps, young.due_at - 1)[0].keep
    assert not decide(policy, snaps, young.due_at)[0].keep
    assert decide(policy, snaps, young.due_at)[0].due_at == young.due_at
    assert decide(policy, snaps, NOW)[1].due_at is None  # the last one: time alone never takes it


@pytest.mark.parametrize(
    "given",
    [
        "", "  ", ",", "last", "last=", "last=0", "last=-1", "last=x", "last=1.5", "last=1,last=2", "last=1,", "yearly=1", "=1",
        "within=7", "within=0d", "within=-1d", "within=7y", "within=d", "within=", "all=1", "all=", "all,last=1", "ALL",
        f"last={MAX_COUNT + 1}", "last=" + "9" * 30, "within=40000d", "hourly=1 daily=2", {}, {"last": 0}, {"last": True},
        {"last": "3"}, {"last": 1.5}, {"within": 7}, {"all": False}, {"all": 1}, {"keep_last": 3}, None, 3, ["last=1"], b"last=1",
    ],
)  # fmt: skip
def test_a_policy_that_says_nothing_or_nonsense_is_refused(given: Any) -> None:
    """Each would keep nothing, or not what was meant; and the text says what is wrong."""
    with pytest.raises(InvalidParams) as caught:
        Policy.parse(given)
    assert "retention" in caught.value.message


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("last=10,within=7d,hourly=24,daily=14,weekly=8", "last=10,within=7d,hourly=24,daily=14,weekly=8"),
        (" daily = 2 , last=1 ", "last=1,daily=2"),
        ("within=1w2d", "within=9d"),
        ("within=90m", "within=90m"),
        ("all", "all"),
        ({"all": True}, "all"),
        ({"monthly": 3, "within": "36h"}, "within=36h,monthly=3"),
    ],
)
def test_a_policy_has_one_text_and_is_read_back_from_it(given: Any, text: str) -> None:
    assert Policy.parse(given).text == text
    assert Policy.parse(text) == Policy.parse(given)


@pytest.mark.parametrize("value", ["", "last=0", "keep=3"])
def test_the_setting_is_checked_when_it_is_loaded(value: str) -> None:
    with pytest.raises(ConfigError, match="MOTHBALL_RETENTION"):
        Settings.load(retention=value)


_COUNTS = st.integers(0, 5)
_POLICIES = st.builds(
    Policy, last=_COUNTS, within_ms=st.integers(0, 40).map(lambda hours: hours * HOUR), hourly=_COUNTS, daily=_COUNTS,
    weekly=_COUNTS, monthly=_COUNTS,
)  # fmt: skip
_SNAPS = st.lists(st.tuples(st.integers(0, 90 * 24 * 60), st.booleans()), max_size=40).map(
    lambda items: [
        Snap(number, NOW - minutes * 60_000, keep and minutes % 5 == 0) for number, (minutes, keep) in enumerate(items, 1)
    ]
)


@settings(deadline=None)
@given(_POLICIES, _SNAPS)
def test_taking_what_goes_changes_no_other_decision(policy: Policy, snaps: list[Snap]) -> None:
    """Else a second sweep right after the first would take more, and a dry run would have lied."""
    first = decide(policy, snaps, NOW)
    left = [snap for snap, decision in zip(snaps, first, strict=True) if decision.keep]
    assert decide(policy, left, NOW) == [decision for decision in first if decision.keep]
    assert [decision.name for decision in first] == [snap.name for snap in snaps]
    assert all(decision.reasons for decision in first if decision.keep)
    if snaps:
        assert first[-1].keep  # the highest number, whatever its time
    assert all(decision.keep for snap, decision in zip(snaps, first, strict=True) if snap.keep)


@settings(deadline=None)
@given(_POLICIES, _SNAPS, st.integers(0, 60))
def test_time_alone_takes_only_what_was_due(policy: Policy, snaps: list[Snap], hours: int) -> None:
    later = NOW + hours * HOUR
    for before, after in zip(decide(policy, snaps, NOW), decide(policy, snaps, later), strict=True):
        assert after.keep == (before.keep and (before.due_at is None or before.due_at > later))
