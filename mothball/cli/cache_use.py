"""`mothball image cache use`: run a command that uses an image cache, under a lease, and note which blobs it touched.

The kernel says which (inotify): file times alone would not do, for most mounts note a read once a day only.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mothball import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

EXIT_NOT_FOUND, EXIT_NOT_EXECUTABLE, _SHELL = 127, 126, 128
MOST_BLOBS: Final = 50_000
"""More blobs than this of one run are not noted; the registry remembers no more either."""
_IN_OPEN, _IN_CREATE, _IN_MOVED_TO, _IN_Q_OVERFLOW, _IN_ISDIR = 0x20, 0x100, 0x80, 0x4000, 0x40000000
_IN_ONLYDIR, _IN_DONT_FOLLOW = 0x01000000, 0x02000000
_HEAD: Final = struct.Struct("iIII")
_NAME = re.compile(rb"(?:sha256[:-])?([0-9a-f]{64})\Z")
_PLACES: Final = ("", "blobs", "blobs/sha256", "sha256")
_PASSED: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT)
_BY_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)


class NotExecutable(errors.InvalidParams):
    """There is such a file, and it cannot be run."""


class Touched:
    """The blobs of a cache that are opened, made or renamed into place while a ``with`` block runs; by anybody, not only by us."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        self._stop_read, self._stop_write = -1, -1
        self._thread: threading.Thread | None = None
        self._new = not folder.is_dir()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.digests: set[str] = set()
        self.problem = ""
        """Why not all of them may be known; empty when they are."""

    def __enter__(self) -> Touched:
        try:
            self._fd = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        except AttributeError:
            self.problem = "this system has no inotify"
            return self
        if self._fd < 0:
            self.problem = f"inotify: {os.strerror(ctypes.get_errno())}"
            return self
        self._watch()
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._read, name="mothball-cache-use", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._new:
            # The first pull of a host: there was nothing to watch, and all that is there now is what it made.
            self._look(_PLACES)
        if self._thread is None:
            return
        os.write(self._stop_write, b".")
        self._thread.join()
        for fd in (self._fd, self._stop_read, self._stop_write):
            os.close(fd)

    def _watch(self) -> None:
        """Folders that are not there yet are watched once they are made; the same folder again is the same watch."""
        mask = _IN_OPEN | _IN_CREATE | _IN_MOVED_TO | _IN_ONLYDIR | _IN_DONT_FOLLOW
        for place in _PLACES:
            path = os.fsencode(self._folder / place)
            if self._libc.inotify_add_watch(self._fd, path, ctypes.c_uint32(mask)) < 0:
                code = ctypes.get_errno()
                if not self.problem and Path(os.fsdecode(path)).is_dir():
                    self.problem = f"inotify: {os.strerror(code)}"

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._stop_read], [], [])
            try:
                while data := os.read(self._fd, 256 * 1024):
                    self._take(data)
            except BlockingIOError:
                pass
            if self._stop_read in ready:
                return

    def _take(self, data: bytes) -> None:
        at = 0
        while at + _HEAD.size <= len(data):
            _, mask, _, length = _HEAD.unpack_from(data, at)
            name = data[at + _HEAD.size : at + _HEAD.size + length].rstrip(b"\0")
            at += _HEAD.size + length
            if mask & _IN_Q_OVERFLOW:
                self.problem = "more happened at once than the kernel keeps"
            elif mask & _IN_ISDIR:
                if mask & (_IN_CREATE | _IN_MOVED_TO):
                    self._made()
            elif found := _NAME.match(name):
                self._add(found[1].decode())

    def _made(self) -> None:
        """A folder was made: what was written into it before it is watched is found by looking."""
        self._watch()
        self._look(("blobs/sha256", "sha256"))

    def _look(self, places: Sequence[str]) -> None:
        for place in places:
            try:
                with os.scandir(self._folder / place) as entries:
                    for entry in entries:
                        if len(self.digests) >= MOST_BLOBS:
                            break
                        if found := _NAME.match(os.fsencode(entry.name)):
                            self._add(found[1].decode())
            except OSError:
                continue

    def _add(self, digest: str) -> None:
        if len(self.digests) < MOST_BLOBS:
            self.digests.add(digest)
        else:
            self.problem = f"it touched more than {MOST_BLOBS:,} blobs"


def run(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run `command` with our streams until it ends; its exit code, 128 and the number for a signal. Signals are passed on.

    Raises `NotFound` when there is no such program, `NotExecutable` when it may not be run, `InvalidParams` when it cannot start.
    """
    with _passing_on() as started:
        try:
            child = subprocess.Popen(list(command), env=dict(env))
        except FileNotFoundError:
            raise errors.NotFound(f"there is no program {command[0]!r}", what="program", id=command[0]) from None
        except PermissionError as error:
            raise NotExecutable(f"{command[0]!r} cannot be started: {error.strerror}") from None
        except (OSError, ValueError) as error:
            raise errors.InvalidParams(f"{command[0]!r} cannot be started: {error}") from None
        started(child)
        code = child.wait()
    return code if code >= 0 else _SHELL - code


@contextmanager
def _passing_on() -> Iterator[Callable[[subprocess.Popen[Any]], None]]:
    """From here on no signal ends us alone: one that comes before the child is there is passed on when it has `started`."""
    children: list[subprocess.Popen[Any]] = []
    early: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        if not children:
            early.append(number)
        # The terminal has sent it to the child as well: twice would make many programs give up at once.
        elif number not in _BY_TERMINAL or not _in_foreground():
            children[0].send_signal(number)

    def started(child: subprocess.Popen[Any]) -> None:
        children.append(child)
        for number in early:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED}
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
