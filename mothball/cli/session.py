"""Opens what a command works with: the fleet behind the settings, or this host's store."""

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
