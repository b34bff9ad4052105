"""One look at the registry without its client: right when all is plain, and silent, never wrong, in every other case."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mothball.cli.glance import host_of
from mothball.client import Fleet
from mothball.settings import Settings
from workers.redis_server import RedisServer


@pytest.fixture
def settings(redis_server: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    """A fleet with one workspace of this host and one of another."""
    found = make_settings()
    assert urlsplit(redis_server.url).password
    with Fleet(settings=found) as fleet:
        fleet.register("owner/repo#1", tmp_path)
        fleet.register("elsewhere", tmp_path, host="far")
    return found


def test_a_registered_workspace_is_on_its_host(settings: Settings) -> None:
    assert host_of(settings, "owner/repo#1") == settings.host
    assert host_of(settings, "elsewhere") == "far"


def test_what_is_not_registered_has_no_answer(settings: Settings) -> None:
    assert host_of(settings, "nobody") is None
    assert host_of(settings, "by:created") is None  # a key of another kind: the server answers with an error


@pytest.mark.parametrize(
    "url", ["redis://:wrong@127.0.0.1:{port}", "redis://127.0.0.1:{port}", "redis://someone:wrong@127.0.0.1:{port}"]
)
def test_a_refused_login_has_no_answer(settings: Settings, redis_server: RedisServer, url: str) -> None:
    other = Settings.load(**{**settings.model_dump(), "redis_url": url.format(port=redis_server.port)})
    assert host_of(other, "owner/repo#1") is None


def test_a_server_that_is_not_there_or_none_has_no_answer(settings: Settings) -> None:
    for answers in (
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"+OK\r\n",
        b"+OK\r\n$-1\r\n",
        b"-ERR no\r\n$4\r\nevil\r\n",
        b"\xff" * 5000,
    ):
        with stranger(answers) as port:
            other = Settings.load(**{**settings.model_dump(), "redis_url": f"redis://127.0.0.1:{port}"})
            assert host_of(other, "owner/repo#1") is None
    other = Settings.load(**{**settings.model_dump(), "redis_url": "redis://127.0.0.1:1"})
    assert host_of(other, "owner/repo#1") is None


@contextmanager
def stranger(answer: bytes) -> Iterator[int]:
    """Something that listens, says `answer` to the first who connects and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=talk)
        thread.start()
        yield server.getsockname()[1]
        thread.join()
