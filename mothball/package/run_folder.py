"""The folder of one run of a bundle: runc's state and log in it, its lock while the run lives, and how everything of it ends."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mothball.errors import OperationFailed, PathNotAllowed, TimedOut
from mothball.package.target import remove_tree
from mothball.runtime.programs import Finished
from mothball.runtime.programs import run as run_program
from mothball.store.below import FOLDER_FLAGS
from mothball.store.blobs import full_disk_is_no_space

PREFIX: Final = "run-"
CALL_SECONDS: Final = 10.0
_RANDOM: Final = 8
_ROUNDS: Final = 50
_PAUSE: Final = 0.02


class RunFolder:
    """`path` is for this run alone. `end` ends its container, when `container` names one."""

    def __init__(self, path: Path, runc: str) -> None:
        self.path = path
        self.state = path / "state"
        self.container = ""
        self._runc = runc

    def call(self, *argv: str) -> Finished:
        """One command of runc about this run's container; one that hangs is a failed one."""
        what = f"runc {argv[0]}"
        try:
            return run_program([self._runc, "--root", str(self.state), *argv], seconds=CALL_SECONDS, what=what)
        except (TimedOut, OperationFailed) as error:
            return Finished(1, "", error.message)

    def cgroups(self, container: str, controller: str = "") -> list[Path]:
        """The container's cgroup folders as runc wrote them down; of `controller` alone if one is named (v2 has one for all)."""
        try:
            told = json.loads((self.state / container / "state.json").read_bytes())["cgroup_paths"]
            paths = {str(name): Path(path) for name, path in told.items() if container in Path(path).name}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
        return [path for name, path in paths.items() if name in {controller, ""} or not controller]

    def end(self) -> None:
        """Kill the container with all its processes and remove what runc made for it: state, cgroups, mounts."""
        for container in {self.container, *self._containers()} - {""}:
            cgroups = self.cgroups(container)
            if not (self.state / container).exists():
                continue
            self.call("delete", "--force", container)
            for _ in range(_ROUNDS):  # runc may be what hangs
                left = [path for path in cgroups if path.is_dir()]
                for path in left:
                    _kill(path)
                    with suppress(OSError):
                        path.rmdir()
                if not left:
                    break
                time.sleep(_PAUSE)

    def _containers(self) -> list[str]:
        with suppress(OSError):
            return [each.name for each in self.state.iterdir() if each.is_dir()]
        return []


def _kill(cgroup: Path) -> None:
    with suppress(OSError, ValueError):
        for pid in (cgroup / "cgroup.procs").read_text().split():
            with suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)


@contextmanager
def run_folder(scratch: Path, runc: str) -> Iterator[RunFolder]:
    """A new folder below `scratch`, gone at the end with everything that was started from it; and so are those of killed runs."""
    with full_disk_is_no_space(scratch):
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        _own(scratch)
        _remove_stale(scratch, runc)
        path, fd = _make(scratch)
    run = RunFolder(path, runc)
    try:
        run.state.mkdir(mode=0o700)
        yield run
    finally:
        run.end()
        remove_tree(path)
        os.close(fd)


def _make(scratch: Path) -> tuple[Path, int]:
    """A new folder and its locked descriptor. Made again when somebody took it for a stale one before it was locked."""
    while True:
        path = scratch / (PREFIX + secrets.token_hex(_RANDOM))
        path.mkdir(mode=0o700)
        with suppress(FileNotFoundError, BlockingIOError):
            fd = os.open(path, FOLDER_FLAGS)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():
                    return path, fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


def _own(folder: Path) -> None:
    """Refuse a folder in which somebody else could write: runc believes what its state says of pids and cgroups."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PathNotAllowed(f"{folder} must be a folder of this user, in which nobody else can write", path=str(folder))


def _remove_stale(scratch: Path, runc: str) -> None:
    """End and remove what killed runs left: folders of ours that nobody holds."""
    for path in scratch.iterdir():
        if not path.name.startswith(PREFIX) or len(path.name) != len(PREFIX) + 2 * _RANDOM:
            continue
        with suppress(OSError):
            fd = os.open(path, FOLDER_FLAGS)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                RunFolder(path, runc).end()
                remove_tree(path)
            finally:
                os.close(fd)
