"""Fixtures of several files here; each test may have a fleet of its own by the same name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mothball.settings import Settings
from tests.integration.sweeping import Sweeping
from workers.redis_server import RedisServer


@pytest.fixture
def make_fleet(private_redis: RedisServer, make_settings: Callable[..., Settings]) -> Iterator[Callable[..., Sweeping]]:
    """Makes registries with workspaces whose ages a test chooses, and the sweeps over them."""
    made: list[Sweeping] = []

    def make(**settings: Any) -> Sweeping:
        made.append(Sweeping(make_settings(**{"host": "h1", "redis_timeout": 2.0, **settings})))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def fleet(make_fleet: Callable[..., Sweeping]) -> Sweeping:
    """With the policy that a fleet has when nobody says anything."""
    return make_fleet()
