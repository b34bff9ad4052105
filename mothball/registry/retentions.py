"""Whose snapshots are kept by which rules: a workspace's own, else those of its host's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator

from mothball.errors import Busy, InvalidParams
from mothball.registry import encode, keys
from mothball.registry.scripts import Scripts, pairs
from mothball.registry.workspaces import Workspace, Workspaces, decode, missing
from mothball.retention import Policy
from mothball.settings import Settings

_TRIES = 10
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
        for _ in range(_TRIES):
            status, answer = self._scripts.run("get_workspace", keys.workspace_id(workspace))
            if status != "ok":
                raise missing(status, workspace, answer)
            raw = pairs(answer)
            changed = encode.loads(raw.get("policy")) or {}
            changed.pop("retention", None)
            if policy is not None:
                changed["retention"] = policy.text
            text = encode.dumps(changed, "policy", encode.MAX_DOCUMENT_BYTES)
            # Who says what counts from now on answers for what a rebuilt record did not know.
            unknown = json.dumps([name for name in decode(raw).unknown if name != "policy"]) if raw.get("unknown") else ""
            value = "settings" if policy is None else policy.text
            status, answer = self._scripts.run(
                "set_policy", workspace, raw.get("policy", ""), text, unknown, "workspace.retention_changed", value
            )
            if status == "ok":
                return decode(pairs(answer))
            if status != "changed":
                raise missing(status, workspace, answer)
        raise Busy(what=f"the policy of workspace {workspace}", reason="others change it at the same time")
