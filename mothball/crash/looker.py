"""Looking for secrets in a process of its own, beside the one that packs.

A look is mostly one long call without the interpreter lock, but what it meets needs the interpreter, thousands of times, and
packing needs it all the time: in threads of one process each would wait for the other. So the looks are threads of another one,
which share what RE2 builds while it reads. It is a fork: it knows the rules, the values and the open files as they were then, is
asked through sockets, and changes nothing. Where none can be made, or it is killed, its work is done here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Final, NoReturn

import msgspec

Look = Callable[..., Any]
"""A look at something that numbers, bytes and lists of them name; what it gives is made of these and of texts."""
_SIZE: Final = struct.Struct("<q")
_FAILED: Final = -1
_encode, _decode = msgspec.msgpack.encode, msgspec.msgpack.decode
THREADS: Final = max(1, min(3, len(os.sched_getaffinity(0))))
"""The packer itself has work for more than one processor."""
_PR_SET_PDEATHSIG: Final = 1


class Looker:
    """Answers the questions `looks`, numbered as they stand there. Threads may share one. Use as a context manager."""

    def __init__(self, looks: Sequence[Look], files: Iterable[int], threads: int = THREADS) -> None:
        """`files` are the descriptors that the looks read; every other one is closed in the process."""
        self._looks = looks
        self._changed = threading.Condition()
        self._waiting = [0] * len(looks)
        self.pid: int | None = None
        """The process; None when there is none."""
        self._lines: list[socket.socket] = []
        if threads:
            with suppress(OSError):
                self.pid, self._lines = _started(looks, set(files), threads)
        self._idle: list[socket.socket | None] = [*self._lines] or [None]

    def __enter__(self) -> Looker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for line in self._lines:
            line.close()
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)

    def ask(self, look: int, *args: Any) -> Any:
        """What look number `look` finds; raises what it raises. Lower numbers are answered before higher ones."""
        line = self._taken(look)
        try:
            answer = None if line is None else _asked(line, look, args)
        except OSError:
            line = answer = None  # the process was killed: nobody asks it again
        finally:
            with self._changed:
                self._idle.append(line)
                self._changed.notify_all()
        return self._looks[look](*args) if answer is None else _decode(answer)

    def _taken(self, look: int) -> socket.socket | None:
        with self._changed:
            self._waiting[look] += 1
            self._changed.wait_for(lambda: self._idle and not any(self._waiting[:look]))
            self._waiting[look] -= 1
            return self._idle.pop()


def _asked(to: socket.socket, look: int, args: tuple[Any, ...]) -> bytes | None:
    """The answer of a process; None when its look failed, which is then done here to have the error. Raises `OSError`."""
    _send(to, _encode((look, *args)))
    (size,) = _SIZE.unpack(_exactly(to, _SIZE.size))
    return None if size == _FAILED else _exactly(to, size)


def _send(to: socket.socket, data: bytes) -> None:
    to.sendall(_SIZE.pack(len(data)) + data)


def _exactly(source: socket.socket, size: int) -> bytes:
    out = bytearray()
    while len(out) < size:
        piece = source.recv(min(size - len(out), 1024**2))
        if not piece:
            raise ConnectionResetError
        out += piece
    return bytes(out)


def _started(looks: Sequence[Look], keep: set[int], threads: int) -> tuple[int, list[socket.socket]]:
    """The process and a socket for each of its threads. Raises `OSError`."""
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(threads)]
        for ours, theirs in pairs:
            stack.callback(theirs.close)
            stack.callback(ours.close)
        parent = os.getpid()
        with warnings.catch_warnings():
            # Other threads of this process renew a lease or wait; a lock that one of them holds is none that a look needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            _serve(looks, [theirs for _, theirs in pairs], keep, parent)
        stack.pop_all()
    for _, theirs in pairs:
        theirs.close()
    return pid, [ours for ours, _ in pairs]


def _serve(looks: Sequence[Look], asked: list[socket.socket], keep: set[int], parent: int) -> NoReturn:
    """The life of the process: answer until nobody asks any more. It never outlives its parent."""
    try:
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGALRM,
            signal.SIGCHLD,
        ):
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # A pipe that somebody waits for the end of would otherwise stay open here.
        keep |= {line.fileno() for line in asked}
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names only
            if (fd := int(name)) not in keep:
                with suppress(OSError):
                    os.close(fd)
        for line in asked[1:]:
            threading.Thread(target=_answer, args=(looks, line, parent), daemon=True).start()
        _answer(looks, asked[0], parent)
    finally:
        os._exit(0)


def _answer(looks: Sequence[Look], asked: socket.socket, parent: int) -> None:
    with suppress(OSError):
        while os.getppid() == parent:
            (size,) = _SIZE.unpack(_exactly(asked, _SIZE.size))
            look, *args = _decode(_exactly(asked, size))
            try:
                answer = _encode(looks[look](*args))
            except Exception:  # whoever asked does it again, and meets the error there
                asked.sendall(_SIZE.pack(_FAILED))
            else:
                _send(asked, answer)
