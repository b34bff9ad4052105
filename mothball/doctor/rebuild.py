"""Rebuild: the registry's records of this host's workspaces, made again from its store after Redis was lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from mothball.doctor.layouts import Layout, is_folder, layouts, recovered
from mothball.errors import InvalidParams
from mothball.registry import Registry, Workspace
from mothball.store import Store

Status = Literal["rebuilt", "missing", "exists", "other_host", "gone", "released", "empty", "impossible"]
Progress = Callable[[int, int], None]
"""Called with the number of layouts looked at and of all."""


class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one layout.

    `rebuilt` has a record again; `missing` would get one (dry run); `exists` has one; `other_host`: the registry knows the
    workspace on another host, which is left as it is; `gone` was released and has a tombstone; `released`: its layout says so;
    `empty`: nothing was captured there; `impossible`: `reason` says why.
    """

    folder: str
    workspace: str | None
    status: Status
    path: str = ""
    path_exists: bool = True
    generation: int = 0
    digest: str | None = None
    snapshots: int = 0
    unknown: list[str] = []
    problems: list[str] = []
    damaged: dict[str, str] = {}
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The finding in JSON types."""
        return msgspec.structs.asdict(self)


def rebuild(
    registry: Registry, store: Store, host: str, *, dry_run: bool = False, progress: Progress = lambda _done, _all: None
) -> list[Rebuilt]:
    """Give every layout of `store` its record back that has neither a record nor a tombstone; nothing is overwritten.

    Safe to repeat, beside running workers and on many hosts at once: each record is one script that looks before it writes.
    `dry_run` only reads. Damage is reported with the layout it is in. Raises `Unavailable`.
    """
    total = len(store.workspaces())
    found = []
    for number, layout in enumerate(layouts(store), 1):
        found.append(_one(registry, layout, host, dry_run=dry_run))
        progress(number, total)
    return found


def _one(registry: Registry, layout: Layout, host: str, *, dry_run: bool) -> Rebuilt:
    known: dict[str, Any] = {
        "folder": layout.folder, "workspace": layout.workspace, "problems": layout.problems, "damaged": layout.damaged,
    }  # fmt: skip
    if layout.empty:
        return Rebuilt(**known, status="empty")
    if layout.released:
        return Rebuilt(**known, status="released")
    try:
        facts = recovered(layout, host)
        known |= {
            "path": facts.path, "path_exists": is_folder(facts.path), "generation": facts.generation, "digest": facts.digest,
            "snapshots": facts.snapshots,
        }  # fmt: skip
        result = registry.rebuilds.record(facts, dry_run=dry_run)
    except InvalidParams as error:
        return Rebuilt(**known, status="impossible", reason=error.message)
    if result.status == "exists" and result.record is not None and result.record.host != host:
        return Rebuilt(**known, status="other_host", reason=_elsewhere(result.record, facts.generation))
    return Rebuilt(**known, status=result.status, unknown=result.unknown, reason=result.reason)


def _elsewhere(record: Workspace, generation: int) -> str:
    where = f"the registry has it on host {record.host}"
    if generation <= record.generation:
        return where
    # It moved between hosts, and the one that was left rebuilt first: nothing is overwritten, and somebody has to know.
    return f"{where} with generation {record.generation}; this store is newer and has generation {generation}, which stays here"
