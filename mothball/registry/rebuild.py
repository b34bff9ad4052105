"""Records of workspaces, made again from what a store kept of them after Redis was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from mothball.errors import Gone, InvalidParams, NotFound
from mothball.names import check_host
from mothball.registry import encode, keys
from mothball.registry.checks import LONE_SURROGATE, MAX_TEXT, check_path, check_whole
from mothball.registry.kept import KEPT
from mothball.registry.scripts import Scripts, pairs
from mothball.registry.workspaces import MODES, Workspace, Workspaces, decode

NEVER_KNOWN = ("state", "last_active", "holds", "runtime", "stored_bytes")
"""What no store says: these begin anew."""


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """What a store knows of one workspace. Times in ms, sizes in bytes; `kept` are the fields of `mothball.registry.kept`.

    `fence` is the highest that ever began there, `created_at` stands in for a kept one that is missing.
    """

    id: str
    host: str
    path: str
    fence: int
    generation: int
    digest: str | None
    bytes: int
    files: int
    high_water_bytes: int
    snapshots: int
    crash_reports: int
    last_good_at: int | None
    created_at: int
    kept: dict[str, Any]


class RebuildResult(msgspec.Struct, frozen=True):
    """`rebuilt` (`record` is new), `missing` (a dry run: it would be rebuilt), `exists` (`record` was there and is as it was),
    or `gone` (released; `reason` says why). `unknown` names what the record does not know."""

    status: Literal["rebuilt", "missing", "exists", "gone"]
    record: Workspace | None
    reason: str = ""
    unknown: list[str] = []


class Rebuilds:
    """The way back of records into the registry."""

    def __init__(self, scripts: Scripts, workspaces: Workspaces) -> None:
        self._scripts = scripts
        self._workspaces = workspaces

    def record(self, found: Recovered, *, dry_run: bool = False) -> RebuildResult:
        """Make the record of `found` unless there is one or a tombstone; asking twice changes nothing, `dry_run` never does.

        Fields that nobody can know are named in the record's `unknown`. An unknown mode becomes ``persistent``, so that nothing
        is reclaimed because something was forgotten. Raises `InvalidParams` for an id, host or path that cannot be one.
        """
        id, host = keys.workspace_id(found.id), check_host(found.host)  # noqa: A001 - the record's own name for it
        check_path(found.path)
        kept, unknown = known_fields(found.kept)
        if dry_run:
            return self._look(id, unknown)
        fields = {
            "number": _number(kept["number"]),
            "title": kept["title"],
            "mode": kept["mode"] or "persistent",
            "agent_id": kept["agent_id"],
            "intent": kept["intent"],
            "changeset_id": kept["changeset_id"],
            "base_commit": kept["base_commit"],
            "pinned": "1" if kept["pinned"] else "",
            "pin_reason": kept["pin_reason"],
            "policy": encode.dumps(kept["policy"], "policy", encode.MAX_DOCUMENT_BYTES) if kept["policy"] else "",
            "stored_bytes": "0",
            "generation": str(found.generation),
            "bytes": str(found.bytes),
            "files": str(found.files),
            "high_water_bytes": str(max(found.high_water_bytes, found.bytes)),
            "snapshots": str(found.snapshots),
            "crash_reports": str(found.crash_reports),
            "unknown": encode.dumps(sorted(unknown), "unknown", encode.MAX_DOCUMENT_BYTES),
        }  # fmt: skip
        created = found.created_at if kept["created_at"] is None else kept["created_at"]
        status, answer = self._scripts.run(
            "rebuild", id, host, found.path, kept["repo"] or "", kept["agent_name"] or "", found.fence, found.digest or "",
            _number(found.last_good_at), created, _number(kept["expires_at"]),
            *(text for name, value in fields.items() if value for text in (name, value)),
        )  # fmt: skip
        if status == "gone":
            return RebuildResult("gone", None, answer)
        return RebuildResult(status, decode(pairs(answer)), unknown=unknown if status == "rebuilt" else [])

    def _look(self, id: str, unknown: list[str]) -> RebuildResult:  # noqa: A002
        try:
            return RebuildResult("exists", self._workspaces.get(id))
        except Gone as error:
            return RebuildResult("gone", None, str(error.fields.get("reason", "")))
        except NotFound:
            return RebuildResult("missing", None, unknown=unknown)


def known_fields(kept: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The kept fields that can be believed, None for the others; and the names of what is not known, sorted.

    The store is a folder that anybody may have edited: what registration would refuse does not come back through here.
    """
    good: dict[str, Any] = dict.fromkeys(KEPT)
    unknown = set(NEVER_KNOWN)
    for name in KEPT:
        if name == "path":  # checked as what it is, by the caller
            continue
        try:
            _CHECKS[name](name, kept[name])
            good[name] = kept[name]
        except (KeyError, InvalidParams):
            unknown.add(name)
    return good, sorted(unknown)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _text(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, str) or len(value) > MAX_TEXT or LONE_SURROGATE.search(value)):
        raise InvalidParams(f"{name} is no text")


def _repo(_: str, value: object) -> None:
    if value is not None:
        keys.repo_name(value)


def _whole(name: str, value: object) -> None:
    check_whole(name, value, 0)


def _moment(name: str, value: object) -> None:
    if value is None:
        raise InvalidParams(f"{name} is no time")
    check_whole(name, value, 0)


def _mode(_: str, value: object) -> None:
    if value not in MODES:
        raise InvalidParams("no mode")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidParams(f"{name} is no boolean")


def _policy(name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise InvalidParams(f"{name} is no mapping")
    encode.dumps(value, name, encode.MAX_DOCUMENT_BYTES)


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "repo": _repo, "number": _whole, "title": _text, "mode": _mode, "agent_id": _text, "agent_name": _text, "intent": _text,
    "changeset_id": _text, "base_commit": _text, "created_at": _moment, "expires_at": _whole, "pinned": _flag, "pin_reason": _text,
    "policy": _policy,
}  # fmt: skip
