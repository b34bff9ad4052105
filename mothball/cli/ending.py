"""What a command leaves behind when it is told to end: nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def tidy_end() -> Iterator[None]:
    """A request to end (a service manager's, a closed terminal's) ends a command as Ctrl-C does: what it had begun is removed."""

    def end(number: int, _frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # the second must not interrupt the tidying
        raise SystemExit(128 + number)

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
