"""Ends the local fleet when its supervisor could not: the last line against orphaned processes.

`mothball up` may be killed with SIGKILL, by the OOM killer or with its terminal. This small process holds the reading end of a
pipe that only the supervisor writes to; when the pipe closes, it ends every process group it was told of and then itself.
Process groups, not processes: a worker's pool children must go as well.

Lines it reads: ``+ PGID SECONDS`` (SIGTERM, then SIGKILL after that many seconds; 0: SIGKILL at once) and ``- PGID``.
Run by its path and with nothing but the standard library, so that it starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def alive(group: int) -> bool:
    """True while the process group has a member."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def send(group: int, number: int) -> None:
    """Send a signal to a group that may have ended already."""
    try:  # noqa: SIM105 - contextlib costs start-up time
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


def end(groups: dict[int, float]) -> None:
    """End the groups: those without grace first, then the others in order, each with its own grace."""
    for group in [number for number, grace in groups.items() if not grace]:
        send(group, signal.SIGKILL)
    for group, grace in groups.items():
        if grace:
            send(group, signal.SIGCONT)
            send(group, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while alive(group) and time.monotonic() < deadline:
                time.sleep(0.05)
            send(group, signal.SIGKILL)


def main() -> None:
    """Read until the supervisor is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    groups: dict[int, float] = {}
    for text in sys.stdin:
        sign, group, *rest = text.split()
        if sign == "+":
            groups[int(group)] = float(rest[0])
        else:
            groups.pop(int(group), None)
    end(groups)


if __name__ == "__main__":
    main()
