"""Verifying a store and, when told from where, fetching what is damaged again."""

from __future__ import annotations

from typing import Any

import msgspec

from mothball.package.repair import RepairResult, repair
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.verify import DEFAULT_SAMPLE, Level, Progress, VerifyReport, verify


class Verified(msgspec.Struct, frozen=True):
    """What is so now, and what was done for it: `repair` is None unless something was damaged and a source was given."""

    report: VerifyReport
    repair: RepairResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `repaired` digests are whole again, `unrepaired` ones have the reason with them."""
        out: dict[str, Any] = msgspec.to_builtins(self.report)
        done = self.repair or RepairResult([], [])
        return {**out, "repaired": done.repaired, "unrepaired": [list(item) for item in done.failed]}


def verify_and_repair(
    store: Store,
    settings: Settings,
    workspace: str | None = None,
    level: Level = "structure",
    *,
    sample: float = DEFAULT_SAMPLE,
    seed: int | None = None,
    source: str | None = None,
    progress: Progress | None = None,
) -> Verified:
    """`verify`; damaged blobs are fetched from `source` (``REGISTRY/REPO``) and the same is verified again, while more comes back.

    Errors as `verify` and `repair`. A layer whose bytes are right and whose table of contents lies cannot be repaired: the same
    digest would bring the same lie.
    """
    if source is not None:
        # A source that is no reference, or whose login is missing, is said before an hour of reading and not after it.
        repair(store, [], source, settings)
    report = verify(store, workspace, level, sample=sample, seed=seed, progress=progress)
    repaired: list[str] = []
    failed: dict[str, str] = {}
    while source is not None:
        # What a damaged manifest names is seen only once it is back, so one look is not enough.
        damaged = {problem.digest for problem in report.problems if problem.digest} - {*repaired, *failed}
        if not damaged:
            break
        done = repair(store, sorted(damaged), source, settings, progress=progress)
        repaired += done.repaired
        failed |= dict(done.failed)
        if not done.repaired:
            break
        report = verify(store, workspace, level, sample=sample, seed=report.seed, progress=progress)
    return Verified(report, RepairResult(repaired, list(failed.items())) if repaired or failed else None)
