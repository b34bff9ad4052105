"""What the ref of a capture says beside its digest: whose capture it is, and what cannot be found out again later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from mothball.capture.types import CaptureRequest, CaptureResult, printable
from mothball.store import Ref
from mothball.store.manifest import PREFIX
from mothball.store.refs import LATEST, Change

_RESUMED = ("parent", "stored_bytes", "added", "modified", "deleted", "squashed", "torn")
"""Fields of the result that a run which finds its own published work cannot measure again."""
CREATED = "org.opencontainers.image.created"


def ref_notes(request: CaptureRequest, result: CaptureResult) -> dict[str, str]:
    """The annotations of a new generation's ref."""
    notes = {
        "job": request.job,
        "fence": str(request.fence),
        "generation": str(result.generation),
        "files": str(result.files),
        "bytes": str(result.bytes),
        "git": json.dumps(result.git, sort_keys=True),
        "stats": json.dumps({key: getattr(result, key) for key in _RESUMED}, sort_keys=True),
    }
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**_identity(request), **{PREFIX + key: value for key, value in notes.items()}, CREATED: created}


def refresh(latest: Ref, request: CaptureRequest) -> Change | None:
    """A change of refs that brings what ``latest`` says of its workspace up to date; None when it is.

    A capture without changes makes no generation, but the workspace may have been pinned or moved since the last one, and
    a registry that was lost is made again from these notes.
    """
    new = _identity(request)
    if not request.record or new.items() <= latest.annotations.items():
        return None

    def change(refs: Sequence[Ref]) -> list[Ref]:
        return [msgspec.structs.replace(ref, annotations={**ref.annotations, **new}) if ref.name == LATEST else ref for ref in refs]

    return change


def _identity(request: CaptureRequest) -> dict[str, str]:
    """Whose capture this is. The record's text is ASCII; a path may not be, and the index must stay readable."""
    notes = {
        "workspace": request.workspace,
        "repo": request.repo or "",
        "host": request.host,
        "path": printable(request.path),
    }
    if request.record:
        notes["record"] = request.record
    return {PREFIX + key: value for key, value in notes.items()}
