"""Snapshots: captures with a number, a time and a flag, as refs ``snap-<n>`` of a workspace's layout.

A snapshot is one more name for a manifest that is there already, so making one costs a line in ``index.json``. Its number is
never given twice, not even after it was forgotten: ``snap-7`` in somebody's notes must never become other content (B-30).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mothball.errors import Corrupt, InvalidParams, NotFound
from mothball.store import Store
from mothball.store.foreign import read_json
from mothball.store.manifest import PREFIX, canonical
from mothball.store.refs import LATEST, REF_NAME, SNAPSHOT, Ref, RefIndex
from mothball.store.trash import Trash

MAX_LABEL = 100
"""Characters of a label; it stands in every listing."""
MAX_NOTE = 2000
_MAX_STATES = 1024**2
_NUMBER, _AT, _LABEL, _NOTE, _KEEP, _JOB = (PREFIX + key for key in ("snapshot", "at", "label", "note", "keep", "snapshot-job"))
_OWN = {_NUMBER, _AT, _LABEL, _NOTE, _KEEP, _JOB}


class Snapshot(msgspec.Struct, frozen=True):
    """One snapshot. `at` is ms since 1970 (0: unknown), `bytes` the size of its files."""

    name: str
    number: int
    digest: str
    at: int
    label: str
    note: str
    keep: bool
    generation: int
    files: int
    bytes: int
    git: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The snapshot in JSON types."""
        return msgspec.structs.asdict(self)


class SnapshotResult(Snapshot, frozen=True):
    """The outcome of workspace.snapshot: the snapshot, and the outcome of the capture that was made for it, if any."""

    workspace: str = ""
    captured: dict[str, Any] | None = None


def check_label(label: object) -> str:
    """`label` when it can stand in a listing, else `InvalidParams`: one printable line of at most 100 characters."""
    if not isinstance(label, str) or len(label) > MAX_LABEL or not label.isprintable():
        raise InvalidParams(f"a label is one printable line of at most {MAX_LABEL} characters")
    return label


def check_note(note: object) -> str:
    """`note` when it is a text of at most 2000 characters that JSON can carry, else `InvalidParams`."""
    if not isinstance(note, str) or len(note) > MAX_NOTE:
        raise InvalidParams(f"a note is a text of at most {MAX_NOTE} characters")
    if any(0xD800 <= ord(char) <= 0xDFFF for char in note):  # noqa: PLR2004 - surrogates, which no JSON reader accepts
        raise InvalidParams("a note must be valid UTF-8")
    return note


def add_snapshot(
    refs: RefIndex,
    *,
    fence: int,
    job: str,
    at_ms: int,
    label: str = "",
    note: str = "",
    keep: bool = False,
    source: Ref | None = None,
) -> Ref:
    """Give ``latest`` (or `source`, whose manifest is in the store) the next number; returns the new ref.

    Asked twice by the same `job` it returns the snapshot that this job made: a worker may die between making it and saying so.
    `at_ms` is Redis TIME. Raises `NotFound` when nothing was captured yet, `InvalidParams`, `LeaseLost`, `TransientFailure`.
    """
    check_label(label)
    check_note(note)
    found: list[Ref] = []

    def add(before: list[Ref]) -> Sequence[Ref]:
        if mine := next((ref for ref in before if ref.annotations.get(_JOB) == job), None):
            found.append(mine)
            return before
        base = source or next((ref for ref in before if ref.name == LATEST), None)
        if base is None:
            raise NotFound(
                f"workspace {refs.workspace!r} has no capture yet; a fresh snapshot (--fresh) makes one first",
                what="capture",
                id=refs.workspace,
            )
        number = refs.last_snapshot + 1
        own = {REF_NAME: f"snap-{number}", _NUMBER: str(number), _AT: str(at_ms), _LABEL: label, _NOTE: note, _JOB: job}
        if keep:
            own[_KEEP] = "1"
        kept = {key: value for key, value in base.annotations.items() if key not in _OWN}
        found.append(Ref(f"snap-{number}", base.digest, base.size, {**kept, **own}))
        return [*before, found[0]]

    refs.replace(add, fence=fence, job=job)
    return found[0]


def snapshots(refs: RefIndex) -> list[Snapshot]:
    """The snapshots of a workspace by number, oldest first. Raises `Corrupt` for an index that cannot be read."""
    return snapshots_of(refs.list())


def snapshots_of(found: Sequence[Ref]) -> list[Snapshot]:
    """Those of `found` that are snapshots, by number."""
    return sorted((as_snapshot(ref) for ref in found if SNAPSHOT.match(ref.name)), key=lambda snapshot: snapshot.number)


def as_snapshot(ref: Ref) -> Snapshot:
    """What a ref ``snap-<n>`` says. An annotation that is missing or makes no sense has its empty value: the capture is
    still there, and refusing to list it would help nobody."""
    match = SNAPSHOT.match(ref.name)
    return Snapshot(
        name=ref.name,
        number=int(match[1]) if match else 0,
        digest=ref.digest,
        at=whole(ref.get("at")),
        label=ref.get("label"),
        note=ref.get("note"),
        keep=ref.get("keep") == "1",
        generation=whole(ref.get("generation")),
        files=whole(ref.get("files")),
        bytes=whole(ref.get("bytes")),
        git=_states(ref.get("git")),
    )


