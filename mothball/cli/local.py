"""What commands need that work on this host's store."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mothball import errors
from mothball.cli.glance import host_of
from mothball.cli.output import note
from mothball.cli.session import open_fleet
from mothball.names import check_workspace_id

if TYPE_CHECKING:
    from mothball.registry import Workspace
    from mothball.settings import Settings
    from mothball.store import Store


def load_settings() -> Settings:
    """The settings of this process; `ConfigError` when they are wrong."""
    from mothball.settings import Settings

    return Settings.load()


def local_store(settings: Settings) -> Store:
    """The store of this host."""
    from mothball.store import Store

    return Store(settings.store_dir)


def here(settings: Settings, workspace: str) -> None:
    """`hosted` for commands that need no record: most of the time one look says that all is well."""
    check_workspace_id(workspace)
    if not local_store(settings).refs(workspace).exists or host_of(settings, workspace) != settings.host:
        hosted(settings, workspace)


def hosted(settings: Settings, workspace: str) -> Workspace | None:
    """The record of a workspace whose captures are on this host; refuses to read what may be stale (`HostOffline`).

    None without Redis, or for a workspace that was released: what lies in this store is still readable then, for that is
    what one needs after a disaster. `NotFound` when this store has no capture of it.
    """
    check_workspace_id(workspace)
    kept = local_store(settings).refs(workspace).exists
    try:
        with open_fleet() as fleet:
            record = fleet.get(workspace)
    except (errors.NotFound, errors.Gone, errors.Unavailable) as error:
        if not kept:
            raise
        note(f"note: {error.message}; reading what this host's store has")
        return None
    if record.host != settings.host:
        raise errors.HostOffline(
            f"workspace {workspace!r} lives on host {record.host!r} and its captures are in that host's store; "
            "run this command there",
            host=record.host,
        )
    if not kept:
        raise errors.NotFound(
            f"workspace {workspace!r} has no capture in {os.fspath(settings.store_dir)} yet; `mothball capture` makes one",
            what="capture",
            id=workspace,
        )
    return record
