"""Real processes for the tests of the drivers: small Python programs, each with a folder in which it says what it did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

from mothball.runtime import Driver, driver_for, handle_of_pid, proc
from mothball.settings import Settings
from tests.support import eventually


def nothing() -> None:
    """A tick of nobody's interest."""


class Bench:
    """A directory, the programs started for it, and their end whatever a test did."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.started: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, code: str, *args: str, session: bool = True, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Run `code`, which calls `say(name)` to write its pid into a file of that name."""
        text = PRELUDE + textwrap.dedent(code)
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", text, str(self.folder), *args], start_new_session=session, cwd=cwd or self.folder
        )
        self.started.append(process)
        return process

    def said(self, name: str) -> int:
        """The pid that a program wrote under `name`, once it has."""

        def pid() -> int:
            path = self.folder / name
            return int(path.read_text() or 0) if path.exists() else 0

        return eventually(pid, what=f"the program saying {name}")

    def names(self) -> list[str]:
        return sorted(each.name for each in self.folder.iterdir())

    def driver(self, process: subprocess.Popen[bytes], **changes: Any) -> Driver:
        """The driver of a running process; `changes` replace parts of its handle."""
        return driver_for({**handle_of_pid(process.pid), **changes}, self.settings, path=str(self.folder))

    def runs(self, pid: int) -> bool:
        found = proc.read(pid)
        return found is not None and not found.dead

    def end(self) -> None:
        """Kill every program of this bench, also those that it forked: all of them have its folder on their command line."""
        eventually(lambda: not [_kill(pid) for pid in proc.everything() if str(self.folder) in _command(pid)], what="their end")
        for process in self.started:
            process.wait(10)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


PRELUDE = """
import os, signal, sys, time
folder = sys.argv[1]
def say(name):
    with open(os.path.join(folder, name + ".new"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(os.path.join(folder, name + ".new"), os.path.join(folder, name))
def ignore():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def sleep():
    while True:
        time.sleep(60)
"""
