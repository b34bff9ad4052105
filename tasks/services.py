"""What a task needs of the world, one set per process: settings, registry, doorbell.

A prefork child must not use its parent's sockets: two processes reading one Redis connection steal each other's
answers. So every access compares the process id, and a child builds its own set on first use.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from mothball.doorbell import DoorbellRinger
from mothball.registry import Registry
from mothball.settings import Settings


@dataclass(frozen=True)
class Services:
    """Settings, registry and doorbell of one process."""

    pid: int
    settings: Settings
    registry: Registry
    ringer: DoorbellRinger


_settings: Settings | None = None
_services: Services | None = None


def configure(settings: Settings) -> None:
    """Use `settings` from now on in this process and in the children it forks."""
    global _settings, _services  # noqa: PLW0603 - one set per process is what this module is for
    _settings = settings
    _services = None


def settings() -> Settings:
    """The settings given to `configure`, else those of the environment."""
    global _settings  # noqa: PLW0603 - see configure
    if _settings is None:
        _settings = Settings.load()
    return _settings


def renew() -> None:
    """Drop this process's connections; `current` builds new ones.

    For code that was interrupted anywhere (a soft time limit): a request may have been sent and its answer not read, and
    the next request on that connection would get it.
    """
    global _services
    dropped, _services = _services, None
    if dropped is not None and dropped.pid == os.getpid():
        with suppress(Exception):  # broken in any way; it is gone either way
            dropped.registry.close()
        with suppress(Exception):
            dropped.ringer.close()


def current() -> Services:
    """This process's services; built on first use, and again after a fork."""
    global _services  # noqa: PLW0603 - see configure
    pid = os.getpid()
    if _services is None or _services.pid != pid:
        loaded = settings()
        _services = Services(pid=pid, settings=loaded, registry=Registry.connect(loaded), ringer=DoorbellRinger(loaded))
    return _services
