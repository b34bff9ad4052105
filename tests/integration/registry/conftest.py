"""A registry in a namespace of its own for every test, on the session's private server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mothball.settings import Settings
from tests.integration.registry.support import Bench
from workers.redis_server import RedisServer


@pytest.fixture
def make_bench(redis_server: RedisServer, make_settings: Callable[..., Settings]) -> Iterator[Callable[..., Bench]]:
    """`make_bench(**settings)`: a bench with settings of its own."""
    made: list[Bench] = []

    def make(**overrides: Any) -> Bench:
        made.append(Bench(make_settings(**overrides)))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """The registry with default settings."""
    return make_bench()
