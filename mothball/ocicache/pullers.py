"""Processes that may be pulling into a cache: those that name it in their arguments, or have something open in it.

A pull that finds a blob asks only whether it is there, and names it in an index when the last of its other blobs came. Nothing in
the file system tells of it meanwhile. So what a prune moved is waited with until every such process has ended that began before
the last of it went: whoever began later did not find it. A daemon that has the path in its arguments only makes a prune wait.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

TICKS_S: Final = os.sysconf("SC_CLK_TCK")
LOOK_S: Final = 5.0
"""To ask for the arguments of a process whose memory is on a mount that hangs may hang as well."""
_SEEN: Final = 3
"""Looks after which arguments are taken as they are: a process that was just made has those of its parent for a moment."""
_MAX_ARGUMENTS: Final = 4 * 1024**2
_PIECE: Final = 64 * 1024
_ENDED: Final = frozenset({"Z", "X", "x"})
_OURS: Final = frozenset({b"mothball", b"workers.main"})
_USE: Final = (b"image", b"cache", b"use")


class Process(NamedTuple):
    """A process that may pull. `began`: ticks since the machine was started, which tells two of one number apart."""

    pid: int
    began: int

    def runs(self) -> bool:
        """False when it has ended, or its number is another's by now."""
        found = _stat(self.pid)
        return found is not None and found[1] == self.began


def ticks() -> int:
    """Now, as processes' beginnings are told."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_S)


class Pullers:
    """The processes that name one of the folders `paths` or something in it; where there is no /proc there are none."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [os.fsencode(each.rstrip("/")) for each in paths]
        self._absolute = _named(self._paths)
        self._known: dict[Process, tuple[int, bool]] = {}
        self.hangs = False
        """The last look did not end in time."""
        self._looking: threading.Thread | None = None

    def look(self, *, files: bool = False) -> set[Process]:
        """Those that run now; `files`: also those that have a file or folder in it open, which takes longer."""
        if self._looking is not None and self._looking.is_alive():
            return set()
        found: set[Process] = set()
        thread = threading.Thread(target=self._look, args=(found, files), name="mothball-pullers", daemon=True)
        thread.start()
        thread.join(LOOK_S)
        self.hangs = thread.is_alive()
        self._looking = thread if self.hangs else None
        return set() if self.hangs else found

    def _look(self, found: set[Process], files: bool) -> None:
        own = _lineage()
        known: dict[Process, tuple[int, bool]] = {}
        with suppress(OSError), os.scandir("/proc") as listed:
            for each in listed:
                if not each.name.isdecimal() or (pid := int(each.name)) in own:
                    continue
                state = _stat(pid)
                if state is None:
                    continue
                process = Process(pid, state[1])
                looks, is_one = self._known.get(process, (0, False))
                if looks < _SEEN:
                    is_one = self._names(pid)
                known[process] = (looks + 1, is_one)
                if is_one or (files and self._has_open(pid)):
                    found.add(process)
        self._known = known

    def _names(self, pid: int) -> bool:
        arguments = _arguments(pid)
        if not arguments or _is_ours(arguments):  # a kernel's thread has none
            return False
        return self._absolute.search(arguments) is not None or self._from_its_folder(pid, arguments)

    def _from_its_folder(self, pid: int, arguments: bytes) -> bool:
        """The folder may be named as the process sees it: ``oci:layout:tag`` beside the layout."""
        try:
            where = os.readlink(b"/proc/%d/cwd" % pid)  # noqa: PTH115 - as bytes
        except OSError:
            return False
        here = where.rstrip(b"/") + b"/"
        below = [each[len(here) :] or b"." for each in (path + b"/" for path in self._paths) if each.startswith(here)]
        return bool(below) and _named([each.rstrip(b"/") for each in below]).search(arguments) is not None

    def _has_open(self, pid: int) -> bool:
        try:
            names = os.listdir(b"/proc/%d/fd" % pid)  # noqa: PTH208 - as bytes
        except OSError:  # ended, or another user's
            return False
        inside = tuple(each + b"/" for each in self._paths)
        for name in names:
            with suppress(OSError):
                # The name only: to ask for the state of a file on a mount that hangs would hang here too.
                link = os.readlink(b"/proc/%d/fd/%b" % (pid, name))  # noqa: PTH115 - as bytes
                if link.startswith(inside) or link in self._paths:
                    return True
        return False


def _named(paths: Sequence[bytes]) -> re.Pattern[bytes]:
    """The paths as words of arguments: ``DIR``, ``oci:DIR:tag``, ``--dir=DIR/sha256``, a list, or within a script's text."""
    words = b"|".join(re.escape(each) for each in paths) or b"(?!)"
    return re.compile(rb"(?:^|[\0:=,'\" ])(?:\./)?(?:" + words + rb")(?=$|[\0/:,'\" ])", re.DOTALL)


def _is_ours(arguments: bytes) -> bool:
    """This program's own processes work under locks, whatever cache they name; but ``image cache use`` stands for its command."""
    argv = arguments.split(b"\0", 12)
    program = argv[0].rpartition(b"/")[2]
    if program.startswith(b"python"):
        rest = argv[1:]
        while rest and rest[0].startswith(b"-") and rest[0] != b"-m":
            rest.pop(0)
        if rest[:1] == [b"-m"]:
            rest.pop(0)
        program = rest[0].rpartition(b"/")[2] if rest else b""
    if program not in _OURS:
        return False
    return not any(tuple(argv[at : at + 3]) == _USE for at in range(len(argv)))


def _arguments(pid: int) -> bytes:
    out = bytearray()
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:  # noqa: PTH123 - thousands of them
            while len(out) < _MAX_ARGUMENTS and (piece := file.read(_PIECE)):
                out += piece
    except OSError:  # ended
        return b""
    return bytes(out)


def _stat(pid: int) -> tuple[int, int] | None:
    """(its parent, when it began) of a process that has not ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123 - thousands of them
            # Its name may hold anything, also brackets and spaces.
            fields = file.read(4096).rpartition(b")")[2].split()
        return None if fields[0].decode() in _ENDED else (int(fields[1]), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None


def _lineage() -> set[int]:
    """This process and those that it comes from."""
    pid = os.getpid()
    found: set[int] = set()
    while pid > 0 and pid not in found:
        found.add(pid)
        state = _stat(pid)
        pid = state[0] if state is not None else 0
    return found
