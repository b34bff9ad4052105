"""Large binaries of a package: looked into where they stand in it, by another process, while what follows is packed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Final

from mothball.crash.outfile import pieces

if TYPE_CHECKING:
    from mothball.crash.looker import Look
    from mothball.crash.members import Key
    from mothball.redact.engine import Redactor

_POLL: Final = 0.5


def look_inside(fd: int, redactor: Redactor, start: int, size: int) -> list[str]:
    """The rules that fire in the binary file that stands at `start` in the package `fd`, sorted."""
    return sorted(redactor.binary(pieces(fd, start, start + size)))


class Inside:
    """The looks that were begun. Use as a context manager, from one thread."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._begun: dict[Key, Future[list[str]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="package-big")

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, key: Key, start: int, size: int) -> None:
        """Look into a file that is written."""
        self._begun[key] = self._pool.submit(self._look, start, size)

    def fired(self, tick: Callable[[], None]) -> dict[Key, list[str]]:
        """The files in which rules fire, and which; waits for all looks. `tick` is called now and then. Raises as both do."""
        return {key: rules for key, each in self._begun.items() if (rules := _waited(each, tick))}


def _waited(each: Future[list[str]], tick: Callable[[], None]) -> list[str]:
    while True:
        try:
            return each.result(timeout=_POLL)
        except TimeoutError:
            if each.done():
                raise
            tick()
