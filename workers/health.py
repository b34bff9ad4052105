"""Liveness: the age of the heartbeat file that the worker's main loop writes. ``python -m workers.health``.

Not ``celery inspect ping``: that costs a second of CPU each time and turns a broker outage into a restart loop. The file
is old during a Redis outage and during a soft shutdown, so liveness waits long; readiness wants a fresh file.
"""

from __future__ import annotations

import argparse
import sys
import time

from mothball.errors import ConfigError
from mothball.settings import Settings
from workers.config import heartbeat_file

LIVE_SECONDS = 600.0
READY_SECONDS = 15.0


def heartbeat_age(settings: Settings, name: str | None = None) -> float | None:
    """Seconds since the worker `name` (default: the host's) wrote its heartbeat; None when it never did."""
    try:
        return max(0.0, time.time() - heartbeat_file(settings, name).stat().st_mtime)
    except FileNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the heartbeat is young enough, 1 when not, 78 for wrong settings."""
    parser = argparse.ArgumentParser(prog="python -m workers.health", description="Is this host's worker alive?")
    parser.add_argument("--ready", action="store_true", help=f"ask for a heartbeat younger than {READY_SECONDS:g} s")
    parser.add_argument("--max-age", type=float, metavar="SECONDS", help=f"oldest heartbeat accepted (default {LIVE_SECONDS:g})")
    parser.add_argument("--name", help="worker name, when a host runs several (default: the host)")
    options = parser.parse_args(argv)
    try:
        settings = Settings.load()
    except ConfigError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_code
    limit = options.max_age if options.max_age is not None else READY_SECONDS if options.ready else LIVE_SECONDS
    age = heartbeat_age(settings, options.name)
    if age is None:
        sys.stderr.write(f"no heartbeat at {heartbeat_file(settings, options.name)}; is the worker running?\n")
        return 1
    sys.stdout.write(f"heartbeat {age:.1f} s old, limit {limit:g} s\n")
    return 0 if age <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
