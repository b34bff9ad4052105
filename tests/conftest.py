"""Fixtures for every room of the tests: private Redis servers, settings of their own, no leaking environment."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.settings import Settings
from tests.support import ON_CI, missing
from workers.redis_server import RedisServer, find_server

# Nothing listens there: a test that did not ask for a server and connects all the same gets a clear refusal at once.
NO_REDIS = "redis://127.0.0.1:1"
_ROOMS = {"acceptance": pytest.mark.acceptance, "chaos": pytest.mark.chaos}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folder is the marker, so `-m "not chaos"` can never miss a file."""
    for item in items:
        for part in item.path.parts:
            if part in _ROOMS:
                item.add_marker(_ROOMS[part])


def pytest_report_header() -> str:
    """Say which server the run uses."""
    try:
        return f"redis server: {_server_program()}; missing tools {'fail' if ON_CI else 'skip'}"
    except Exception as error:  # the header must never stop a run; the fixtures tell it properly
        return f"redis server: none ({error})"


def _server_program() -> str:
    return str(find_server(os.environ.get("MOTHBALL_TEST_REDIS_SERVER", "")))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own MOTHBALL_* and CELERY_* variables must not reach a test."""
    for name in list(os.environ):
        if name.startswith(("MOTHBALL_", "CELERY_")) and not name.startswith("MOTHBALL_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def redis_program() -> str:
    """The server program of this machine."""
    try:
        return _server_program()
    except Exception as error:
        missing(f"a Redis server ({error})")
        raise


@pytest.fixture(scope="session")
def redis_server(redis_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for the whole session. Never kill or flush it; keep apart by namespace (`make_settings`)."""
    with RedisServer(tmp_path_factory.mktemp("redis"), binary=redis_program) as server:
        yield server


@pytest.fixture
def private_redis(redis_program: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test alone: may be killed, frozen, flushed and restarted."""
    with RedisServer(tmp_path / "redis", binary=redis_program) as server:
        yield server


@pytest.fixture
def make_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Settings]:
    """`make_settings(**overrides)`: a namespace and a host name of their own, data and workspaces below tmp_path.

    The URL is that of `private_redis` or `redis_server` when the test asks for one of them, else an address where
    nothing listens. Queue names of the broker carry no namespace: tests with workers take `private_redis`.
    """

    def make(**overrides: Any) -> Settings:
        unique = uuid.uuid4().hex[:10]
        servers = [name for name in ("private_redis", "redis_server") if name in request.fixturenames]
        url = request.getfixturevalue(servers[0]).url if servers else NO_REDIS
        workspaces = tmp_path / "workspaces"
        workspaces.mkdir(exist_ok=True)
        values: dict[str, Any] = {
            "redis_url": url,
            "namespace": f"t{unique}",
            "host": f"host-{unique}",
            "data_dir": tmp_path / f"data-{unique}",
            "workspace_roots": (tmp_path,),
        }
        return Settings.load(**{**values, **overrides})

    return make
