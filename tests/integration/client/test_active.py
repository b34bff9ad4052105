"""`Fleet.active` on a real Redis: heartbeats while the block runs, a goodbye after it, and what a producer that dies leaves."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball import Fleet, errors, policy
from mothball.presence import Active
from mothball.settings import Settings
from tests.support import eventually
from workers.config import settings_env
from workers.redis_server import RedisServer

WORKSPACE = "owner/repo#1"


@pytest.fixture
def fleet(make_settings: Callable[..., Settings], private_redis: RedisServer) -> Iterator[Fleet]:
    """A fleet with one workspace; Redis answers within a second or not at all."""
    with Fleet(settings=make_settings(redis_timeout=1.0, lease_seconds=10)) as found:
        found.registry.hosts.heartbeat(found.settings.host, {})
        found.register(WORKSPACE, found.settings.workspace_roots[0])
        yield found


@pytest.fixture(autouse=True)
def no_thread_stays(fleet: Fleet) -> Iterator[None]:
    """A goodbye that still tries to arrive would go on trying through the tests that follow, when this test's Redis is gone."""
    yield
    eventually(lambda: not any(each.name.startswith("mothball-active") for each in threading.enumerate()), what="the goodbye")


def holders(fleet: Fleet) -> dict[str, int]:
    return fleet.registry.presence.holders(WORKSPACE)


def decision(fleet: Fleet) -> policy.Decision:
    return fleet.explain(WORKSPACE).decision


