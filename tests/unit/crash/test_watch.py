"""A watched command: its output, its end, its signals and its memory, with real processes and, where possible, a real cgroup."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mothball.crash.cgroup import MOUNT
from mothball.crash.own_cgroup import OwnCgroup
from mothball.crash.watch import HEAD_BYTES, TAIL_BYTES, Watched, find, watch
from mothball.errors import InvalidParams, NotFound
from tests.support import eventually, not_permitted

EATS = "x = []\nwhile True: x.append(bytearray(1 << 20))"


def ran(folder: Path, *command: str, memory: int | None = None, log: Path | None = None) -> tuple[Watched, bytes, bytes]:
    """Run `command` in `folder`; how it ended, and what passed through on both descriptors."""
    with (folder / ".out").open("w+b") as out, (folder / ".err").open("w+b") as err, contextlib.ExitStack() as stack:
        file = stack.enter_context(log.open("wb")) if log else None
        found = watch(command, cwd=folder, memory=memory, log=file, out=out.fileno(), err=err.fileno())
        return found, (folder / ".out").read_bytes(), (folder / ".err").read_bytes()


def left() -> set[str]:
    return {str(each) for each in MOUNT.rglob("mothball-exec-*")}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> object:
    before = left()
    yield
    mine = left() - before  # and perhaps those of another test beside this one, which go as well
    eventually(lambda: not mine & left(), what="the folders of cgroups")


def test_output_passes_through_and_the_exit_code_is_known(tmp_path: Path) -> None:
    found, out, err = ran(tmp_path, "sh", "-c", "pwd; echo error >&2; exit 3")
    assert (out, err) == (f"{tmp_path}\n".encode(), b"error\n")
    assert (found.exit_code, found.signal, found.status, found.failed) == (3, None, 3, True)
    assert set(found.output.split("\n")) == {"", str(tmp_path), "error"}
    assert found.output_bytes == len(out) + len(err)


def test_success_is_no_failure(tmp_path: Path) -> None:
    found, _, _ = ran(tmp_path, "true")
    assert (found.status, found.failed, found.oom_killed, found.asked) == (0, False, False, None)


def test_a_signal_and_a_core_are_told(tmp_path: Path) -> None:
    found, _, _ = ran(tmp_path, "sh", "-c", "kill -SEGV $$")
    assert (found.exit_code, found.signal, found.status, found.failed) == (None, signal.SIGSEGV, 139, True)
    assert isinstance(found.core_dumped, bool)


def test_of_long_output_both_ends_are_kept_and_all_of_it_passes(tmp_path: Path) -> None:
    lines = 300_000
    found, out, _ = ran(tmp_path, "seq", "-f", "line %09.0f", str(lines), log=tmp_path / "log")
    assert len(out) == found.output_bytes == 15 * lines
    assert (tmp_path / "log").read_bytes() == out
    assert found.output.startswith("line 000000001\n")
    assert found.output.endswith(f"line {lines:09d}\n")
    assert "bytes left out ...]" in found.output
    assert TAIL_BYTES // 2 < len(found.output) < HEAD_BYTES + TAIL_BYTES + 70_000
    # Every line is whole.
    assert {len(line) for line in found.output.split("\n") if line.startswith("line")} == {14}


def test_the_environment_and_arguments_arrive_as_they_are(tmp_path: Path) -> None:
    code = "import sys, os; print(sys.argv[1:], os.environ['MARK'])"
    os.environ["MARK"] = "a b"
    try:
        _, out, _ = ran(tmp_path, sys.executable, "-c", code, "a b", "", "$(x)", "-n", "'\"")
    finally:
        del os.environ["MARK"]
    assert out.decode() == f"{['a b', '', '$(x)', '-n', chr(39) + chr(34)]} a b\n"


def test_an_unknown_program_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no-such-program"):
        find(["no-such-program"], tmp_path)
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    with pytest.raises(NotFound):
        find(["./plain"], tmp_path)
    (tmp_path / "plain").chmod(0o755)
    assert find(["./plain"], tmp_path) == str(tmp_path / "plain")
    for nothing in ([], [""]):
        with pytest.raises(InvalidParams):
            find(nothing, tmp_path)


def test_what_the_command_leaves_in_the_background_does_not_hold_it_up(tmp_path: Path) -> None:
    started = time.monotonic()
    found, out, _ = ran(tmp_path, "sh", "-c", "sleep 60 & echo $!")
    assert found.status == 0
    assert time.monotonic() - started < 10
    os.kill(int(out), signal.SIGKILL)  # it was left alone


def cgroup_or_skip(memory: int | None = None) -> None:
    with OwnCgroup(memory) as own:
        if own.folder is None:
            not_permitted(f"make a cgroup ({own.why_not})")


def test_a_command_over_its_memory_limit_is_known_as_an_oom_kill(tmp_path: Path) -> None:
    cgroup_or_skip(64 << 20)
    found, _, _ = ran(tmp_path, sys.executable, "-c", EATS, memory=64 << 20)
    assert (found.signal, found.oom_killed, found.failed) == (signal.SIGKILL, True, True)
    assert found.cgroup is not None
    assert found.cgroup["memory_limit"] == 64 << 20
    assert 60 << 20 < found.cgroup["memory_peak"] <= 64 << 20


def test_a_child_that_was_killed_for_memory_counts_for_the_command(tmp_path: Path) -> None:
    cgroup_or_skip(64 << 20)
    found, _, _ = ran(tmp_path, "sh", "-c", f"{sys.executable} -c '{EATS}'; exit 2", memory=64 << 20)
    assert (found.exit_code, found.oom_killed) == (2, True)


def test_a_kill_that_was_not_for_memory_is_none(tmp_path: Path) -> None:
    cgroup_or_skip()
    found, _, _ = ran(tmp_path, "sh", "-c", "kill -KILL $$", memory=64 << 20)
    assert (found.signal, found.oom_killed) == (signal.SIGKILL, False)


def test_where_no_cgroup_can_be_made_it_is_said_and_the_command_runs(tmp_path: Path) -> None:
    with OwnCgroup(1 << 20, mount=tmp_path / "nowhere") as own:
        assert own.folder is None
        assert "no memory controller" in own.why_not
        assert own.command(["true"]) == ["true"]
        assert own.facts() is None
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "cgroup.procs").write_text("")
    # A folder that is no cgroup: nothing can be moved there, and it goes again.
    with OwnCgroup(1 << 20, mount=tmp_path) as own:
        assert own.folder is None
        assert "no cgroup file system" in own.why_not
    assert not list((tmp_path / "memory").glob("mothball-exec-*"))


SCRIPT = """
import sys
from pathlib import Path
from mothball.crash.watch import watch
found = watch(sys.argv[1:], cwd=Path("."))
sys.stderr.write(f"{found.exit_code} {found.signal} {found.asked} {found.failed} {found.reader_gone}\\n")
"""


TERMINAL = """
import os, sys
pid, terminal = os.forkpty()
if pid == 0:  # leader of a session, in the foreground of a terminal of its own
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], "sh", "-c", sys.argv[2]])
asked = False
try:
    while piece := os.read(terminal, 4096):
        os.write(1, piece)
        if b"ready" in piece and not asked:
            asked = True
            os.write(terminal, bytes([3]))
