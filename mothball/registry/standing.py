"""What the registry knows of the workspaces whose captures a host's store holds: the collector's evidence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from mothball.errors import Gone, InvalidParams, NotFound
from mothball.registry.workspaces import Workspaces

_ALL = 10**9


class StoreFacts:
    """Facts for `mothball.store.collect`. Every question is asked afresh: an answer kept would be a guess."""

    def __init__(self, workspaces: Workspaces, host: str) -> None:
        self._workspaces = workspaces
        self._host = host

    def standing(self, workspace: str) -> Literal["known", "elsewhere", "gone", "unknown"]:
        """``known`` for a workspace with a record, ``elsewhere`` if that is on another host, ``gone`` for one with a tombstone.

        Raises `Unavailable`.
        """
        try:
            record = self._workspaces.get(workspace)
        except Gone:
            return "gone"
        except (NotFound, InvalidParams):
            return "unknown"
        return "known" if record.host == self._host else "elsewhere"

    def registered(self) -> Iterator[tuple[str, str | None]]:
        """(id, digest of the latest capture or None) of every workspace of this host."""
        for record in self._workspaces.list(host=self._host, limit=_ALL):
            yield record.id, record.digest
