"""Runs one command and watches it: its output passes through and its end is kept, its signals are passed on, its end is known.

The command is started in a cgroup of its own where one can be made, so that a kill for want of memory is told from any other. At a
terminal it gets one of its own (`terminal`), else pipes.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Final

import msgspec

from mothball.crash.own_cgroup import OwnCgroup
from mothball.crash.terminal import own_terminal
from mothball.crash.text import line_end, line_start
from mothball.errors import InvalidParams, NotFound, OperationFailed

HEAD_BYTES: Final = 64 * 1024
TAIL_BYTES: Final = 512 * 1024
"""What is kept of the output: more than a report takes, for it is redacted before it is cut."""
DRAIN_SECONDS: Final = 2.0
"""How long output is still read after the command has ended: what it left in the background may hold the pipe for ever."""
_PIECE: Final = 64 * 1024
_PASSED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_BY_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SHELL: Final = 128
_ASKED_SECONDS: Final = 10.0
"""So long an end may take that somebody asked for. Whoever pressed Ctrl-C an hour ago in a shell did not ask for today's crash."""

logger = logging.getLogger("mothball.exec")


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended. `exit_code` is None when a `signal` ended it.

    `output` is its standard output and error as they came, of a long one the beginning and the end; `output_bytes` is the size of
    all of it. `cgroup` are the figures of its cgroup, None when it had none, and then `no_cgroup` says why. `asked` is the signal
    that somebody sent to end it, `reader_gone` that nobody read its output any more.
    """

    exit_code: int | None
    signal: int | None
    core_dumped: bool
    seconds: float
    output: str
    output_bytes: int
    cgroup: dict[str, Any] | None
    no_cgroup: str
    asked: int | None
    reader_gone: bool

    @property
    def status(self) -> int:
        """What a shell would say: the exit code, or 128 and the signal's number."""
        return self.exit_code if self.exit_code is not None else _SHELL + (self.signal or 0)

    @property
    def oom_killed(self) -> bool:
        """True when the kernel killed something of it for want of memory."""
        return bool((self.cgroup or {}).get("oom_kills"))

    @property
    def failed(self) -> bool:
        """True for an end that nobody asked for and that is no success."""
        if self.status == 0:
            return False
        if self.reader_gone and self.status == _SHELL + signal.SIGPIPE:
            return False
        return self.oom_killed or self.asked is None


def find(command: Sequence[str], cwd: Path) -> str:
    """The program of `command` as a path; `NotFound` and `InvalidParams` before anything is started."""
    if not command or not command[0]:
        raise InvalidParams("say the command after --, for example: mothball exec ID -- make test")
    name = command[0]
    found = shutil.which(name if "/" not in name else str(cwd / name))
    if found is None:
        raise NotFound(f"there is no program {name!r} that can be run", what="program", id=name)
    return found


def watch(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    memory: int | None = None,
    log: BinaryIO | None = None,
    out: int = 1,
    err: int = 2,
) -> Watched:
    """Run `command` in `cwd` until it has ended. Its output goes to the descriptors `out` and `err`, and to `log` too.

    Called from the main thread. `memory`: limit in bytes. Signals are passed on to it; Ctrl-C at a terminal reaches it by itself.
    Raises `NotFound` for a program that is not there and `OperationFailed` when it cannot be started.
    """
    program = find(command, cwd)
    with ExitStack() as stack:
        own = stack.enter_context(OwnCgroup(memory))
        asked: list[tuple[int, float]] = []
        terminal = stack.enter_context(own_terminal(out, lambda number: asked.append((number, time.monotonic()))))
        relay = stack.enter_context(_passing_on(asked, by_terminal=terminal is None and _in_foreground()))
        started = time.monotonic()
        argv = own.command([program, *command[1:]])
        side = terminal.slave if terminal is not None else subprocess.PIPE
        errors = side if terminal is None or os.isatty(err) else subprocess.PIPE
        try:
            child = subprocess.Popen(
                argv if terminal is None else terminal.command(argv), cwd=cwd, env=env, stdin=None if terminal is None else side,
                stdout=side, stderr=errors, start_new_session=terminal is not None,
            )  # fmt: skip
        except OSError as error:
            raise OperationFailed(f"{command[0]!r} cannot be started: {error.strerror or error}", reason=str(error)) from error
        stack.callback(_reap, child)
        relay(child)
        output = _Output(log)
        streams = [(child.stdout, out), (child.stderr, err)]
        if terminal is not None:
            terminal.started()
            streams[0] = (os.fdopen(os.dup(terminal.master), "rb", 0), out)
        threads = [output.follow(stream, to) for stream, to in streams if stream is not None]
        dumped = _ended(child)
        code = child.wait()
        seconds = time.monotonic() - started
        facts = own.facts()
        last = time.monotonic() + DRAIN_SECONDS
        for thread in threads:
            thread.join(max(last - time.monotonic(), 0.0))
        return Watched(
            exit_code=code if code >= 0 else None, signal=-code if code < 0 else None, core_dumped=dumped,
            seconds=round(seconds, 3), output=output.text(), output_bytes=output.bytes, cgroup=facts, no_cgroup=own.why_not,
            asked=_asked(asked, code, started + seconds), reader_gone=output.reader_gone,
        )  # fmt: skip


