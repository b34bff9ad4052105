"""What a capture keeps of its workspace's record, so that the record can be made again when Redis was lost.

It stands as one JSON text in the annotation ``dev.mothball.record`` of the capture's ref. Only what somebody said once and nobody
could find out again is in it; counts, sizes and times of captures follow from the refs themselves.
"""

from __future__ import annotations

import json
from typing import Any

from mothball.registry.workspaces import Workspace

KEPT = (
    "path", "repo", "number", "title", "mode", "agent_id", "agent_name", "intent", "changeset_id", "base_commit", "created_at",
    "expires_at", "pinned", "pin_reason", "policy",
)  # fmt: skip
"""The fields of the record that are kept."""

MAX_KEPT_BYTES = 16 * 1024
"""Every ref of a workspace carries a copy, and the index of refs is read and written as a whole."""

_CUT = "cut"


def kept_record(workspace: Workspace) -> str:
    """The kept fields of `workspace` as ASCII JSON of at most 16 KiB; fields that do not fit are named in ``cut`` instead.

    ASCII, because a path may hold bytes that are no UTF-8, which only escapes carry through.
    """
    fields = {name: getattr(workspace, name) for name in KEPT}
    cut: list[str] = []
    while len(text := _text({**fields, _CUT: cut} if cut else fields)) > MAX_KEPT_BYTES:
        largest = max(fields, key=lambda name: len(_text(fields[name])))
        del fields[largest]
        cut = sorted([*cut, largest])
    return text


def recall(text: str) -> dict[str, Any]:
    """The fields of a kept record, without those that were cut; empty for a text that is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {name: found[name] for name in KEPT if name in found} if isinstance(found, dict) else {}


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
