"""Being in a workspace's network for a moment: a thread of its own enters the network namespace of a process, and ends.

There 127.0.0.1 is the workspace's own loopback. Nothing else of the worker moves: a namespace is a thread's, not a process's.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mothball.runtime import proc
from mothball.runtime.driver import Listener

_CLONE_NEWNET = 0x40000000
T = TypeVar("T")


class Cannot(Exception):
    """Why a workspace's network cannot be entered, in words."""


class Visit(Generic[T]):
    """One call in the network of `listener`, in a daemon thread; `wait` for its answer."""

    def __init__(self, listener: Listener, call: Callable[[], T]) -> None:
        self._listener = listener
        self._call = call
        self._answer: list[T] = []
        self._error: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name=f"probe-{listener.port}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> T | None:
        """The answer; None when there is none within `seconds`. Raises what the call raised, or `Cannot`."""
        self._thread.join(max(0.0, seconds))
        if self._error:
            raise self._error[0]
        return self._answer[0] if self._answer else None

    def _run(self) -> None:
        try:
            if self._listener.netns:
                _enter(self._listener)
            self._answer.append(self._call())
        except BaseException as error:  # handed to whoever waits
            self._error.append(error)


def _enter(listener: Listener) -> None:
    """Move this thread into the network namespace of the listener's process, which must still be the same one."""
    pid = listener.pid or 0
    try:
        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Cannot(f"its network namespace cannot be opened: {error.strerror}") from None
    try:
        found = proc.read(pid)
        if found is None or found.started != listener.started:
            raise Cannot("its process has ended")
        if _libc().setns(fd, _CLONE_NEWNET) != 0:
            raise Cannot(f"its network namespace cannot be entered: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
