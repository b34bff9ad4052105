"""Children of the local fleet: restarted later each time, ended with everything they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import eventually
from workers import guard, processes
from workers.processes import Child, Guard

# A program with a child of its own that ignores SIGTERM, as a busy pool process does.
FAMILY = "sh -c 'trap \"\" TERM; sleep 300' & echo child $!; wait"


@pytest.fixture
def watcher() -> Iterator[Guard]:
    found = Guard()
    found.start()
    yield found
    found.stop()


def child(folder: Path, watcher: Guard, script: str, *, grace: float = 5) -> Child:
    return Child(
        "thing", ["sh", "-c", script], env=dict(os.environ), cwd=folder, log_file=folder / "thing.log", grace=grace, guard=watcher
    )


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def test_a_child_that_ends_is_started_again_and_later_each_time(
    tmp_path: Path, watcher: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BACKOFF_FIRST_SECONDS", 0.05)
    said: list[str] = []
    thing = child(tmp_path, watcher, "echo started; exit 3")
    thing.start()

    def restarted() -> bool:
        thing.check(said.append)
        return thing.restarts == 3

    eventually(restarted, seconds=10)
    ends = [line for line in said if "ended" in line]
    assert "exit code 3" in ends[0]
    assert [line.split(" in ")[1].split(" s;")[0] for line in ends[:3]] == ["0.05", "0.1", "0.2"]
    thing.terminate()
    thing.wait(lambda: False)
    assert thing.tail().splitlines().count("started") >= 3
    assert (tmp_path / "thing.log").stat().st_mode & 0o777 == 0o600


def test_the_restart_ends_what_the_dead_one_left_behind(tmp_path: Path, watcher: Guard) -> None:
    thing = child(tmp_path, watcher, FAMILY)
    thing.start()
    group = thing.pid
    assert group is not None
    eventually(lambda: len(members(group)) >= 3)
    os.kill(group, signal.SIGKILL)
    time.sleep(0.1)
    assert members(group)
    eventually(lambda: thing.check(lambda _: None) or not members(group), seconds=5)
    thing.terminate()
    thing.wait(lambda: True)


def test_stop_waits_for_the_grace_and_then_kills_the_group(tmp_path: Path, watcher: Guard) -> None:
    thing = child(tmp_path, watcher, "trap '' TERM; " + FAMILY + "; sleep 300", grace=0.3)
    thing.start()
    group = thing.pid
    assert group is not None
    eventually(lambda: "child" in thing.tail())
    thing.terminate()
    assert thing.wait(lambda: False) is False
    eventually(lambda: not members(group))


def test_a_child_that_ends_in_time_ended_in_order(tmp_path: Path, watcher: Guard) -> None:
    thing = child(tmp_path, watcher, "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done")
    thing.start()
    eventually(lambda: "up" in thing.tail())
    thing.terminate()
    assert thing.wait(lambda: False) is True
    assert thing.pid is None


def test_a_large_log_is_put_aside_at_the_start(tmp_path: Path, watcher: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_KEEP_BYTES", 10)
    (tmp_path / "thing.log").write_text("x" * 11)
    thing = child(tmp_path, watcher, "echo new")
    thing.start()
    thing.wait(lambda: False)
    assert (tmp_path / "thing.log.1").read_text() == "x" * 11
    assert (tmp_path / "thing.log").read_text() == "new\n"


def start_group(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL, start_new_session=True)


def test_when_the_supervisor_is_gone_the_guard_ends_every_group_it_was_told_of(tmp_path: Path) -> None:
    hard, soft, other = (
        start_group(FAMILY),
        start_group(f"trap 'echo bye > {tmp_path}/bye; exit 0' TERM; while :; do sleep 0.05; done"),
        start_group("sleep 300"),
    )
    try:
        eventually(lambda: len(members(hard.pid)) >= 3)
        script = (
            "import os, sys, time\nfrom workers.processes import Guard\nguard = Guard(); guard.start()\n"
            f"guard.add({hard.pid}, 0); guard.add({other.pid}, 0); guard.remove({other.pid}); guard.add({soft.pid}, 5)\n"
            "print('ready', flush=True); time.sleep(300)\n"
        )
        supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(guard.__file__).parents[1])
        assert supervisor.stdout is not None
        with supervisor.stdout:
            assert supervisor.stdout.readline() == b"ready\n"
            supervisor.kill()
            supervisor.wait()
        eventually(lambda: not members(hard.pid), seconds=5)
        assert soft.wait(5) == 0
        assert (tmp_path / "bye").exists()
        assert other.poll() is None
    finally:
        for process in (hard, soft, other):
            guard.send(process.pid, signal.SIGKILL)
            process.wait()


def test_a_guard_that_dies_is_replaced_and_told_again(tmp_path: Path) -> None:
    watcher = Guard()
    watcher.start()
    thing = start_group("sleep 300")
    watcher.add(thing.pid, 0)
    assert watcher._process is not None
    watcher._process.kill()
    watcher._process.wait()
    watcher.check()
    watcher.stop()
    assert thing.wait(5) == -signal.SIGKILL
