"""What the registry knows of the workspaces whose captures a host's store holds: the collector's evidence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from mothball.errors import Gone, InvalidParams, NotFound
from mothball.registry.crashes import Crashes
from mothball.registry.workspaces import Workspaces

_ALL = 10**9


class StoreFacts:
    """Facts for `mothball.store.collect`. Every question is asked afresh: an answer kept would be a guess."""

    def __init__(self, workspaces: Workspaces, host: str, crashes: Crashes) -> None:
        self._workspaces = workspaces
        self._host = host
        self._crashes = crashes

    def standing(self, workspace: str) -> Literal["known", "elsewhere", "gone", "unknown"]:
        """``known`` for a workspace with a record, ``elsewhere`` if that is on another host, ``gone`` for one with a tombstone.

        One without a record here, of which crash reports are kept on this host, is ``known``: they need its captures. When the last
        of them was deleted it is ``gone`` for a while, so that its layout does not stay as one that nobody can account for.
        Raises `Unavailable`.
        """
        try:
            record = self._workspaces.get(workspace)
        except Gone:
            return self._kept_for_reports(workspace) or "gone"
        except NotFound:
            return self._kept_for_reports(workspace) or "unknown"
        except InvalidParams:
            return "unknown"
        return "known" if record.host == self._host else self._kept_for_reports(workspace) or "elsewhere"

    def _kept_for_reports(self, workspace: str) -> Literal["known", "gone"] | None:
        found = self._crashes.of_workspace_here(workspace, self._host)
        return {"some": "known", "gone": "gone"}.get(found)  # type: ignore[return-value]

    def registered(self) -> Iterator[tuple[str, str | None]]:
        """(id, digest of the latest capture or None) of every workspace of this host."""
        for record in self._workspaces.list(host=self._host, limit=_ALL):
            yield record.id, record.digest
