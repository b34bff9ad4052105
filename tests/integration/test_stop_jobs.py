"""workspace.stop on a real Redis, a real store and real processes (N-33, N-35)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mothball.errors import Busy, InvalidParams, InvalidTransition, MothballError, NotFound, TimedOut
from mothball.runtime import process as runtime_process
from mothball.settings import Settings
from mothball.store.tree import Tree
from tasks import ending
from tests.integration.ending import ID, Host, ended
from tests.support import eventually
from workers.redis_server import RedisServer

SLEEPS = "print('ready', flush=True)\nimport time\nwhile True: time.sleep(60)"
COMPUTES = "print('ready', flush=True)\nwhile True: pass"
DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\nwhile True: time.sleep(60)"
TREE = (
    "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time\\nwhile True: time.sleep(60)'])\n"
    "print('ready', flush=True)\nwhile True: time.sleep(60)"
)
SAYS_GOODBYE = (
    "import pathlib, signal, sys, time\n"
    "def bye(*_):\n  pathlib.Path('last.txt').write_text('said at the end')\n  sys.exit(3)\n"
    "signal.signal(signal.SIGTERM, bye)\nprint('ready', flush=True)\nwhile True: time.sleep(60)"
)
RULE: dict[str, Any] = {"rule": "stop_after", "detail": "idle for an hour", "by": "policy"}
POLICY = {"stop_after": "10m", "stop_grace": "1s", "ttl": "never", "signals": ["touch", "exec", "lease"]}


@pytest.fixture
def host(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    found = Host(make_settings(fsync=False, redis_timeout=1.0), tmp_path / "tree")
    yield found
    found.close()


def files(host: Host) -> dict[str, bytes]:
    with Tree.open(host.store, host.record.digest or "") as tree:
        return {entry.path: tree.read(entry.path) for entry in tree.walk() if entry.type == "file"}


def test_n33_a_stale_workspace_is_captured_its_whole_tree_ended_and_its_state_stopped(host: Host) -> None:
    process = host.start(TREE, policy=POLICY)
    (child,) = eventually(lambda: psutil.Process(process.pid).children())
    host.idle()
    seen = host.record
    result = host.run("workspace.stop", **RULE, generation=seen.generation, last_active=seen.last_active)
    assert (result["stopped"], result["how"], result["directory"]) == (True, "term", "there")
    assert ended(process) == -signal.SIGTERM
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    record = host.record
    assert (record.state, record.state_reason, record.generation) == ("stopped", "stop_after", 1)
    assert files(host) == {"a.txt": b"first\n", "b.txt": b"other\n"}
    assert host.counters()["stopped:stop_after"] == 1
    (event,) = host.events("workspace.stopped")
    assert (event.fields["reason"], event.fields["by"], event.fields["detail"]) == ("stop_after", "policy", "idle for an hour")
    assert result["evidence"]["stats"]["processes"] == 2


def test_n35_a_stop_is_clean_up_and_no_deletion(host: Host) -> None:
    host.start(SLEEPS, policy=POLICY)
    host.run("workspace.stop", by="me")
    assert sorted(os.listdir(host.folder)) == ["a.txt", "b.txt"]
    assert host.record.path == str(host.folder)
    assert host.registry.lifecycle.resume(ID, by="me").outcome == "ok"
    assert host.record.state == "active"
    assert host.run("workspace.stop", by="me")["stopped"]


def test_what_the_processes_write_at_their_end_is_captured_too(host: Host) -> None:
    process = host.start(SAYS_GOODBYE, policy=POLICY)
    result = host.run("workspace.stop")
    assert ended(process) == 3
    assert files(host)["last.txt"] == b"said at the end"
    assert (host.record.generation, result["captured"]["generation"]) == (2, 2)
    assert host.counters()["captures"] == 2


def test_a_process_that_ignores_term_is_killed_after_its_grace(host: Host) -> None:
    process = host.start(DEAF, policy=POLICY)
    began = time.monotonic()
    result = host.run("workspace.stop")
    assert time.monotonic() - began >= 1
    assert (result["how"], ended(process)) == ("kill", -signal.SIGKILL)
    assert host.record.state == "stopped"


@pytest.mark.parametrize("moved", ["last_active", "generation", "touched meanwhile", "resumed meanwhile"])
def test_n33_what_was_used_since_that_was_decided_is_left_alone(host: Host, monkeypatch: pytest.MonkeyPatch, moved: str) -> None:
    process = host.start(SLEEPS, policy=POLICY)
    host.idle()
    seen = host.record
    args = {"generation": seen.generation, "last_active": seen.last_active}
    if moved in {"last_active", "generation"}:
        args[moved] += 1
    else:
        real = ending.capture_now

        def capture(*given: Any, **named: Any) -> Any:
            done = real(*given, **named)
            if moved == "touched meanwhile":
                host.registry.workspaces.touch(ID, "exec")
            else:
                host.registry.lifecycle.extend(host.facts, host.registry.time_ms() + 60_000, "me")
            return done

        monkeypatch.setattr(ending, "capture_now", capture)
    result = host.run("workspace.stop", **RULE, **args)
    assert (result["stopped"], host.record.state) == (False, "active")
    assert "used" in result["detail"]
    assert process.poll() is None
    assert "stopped:stop_after" not in host.counters()


@pytest.mark.parametrize("when", ["while it is captured", "after its processes ended"])
@pytest.mark.parametrize("asked", [False, True])
def test_n33_what_was_started_anew_meanwhile_is_neither_ended_nor_called_stopped(
    host: Host, monkeypatch: pytest.MonkeyPatch, when: str, asked: bool
) -> None:
    host.start(SLEEPS, policy=POLICY)
    host.idle()
    anew: list[Any] = []

    def then(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            answer = real(*args, **named)
            if not anew:
                anew.append(host.start(SLEEPS))
            return answer

        return wrapped

    owner, name = (ending, "capture_now") if when == "while it is captured" else (ending.Ending, "end_processes")
    monkeypatch.setattr(owner, name, then(getattr(owner, name)))
    if asked and owner is ending:
        with pytest.raises(Busy, match="another runtime was registered"):
            host.run("workspace.stop", by="me")
    else:
        assert not host.run("workspace.stop", **({"by": "me"} if asked else RULE))["stopped"]
    assert anew[0].poll() is None
    assert (host.record.state, host.record.runtime["pid"]) == ("active", anew[0].pid)


def test_n33_it_is_decided_again_under_the_lease(host: Host) -> None:
    process = host.start(SLEEPS, policy=POLICY)
    assert host.run("workspace.stop", **RULE)["detail"].startswith("none")  # not idle at all
    host.idle()
    host.registry.presence.heartbeat(ID, "agent", 60_000)
    assert host.run("workspace.stop", **RULE)["detail"].startswith("presence")
    host.registry.presence.goodbye(ID, "agent")
    host.idle()
    host.registry.lifecycle.hold(ID, "evidence", "me")
    assert host.run("workspace.stop", **RULE)["detail"].startswith("hold")
    assert process.poll() is None


@pytest.mark.parametrize("signal_name", ["cpu", "file"])
def test_processes_that_compute_and_files_that_change_keep_it_and_count_as_signs_of_life(host: Host, signal_name: str) -> None:
    policy = {**POLICY, "signals": ["touch", signal_name], "cpu_busy": 1}  # other tests compute as well
    process = host.start(COMPUTES if signal_name == "cpu" else SLEEPS, policy=policy)
    host.idle()
    result = host.run("workspace.stop", **RULE)
    assert (result["stopped"], host.record.last_signal) == (False, signal_name)
    assert ("compute" if signal_name == "cpu" else "changed") in result["detail"]
    assert process.poll() is None
    assert host.record.generation == 0


def test_signals_that_the_policy_does_not_count_keep_nothing(host: Host) -> None:
    process = host.start(COMPUTES, policy=POLICY)
    host.idle()
    assert host.run("workspace.stop", **RULE)["stopped"]
    ended(process)


def test_a_capture_that_fails_stops_nothing(host: Host) -> None:
    process = host.start(SLEEPS, policy={**POLICY, "capture": {"max_files": 1}})
    with pytest.raises(MothballError) as caught:
        host.run("workspace.stop")
    assert (caught.value.code, process.poll(), host.record.state) == ("oversize", None, "active")
    assert "entries" in host.record.last_error


def test_a_directory_that_is_gone_does_not_keep_its_processes(host: Host) -> None:
    process = host.start(SLEEPS, cwd=Path("/"), policy=POLICY)
    host.folder.rename(host.folder.parent / "moved")
    result = host.run("workspace.stop")
    assert (result["stopped"], result["directory"], result["captured"]) == (True, "gone", None)
    assert "directory is gone" in result["detail"]
    assert ended(process) == -signal.SIGTERM


def test_a_link_in_the_place_of_the_directory_stops_nothing(host: Host) -> None:
    process = host.start(SLEEPS, cwd=Path("/"), policy=POLICY)
    host.folder.rename(host.folder.parent / "moved")
    host.folder.symlink_to("/nowhere")
    with pytest.raises(MothballError) as caught:
        host.run("workspace.stop")
    assert (caught.value.code, process.poll()) == ("path_not_allowed", None)


def test_a_person_is_refused_while_somebody_works_there_and_may_insist_but_not_over_a_hold(host: Host) -> None:
    process = host.start(SLEEPS, policy=POLICY)
    host.registry.presence.heartbeat(ID, "agent-7", 60_000)
    job = host.submit("workspace.stop", by="me")
    with pytest.raises(Busy, match="agent-7 works in it"):
        host.deliver(job)
    assert host.registry.jobs.get(job.id).state == "failed"  # and does not come back at a time when nobody thinks of it
    host.registry.lifecycle.hold(ID, "legal", "me")
    with pytest.raises(Busy, match="legal"):
        host.run("workspace.stop", force=True)
    assert process.poll() is None
    host.registry.lifecycle.unhold(ID)
    assert host.run("workspace.stop", force=True)["stopped"]
    ended(process)


def test_only_an_active_workspace_can_be_stopped(host: Host) -> None:
    host.register()
    host.registry.lifecycle.transition(ID, "submitted")
    with pytest.raises(InvalidTransition, match="submitted"):
        host.run("workspace.stop", force=True)
    host.registry.lifecycle.transition(ID, "active")
    assert host.run("workspace.stop")["stopped"]
    again = host.run("workspace.stop")
    assert (again["stopped"], again["detail"]) == (True, "it is stopped already")
    assert host.counters()["stopped:asked"] == 1
    with pytest.raises(NotFound):
        host.registry.jobs.submit("workspace.stop", {"workspace": "o/r#9"}, workspace="o/r#9")


@pytest.mark.parametrize("step", ["capture", "end", "stopped"])
def test_a_worker_that_is_killed_at_any_step_is_followed_by_one_that_goes_on(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    process = host.start(SLEEPS, policy=POLICY)
    job = host.submit("workspace.stop")

    class Killed(BaseException):
        pass

    def after(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            real(*args, **named)
            raise Killed

        return call

    with monkeypatch.context() as patch:
        if step == "capture":
            patch.setattr(ending, "capture_now", after(ending.capture_now))
        elif step == "end":
            patch.setattr(ending.Ending, "end_processes", after(ending.Ending.end_processes))
        else:
            patch.setattr(type(host.registry.lifecycle), "stopped", after(type(host.registry.lifecycle).stopped))
        with pytest.raises(Killed):
            host.deliver(job)
    result = host.again(job)
    assert (result["stopped"], host.record.state, host.record.generation) == (True, "stopped", 1)
    assert (host.counters()["stopped:asked"], len(host.events("workspace.stopped"))) == (1, 1)
    ended(process)


def test_an_id_that_is_evicted_while_it_is_stopped_ends_the_job_and_harms_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = host.start(SLEEPS, policy=POLICY)
    real = ending.capture_now

    def capture(*given: Any, **named: Any) -> Any:
        done = real(*given, **named)
        job = host.registry.jobs.get(host.registry.jobs.list(workspace=ID)[0].id)
        host.raw.delete(host.key(f"lease:{ID}"))
        assert host.registry.workspaces.release(ID, "me")
        assert job.state == "running"
        return done

    monkeypatch.setattr(ending, "capture_now", capture)
    job = host.submit("workspace.stop")
    with pytest.raises(BaseException, match="lease lost"):
        host.deliver(job)
    assert process.poll() is None
    assert "stopped:asked" not in host.counters()
    host.registry.jobs.ring()
    with pytest.raises(MothballError):
        host.deliver(job)


def test_a_driver_that_hangs_fails_its_own_job_and_is_tried_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    process = host.start(SLEEPS, policy=POLICY)

    def hang(*_: Any) -> Any:
        raise TimedOut(what="the driver", seconds=5)

    monkeypatch.setattr(runtime_process.ProcessDriver, "alive", hang)
    job = host.submit("workspace.stop")
    with pytest.raises(BaseException, match="retried"):
        host.deliver(job)
    waiting = host.registry.jobs.get(job.id)
    assert (waiting.state, waiting.error_code, process.poll()) == ("queued", "timeout", None)
    assert host.record.state == "active"


@pytest.mark.parametrize("args", [{"rule": "Bad rule"}, {"by": "x" * 5000}, {"grace": 1}, {"generation": -1}])
def test_wrong_arguments_are_refused(host: Host, args: dict[str, Any]) -> None:
    host.register()
    with pytest.raises(InvalidParams):
        host.run("workspace.stop", **args)
