"""Child processes of the local fleet: started in groups of their own, logged, restarted, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from workers import guard

LOG_KEEP_BYTES = 10 * 1024**2
BACKOFF_FIRST_SECONDS = 0.5
BACKOFF_MAX_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
TAIL_BYTES = 4096


class Guard:
    """The guard process (see `workers.guard`), restarted and told again should it die."""

    def __init__(self) -> None:
        self._groups: dict[int, float] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it anew."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__], stdin=subprocess.PIPE, start_new_session=True, bufsize=0
        )
        for group, grace in self._groups.items():
            self._tell(f"+ {group} {grace}\n")

    def check(self) -> None:
        """Start it anew when it has died."""
        if self._process is not None and self._process.poll() is not None:
            self._close_pipe(self._process)
            self.start()

    def add(self, group: int, grace: float) -> None:
        """From now on `group` ends with the supervisor."""
        self._groups[group] = grace
        self._tell(f"+ {group} {grace}\n")

    def remove(self, group: int) -> None:
        """The group has ended; its number may soon be a stranger's."""
        if self._groups.pop(group, None) is not None:
            self._tell(f"- {group}\n")

    def stop(self) -> None:
        """Close the pipe: whatever was added and not removed ends now."""
        process, self._process = self._process, None
        if process is None:
            return
        self._close_pipe(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(sum(self._groups.values()) + 10)

    def _close_pipe(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def _tell(self, text: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has died: `check` starts it anew with everything
                self._process.stdin.write(text.encode())


class Child:
    """One supervised program. `grace` is what SIGTERM gets before SIGKILL, in seconds."""

    def __init__(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log_file: Path, grace: float, guard: Guard
    ) -> None:
        self.name = name
        self.log_file = log_file
        self.restarts = 0
        self._command = list(command)
        self._env = dict(env)
        self._cwd = cwd
        self._grace = grace
        self._guard = guard
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._backoff = BACKOFF_FIRST_SECONDS
        self._start_at: float | None = None

    @property
    def pid(self) -> int | None:
        """The main process, None while there is none. It leads a group of its own with the same number."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self) -> None:
        """Start it with its output appended to the log."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.log_file.exists() and self.log_file.stat().st_size > LOG_KEEP_BYTES:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            # A session of its own: Ctrl-C in the terminal must reach the supervisor only, which stops things in order.
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        # No grace: without its supervisor a worker that finishes politely for half a minute is an orphan; its job is safe.
        self._guard.add(self._process.pid, 0)
        self._started = time.monotonic()
        self._start_at = None

    def check(self, say: Callable[[str], None]) -> None:
        """Notice its end and start it again, later each time; `say` gets one line about it."""
        if self._start_at is not None:
            if time.monotonic() >= self._start_at:
                self.restarts += 1
                self.start()
                say(f"{self.name} runs again (pid {self.pid})")
            return
        if self._process is None or self._process.poll() is None:
            return
        self._clear_group(self._process.pid)
        if time.monotonic() - self._started > HEALTHY_SECONDS:
            self._backoff = BACKOFF_FIRST_SECONDS
        say(f"{self.name} ended ({_how(self._process.returncode)}); starting it again in {self._backoff:g} s; log: {self.log_file}")
        self._start_at = time.monotonic() + self._backoff
        self._backoff = min(self._backoff * 2, BACKOFF_MAX_SECONDS)

    def signal(self, number: int) -> None:
        """Send a signal to the main process and everything it started, if it runs."""
        if self._process is not None and self._process.poll() is None:
            guard.send(self._process.pid, number)

    def terminate(self) -> None:
        """Ask it to end; only the main process is told, it ends its children itself."""
        self._start_at = None
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGTERM)

    def wait(self, hurry: Callable[[], bool]) -> bool:
        """Wait for the end of `terminate`; after its grace, or once `hurry()` is true, kill it. True when it ended in order."""
        if self._process is None:
            return True
        deadline = time.monotonic() + self._grace
        while self._process.poll() is None and time.monotonic() < deadline and not hurry():
            time.sleep(0.05)
        in_order = self._process.poll() is not None
        self._clear_group(self._process.pid)
        self._process.wait()
        self._process = None
        return in_order

    def tail(self) -> str:
        """The last lines of its log."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(self.log_file.stat().st_size - TAIL_BYTES, 0))
                return file.read().decode(errors="replace").strip()
        except OSError:
            return ""

    def _clear_group(self, group: int) -> None:
        """End what the main process left behind, before a successor starts: two pools must never share a host."""
        guard.send(group, signal.SIGKILL)
        self._guard.remove(group)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
