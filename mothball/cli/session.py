"""Opens what a command works with: the fleet behind the settings, or this host's store; and says who asks."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mothball.client import Fleet


@contextmanager
def open_fleet() -> Iterator[Fleet]:
    """The fleet of the settings, closed at the end."""
    from mothball.client import Fleet

    with Fleet() as fleet:
        if fleet.settings.log_level == "debug":
            logging.getLogger("mothball").setLevel(logging.DEBUG)
        yield fleet


def who(by: str) -> str:
    """`by`, or the login name: whoever finds a workspace stopped or gone wants to know whom to ask."""
    if by:
        return by
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container whose user has no name
        return ""
