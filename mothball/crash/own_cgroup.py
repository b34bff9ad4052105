"""A cgroup of its own for one command: its memory limit, and figures that are nobody else's. Versions 1 and 2.

Where none can be made (no rights, no memory controller, a read-only mount) `OwnCgroup.why_not` says so, and the command runs
without. Nothing is left: what the command leaves running moves to the cgroup this process is in, and the folder goes. That of a
process which was killed goes when the next one is made.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from mothball.crash import cgroup
from mothball.crash.cgroup import MOUNT
from mothball.errors import MothballError
from mothball.store.below import FOLDER_FLAGS

_NAME: Final = "mothball-exec-"
_PROBE_SECONDS: Final = 5.0
_GO_SECONDS: Final = 2.0
_STALE_SECONDS: Final = 60.0
"""A folder so young may be one that somebody is just making, and has not locked yet."""
_JOIN: Final = 'echo 0 > "$0" && exec "$@"'
"""A shell joins and becomes the command: it never runs a moment outside, and no code of ours runs between fork and exec."""


class OwnCgroup:
    """One cgroup from `__enter__` to `__exit__`. `folder` is None where none could be made."""

    def __init__(self, memory: int | None = None, mount: Path = MOUNT) -> None:
        """`memory`: limit in bytes; swap does not lift it where the kernel counts swap."""
        self.memory = memory
        self.folder: Path | None = None
        self.why_not = ""
        self._mount = mount
        self._home: Path | None = None
        self._lock = -1

    def __enter__(self) -> Self:
        reasons: list[str] = []
        for home, version in _homes(self._mount):
            try:
                self._make(home, version)
            except (OSError, subprocess.SubprocessError) as error:
                reasons.append(f"{home}: {error.strerror if isinstance(error, OSError) and error.strerror else error}")
                self._remove()
            else:
                return self
        self.why_not = "; ".join(reasons) or f"no memory controller is mounted below {self._mount}"
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def command(self, command: list[str]) -> list[str]:
        """What to start so that `command` runs in here from its first instruction."""
        return command if self.folder is None else ["/bin/sh", "-c", _JOIN, str(self.folder / "cgroup.procs"), *command]

    def facts(self) -> dict[str, Any] | None:
        """Its figures, as a crash report takes them; ``own`` says that they are nobody else's. None without a cgroup."""
        if self.folder is None:
            return None
        try:
            return {**cgroup.read(str(self.folder), self._mount), "own": True}
        except MothballError:
            return None

    def _make(self, home: Path, version: int) -> None:
        _sweep(home)
        folder = home / (_NAME + uuid.uuid4().hex[:16])
        folder.mkdir(0o755)
        self.folder, self._home = folder, home
        # As long as this process lives nobody takes the folder for one that was left behind.
        self._lock = os.open(folder, FOLDER_FLAGS)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (folder / "cgroup.procs").exists():
            raise OSError(0, "it is no cgroup file system")
        if version == 1:
            if self.memory is not None:
                _put(folder / "memory.limit_in_bytes", str(self.memory))
                with suppress(OSError):  # only where the kernel counts swap
                    _put(folder / "memory.memsw.limit_in_bytes", str(self.memory))
        else:
            if not (folder / "memory.current").exists():
                raise OSError(0, "the memory controller is not enabled for its children")
            if self.memory is not None:
                _put(folder / "memory.max", str(self.memory))
                with suppress(OSError):
                    _put(folder / "memory.swap.max", "0")
        # Whether a process may be moved there is known once one was.
        probe = [*self.command(["/bin/true"])]
        subprocess.run(
            probe,
            check=True,
            timeout=_PROBE_SECONDS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _remove(self) -> None:
        folder, home, self.folder, self._home = self.folder, self._home, None, None
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)
        if folder is None or home is None:
            return
        end = time.monotonic() + _GO_SECONDS
        while True:
            try:
                folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                # Something runs on: a server that the command started, or the last breath of a killed process.
                _move(folder, home)
                if time.monotonic() >= end:
                    return
                time.sleep(0.01)
            else:
                return


def _sweep(home: Path) -> None:
    """Remove what a killed process left: empty (else the kernel refuses), locked by nobody, and not of this moment."""
    with suppress(OSError):
        for folder in home.glob(f"{_NAME}*"):
            with suppress(OSError):
                fd = os.open(folder, FOLDER_FLAGS)
                try:
                    if time.time() - os.fstat(fd).st_mtime > _STALE_SECONDS:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        folder.rmdir()
                finally:
                    os.close(fd)


def _put(file: Path, text: str) -> None:
    """Write a file of the kernel's: one that is not there is not made."""
    fd = os.open(file, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _move(folder: Path, home: Path) -> None:
    with suppress(OSError):
        for pid in (folder / "cgroup.procs").read_text().split():
            with suppress(OSError):
                _put(home / "cgroup.procs", pid)


def _homes(mount: Path) -> Iterator[tuple[Path, int]]:
    """Where a cgroup with memory figures may be made, the nearest first, with the version."""
    own = _own_paths()
    unified = cgroup.unified(mount)
    if unified is not None and "memory" in _controllers(unified):
        here = unified / own.get("", "/").lstrip("/")
        # A cgroup with processes gives its children no controllers; beside it they often have them, and at the top they do.
        for home in dict.fromkeys((here, here.parent if here != unified else here, unified)):
            if home.is_dir():
                yield home, 2
    first = mount / "memory"
    if (first / "memory.usage_in_bytes").exists() or (first / "cgroup.procs").exists():
        here = first / own.get("memory", "/").lstrip("/")
        for home in dict.fromkeys((here, first)):
            if home.is_dir():
                yield home, 1


def _own_paths() -> dict[str, str]:
    paths: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(errors="replace").splitlines():
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            if ".." not in path.split("/"):
                paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def _controllers(folder: Path) -> list[str]:
    with suppress(OSError):
        return (folder / "cgroup.controllers").read_text().split()
    return []
