"""Drivers `docker` and `podman` against a real server of the Docker Engine API: Podman's, with containers run by runc."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mothball.errors import ConfigError, InvalidParams, NotRunning, OperationFailed, TimedOut
from mothball.runtime import Driver, docker, driver_for, proc
from mothball.runtime.health import check_health
from mothball.runtime.ports import probe
from mothball.settings import Settings
from tests.integration.runtime.containers import DockerApi, docker_api
from tests.integration.runtime.support import nothing
from tests.support import eventually

POLITE = "trap 'exit 3' TERM; while true; do sleep 0.1; done"
STUBBORN = "trap '' TERM; while true; do sleep 0.1; done"


@pytest.fixture(scope="module")
def api() -> Iterator[DockerApi]:
    with docker_api() as made:
        yield made


@pytest.fixture
def settings(api: DockerApi, make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(docker_socket=f"unix://{api.path}")


def driver(ident: str, settings: Settings, name: str = "docker") -> Driver:
    return driver_for({"driver": name, "container": ident}, settings)


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_a_container_that_ends_at_term_is_stopped_with_its_exit_code_and_stays(
    api: DockerApi, settings: Settings, tmp_path: Path, name: str
) -> None:
    ident = api.start(tmp_path, POLITE)
    found = driver(ident, settings, name)
    assert found.name == name
    assert found.alive().alive
    stopped = found.stop(10, nothing)
    assert (stopped.how, stopped.left, stopped.facts["exit_code"], stopped.facts["oom"]) == ("term", [], 3, False)
    assert not api.running(ident)
    after = found.alive()
    assert (after.alive, after.sure, after.facts["exit_code"]) == (False, True, 3)
    assert found.stop(1, nothing).how == "was_dead"
    with pytest.raises(NotRunning):
        found.stats(None)


def test_a_container_that_ignores_term_is_killed_after_the_grace(api: DockerApi, settings: Settings, tmp_path: Path) -> None:
    ident = api.start(tmp_path, STUBBORN)
    ticks: list[float] = []
    began = time.monotonic()
    stopped = driver(ident, settings).stop(2, lambda: ticks.append(time.monotonic()))
    assert time.monotonic() - began >= 2
    assert (stopped.how, stopped.left) == ("kill", [])
    assert len(ticks) >= 5  # a cancel or a lost lease is noticed while the engine waits
    assert not api.running(ident)


def test_what_a_tick_raises_ends_the_wait(api: DockerApi, settings: Settings, tmp_path: Path) -> None:
    ident = api.start(tmp_path, STUBBORN)

    def cancelled() -> None:
        raise KeyError

    began = time.monotonic()
    with pytest.raises(KeyError):
        driver(ident, settings).stop(20, cancelled)
    assert time.monotonic() - began < 5


def test_a_container_that_would_be_started_again_stays_stopped(api: DockerApi, settings: Settings, tmp_path: Path) -> None:
    ident = api.start(tmp_path, POLITE, RestartPolicy={"Name": "always"})
    assert driver(ident, settings).stop(10, nothing).how == "term"
    time.sleep(1)
    assert not api.running(ident)


def test_n24_stats_and_n26_ports_are_those_of_the_container(api: DockerApi, settings: Settings, tmp_path: Path) -> None:
    ident = api.start(tmp_path, "mkdir -p /www; httpd -f -p 127.0.0.1:8080 -h /www & while true; do sleep 0.1; done")
    found = driver(ident, settings)
    listeners = eventually(found.ports)
    assert [(each.address, each.port, each.process) for each in listeners] == [("127.0.0.1", 8080, "httpd")]
    assert listeners[0].netns != proc.namespace("net")
    assert [each["scheme"] for each in probe(listeners)] == ["http"]
    stats = found.stats(str(tmp_path))
    assert stats.processes >= 2
    assert stats.cpu_seconds > 0
    assert stats.rss_bytes > 0
    assert stats.disk_bytes is not None
    assert check_health(found, {"health_url": "http://127.0.0.1:8080/nothing"}).status == 404


def test_a_container_that_nobody_knows_is_dead_for_sure(settings: Settings) -> None:
    found = driver("nobody", settings).alive()
    assert (found.alive, found.sure) == (False, True)
    assert driver("nobody", settings).stop(1, nothing).how == "was_dead"


def test_a_container_whose_id_merely_begins_like_the_name_is_somebody_elses(
    api: DockerApi, settings: Settings, tmp_path: Path
) -> None:
    ident = api.start(tmp_path, POLITE)
    gone = driver(ident[:3], settings)  # "ada", say, which was removed; the engine takes it for the beginning of an id
    assert api("GET", f"/containers/{ident[:3]}/json")[0] == 200
    assert not gone.alive().alive
    assert gone.stop(3, nothing).how == "was_dead"
    with pytest.raises(NotRunning):
        gone.ports()
    assert api.running(ident)
    name = str(api("GET", f"/containers/{ident}/json")[1]["Name"]).removeprefix("/")
    assert driver(name, settings).alive().alive
    assert driver(ident[:12], settings).alive().alive


@pytest.mark.parametrize("name", ["../json", "a/b", "a?x=1", "a b", "-x", "", "a\r\nHost: b", "%2e%2e", "a" * 129])
def test_no_container_name_leaves_its_place_in_the_url(name: str, settings: Settings) -> None:
    with pytest.raises(InvalidParams):
        driver(name, settings)


def test_without_a_socket_in_the_settings_both_drivers_are_off(make_settings: Callable[..., Settings]) -> None:
    for name in ("docker", "podman"):
        with pytest.raises(ConfigError, match="MOTHBALL_DOCKER_SOCKET"):
            driver("x", make_settings(), name)
    with pytest.raises(ConfigError, match="absolute path"):
        driver("x", make_settings(docker_socket="tcp://192.0.2.1:2375"))


def test_a_daemon_that_is_not_there_says_so(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(OperationFailed, match="does not answer"):
        driver("x", make_settings(docker_socket=str(tmp_path / "none.sock"))).alive()


@pytest.fixture
def odd_daemon(tmp_path: Path) -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """`odd_daemon(answer)`: the path of a socket where `answer` has every connection."""
    servers: list[socket.socket] = []

    def make(answer: Callable[[socket.socket], None]) -> str:
        path = tmp_path / "odd.sock"
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.listen()
        servers.append(server)

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(peer,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return str(path)

    yield make
    for each in servers:
        each.shutdown(socket.SHUT_RDWR)
        each.close()


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"], ids=["line", "header", "body"]
)
def test_a_daemon_that_drips_is_timed_out_wherever_it_is(
    start: bytes, odd_daemon: Callable[..., str], make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drip(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            peer.sendall(start)
            while True:
                peer.send(b"x")
                time.sleep(0.05)

    monkeypatch.setattr(docker, "CALL_SECONDS", 0.5)
    found = driver("x", make_settings(docker_socket=odd_daemon(drip)))
    began = time.monotonic()
    with pytest.raises(TimedOut):
        found.alive()
    assert time.monotonic() - began < 2
    eventually(lambda: not [each for each in threading.enumerate() if each.name == "docker-api"])


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{]}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n[[]]",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["nothing", "no http", "no json", "no object", "an error"],
)
def test_a_daemon_that_answers_garbage_is_one_clear_error(
    odd_daemon: Callable[..., str], make_settings: Callable[..., Settings], answer: bytes
) -> None:
    def say(peer: socket.socket) -> None:
        with peer:
            peer.recv(65536)
            peer.sendall(answer)

    found = driver("x", make_settings(docker_socket=odd_daemon(say)))
    with pytest.raises(OperationFailed):
        found.alive()


def test_the_container_that_the_worker_runs_in_is_never_stopped(
    odd_daemon: Callable[..., str], make_settings: Callable[..., Settings]
) -> None:
    """A daemon that says of a container that its first process is a parent of this one: as inside it."""
    asked: list[bytes] = []

    def say(peer: socket.socket) -> None:
        body = json.dumps({"Id": "f" * 64, "State": {"Running": True, "Pid": os.getppid(), "Status": "running"}}).encode()
        with peer:
            asked.append(peer.recv(65536).split(b"\r\n")[0])
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    found = driver("f" * 64, make_settings(docker_socket=odd_daemon(say)))
    with pytest.raises(InvalidParams, match="this worker runs in"):
        found.stop(1, nothing)
    assert [line.split()[0] for line in asked] == [b"GET"] * len(asked)
