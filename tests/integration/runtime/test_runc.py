"""Driver `runc` with real containers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import InvalidParams, NotRunning, PathNotAllowed
from mothball.runtime import Driver, driver_for, handle_of_pid, proc
from mothball.settings import Settings
from tests.integration.runtime.containers import Runc
from tests.integration.runtime.support import nothing
from tests.support import eventually

POLITE = "trap 'exit 3' TERM; while true; do sleep 0.1; done"
STUBBORN = "trap '' TERM; (trap '' TERM; while true; do sleep 0.1; done) & while true; do sleep 0.1; done"


@pytest.fixture
def runc(tmp_path: Path) -> Iterator[Runc]:
    made = Runc(tmp_path / "runc")
    yield made
    made.end()


@pytest.fixture
def settings(make_settings: Any) -> Settings:
    return make_settings()  # type: ignore[no-any-return]


def driver(runc: Runc, name: str, settings: Settings) -> Driver:
    return driver_for(runc.handle(name), settings)


def test_a_container_that_ends_at_term_is_stopped_and_not_deleted(runc: Runc, settings: Settings) -> None:
    name = runc.start(POLITE)
    found = driver(runc, name, settings)
    assert found.alive().alive
    stopped = found.stop(10, nothing)
    assert (stopped.how, stopped.left) == ("term", [])
    assert runc.status(name) == "stopped"
    after = found.alive()
    assert (after.alive, after.sure) == (False, True)
    assert found.stop(1, nothing).how == "was_dead"


def test_a_container_that_ignores_term_is_killed_with_all_its_processes(runc: Runc, settings: Settings) -> None:
    name = runc.start(STUBBORN)
    pid = runc.pid(name)
    eventually(lambda: len(proc.grown([proc.read(pid).key], proc.everything())) >= 3)  # type: ignore[union-attr]
    tree = proc.grown([proc.read(pid).key], proc.everything())  # type: ignore[union-attr]
    began = time.monotonic()
    stopped = driver(runc, name, settings).stop(0.5, nothing)
    assert time.monotonic() - began >= 0.5
    assert (stopped.how, stopped.left) == ("kill", [])

    def living() -> set[tuple[int, int]]:
        return {each.key for each in proc.everything().values() if not each.dead} & {each.key for each in tree.values()}

    eventually(lambda: not living())


def test_processes_that_outlive_the_first_one_of_the_container_are_alive_and_are_ended(runc: Runc, settings: Settings) -> None:
    """A container in the host's pid namespace does not end with its first process."""
    name = runc.start("sh -c 'while true; do sleep 0.1; done' & sleep 0.3", host_pids=True)
    eventually(lambda: runc.status(name) == "stopped")
    found = driver(runc, name, settings)
    assert "still run" in found.alive().reason
    assert found.stop(0.2, nothing).left == []
    assert not found.alive().alive


def test_a_paused_container_is_ended_too(runc: Runc, settings: Settings) -> None:
    name = runc.start(POLITE)
    assert runc("pause", name).returncode == 0
    found = driver(runc, name, settings)
    assert found.alive().reason.endswith("paused")
    assert found.stop(10, nothing).how == "term"


def test_n24_stats_are_those_of_the_containers_cgroup(runc: Runc, settings: Settings, tmp_path: Path) -> None:
    name = runc.start("i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; while true; do sleep 0.1; done")
    found = driver(runc, name, settings)
    eventually(lambda: found.stats(None).cpu_seconds > 0.02)
    stats = found.stats(str(tmp_path))
    assert stats.processes >= 1
    assert stats.rss_bytes > 0
    assert stats.disk_bytes is not None
    assert stats.disk_bytes > 500_000
    found.stop(0, nothing)
    with pytest.raises(NotRunning, match="has ended"):
        found.stats(None)


def test_a_container_that_nobody_knows_is_dead_for_sure(runc: Runc, settings: Settings) -> None:
    found = driver(runc, "nobody", settings)
    assert (found.alive().alive, found.alive().sure) == (False, True)
    assert found.stop(1, nothing).how == "was_dead"


def test_a_state_folder_that_others_can_write_to_is_not_believed(runc: Runc, settings: Settings) -> None:
    """Its state.json says which pids and cgroups runc kills: whoever writes there would choose them."""
    name = runc.start(POLITE)
    (runc.root / name).chmod(0o777)
    for call in ("alive", "stop"):
        with pytest.raises(PathNotAllowed, match="can be changed by others"):
            getattr(driver(runc, name, settings), call)(*([1, nothing] if call == "stop" else []))
    (runc.root / name).chmod(0o711)
    assert runc.status(name) == "running"


def test_a_state_folder_of_another_user_or_behind_a_link_is_not_believed(runc: Runc, settings: Settings, tmp_path: Path) -> None:
    name = runc.start(POLITE)
    link = tmp_path / "link"
    link.symlink_to(runc.root)
    with pytest.raises(PathNotAllowed, match="symbolic link"):
        driver_for({**runc.handle(name), "root": str(link)}, settings).stop(0, nothing)
    os.chown(runc.root, 12345, -1)
    with pytest.raises(PathNotAllowed, match="can be changed by others"):
        driver(runc, name, settings).stop(0, nothing)
    os.chown(runc.root, 0, -1)
    assert runc.status(name) == "running"


@pytest.mark.parametrize("name", ["--all", "-f", "a b", "a/../b", "", "a\nb", "a;b", "../x", "a" * 129])
def test_no_container_name_can_be_an_option_or_a_path(name: str, settings: Settings) -> None:
    with pytest.raises(InvalidParams):
        driver_for({"driver": "runc", "container": name}, settings)


def test_ports_inside_the_containers_own_network_are_listed_with_their_process(runc: Runc, settings: Settings) -> None:
    name = runc.start("httpd -f -p 127.0.0.1:8080 -h /www & httpd -f -p 9090 -h /www")
    found = driver(runc, name, settings)
    eventually(lambda: len(found.ports()) == 2)
    assert [(each.address, each.port, each.process) for each in found.ports()] == [
        ("127.0.0.1", 8080, "httpd"),
        ("::", 9090, "httpd"),
    ]
    assert all(each.netns.startswith("net:[") for each in found.ports())


def test_the_first_process_of_a_container_can_be_a_handle_of_driver_process(runc: Runc, settings: Settings) -> None:
    name = runc.start(STUBBORN)
    # It is in a pid namespace of its own, and named by the pid that it has here.
    assert driver_for(handle_of_pid(runc.pid(name)), settings).stop(0.1, nothing).how == "kill"
    eventually(lambda: runc.status(name) == "stopped")