def _asked(asked: Sequence[tuple[int, float]], code: int, ended: float) -> int | None:
    """The signal that somebody sent to end it, when that may be why it ended."""
    for number, at in asked:
        if ended - at <= _ASKED_SECONDS or code in {-number, _SHELL + number}:
            return number
    return None


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Wait, and whether it left a core: what `Popen.wait` does not say."""
    while True:
        try:
            found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return False
        if found is not None:
            return found.si_code == os.CLD_DUMPED


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Nothing of ours fails and leaves the command running unseen."""
    if child.poll() is None:
        child.kill()
        child.wait()


@contextmanager
def _passing_on(asked: list[tuple[int, float]], *, by_terminal: bool) -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Signals that this process gets go to the command too, once it is given; `asked` takes those that ask it to end, and when.

    `by_terminal`: Ctrl-C reaches the command by itself, for it is in the foreground of our terminal: twice would be once too often.
    """
    commands: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def passed(number: int, _frame: FrameType | None) -> None:
        if number in _ENDING:
            asked.append((number, time.monotonic()))
        if commands and not (by_terminal and number in _BY_TERMINAL):
            commands[0].send_signal(number)
        elif not commands:
            early.append(number)

    def started(command: subprocess.Popen[bytes]) -> None:
        commands.append(command)
        for number in early:
            command.send_signal(number)

    # What is ignored here (nohup) is ignored there as well.
    handled = [number for number in _PASSED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, passed) for number in handled}
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False


class _Output:
    """Both streams: passed through, written to the log, the beginning and the end kept."""

    def __init__(self, log: BinaryIO | None) -> None:
        self.bytes = 0
        self.reader_gone = False
        self._log = log
        self._lock = threading.Lock()
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._kept = 0

    def follow(self, stream: Any, to: int) -> threading.Thread:
        """A thread that reads `stream` to its end and writes it to the descriptor `to`."""
        thread = threading.Thread(target=self._read, args=(stream, to), name="exec-output", daemon=True)
        thread.start()
        return thread

    def text(self) -> str:
        """What is kept, cut between lines, with a line that says what is missing."""
        with self._lock:
            head, tail = bytes(self._head), b"".join(self._tail)
        missing = self.bytes - len(head) - len(tail)
        if missing <= 0:
            return (head + tail).decode("utf-8", "replace")
        begin, end = line_end(head.decode("utf-8", "replace")), line_start(tail.decode("utf-8", "replace"))
        missing = self.bytes - len(begin.encode()) - len(end.encode())
        return f"{begin}\n[... {missing} bytes left out ...]\n{end}"

    def _read(self, stream: Any, to: int) -> None:
        with stream:
            while True:
                try:
                    piece = os.read(stream.fileno(), _PIECE)
                except (OSError, ValueError):
                    return
                if not piece:
                    return
                with self._lock:
                    self._keep(piece)
                try:
                    _write(to, piece)
                except OSError:
                    # `| head` has seen enough: the command learns it as it would without us, when the pipe closes.
                    self.reader_gone = True
                    return

    def _keep(self, piece: bytes) -> None:
        self.bytes += len(piece)
        if self._log is not None:
            try:
                self._log.write(piece)
                self._log.flush()
            except OSError as error:
                logger.warning("the log is not written any more: %s", error.strerror)
                self._log = None
        room = HEAD_BYTES - len(self._head)
        if room > 0:
            self._head += piece[:room]
            piece = piece[room:]
        if piece:
            self._tail.append(piece)
            self._kept += len(piece)
        while self._tail and self._kept - len(self._tail[0]) >= TAIL_BYTES:
            self._kept -= len(self._tail.popleft())


def _write(to: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(to, view) :]
