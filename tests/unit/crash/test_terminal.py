"""A command at a terminal: it sees one of its own, which behaves as ours would, and ours is as it was at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mothball.crash.watch import _asked
from tests.support import eventually

RUN = """
import sys
from pathlib import Path
from mothball.crash.watch import watch
found = watch(sys.argv[1:], cwd=Path("."))
sys.stderr.write(f"END {found.exit_code} {found.signal} {found.asked} {found.failed} [{found.output!r}]\\n")
"""


class Typist:
    """Somebody at a terminal of 30 lines with 100 columns who runs one command."""

    def __init__(self, *command: str) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
            os.execv(sys.executable, [sys.executable, "-c", RUN, *command])  # noqa: S606
        self.seen = b""

    def read(self) -> None:
        if select.select([self.terminal], [], [], 0.05)[0]:
            with suppress(OSError):
                self.seen += os.read(self.terminal, 65_536)

    def until(self, text: bytes) -> bytes:
        def found() -> bool:
            self.read()
            return text in self.seen

        return eventually(found, seconds=20, what=f"{text!r} on the terminal") and self.seen

    def type(self, text: bytes) -> None:
        os.write(self.terminal, text)

    def end(self) -> list[bytes]:
        self.until(b"]\r\n") if b"END" in self.until(b"END ") else None
        return self.seen[self.seen.rindex(b"END ") :].split()[1:5]


@pytest.fixture
def typists() -> Iterator[list[Typist]]:
    made: list[Typist] = []
    yield made
    for each in made:
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)
        os.waitpid(each.pid, 0)
        os.close(each.terminal)


def at_terminal(typists: list[Typist], script: str) -> Typist:
    made = Typist("sh", "-c", script)
    typists.append(made)
    return made


def test_a_command_at_a_terminal_has_one_with_its_size_and_reads_what_is_typed(typists: list[Typist]) -> None:
    run = at_terminal(typists, 'test -t 0 && test -t 1 && test -t 2 && stty size; read x; echo "got $x"; exit 3')
    run.until(b"30 100\r\n")
    run.type(b"typed\n")
    assert run.end() == [b"3", b"None", b"None", b"True"]
    assert b"got typed" in run.seen
    assert run.seen.count(b"typed\r\n") == 2  # the echo of one terminal, not of two; and the answer


def test_the_window_s_new_size_reaches_the_command(typists: list[Typist]) -> None:
    run = at_terminal(typists, "trap 'stty size' WINCH; echo ready; n=0; while [ $n -lt 400 ]; do sleep 0.05; n=$((n+1)); done")
    run.until(b"ready")
    fcntl.ioctl(run.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 77, 0, 0))
    run.until(b"41 77")
    run.type(b"\x03")
    run.end()


def test_ctrl_c_ends_the_command_and_is_no_crash(typists: list[Typist]) -> None:
    run = at_terminal(typists, "echo ready; exec sleep 60")
    run.until(b"ready")
    run.type(b"\x03")
    assert run.end() == [b"None", b"2", b"2", b"False"]


def test_a_program_that_reads_its_keys_itself_gets_ctrl_c_as_one(typists: list[Typist]) -> None:
    run = at_terminal(typists, "stty raw -echo; echo ready; head -c 1 | od -An -tx1; stty sane; exit 4")
    run.until(b"ready")
    run.type(b"\x03")
    assert run.end() == [b"4", b"None", b"None", b"True"]
    assert b" 03" in run.seen


def test_our_terminal_is_afterwards_as_it_was(typists: list[Typist]) -> None:
    run = at_terminal(typists, "stty raw -echo; echo ready; sleep 0.3; kill -9 $$")
    before = termios.tcgetattr(run.terminal)
    run.until(b"ready")
    assert run.end() == [b"None", b"9", b"None", b"True"]
    assert termios.tcgetattr(run.terminal) == before


def test_when_we_are_killed_the_command_is_hung_up(typists: list[Typist], tmp_path: Path) -> None:
    run = at_terminal(typists, f"echo $$ > {tmp_path}/pid; echo ready; exec sleep 60")
    run.until(b"ready")
    command = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}")
    lines = (command / "cgroup").read_text().splitlines()
    os.kill(run.pid, signal.SIGKILL)
    eventually(lambda: not command.exists() or not (command / "cmdline").read_bytes(), seconds=10)
    name = next((line.rpartition("/")[2] for line in lines if "/mothball-exec-" in line), None)
    for left in Path("/sys/fs/cgroup").rglob(name) if name else ():  # the next command would take it away, a minute from now
        eventually(lambda each=left: not (each / "cgroup.procs").read_text())  # type: ignore[misc]
        left.rmdir()


def test_errors_that_go_elsewhere_go_there(typists: list[Typist], tmp_path: Path) -> None:
    run = Typist("sh", "-c", "exit 0")
    typists.append(run)
    run.end()
    code = RUN.replace("sys.stderr.write", "sys.stdout.write")
    outer = ["sh", "-c", f'exec "$0" -c "$1" sh -c "test -t 2 || echo apart >&2; exit 5" 2>{tmp_path}/err', sys.executable, code]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("sh", outer)  # noqa: S606
    seen = b""
    with suppress(OSError):
        while piece := os.read(terminal, 65_536):
            seen += piece
    os.waitpid(pid, 0)
    os.close(terminal)
    assert b"END 5 None None True" in seen
    assert (tmp_path / "err").read_text() == "apart\n"


def test_with_standard_input_from_elsewhere_there_are_pipes_as_ever() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, "sh", "-c", "test -t 1; echo $?; cat"], input=b"in\n", capture_output=True, check=True
    )
    assert done.stdout == b"1\nin\n"


def test_a_key_pressed_long_ago_does_not_excuse_a_crash() -> None:
    now = time.monotonic()
    assert _asked([(2, now - 3600)], 1, now) is None
    assert _asked([(2, now - 3600)], -2, now) == 2
    assert _asked([(15, now - 60)], 143, now) == 15
    assert _asked([(2, now - 1)], 1, now) == 2
