"""Which crash reports stay (B-58): exact boundaries, oldest first, never one that must be kept."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mothball.crash.keep import choose

NOW = 1_800_000_000_000


@dataclass(frozen=True)
class Report:
    id: str
    at: int
    bytes: int = 0
    keep: bool = False


def gone(*reports: Report, seconds: int = 0, count: int = 0, size: int = 0) -> list[tuple[str, str]]:
    return list(choose(reports, now=NOW, keep_seconds=seconds, keep_count=count, keep_bytes=size))


def test_b58_a_report_goes_when_it_is_older_than_the_limit_and_not_when_it_is_as_old() -> None:
    assert gone(Report("a", NOW - 60_000), seconds=60) == []
    assert gone(Report("a", NOW - 60_001), seconds=60) == [("a", "age")]


def test_b58_the_oldest_go_while_there_are_more_than_the_count() -> None:
    reports = [Report(name, NOW - age) for name, age in (("new", 1), ("old", 3), ("middle", 2))]
    assert gone(*reports, count=3) == []
    assert gone(*reports, count=2) == [("old", "count")]
    assert gone(*reports, count=1) == [("old", "count"), ("middle", "count")]


def test_b58_the_oldest_packages_go_while_they_have_more_bytes() -> None:
    reports = [Report("a", 1, 10), Report("b", 2, 0), Report("c", 3, 10), Report("d", 4, 10)]
    assert gone(*reports, size=30) == []
    assert gone(*reports, size=29) == [("a", "bytes")]
    assert gone(*reports, size=19) == [("a", "bytes"), ("c", "bytes")]


def test_a_report_without_a_package_frees_no_bytes_and_is_not_taken_for_them() -> None:
    assert gone(Report("bare", 1, 0), Report("a", 2, 10), Report("b", 3, 10), size=10) == [("a", "bytes")]


def test_the_newest_report_stays_however_large_its_package_is() -> None:
    assert gone(Report("only", 1, 1000), size=1) == []
    assert gone(Report("old", 1, 1000), Report("new", 2, 1000), size=1) == [("old", "bytes")]


def test_a_report_that_must_be_kept_counts_and_never_goes() -> None:
    kept = Report("kept", 1, 100, keep=True)
    assert gone(kept, seconds=1) == []
    assert gone(kept, Report("a", 2), Report("b", 3), count=2) == [("a", "count")]
    assert gone(kept, Report("a", 2, 10), Report("b", 3, 10), size=110) == [("a", "bytes")]
    assert gone(kept, Report("b", 2, keep=True), count=1) == []


def test_a_report_of_unknown_time_or_dated_in_the_future_goes_last() -> None:
    reports = [Report("unknown", 0), Report("ahead", NOW + 10 * 3_600_000), Report("old", NOW - 10)]
    assert gone(*reports, seconds=1, count=2) == [("old", "count")]
    assert gone(Report("unknown", 0), seconds=1) == []


def test_limits_of_zero_keep_everything() -> None:
    assert gone(Report("a", 1, 10**15), Report("b", 2, 10**15)) == []


def test_what_went_for_its_age_is_not_counted_again() -> None:
    reports = [Report("old", 1, 100), Report("a", NOW - 2, 10), Report("b", NOW - 1, 10)]
    assert gone(*reports, seconds=60, count=2, size=20) == [("old", "age")]


reports = st.lists(
    st.builds(
        Report,
        id=st.text("abcdef", min_size=1, max_size=6),
        at=st.integers(0, NOW + 10_000_000),
        bytes=st.integers(0, 100),
        keep=st.booleans(),
    ),
    max_size=20,
    unique_by=lambda report: report.id,
)


@given(reports, st.integers(0, 10**10), st.integers(0, 10), st.integers(0, 500))
def test_the_choice_is_enough_no_more_than_needed_and_the_same_for_any_order(
    found: list[Report], seconds: int, count: int, size: int
) -> None:
    chosen = gone(*found, seconds=seconds, count=count, size=size)
    assert chosen == gone(*reversed(found), seconds=seconds, count=count, size=size)
    names = {name for name, _ in chosen}
    left = [report for report in found if report.id not in names]
    assert all(not report.keep for report in found if report.id in names)
    free = [report for report in left if not report.keep]
    if count:
        assert len(left) <= count or not free
    assert gone(*left, seconds=seconds, count=count, size=size) == []