def another_process(fleet: Fleet, script: str) -> subprocess.Popen[str]:
    """A producer in a process of its own, which runs `script` with a `fleet`."""
    code = f"import os, sys, time, threading\nfrom mothball import Fleet\nfleet = Fleet()\n{script}"
    env = {**os.environ, **settings_env(fleet.settings)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_while_the_block_runs_presence_keeps_the_workspace_and_afterwards_nobody_is_missed(fleet: Fleet) -> None:
    with fleet.active(WORKSPACE, holder="me") as active:
        assert list(holders(fleet)) == ["me"]
        assert (decision(fleet).action, decision(fleet).rule) == ("keep", "presence")
        assert active.until > fleet.registry.time_ms()
    assert holders(fleet) == {}
    told = decision(fleet)
    assert (told.action, told.next_action) == ("keep", "evict")
    record = fleet.get(WORKSPACE)
    assert set(record.signals) == {"lease"}


def test_heartbeats_go_on_for_as_long_as_the_block_runs(fleet: Fleet) -> None:
    with fleet.active(WORKSPACE, timeout=1.0) as active:
        first = active.until
        eventually(lambda: active.until > first + 1500, seconds=10, what="the presence reaches beyond the first timeout")
        assert active.until > fleet.registry.time_ms()
        assert active.error is None


def test_two_activities_are_two_holders_and_one_goodbye_leaves_the_other(fleet: Fleet) -> None:
    with fleet.active(WORKSPACE):
        with fleet.active(WORKSPACE):
            assert len(holders(fleet)) == 2
        assert len(holders(fleet)) == 1
        assert decision(fleet).rule == "presence"


def test_an_exception_in_the_block_is_a_goodbye_too_and_comes_through(fleet: Fleet) -> None:
    with pytest.raises(ZeroDivisionError), fleet.active(WORKSPACE):
        _ = 1 // 0
    assert holders(fleet) == {}


def test_missing_is_not_idle_a_killed_producer_leads_to_strand(fleet: Fleet) -> None:
    process = another_process(
        fleet, f"with fleet.active({WORKSPACE!r}, timeout=1.0):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        assert decision(fleet).rule == "presence"
    finally:
        process.kill()
        process.communicate()
    told = eventually(
        lambda: found if (found := decision(fleet)).action != "keep" else None, seconds=10, what="the producer is missed"
    )
    assert (told.action, told.rule) == ("strand", "heartbeats")


def test_the_thread_never_keeps_the_process_alive(fleet: Fleet) -> None:
    """Entered and never left: the interpreter ends all the same, and nobody said goodbye."""
    process = another_process(fleet, f"active = fleet.active({WORKSPACE!r}, timeout=60)\nactive.__enter__()\nprint('in')")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "in\n", "")
    assert len(holders(fleet)) == 1


def test_a_forked_child_that_leaves_the_block_says_no_goodbye_for_its_parent(fleet: Fleet) -> None:
    script = (
        f"with fleet.active({WORKSPACE!r}, holder='parent', timeout=60):\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        os.waitpid(child, 0)\n"
        "        print(sorted(fleet.registry.presence.holders('owner/repo#1')), flush=True)\n"
        "if not child:\n"
        "    os._exit(0)\n"
    )
    out, err = another_process(fleet, script).communicate(timeout=20)
    assert (out, err) == ("['parent']\n", "")
    assert holders(fleet) == {}


def test_an_outage_of_redis_is_survived_and_told_once(
    fleet: Fleet, private_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mothball.client"), fleet.active(WORKSPACE, holder="me", timeout=1.0) as active:
        private_redis.stop()
        eventually(lambda: active.error is not None, seconds=10, what="the outage is noticed")
        assert isinstance(active.error, errors.Unavailable)
        time.sleep(1.5)
        private_redis.start()
        before = active.until
        eventually(lambda: active.until > before, seconds=15, what="heartbeats arrive again")
        assert active.error is None
        assert decision(fleet).rule == "presence"
    assert holders(fleet) == {}
    texts = [record.message for record in caplog.records]
    assert sum("did not arrive" in text for text in texts) == 1
    assert sum("arrive again" in text for text in texts) == 1


def test_a_goodbye_during_an_outage_arrives_when_redis_is_back(fleet: Fleet, private_redis: RedisServer) -> None:
    with fleet.active(WORKSPACE, timeout=60):
        private_redis.stop()
        started = time.monotonic()
    assert time.monotonic() - started < 8
    private_redis.start()
    eventually(lambda: holders(fleet) == {}, seconds=15, what="the goodbye arrives")


def test_a_frozen_redis_does_not_hold_up_the_end_of_the_block(fleet: Fleet, private_redis: RedisServer) -> None:
    with fleet.active(WORKSPACE, timeout=60):
        private_redis.freeze()
        started = time.monotonic()
    assert time.monotonic() - started < 8
    private_redis.thaw()
    eventually(lambda: holders(fleet) == {}, seconds=15, what="the goodbye arrives")


def test_closing_the_fleet_does_not_end_the_presence(fleet: Fleet) -> None:
    with fleet.active(WORKSPACE, timeout=1.0) as active:
        fleet.close()
        first = active.until
        eventually(lambda: active.until > first + 1000, seconds=10, what="heartbeats go on")
    assert holders(fleet) == {}


def test_a_workspace_that_is_released_meanwhile_ends_the_heartbeats_and_says_so(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    before = {*_threads()}
    with caplog.at_level(logging.WARNING, logger="mothball.client"), fleet.active(WORKSPACE, timeout=1.0) as active:
        assert fleet.release(WORKSPACE)
        eventually(lambda: isinstance(active.error, errors.Gone), seconds=10, what="the release is noticed")
        eventually(lambda: {*_threads()} <= before, seconds=10, what="the thread has ended")
    assert any("in use no longer" in record.message for record in caplog.records)


def test_a_workspace_that_was_stranded_meanwhile_is_told(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mothball.client"), fleet.active(WORKSPACE, timeout=1.0) as active:
        assert active.state == "active"
        raw = fleet.registry.workspaces._connection
        with raw.guard() as client:
            client.hset(f"{fleet.settings.namespace}:ws:{WORKSPACE}", "state", "stranded")
        eventually(lambda: active.state == "stranded", seconds=10, what="a heartbeat tells the state")
    assert any("is stranded" in record.message for record in caplog.records)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"mothball-active-{WORKSPACE}"]


def test_entering_raises_what_stands_in_the_way(fleet: Fleet, private_redis: RedisServer) -> None:
    before = {*_threads()}  # of another test, whose Redis went before its goodbye
    with pytest.raises(errors.NotFound), fleet.active("nobody"):
        pass
    with pytest.raises(errors.InvalidParams), fleet.active("../x"):
        pass
    for wrong in (0, 0.5, 86_401, True, "60"):
        with pytest.raises(errors.InvalidParams, match="timeout"):
            fleet.active(WORKSPACE, timeout=wrong)  # type: ignore[arg-type]
    active: Active = fleet.active(WORKSPACE)
    with active:
        pass
    with pytest.raises(errors.InvalidParams, match="once"), active:
        pass
    private_redis.kill()
    with pytest.raises(errors.Unavailable), fleet.active(WORKSPACE):
        pass
    eventually(lambda: {*_threads()} <= before, seconds=5, what="no thread is left")


def test_a_heartbeat_and_a_goodbye_of_ones_own(fleet: Fleet) -> None:
    until = fleet.heartbeat(WORKSPACE, "me", timeout=30)
    assert 29_000 < until - fleet.registry.time_ms() <= 30_000
    assert fleet.goodbye(WORKSPACE, "me") is True
    assert fleet.goodbye(WORKSPACE, "me") is False


def test_sigterm_that_ends_the_block_in_order_says_goodbye(fleet: Fleet) -> None:
    script = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"with fleet.active({WORKSPACE!r}):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    process: Any = another_process(fleet, script)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert holders(fleet) == {}


def test_the_module_can_be_imported_without_redis_or_settings() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, mothball.presence; print('redis' in sys.modules, 'pydantic' in sys.modules)"],
        capture_output=True, text=True, check=True, timeout=60, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.stdout == "False False\n"
