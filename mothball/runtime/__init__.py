"""What runs in a workspace: drivers that see it, measure it, find its ports and end it. None starts anything.

`check` is for whoever stores a runtime, `driver_for` for whoever uses one, `handle_of_pid` for whoever is one.
"""

from __future__ import annotations

from typing import Any

from mothball.runtime.driver import Alive, Driver, Listener, Stats, Stopped, Tick
from mothball.runtime.handles import DRIVERS, check
from mothball.runtime.proc import handle_of_pid
from mothball.settings import Settings

__all__ = [
    "DRIVERS", "Alive", "Driver", "Listener", "Stats", "Stopped", "Tick", "check", "driver_for", "handle_of_pid",
]  # fmt: skip


def driver_for(runtime: dict[str, Any], settings: Settings, *, path: str | None = None) -> Driver:
    """The driver of a record's `runtime`; `path` is the workspace's directory.

    The handle is checked again: a record may be older than the check, or written by somebody else. Raises `InvalidParams`, and
    `ConfigError` for a driver that this host's settings do not allow.
    """
    handle = check(runtime)
    match handle.get("driver", "none"):
        case "process":
            from mothball.runtime.process import ProcessDriver

            return ProcessDriver(handle, path)
        case "none":
            from mothball.runtime.none import NoneDriver

            return NoneDriver()
        case "runc":
            from mothball.runtime.runc import RuncDriver

            return RuncDriver(handle)
        case "systemd":
            from mothball.runtime.systemd import SystemdDriver

            return SystemdDriver(handle)
        case "command":
            from mothball.runtime.command import CommandDriver

            return CommandDriver(handle, path, settings.runtime_commands)
        case _:  # docker and podman: one API
            from mothball.runtime.docker import DockerDriver

            return DockerDriver(handle, settings.docker_socket)
