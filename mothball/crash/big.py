"""Big binaries of a package: a look inside one takes long, so it begins while entries before it are still being packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mothball.crash.looker import Look
    from mothball.store.merge import Found

BATCH: Final = 256
AHEAD: Final = 16
"""So many batches are seen before their turn comes."""
BIG: Final = 16 * 1024**2
"""Bytes from which on a file is looked at early."""
_POLL: Final = 0.5


class BigBinaries:
    """Use as a context manager, from one thread."""

    def __init__(self, look: Look | None) -> None:
        """`look` gives the rules that fire in the binary file of a path, None for a text; without it nothing is looked at."""
        self._look = look
        self._early: dict[bytes, Future[list[str] | None]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="package-big")

    def __enter__(self) -> BigBinaries:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, rows: Iterator[Found]) -> Iterator[list[Found]]:
        """The entries, some at a time; those that follow are seen by then."""
        ahead: deque[list[Found]] = deque()
        while True:
            while len(ahead) < AHEAD and (batch := list(islice(rows, BATCH))):
                ahead.append(batch)
                if self._look is not None:
                    for found in batch:
                        if found.row.size >= BIG and found.row.type == "f":
                            self._early[found.row.path] = self._pool.submit(self._look, found.row.path)
            if not ahead:
                return
            yield ahead.popleft()

    def found(self, path: bytes, tick: Callable[[], None]) -> list[str] | None:
        """The rules that fire in a file that is known to be binary; None when it was not looked at. `tick` is called now and then,
        and raises as the look does."""
        early = self._early.pop(path, None)
        while early is not None:
            try:
                return early.result(timeout=_POLL)
            except TimeoutError:
                if early.done():
                    raise
                tick()
        return None
