"""Driver `process` with real processes: what belongs to a tree is ended, and nothing else is ever signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mothball.errors import Cancelled, InvalidParams, NotRunning, OperationFailed
from mothball.runtime import driver_for, handle_of_pid, proc
from mothball.runtime.ending import Ending
from mothball.runtime.usage import disk_bytes
from tests.integration.runtime.support import Bench, nothing
from tests.support import eventually, not_permitted

SLEEPER = "say('up'); sleep()"


def test_n23_alive_means_this_pid_with_this_start_time(bench: Bench) -> None:
    process = bench.start(SLEEPER)
    found = bench.driver(process).alive()
    assert (found.alive, found.sure) == (True, True)
    assert str(process.pid) in found.reason
    process.kill()
    process.wait()
    # The handle was made while it ran; now nobody has its pid.
    gone = driver_for({"driver": "process", "pid": process.pid, "start_time": 1}, bench.settings).alive()
    assert (gone.alive, gone.sure) == (False, True)
    assert "has ended" in gone.reason


def test_a_process_that_ends_at_term_is_not_killed_and_its_exit_code_is_known(bench: Bench) -> None:
    process = bench.start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); say('up'); sleep()")
    bench.said("up")
    stopped = bench.driver(process).stop(10, nothing)
    assert (stopped.how, stopped.left) == ("term", [])
    assert stopped.facts["exit_code"] == 7
    assert process.wait() == 7


def test_a_process_that_ignores_term_is_killed_after_the_grace_and_not_before(bench: Bench) -> None:
    process = bench.start("ignore(); say('up'); sleep()")
    bench.said("up")
    driver = bench.driver(process)
    began = time.monotonic()
    stopped = driver.stop(0.7, nothing)
    assert time.monotonic() - began >= 0.7
    assert (stopped.how, stopped.left, stopped.facts["killed"]) == ("kill", [], 1)
    assert process.wait() == -9
    assert driver.stop(0.1, nothing).how == "was_dead"


def test_the_whole_tree_ends_children_of_children_and_a_daemon_of_the_same_session(bench: Bench) -> None:
    process = bench.start(
        """
        ignore()
        if os.fork() == 0:
            if os.fork() == 0:          # a double fork: its parent is init from here on
                time.sleep(0.3)
                say("daemon")
                sleep()
            os._exit(0)
        os.wait()
        if os.fork() == 0:
            os.setsid()                 # a session of its own, but still a child
            if os.fork() == 0:
                os.setpgid(0, 0)
                say("grandchild")
                sleep()
            say("child")
            sleep()
        say("leader")
        sleep()
        """
    )
    pids = [bench.said(name) for name in ("daemon", "grandchild", "child", "leader")]
    daemon = proc.read(pids[0])
    assert daemon is not None
    assert daemon.ppid != process.pid
    stopped = bench.driver(process).stop(0.2, nothing)
    assert stopped.left == []
    assert [bench.runs(pid) for pid in pids] == [False] * 4
    assert stopped.facts["processes"] == 4


def test_a_process_that_forks_while_it_is_killed_does_not_get_away(bench: Bench) -> None:
    """Each generation lives for milliseconds and leaves the next: whoever signals what it saw a moment ago is always too late."""
    process = bench.start(
        """
        ignore()
        say("up")
        if os.fork():
            sleep()
        deadline = time.monotonic() + 30    # one at a time, and never for longer than the test
        count = 0
        while time.monotonic() < deadline:
            if os.fork():
                os._exit(0)
            count += 1
            fd = os.open(os.path.join(folder, "count"), os.O_WRONLY | os.O_CREAT)
            os.write(fd, b"%d" % count)
            os.close(fd)
        """
    )
    session = bench.said("up")

    def generations() -> int:
        return int((bench.folder / "count").read_text() or 0) if (bench.folder / "count").exists() else 0

    eventually(lambda: generations() > 20)
    stopped = bench.driver(process).stop(0.2, nothing)
    assert (stopped.how, stopped.left) == ("kill", [])
    assert [each for each in proc.everything().values() if each.session == session and not each.dead] == []
    ended_at = generations()
    time.sleep(0.3)
    assert generations() == ended_at


def test_children_that_are_born_after_term_belong_to_it_also_when_their_parent_has_ended(bench: Bench) -> None:
    process = bench.start(
        """
        def late(*_):
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                say("late")
                sleep()
            os._exit(0)
        signal.signal(signal.SIGTERM, late)
        say("up")
        sleep()
        """
    )
    bench.said("up")
    stopped = bench.driver(process).stop(0.5, nothing)
    assert (stopped.how, stopped.left) == ("kill", [])
    assert not bench.runs(bench.said("late"))


def test_a_stopped_process_hears_of_the_end_in_time(bench: Bench) -> None:
    process = bench.start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); say('up'); os.kill(os.getpid(), 19); sleep()")
    bench.said("up")
    eventually(lambda: (found := proc.read(process.pid)) is not None and found.state == "T")
    assert bench.driver(process).stop(10, nothing).how == "term"


def test_a_neighbour_of_the_same_session_that_is_no_child_is_left_alone(bench: Bench) -> None:
    """A shell's other job: the handle names one of them, and the session is the shell's."""
    shell = bench.start(
        """
        for name in ("mine", "other"):
            if os.fork() == 0:
                os.setpgid(0, 0)
                say(name)
                sleep()
        say("shell")
        sleep()
        """
    )
    mine, other = bench.said("mine"), bench.said("other")
    assert bench.said("shell") == shell.pid
    stopped = driver_for(handle_of_pid(mine), bench.settings, path=str(bench.folder)).stop(5, nothing)
    assert stopped.how == "term"
    assert [bench.runs(pid) for pid in (mine, other, shell.pid)] == [False, True, True]


def _next_with_pid(bench: Bench, pid: int) -> subprocess.Popen[bytes]:
    """A stranger that the kernel gives exactly `pid`."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(200):
        try:
            last.write_text(str(pid - 1))
        except OSError:
            not_permitted("choose the next pid (ns_last_pid)")
        stranger = bench.start("ignore(); say('stranger'); sleep()")
        if stranger.pid == pid:
            return stranger
        stranger.kill()
        stranger.wait()
    pytest.fail("the kernel did not give the pid again")


