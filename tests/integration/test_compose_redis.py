"""deploy/docker/redis.sh really starts a server that keeps its promises."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tests.support import eventually
from workers.redis_server import RedisServer

SCRIPT = Path(__file__).resolve().parents[2] / "deploy/docker/redis.sh"


def test_the_compose_server_starts_with_its_password_off_the_command_line(redis_program: str, tmp_path: Path) -> None:
    port = RedisServer(tmp_path / "unused").port
    programs = tmp_path / "bin"
    programs.mkdir()
    entry = programs / "docker-entrypoint.sh"
    entry.write_text('#!/bin/sh\nexec "$@"\n')
    entry.chmod(0o755)
    (programs / "redis-server").symlink_to(redis_program)
    (programs / "chown").symlink_to("/bin/true")
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "REDIS_PASSWORD": "Secret1234",
        "REDIS_CONF": str(tmp_path / "redis.conf"),
        "REDIS_DATA": str(tmp_path),
        "REDIS_PORT": str(port),
    }
    with subprocess.Popen(["sh", str(SCRIPT)], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        try:
            with Redis(port=port, password="Secret1234", retry=Retry(NoBackoff(), 0), decode_responses=True) as client:

                def answers() -> bool:
                    try:
                        return bool(client.ping())
                    except RedisError:
                        return False

                eventually(answers, what="PING")
                assert client.config_get("appendonly") == {"appendonly": "yes"}
                assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            process = psutil.Process(server.pid)
            assert "Secret1234" not in " ".join(process.cmdline())
            assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
        finally:
            server.terminate()


def test_the_compose_server_refuses_to_start_without_a_password(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(SCRIPT)],
        env={"PATH": os.environ["PATH"], "REDIS_CONF": str(tmp_path / "c")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "REDIS_PASSWORD" in done.stderr
