"""Retention on disk: what a policy takes out of the indexes of this host's workspaces.

What goes is decided twice: once from a look, and again from the refs as they are under the index lock. In between somebody may
have set a keep flag or made a newer snapshot, and the first answer would take what the second keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from mothball.errors import MothballError
from mothball.retention import Decision, Policy, decide
from mothball.store import Ref, Store
from mothball.store.reserve import Reserve
from mothball.store.snapshots import Snapshot, snapshots, snapshots_of
from mothball.store.trash import Trash

LISTED = 200
"""Snapshots and problems that a report lists one by one; its counts are complete. With the longest ids and a reason for every
rule it stays below what the outcome of a job may have, or a run that took snapshots would end as failed."""
_MAX_ERROR = 300
AT_ONCE = 64
"""Snapshots that one change of an index takes: each is written to disk, while captures and collectors wait for the locks."""


class Taken(msgspec.Struct, frozen=True):
    """One snapshot that retention takes, and why: one reason per rule that does not hold it."""

    workspace: str
    name: str
    at: int
    reasons: list[str]


class Retained(msgspec.Struct, frozen=True):
    """One workspace after retention: how many snapshots it has now, and which went (or would go, in a dry run)."""

    workspace: str
    policy: str
    count: int
    taken: list[Taken]


class RetainReport(msgspec.Struct):
    """One run over the workspaces of a host."""

    dry_run: bool
    workspaces: int = 0
    """Workspaces with a layout here that were looked at."""
    kept: int = 0
    removed: int = 0
    """In a dry run: how many would go."""
    taken: list[Taken] = []
    skipped: list[tuple[str, str]] = []
    """(workspace, why it was left alone)"""
    failed: list[tuple[str, str]] = []
    """(workspace, error); the others were done all the same."""

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON types, its lists cut after 200 items; ``complete`` says whether they are whole."""
        lists = (self.taken, self.skipped, self.failed)
        return {
            "dry_run": self.dry_run,
            "workspaces": self.workspaces,
            "kept": self.kept,
            "removed": self.removed,
            "taken": [msgspec.structs.asdict(item) for item in self.taken[:LISTED]],
            "skipped": [{"workspace": workspace, "reason": reason} for workspace, reason in self.skipped[:LISTED]],
            "failed": [{"workspace": workspace, "error": error[:_MAX_ERROR]} for workspace, error in self.failed[:LISTED]],
            "complete": all(len(items) <= LISTED for items in lists),
        }


def retain_workspace(store: Store, workspace: str, policy: Policy, *, now_ms: int, dry_run: bool = False) -> Retained:
    """Take from `workspace` the snapshots that `policy` does not keep at `now_ms` (ms of Redis TIME); they go to the trash.

    Only numbered snapshots are looked at; ``latest`` and every other ref stay. A dry run opens nothing for writing. Raises
    `Corrupt`, `Busy`, `NoSpace`; what was taken until then is in the trash.
    """
    refs = store.refs(workspace)
    found = snapshots(refs)
    would = _taken(workspace, found, decide(policy, found, now_ms))
    if dry_run or not would:
        return Retained(workspace, policy.text, len(found) - len(would), would)
    trash = Trash(store)
    taken: list[Taken] = []
    left = True

    def change(before: list[Ref]) -> Sequence[Ref]:
        nonlocal left
        now = snapshots_of(before)
        all_going = _taken(workspace, now, decide(policy, now, now_ms))
        going = {item.name: item for item in all_going[:AT_ONCE]}
        left = len(going) < len(all_going)
        for ref in before:
            if ref.name in going:
                trash.bury_ref(workspace, ref, f"retention {policy.text}", now_ms)
        taken.extend(going.values())
        return [ref for ref in before if ref.name not in going]

    after: list[Ref] = []
    while left:
        after = refs.replace(change)
    return Retained(workspace, policy.text, len(snapshots_of(after)), taken)


def retain(
    store: Store,
    wanted: Iterable[tuple[str, Policy | str]],
    *,
    now_ms: int,
    dry_run: bool = False,
    reserve: Reserve | None = None,
    each: Callable[[str], None] = lambda _workspace: None,
    done: Callable[[Retained], None] = lambda _retained: None,
) -> RetainReport:
    """Apply to each workspace of `wanted` its policy, or leave it alone for the reason that stands in its place.

    `each` is called before a workspace and may raise to stop; `done` after one that was looked at. One workspace that fails
    (its index is damaged or locked) never ends the run. On a full disk `reserve` is spent: what is forgotten frees it.
    """
    report = RetainReport(dry_run)
    for workspace, policy in wanted:
        if not store.refs(workspace).exists:
            continue
        each(workspace)
        if isinstance(policy, str):
            report.skipped.append((workspace, policy))
            continue
        try:
            call = partial(retain_workspace, store, workspace, policy, now_ms=now_ms, dry_run=dry_run)
            retained = reserve.spend_when_full(call) if reserve is not None else call()
        except MothballError as error:
            report.failed.append((workspace, f"{error.code}: {error.message}"))
            continue
        except (OSError, ValueError) as error:
            report.failed.append((workspace, f"{type(error).__name__}: {error}"))
            continue
        report.workspaces += 1
        report.kept += retained.count
        report.removed += len(retained.taken)
        report.taken += retained.taken
        done(retained)
    return report


def _taken(workspace: str, found: Sequence[Snapshot], decisions: Sequence[Decision]) -> list[Taken]:
    return [
        Taken(workspace, snapshot.name, snapshot.at, decision.reasons)
        for snapshot, decision in zip(found, decisions, strict=True)
        if not decision.keep
    ]