def find_snapshot(found: Sequence[Ref], workspace: str, name: str) -> Ref:
    """The snapshot `name` among `found`; `InvalidParams` when it is no name of one, `NotFound` when it is not there."""
    if not SNAPSHOT.match(name):
        raise InvalidParams(f"{name!r} is not the name of a snapshot, such as snap-3; `mothball snapshots` lists them")
    for ref in found:
        if ref.name == name:
            return ref
    known = ", ".join(snapshot.name for snapshot in snapshots_of(found)[-10:]) or "none"
    raise NotFound(
        f"workspace {workspace!r} has no snapshot {name!r} on this host; the last are: {known}", what="snapshot", id=name
    )


def mark(refs: RefIndex, name: str, *, keep: bool | None = None, label: str | None = None, note: str | None = None) -> Snapshot:
    """`mark_all` for one snapshot."""
    return mark_all(refs, [name], keep=keep, label=label, note=note)[0]


def mark_all(
    refs: RefIndex,
    names: Sequence[str],
    *,
    keep: bool | None = None,
    label: str | None = None,
    note: str | None = None,
    fence: int | None = None,
    job: str = "",
) -> list[Snapshot]:
    """Change what is said of snapshots, all of `names` or none; None leaves a thing as it is.

    Raises `NotFound`, `InvalidParams`, `LeaseLost`.
    """
    changes = {
        _KEEP: None if keep is None else "1" if keep else "",
        _LABEL: None if label is None else check_label(label),
        _NOTE: None if note is None else check_note(note),
    }
    given = {key: value for key, value in changes.items() if value is not None}
    if not names or not given:
        raise InvalidParams("name at least one snapshot, and what to change of it")

    def change(before: list[Ref]) -> Sequence[Ref]:
        chosen = {find_snapshot(before, refs.workspace, name).name for name in names}
        return [
            msgspec.structs.replace(ref, annotations={**ref.annotations, **given}) if ref.name in chosen else ref for ref in before
        ]

    after = refs.replace(change, fence=fence, job=job)
    return [as_snapshot(find_snapshot(after, refs.workspace, name)) for name in dict.fromkeys(names)]


class Forgotten(msgspec.Struct, frozen=True):
    """What `forget` did: the snapshots that went, and the names of those that had gone before."""

    gone: list[Snapshot]
    already: list[str]


def forget(
    store: Store,
    workspace: str,
    names: Sequence[str],
    *,
    reason: str,
    at_ms: int,
    force_keep: bool = False,
    fence: int | None = None,
    job: str = "",
) -> Forgotten:
    """Take snapshots out of the index, all of `names` or none; they lie in the trash and can be undeleted for a while.

    Their blobs stay until a collection finds that nothing else names them. A name that lies in the trash already is no error:
    whoever forgets may have died before saying so; what the same `job` put there counts as gone now. Raises `NotFound`,
    `InvalidParams` (also for a snapshot with the keep flag, unless `force_keep`), `LeaseLost`, `NoSpace`.
    """
    if not names:
        raise InvalidParams("name at least one snapshot to forget")
    refs, trash = store.refs(workspace), Trash(store)
    gone: list[Snapshot] = []
    already: list[str] = []

    def change(before: list[Ref]) -> Sequence[Ref]:
        buried = {entry.ref.name: entry for entry in trash.buried(workspace)}
        there = {ref.name for ref in before}
        before_us = [buried[name] for name in dict.fromkeys(names) if name not in there and name in buried]
        mine = [entry.ref for entry in before_us if job and entry.job == job]
        already.extend(entry.ref.name for entry in before_us if entry.ref not in mine)
        had_gone = {entry.ref.name for entry in before_us}
        chosen = {name: find_snapshot(before, workspace, name) for name in names if name not in had_gone}
        kept = sorted(name for name, ref in chosen.items() if ref.annotations.get(_KEEP) == "1")
        if kept and not force_keep:
            raise InvalidParams(f"{', '.join(kept)} of {workspace!r} must be kept; `mothball keep --off` lifts that")
        for ref in chosen.values():
            trash.bury_ref(workspace, ref, reason, at_ms, job=job)
        gone.extend(snapshots_of([*mine, *chosen.values()]))
        return [ref for ref in before if ref.name not in chosen]

    if not refs.exists:
        raise NotFound(f"workspace {workspace!r} has no capture on this host", what="capture", id=workspace)
    refs.replace(change, fence=fence, job=job)
    return Forgotten(gone, already)


def whole(text: str) -> int:
    """The number that an annotation says, 0 when it says none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else 0  # noqa: PLR2004 - what 64 bits hold


def _states(text: str) -> list[dict[str, Any]]:
    try:
        states: list[Any] = read_json(text, list, "git state", limit=_MAX_STATES) if text else []
    except Corrupt:
        return []
    return [state for state in states if isinstance(state, dict)]


class _GitState(msgspec.Struct, omit_defaults=True):
    """What a capture says of one repository."""

    path: str
    kind: str = ""
    head: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    unpushed: int | None = None
    stashes: int | None = None
    error: str = ""


def clean_states(text: object, limit: int) -> str:
    """A git state that comes from elsewhere, written anew from what it may hold; ``""`` for what is none or too large."""
    if not isinstance(text, str):
        return ""
    try:
        states = read_json(text, list[_GitState], "git state", limit=limit)
    except Corrupt:
        return ""
    return canonical(msgspec.to_builtins(states)).decode()
