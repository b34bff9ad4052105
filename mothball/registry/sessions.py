"""Sessions: who works on a repo. A session is a workspace seen by its agent; its id is the workspace's (D-01, D-04).

Every question reads indexes of the repo or of the fleet, never all records.
"""

from __future__ import annotations

from typing import Any

from mothball.registry import keys
from mothball.registry.connection import Connection
from mothball.settings import Settings

SESSION_KEYS = ("session_id", "agent_id", "agent_name", "intent", "repo_id", "changeset_id", "state", "elapsed_secs")
"""The keys of a session, these and no others (D-01)."""

RESTING = ("submitted", "merged", "stopped", "stranded", "abandoned")
"""The states of a registered workspace other than `active`, each with an index of its own."""

_BATCH = 500
_FIELDS = ("id", "agent_id", "agent_name", "intent", "repo", "changeset_id", "state", "created_at")


class Sessions:
    """The sessions of the fleet."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._key = keys.Keys(settings.namespace)

    def active(self, repo: str, exclude: str | None = None) -> list[dict[str, Any]]:
        """Those of `list` whose state is `active`: the sessions that may change the repo right now (D-14)."""
        return [session for session in self.list(repo, exclude) if session["state"] == "active"]

    def agent_names(self, repo: str, exclude: str | None = None) -> list[str]:
        """Names of the agents of the active sessions of `repo` other than `exclude`, in the order of `list`, each once."""
        return list(dict.fromkeys(name for session in self.active(repo, exclude) if (name := session["agent_name"])))

    def active_count(self, repo: str) -> int:
        """How many sessions of `repo` are active (D-14)."""
        resting = [self._key("ws", "state", state) for state in RESTING]
        with self._connection.guard() as client:
            return len(client.sdiff([self._key("ws", "repo", keys.repo_name(repo)), *resting]))

    def total_active(self) -> int:
        """How many workspaces of the fleet are active, with a repo or without (D-14)."""
        return self.states()["active"]

    def states(self) -> dict[str, int]:
        """How many registered workspaces are in each state; its cost does not grow with their number (D-75)."""
        with self._connection.guard() as client:
            pipe = client.pipeline(transaction=True)
            pipe.zcard(self._key("ws", "by", "created"))
            for state in RESTING:
                pipe.scard(self._key("ws", "state", state))
            total, *counts = pipe.execute()
        return {"active": int(total) - sum(counts), **dict(zip(RESTING, map(int, counts), strict=True))}

    def list(self, repo: str, exclude: str | None = None) -> list[dict[str, Any]]:
        """The sessions of `repo` other than `exclude`, oldest first, equally old ones by id (D-14); each has `SESSION_KEYS`.

        `elapsed_secs` are whole seconds since creation. What an agent did not say is null. A repo without sessions, or an
        unknown one, has none. Raises `InvalidParams`, `Unavailable`.
        """
        found: list[tuple[int, str, dict[str, Any]]] = []
        with self._connection.guard() as client:
            ids = [each for each in client.smembers(self._key("ws", "repo", keys.repo_name(repo))) if each != exclude]
            for start in range(0, len(ids), _BATCH):
                pipe = client.pipeline(transaction=False)
                for each in ids[start : start + _BATCH]:
                    pipe.hmget(self._key("ws", each), _FIELDS)
                pipe.time()
                *records, (seconds, micros) = pipe.execute()
                now = int(seconds) * 1000 + int(micros) // 1000
                for record in records:
                    fields = dict(zip(_FIELDS, record, strict=True))
                    if fields["id"] and fields["created_at"]:  # else it was released between the two looks
                        created = int(fields["created_at"])
                        found.append((created, fields["id"], _session(fields, max(0, now - created) // 1000)))
        return [session for _, _, session in sorted(found, key=lambda each: each[:2])]


def _session(fields: dict[str, str | None], elapsed: int) -> dict[str, Any]:
    return {
        "session_id": fields["id"],
        "agent_id": fields["agent_id"] or None,
        "agent_name": fields["agent_name"] or None,
        "intent": fields["intent"] or None,
        "repo_id": fields["repo"],
        "changeset_id": fields["changeset_id"] or None,
        "state": fields["state"] or "active",
        "elapsed_secs": elapsed,
    }