except OSError:  # the other side is gone
    os.waitpid(pid, 0)
"""


def script(*command: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*before, sys.executable, "-c", SCRIPT, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_asks_to_end_is_passed_on_and_is_no_crash(number: signal.Signals) -> None:
    process = script("sh", "-c", "echo ready; exec sleep 60")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert err.decode().split()[-5:] == ["None", str(int(number)), str(int(number)), "False", "False"]


def test_ctrl_c_at_a_terminal_reaches_the_command_once_and_is_no_crash() -> None:
    command = "trap 'echo got' INT; echo ready; n=0; while [ $n -lt 20 ]; do sleep 0.05; n=$((n+1)); done; exit 7"
    done = subprocess.run([sys.executable, "-c", TERMINAL, SCRIPT, command], capture_output=True, timeout=60, check=True)
    seen = done.stdout
    assert seen.count(b"got\r\n") == 1
    assert seen.split()[-5:] == [b"7", b"None", b"2", b"False", b"False"]


def test_what_is_ignored_under_nohup_is_ignored_by_the_command_too() -> None:
    before = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    process = script("sh", "-c", "echo ready; sleep 0.5; echo on; exit 6", before=before)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=20)
    assert out == b"on\n"
    assert err.decode().split()[-5:] == ["6", "None", "None", "True", "False"]


def test_other_signals_are_passed_on_too() -> None:
    process = script("sh", "-c", "trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=20)
    assert out == b"got\n"
    assert err.decode().split()[-5:] == ["5", "None", "None", "True", "False"]


def test_a_reader_that_leaves_ends_the_command_and_is_no_crash() -> None:
    process = script("yes")
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=20)
    process.stderr.close()
    assert err.decode().split()[-5:] == ["None", str(int(signal.SIGPIPE)), "None", "False", "True"]


def test_the_cgroup_of_a_killed_process_goes_with_the_next_and_a_living_one_s_stays(tmp_path: Path) -> None:
    cgroup_or_skip()
    with OwnCgroup() as living, OwnCgroup() as young, OwnCgroup() as killed:
        folders = [each.folder for each in (living, young, killed) if each.folder is not None]
        for each in (living, killed):
            assert each.folder is not None
            os.utime(each.folder, (0, 0))
        for each in (young, killed):
            os.close(each._lock)  # as the kernel does when a process dies
            each._lock = -1
        with OwnCgroup():
            assert [folder.exists() for folder in folders] == [True, True, False]


def test_what_stays_in_the_cgroup_moves_home_and_the_folder_goes(tmp_path: Path) -> None:
    cgroup_or_skip()
    found, out, _ = ran(tmp_path, "sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!")
    pid = int(out)
    try:
        assert found.cgroup is not None
        assert "mothball-exec-" not in eventually(lambda: Path(f"/proc/{pid}/cgroup").read_text())
    finally:
        os.kill(pid, signal.SIGKILL)
