"""Whose snapshots are kept by which rules: a workspace's own, else those of its host's settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mothball.errors import InvalidParams
from mothball.registry.overrides import change_policy
from mothball.registry.scripts import Scripts
from mothball.registry.workspaces import Workspace, Workspaces
from mothball.retention import Policy
from mothball.settings import Settings

_EVERY = 10**9


class Retentions:
    """The retention of the fleet's workspaces. What is said here is obeyed by `store.retain` on the workspace's host."""

    def __init__(self, scripts: Scripts, workspaces: Workspaces, settings: Settings) -> None:
        self._scripts = scripts
        self._workspaces = workspaces
        self._default = settings.retention

    def of(self, record: Workspace) -> Policy | str:
        """The policy of this workspace's snapshots, or why retention leaves them alone.

        That of the settings is this process's: ask on the workspace's host.
        """
        if record.holds:
            return "somebody holds it"
        if "policy" in record.unknown:
            return "its own policy was lost with the registry; `mothball retention` sets one"
        try:
            return Policy.parse(record.policy.get("retention", self._default))
        except InvalidParams as error:
            return f"its own policy is wrong: {error.message}"

    def of_host(self, host: str, only: str | None = None) -> Iterator[tuple[str, Policy | str]]:
        """Each workspace of `host` (or `only` that one) with the policy of its snapshots, or why retention leaves it alone.

        A workspace without a record is not among them: nobody knows what it was promised. Raises `NotFound` or `Gone` for `only`.
        """
        records = self._workspaces.list(host=host, limit=_EVERY) if only is None else [self._workspaces.get(only)]
        for record in records:
            yield record.id, self.of(record) if record.host == host else f"it lives on host {record.host}"

    def set(self, workspace: str, rules: object | None) -> Workspace:
        """Give the workspace a retention of its own (`Policy.parse` reads it), or with None that of its host's settings.

        The rest of its policy stays. Raises `InvalidParams`, `NotFound`, `Gone`, `Busy` (somebody else changes it all the time).
        """
        policy = None if rules is None else Policy.parse(rules)

        def change(record: Workspace) -> dict[str, Any]:
            changed = {name: value for name, value in record.policy.items() if name != "retention"}
            return changed if policy is None else {**changed, "retention": policy.text}

        value = "settings" if policy is None else policy.text
        return change_policy(self._scripts, workspace, change, event="workspace.retention_changed", value=value)
