"""A terminal of the command's own, where ours is one: colours, editors, password prompts and the window's size as without us.

What is typed goes in as it is typed, so Ctrl-C is the business of the command's terminal; this side only sees that it was asked.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

_PIECE: Final = 4096
# A leader of a session that opens a terminal gets it as its own: no code of ours has to run between fork and exec.
_TAKE: Final = 'exec <>"$0" && exec "$@"'
_KEYS: Final = ((termios.VINTR, signal.SIGINT), (termios.VQUIT, signal.SIGQUIT))
_LOCAL, _CHARACTERS = 3, 6


class Terminal:
    """`master` is our side; `slave` is the command's, open until `started`. Typed keys that ask to end go to `asked`."""

    def __init__(self, asked: Callable[[int], None]) -> None:
        self._asked = asked
        self.master, self.slave = os.openpty()
        self._name = os.ttyname(self.slave)
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._type, name="exec-input", daemon=True)

    def command(self, command: list[str]) -> list[str]:
        """What to start, as leader of a new session, so that the terminal is `command`'s own."""
        return ["/bin/sh", "-c", _TAKE, self._name, *command]

    def started(self) -> None:
        """The command has its side; from now on what is typed goes to it."""
        os.close(self.slave)
        self.slave = -1
        self._thread.start()

    def resize(self) -> None:
        """Give it the size of our window; the kernel tells the command."""
        with suppress(OSError):
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))

    def close(self) -> None:
        os.write(self._wake[1], b"x")
        if self._thread.is_alive():
            self._thread.join()
        for fd in (self.master, self.slave, *self._wake):
            if fd >= 0:
                os.close(fd)

    def _type(self) -> None:
        with suppress(OSError):
            while self._wake[0] not in (ready := select.select([0, self._wake[0]], [], [])[0]):
                piece = os.read(0, _PIECE) if ready else b""
                if not piece:
                    return
                self._look(piece)
                view = memoryview(piece)
                while view:
                    # A command that reads nothing must not keep us from ending with it.
                    if self._wake[0] in select.select([self._wake[0]], [self.master], [])[0]:
                        return
                    view = view[os.write(self.master, view) :]

    def _look(self, piece: bytes) -> None:
        """Note a key that ends the command, unless it reads its keys itself, as editors do."""
        modes: list[Any] = termios.tcgetattr(self.master)
        if modes[_LOCAL] & termios.ISIG:
            for index, number in _KEYS:
                if modes[_CHARACTERS][index] in piece and modes[_CHARACTERS][index] != b"\0":
                    self._asked(number)


@contextmanager
def own_terminal(out: int, asked: Callable[[int], None]) -> Iterator[Terminal | None]:
    """A terminal for the command when standard input and `out` are one and we are in its foreground; else None.

    Ours passes on every key until the block ends, then it is as it was. Called from the main thread.
    """
    with ExitStack() as stack:
        terminal = None
        if _at_terminal(out):
            with suppress(OSError, termios.error):
                modes = termios.tcgetattr(0)
                terminal = Terminal(asked)
                stack.callback(terminal.close)
                termios.tcsetattr(terminal.slave, termios.TCSANOW, modes)
                terminal.resize()
                resize = terminal.resize
                before = signal.signal(signal.SIGWINCH, lambda *_: resize())
                stack.callback(signal.signal, signal.SIGWINCH, before)
                stack.callback(termios.tcsetattr, 0, termios.TCSADRAIN, modes)
                tty.setraw(0, termios.TCSADRAIN)
        yield terminal


def _at_terminal(out: int) -> bool:
    try:
        return os.isatty(out) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
