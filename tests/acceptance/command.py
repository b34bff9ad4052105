"""The real `mothball` command in processes of its own, and a way to find every process that it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
# Not MOTHBALL_*: the fleet rebuilds those for its children, and this mark must reach every one of them.
MARK = "ACCEPTANCE_MARK"


class Done(NamedTuple):
    """What one command line gave."""

    code: int
    out: bytes
    err: str

    def json(self) -> Any:
        """stdout as one JSON document."""
        return json.loads(self.out)


class Command:
    """`mothball` with a marked environment of its own; what it starts works in or below `place`."""

    def __init__(self, place: Path, **settings: str | Path) -> None:
        self.place = str(place.resolve())
        self.mark = uuid.uuid4().hex
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("MOTHBALL_")}
        self.env |= {MARK: self.mark, **{f"MOTHBALL_{key.upper()}": str(value) for key, value in settings.items()}}

    def __call__(self, *argv: str | bytes, timeout: float = 120, env: Mapping[str, str] | None = None) -> Done:
        """Run one command line to its end."""
        done = subprocess.run(
            [sys.executable, "-m", "workers.main", *argv],
            cwd=ROOT, env={**self.env, **(env or {})}, capture_output=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr.decode())

    def start(self, *argv: str, log: Path) -> subprocess.Popen[bytes]:
        """Start one in the background, in a process group of its own; stdout and stderr go to `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "workers.main", *argv],
                cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Every living process of ours, whoever its parent is now: by the mark, or (Redis overwrites its own) by its folder."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                return False
            return process.environ().get(MARK) == self.mark or process.cwd().startswith(self.place)
        except (psutil.Error, OSError):
            return False

    def kill_all(self) -> None:
        """For teardown: end whatever a failed test left."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                continue


def fingerprint(root: Path) -> dict[str, tuple[Any, ...]]:
    """Every entry below `root`: kind, mode, size, times, inode and content."""
    out: dict[str, tuple[Any, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in [".", *folders, *files]:
            path = Path(folder, name)
            facts = path.lstat()
            content: bytes | str = b""
            if path.is_symlink():
                content = str(path.readlink())
            elif path.is_file():
                content = path.read_bytes()
            out[str(path)] = (
                facts.st_mode,
                facts.st_size,
                facts.st_mtime_ns,
                facts.st_ctime_ns,
                facts.st_ino,
                facts.st_nlink,
                content,
            )
    return out