def test_a_pid_that_was_given_to_another_process_is_dead_and_nobody_is_signalled(bench: Bench) -> None:
    process = bench.start(SLEEPER)
    bench.said("up")
    driver = bench.driver(process)
    process.kill()
    process.wait()
    time.sleep(0.05)
    stranger = _next_with_pid(bench, process.pid)
    bench.said("stranger")
    found = driver.alive()
    assert (found.alive, found.sure) == (False, True)
    assert "belongs to another process now" in found.reason
    assert driver.stop(0.2, nothing).how == "was_dead"
    assert bench.runs(stranger.pid)
    with pytest.raises(NotRunning):
        driver.stats(None)
    with pytest.raises(NotRunning):
        driver.ports()


def test_a_signal_never_reaches_the_next_owner_of_a_pid(bench: Bench) -> None:
    """The last moment: the process was seen, ended, and its pid was given away before the signal."""
    process = bench.start(SLEEPER)
    bench.said("up")
    seen = proc.read(process.pid)
    assert seen is not None
    process.kill()
    process.wait()
    time.sleep(0.05)
    stranger = _next_with_pid(bench, process.pid)
    bench.said("stranger")
    assert proc.send(seen, signal.SIGKILL) is False
    assert bench.runs(stranger.pid)


def test_a_handle_from_before_a_restart_of_the_host_is_dead_for_sure(bench: Bench) -> None:
    process = bench.start(SLEEPER)
    bench.said("up")
    driver = bench.driver(process, boot_id="00000000-0000-0000-0000-000000000000")
    found = driver.alive()
    assert (found.alive, found.sure) == (False, True)
    assert driver.stop(0.1, nothing).how == "was_dead"
    assert bench.runs(process.pid)


def test_a_handle_from_another_pid_namespace_is_not_known_and_nothing_is_signalled(bench: Bench) -> None:
    """The number means another process here; dead is something else than not to be seen."""
    process = bench.start(SLEEPER)
    bench.said("up")
    driver = bench.driver(process, pid_ns="pid:[1]")
    found = driver.alive()
    assert (found.alive, found.sure) == (False, False)
    with pytest.raises(OperationFailed, match="pid namespace"):
        driver.stop(0.1, nothing)
    assert bench.runs(process.pid)


