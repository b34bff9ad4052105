"""Running another program for a driver: bounded in time and output, without a shell, without this worker's secrets."""

from __future__ import annotations

import os
import selectors
import signal
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mothball.errors import OperationFailed, PathNotAllowed, TimedOut
from mothball.runtime import proc
from mothball.runtime.driver import Tick

MAX_OUTPUT = 1024 * 1024
_TICK_SECONDS = 0.2
_CHUNK = 65_536
_PASSED_ON = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
"""Of the environment. The rest holds the password of Redis."""
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Finished(NamedTuple):
    """A program that has ended."""

    code: int
    out: str
    err: str


def run(
    argv: Sequence[str],
    *,
    seconds: float,
    what: str,
    input_text: str = "",
    tick: Tick | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run `argv` and wait for its end at most `seconds`; `tick` is called meanwhile and may raise.

    When it is not waited for any longer, its process group and all its children are killed. Raises `TimedOut` (naming `what`), and
    `OperationFailed` when it cannot be started or says more than `MAX_OUTPUT` bytes.
    """
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        process = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**passed, "LC_ALL": "C.UTF-8", **(environment or {})}, cwd="/", start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise OperationFailed(f"{what}: {argv[0]} cannot be run: {error}", reason=str(error)) from None
    try:
        out, err = _talk(process, input_text.encode("utf-8", "surrogateescape"), time.monotonic() + seconds, tick, what, seconds)
        return Finished(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
    finally:
        _end(process)


def _talk(
    process: subprocess.Popen[bytes], data: bytes, deadline: float, tick: Tick | None, what: str, seconds: float
) -> tuple[bytes, bytes]:
    assert process.stdin and process.stdout and process.stderr  # noqa: S101 - all three are pipes
    out: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    for pipe in (process.stdin, process.stdout, process.stderr):
        os.set_blocking(pipe.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        if data:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        else:
            process.stdin.close()
        # Its end counts, not that of its pipes: a daemon it left behind may keep those open for ever.
        ended = False
        while selector.get_map() and not ended:
            ended = process.poll() is not None
            left = deadline - time.monotonic()
            if left <= 0 and not ended:
                raise TimedOut(what=what, seconds=seconds)
            for key, _ in selector.select(0 if ended else min(left, _TICK_SECONDS)):
                if key.fileobj is process.stdin:
                    data = _write(process, data)
                    if not data:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                if not _drain(key.fd, out[key.fd]):
                    selector.unregister(key.fileobj)
                if len(out[key.fd]) > MAX_OUTPUT:
                    raise OperationFailed(f"{what}: it says more than {MAX_OUTPUT} bytes", reason="too much output")
            if tick is not None:
                tick()
        while process.poll() is None:
            if time.monotonic() >= deadline:
                raise TimedOut(what=what, seconds=seconds)
            if tick is not None:
                tick()
            time.sleep(0.01)
    return bytes(out[process.stdout.fileno()]), bytes(out[process.stderr.fileno()])


def _write(process: subprocess.Popen[bytes], data: bytes) -> bytes:
    assert process.stdin  # noqa: S101 - a pipe
    try:
        return data[os.write(process.stdin.fileno(), data[:_CHUNK]) :]
    except BlockingIOError:
        return data
    except OSError:  # it does not listen, which is its business
        return b""


def _drain(fd: int, into: bytearray) -> bool:
    """Read what is there; False at the end of the pipe."""
    while len(into) <= MAX_OUTPUT:
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        into += chunk
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a program that still runs, with its process group and all its children, and close its pipes."""
    if process.poll() is None:
        # Its parent sees it as long as it has not waited: what runs in a session of its own (sudo, ssh) hangs on it still.
        found = proc.read(process.pid)
        tree = proc.grown([found.key], proc.everything()) if found is not None else {}
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        for each in tree.values():
            with suppress(OSError):
                proc.send(each, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def trusted(path: Path, what: str) -> None:
    """Raise `PathNotAllowed` unless only root and this worker's own user can change what `path` leads to.

    Every folder above it counts, as for ssh's keys: whoever can rename one of them can put something else in its place. A folder
    with the sticky bit (like /tmp) lets nobody do that to another's. What is not there is trusted: nothing is read from it.
    """
    mine = {0, os.geteuid()}
    for each in (path, *path.parents):
        try:
            found = each.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise PathNotAllowed(f"{what} {path}: {each} cannot be looked at: {error.strerror}", path=str(path)) from None
        if stat.S_ISLNK(found.st_mode):
            raise PathNotAllowed(f"{what} {path}: {each} is a symbolic link; write the real path", path=str(path))
        sticky = each != path and stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if found.st_uid not in mine or (found.st_mode & _WRITABLE_BY_OTHERS and not sticky):
            raise PathNotAllowed(
                f"{what} {path}: {each} can be changed by others than root and this worker's user (chown, chmod go-w)",
                path=str(path),
            )
