"""Which workspaces a list of live ones leaves out, and why they stay all the same (D-16)."""

from __future__ import annotations

from collections.abc import Sequence

from mothball.errors import InvalidParams
from mothball.policy import Facts
from mothball.registry import keys

OLDEST_VIEW_MS = 600_000
"""A list that was complete longer ago than this says nothing about now."""


def check_list(active_ids: Sequence[str], as_of: int, now: int, *, force: bool) -> set[str]:
    """The ids of a list that was complete at `as_of`; raises `InvalidParams` for one that cannot be believed."""
    if isinstance(active_ids, str):
        raise InvalidParams("the live workspaces are a list of ids, not a text")
    live = {keys.workspace_id(each) for each in active_ids}
    if not live and not force:
        raise InvalidParams("the list of live workspaces is empty: that would strand all of them; nothing was changed")
    if isinstance(as_of, bool) or not isinstance(as_of, int) or as_of > now:
        raise InvalidParams(f"as_of {as_of!r} must be when the list was complete, in ms of Redis TIME, and not ahead of it")
    if as_of < now - OLDEST_VIEW_MS:
        raise InvalidParams(f"the list is {(now - as_of) // 1000} s old; make a new one (at most {OLDEST_VIEW_MS // 1000} s)")
    return live


def verdict(facts: Facts, live: set[str], as_of: int, now: int) -> str:
    """Why the workspace stays; '' when it is to be stranded; ``present`` when the list should have named it."""
    if facts.id in live:
        return "live"
    if facts.state != "active":
        return facts.state
    if facts.present_until is not None and facts.present_until > now:
        return "present"
    if facts.mode != "ephemeral":
        return facts.mode
    if facts.holds:
        return "hold"
    if facts.pinned:
        return "pin"
    if facts.unknown and {"pinned", "policy", "mode"} & set(facts.unknown):
        return "unknown"
    if facts.lease_until is not None or facts.queued:
        return "lease"
    if max(facts.created_at, facts.last_active, *facts.signals.values(), 0) > as_of:
        return "newer"
    return ""