@pytest.mark.parametrize("pid", [os.getpid, os.getppid], ids=["itself", "its parent"])
def test_the_worker_never_ends_itself_or_a_parent(bench: Bench, pid: object) -> None:
    number = pid()  # type: ignore[operator]
    found = proc.read(number)
    assert found is not None
    handle = {"driver": "process", "pid": number, "start_time": found.started}
    driver = driver_for(handle, bench.settings)
    assert driver.alive().alive  # looking is not forbidden
    with pytest.raises(InvalidParams, match="this worker itself or one of its parents"):
        driver.stop(0, nothing)


def test_init_and_threads_of_the_kernel_are_no_workspace(bench: Bench) -> None:
    with pytest.raises(InvalidParams, match="from 2 to"):
        driver_for({"driver": "process", "pid": 1, "start_time": 0}, bench.settings)
    threads = [each for each in proc.everything().values() if each.ppid == 2]
    if not threads:
        pytest.skip("this pid namespace shows no threads of the kernel")
    handle = {"driver": "process", "pid": threads[0].pid, "start_time": threads[0].started}
    with pytest.raises(InvalidParams, match="thread of the kernel"):
        driver_for(handle, bench.settings).stop(0, nothing)
    with pytest.raises(InvalidParams, match="thread of the kernel"):
        handle_of_pid(threads[0].pid)


LEAVES = """
if os.fork() == 0:
    ignore()
    os.chdir(sys.argv[2])
    say("left")
    sleep()
say("leader")
sleep()
"""


def test_what_a_dead_leader_left_in_the_directory_is_ended(bench: Bench) -> None:
    process = bench.start(LEAVES, str(bench.folder))
    left = bench.said("left")
    driver = bench.driver(process)
    process.kill()
    process.wait()
    found = driver.alive()
    assert found.alive
    assert "1 of its processes" in found.reason
    assert driver.stop(0.2, nothing).how == "kill"
    assert not bench.runs(left)


def test_what_a_dead_leader_left_elsewhere_is_left_alone_for_its_pid_may_have_been_anothers_since(
    bench: Bench, tmp_path: Path
) -> None:
    process = bench.start(LEAVES, str(tmp_path))
    left = bench.said("left")
    driver = bench.driver(process)
    process.kill()
    process.wait()
    assert not driver.alive().alive
    assert driver.stop(0.2, nothing).how == "was_dead"
    assert bench.runs(left)


def test_a_cancel_while_waiting_signals_nobody_further(bench: Bench) -> None:
    process = bench.start("ignore(); say('up'); sleep()")
    bench.said("up")

    def cancelled() -> None:
        raise Cancelled(job="j")

    with pytest.raises(Cancelled):
        bench.driver(process).stop(0.1, cancelled)
    time.sleep(0.3)
    assert bench.runs(process.pid)


def test_a_stop_that_is_interrupted_between_freezing_and_killing_leaves_nobody_frozen(bench: Bench) -> None:
    process = bench.start("ignore(); say('up'); sleep()")
    bench.said("up")
    seen = proc.read(process.pid)
    assert seen is not None
    rounds = 0

    def members(_: object) -> dict[int, proc.Proc]:
        nonlocal rounds
        rounds += 1
        if rounds > 2:  # as a soft time limit would: after SIGSTOP, before SIGKILL
            raise TimeoutError
        return {seen.pid: seen}

    with pytest.raises(TimeoutError):
        Ending(members, nothing).run(0)
    assert eventually(lambda: (now := proc.read(process.pid)) is not None and now.state == "S")


