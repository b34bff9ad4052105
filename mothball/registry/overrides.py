"""Changes of a workspace's own policy: several writers share that one text of its record, each with keys of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mothball.errors import Busy
from mothball.registry import encode, keys
from mothball.registry.scripts import Scripts, pairs
from mothball.registry.workspaces import Workspace, decode, missing

_TRIES = 10


def change_policy(
    scripts: Scripts, workspace: str, change: Callable[[Workspace], dict[str, Any]], *, event: str, value: str, by: str = ""
) -> Workspace:
    """Replace the policy of `workspace` by what `change` makes of its record; again when somebody else changed it meanwhile.

    The sweeps look at the workspace anew, and `event` says `value`. Raises `InvalidParams`, `NotFound`, `Gone`, and `Busy` when
    others change it all the time.
    """
    for _ in range(_TRIES):
        status, answer = scripts.run("get_workspace", keys.workspace_id(workspace))
        if status != "ok":
            raise missing(status, workspace, answer)
        raw = pairs(answer)
        record = decode(raw)
        changed = change(record)
        text = encode.dumps(changed, "policy", encode.MAX_DOCUMENT_BYTES) if changed else ""
        # Who says what counts from now on answers for what a rebuilt record did not know.
        unknown = json.dumps([name for name in record.unknown if name != "policy"]) if record.unknown else ""
        status, answer = scripts.run("set_policy", workspace, raw.get("policy", ""), text, unknown, event, value, by)
        if status == "ok":
            return decode(pairs(answer))
        if status != "changed":
            raise missing(status, workspace, answer)
    raise Busy(what=f"the policy of workspace {workspace}", reason="others change it at the same time")
