"""What a restore answers."""

from __future__ import annotations

from typing import Any, Final

import msgspec

MAX_ACTIONS_BYTES: Final = 32 * 1024
"""Most bytes of the actions in a job's result, which Redis holds."""


class Action(msgspec.Struct, frozen=True):
    """One thing a restore does or leaves: ``write``, ``metadata``, ``delete`` or ``keep``. Paths as `show` has them."""

    action: str
    path: str


class RestoreResult(msgspec.Struct, frozen=True):
    """What a restore did, or with `dry_run` would do. Sizes in bytes; `files` and `bytes` count what was chosen."""

    target: str
    digest: str
    files: int
    folders: int
    links: int
    bytes: int
    written: int = 0
    """Files (further names too), links and folders made or replaced by this run."""
    written_bytes: int = 0
    unchanged: int = 0
    """Entries that were there already as captured; after a continued run, those of the runs before."""
    metadata: int = 0
    """Entries of which only owner, mode or time was set."""
    kept: int = 0
    """Entries that were not written because something is there (overwrite never), or foreign ones that are never deleted."""
    deleted: int = 0
    owner_skipped: int = 0
    """Entries whose owner could not be set; their setuid and setgid bits are left off."""
    resumed: bool = False
    dry_run: bool = False
    seconds: float = 0.0
    actions: list[Action] = []
    """All of them with `dry_run`; else what was kept and deleted. A job's result has the first ones."""
    further_actions: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]  # a Struct becomes a dict


def bounded(result: RestoreResult, limit: int = MAX_ACTIONS_BYTES) -> RestoreResult:
    """`result` with no more actions than fit into `limit` bytes; the counts say how many there are."""
    used = fit = 0
    for action in result.actions:
        used += len(action.path) + 64  # the JSON around a path, and what escapes it
        if used > limit:
            break
        fit += 1
    return msgspec.structs.replace(result, actions=result.actions[:fit], further_actions=len(result.actions) - fit)