@pytest.fixture
def own_cgroup(bench: Bench) -> Path:
    """A cgroup of the unified hierarchy without anybody in it."""
    roots = [root for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")) if (root / "cgroup.procs").exists()]
    for root in roots:
        if not (root / "cgroup.controllers").exists():
            continue
        group = root / f"mothball-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            not_permitted("make a cgroup")
        return group
    not_permitted("make a cgroup of the unified hierarchy")
    raise AssertionError


DAEMON = """
while not open(f"/proc/{os.getpid()}/cgroup").read().count("mothball-test"):
    time.sleep(0.01)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir("/")
        say("daemon")
        sleep()
    os._exit(0)
os.wait()
say("leader")
sleep()
"""


def test_a_daemon_that_left_the_session_is_found_in_the_leaders_own_cgroup(bench: Bench, own_cgroup: Path) -> None:
    try:
        process = bench.start(DAEMON)
        (own_cgroup / "cgroup.procs").write_text(str(process.pid))
        daemon = bench.said("daemon")
        bench.said("leader")
        stopped = bench.driver(process).stop(5, nothing)
        assert (stopped.how, stopped.left) == ("term", [])
        assert not bench.runs(daemon)
    finally:
        bench.end()
        eventually(lambda: not (own_cgroup / "cgroup.procs").read_text())
        own_cgroup.rmdir()


def test_a_cgroup_that_somebody_older_is_in_is_not_the_leaders(bench: Bench, own_cgroup: Path) -> None:
    """A login: the shell was there before, and so were the user's editors."""
    try:
        older = bench.start("say('older'); sleep()")
        (own_cgroup / "cgroup.procs").write_text(str(older.pid))
        bench.said("older")
        time.sleep(0.05)
        process = bench.start(DAEMON)
        (own_cgroup / "cgroup.procs").write_text(str(process.pid))
        daemon = bench.said("daemon")
        bench.said("leader")
        assert bench.driver(process).stop(5, nothing).how == "term"
        assert [bench.runs(pid) for pid in (process.pid, daemon, older.pid)] == [False, True, True]
    finally:
        bench.end()
        eventually(lambda: not (own_cgroup / "cgroup.procs").read_text())
        own_cgroup.rmdir()


def test_n24_stats_count_the_whole_tree_and_blocks_of_the_directory(bench: Bench) -> None:
    process = bench.start(
        """
        hold = bytearray(os.urandom(20_000_000))
        if os.fork() == 0:
            until = time.process_time() + 0.3
            while time.process_time() < until: pass
            say("child")
            sleep()
        say("up")
        sleep()
        """
    )
    bench.said("up"), bench.said("child")
    sparse = bench.folder / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 30)
    (bench.folder / "real").write_bytes(os.urandom(1 << 20))
    os.link(bench.folder / "real", bench.folder / "again")
    (bench.folder / "out").symlink_to("/usr")
    found = bench.driver(process).stats(str(bench.folder))
    assert found.processes == 2
    assert found.cpu_seconds >= 0.25
    assert found.rss_bytes > 20_000_000
    assert found.disk_bytes is not None
    assert 1 << 20 <= found.disk_bytes < (1 << 20) + 200_000
    assert found.disk_complete
    assert not found.stale


def test_a_thread_is_no_process_that_could_be_registered(bench: Bench) -> None:
    """Its number can be looked up as a pid's; but no list of processes has it, and the workspace would be lost at once."""
    process = bench.start("import threading; threading.Thread(target=sleep, daemon=True).start(); say('up'); sleep()")
    bench.said("up")
    (thread,) = {int(each.name) for each in Path(f"/proc/{process.pid}/task").iterdir()} - {process.pid}
    assert handle_of_pid(process.pid)["pid"] == process.pid
    with pytest.raises(InvalidParams, match=f"thread of process {process.pid}"):
        handle_of_pid(thread)


def test_one_folder_of_many_files_is_not_measured_beyond_its_time(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / str(number)).write_bytes(b"x" * 4096)
    whole, complete = disk_bytes(str(tmp_path))
    assert complete
    found, complete = disk_bytes(str(tmp_path), seconds=0)
    assert not complete
    assert found is not None
    assert whole is not None
    assert found < whole / 10


@pytest.mark.parametrize("name", ["session-7.scope", "cron.service", "user-1000.slice"])
def test_the_cgroup_of_a_login_is_nobodys_own_also_when_its_shell_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The eldest who is left of a login is not the one that it was made for."""
    process = bench.start("say('leader'); sleep()")
    bench.said("leader")
    time.sleep(0.05)
    stranger = bench.start("say('stranger'); sleep()")
    bench.said("stranger")
    both = {process.pid: f"/user.slice/{name}", stranger.pid: f"/user.slice/{name}"}
    monkeypatch.setattr(proc, "cgroup", lambda pid: both.get(pid, "/worker"))  # this kernel may have no unified hierarchy
    assert bench.driver(process).stop(5, nothing).how == "term"
    assert bench.runs(stranger.pid)


def test_the_directory_is_gone_and_the_processes_are_measured_all_the_same(bench: Bench) -> None:
    process = bench.start(SLEEPER)
    bench.said("up")
    found = bench.driver(process).stats(str(bench.folder / "nowhere"))
    assert (found.processes, found.disk_bytes, found.disk_complete) == (1, None, False)
