"""Which crash reports stay: one pure function for the sweep, its dry run and whoever asks (B-58)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

Reason = Literal["age", "count", "bytes"]
FUTURE_MS: Final = 3_600_000
"""A report that is dated further ahead was dated by a clock that was wrong; nobody can say how old it is."""


class Report(Protocol):
    """What the choice needs to know of a report. `at` is ms since 1970, 0 when nobody knows; `bytes` those of its package."""

    @property
    def id(self) -> str: ...
    @property
    def at(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def keep(self) -> bool: ...


def choose(reports: Sequence[Report], *, now: int, keep_seconds: int, keep_count: int, keep_bytes: int) -> list[tuple[str, Reason]]:
    """(id, why) of the reports that go, oldest first; `now` in ms, each limit 0 for none.

    A report goes when it is strictly older than `keep_seconds`; then the oldest of the rest while there are more than `keep_count`;
    then the oldest of those that have a package while the packages have more than `keep_bytes`. One that is marked `keep` is never
    chosen, though it counts; one whose time is unknown or still to come has no age, and goes last. The newest report always stays
    clear of `keep_bytes`: a single package that is over the limit is still worth more than none.
    """
    order = sorted(reports, key=lambda report: (_when(report, now), report.id))
    chosen: dict[str, Reason] = {}
    if keep_seconds:
        for report in order:
            if not report.keep and report.at > 0 and now - report.at > keep_seconds * 1000:
                chosen[report.id] = "age"
    left = [report for report in order if report.id not in chosen]
    if keep_count:
        excess = len(left) - keep_count
        for report in [each for each in left if not each.keep][: max(0, excess)]:
            chosen[report.id] = "count"
        left = [report for report in left if report.id not in chosen]
    if keep_bytes:
        excess = sum(max(0, report.bytes) for report in left) - keep_bytes
        for report in left[:-1]:
            if excess <= 0:
                break
            if not report.keep and report.bytes > 0:
                chosen[report.id] = "bytes"
                excess -= report.bytes
    return [(report.id, chosen[report.id]) for report in order if report.id in chosen]


def _when(report: Report, now: int) -> int:
    """The time to order by; what has none counts as new."""
    return report.at if 0 < report.at <= now + FUTURE_MS else now + FUTURE_MS + 1
