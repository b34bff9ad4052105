"""The last known figures of each workspace's runtime: what `workspace.stats` answers for one that has ended since (N-24)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mothball.registry import encode, keys
from mothball.registry.connection import Connection
from mothball.settings import Settings

KEPT_MS = 86_400_000
"""A day: older figures say nothing about a workspace."""
MAX_STATS_BYTES = 4096


class LastStats:
    """Key ``stats:<id>``. Nothing is decided by it, and no write of it touches the record: looking is no sign of life (N-32)."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._key = keys.Keys(settings.namespace)

    def put(self, id: str, registration: str, figures: Mapping[str, Any]) -> None:  # noqa: A002
        """Keep `figures` of the workspace that is registered as `registration` for a day. Raises `Unavailable`."""
        text = encode.dumps({"registration": registration, "figures": dict(figures)}, "stats", MAX_STATS_BYTES)
        with self._connection.guard() as client:
            client.set(self._key("stats", keys.workspace_id(id)), text, px=KEPT_MS)

    def get(self, id: str, registration: str) -> dict[str, Any] | None:  # noqa: A002
        """The last figures, None when there are none of this registration: an id that was used again starts anew."""
        with self._connection.guard() as client:
            text = client.get(self._key("stats", keys.workspace_id(id)))
        try:
            found = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            return None
        figures = found.get("figures") if isinstance(found, dict) and found.get("registration") == registration else None
        return figures if isinstance(figures, dict) else None
