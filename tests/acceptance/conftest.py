"""A fleet per test, on a Redis of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.settings import Settings
from tests.acceptance.fleet import FleetRun
from workers.redis_server import RedisServer


@pytest.fixture
def fleet(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[FleetRun]:
    """Quick settings: a lease of 3 s, rings each second, a heartbeat each second, a soft shutdown of 1 s."""
    quick: dict[str, Any] = {
        "lease_seconds": 3, "ring_seconds": 1, "queued_ring_after_seconds": 1, "heartbeat_seconds": 1,
        "soft_shutdown_seconds": 1, "worker_concurrency": 1, "log_format": "json", "redis_timeout": 1.5,
    }  # fmt: skip
    with FleetRun(make_settings(**quick), tmp_path / "fleet") as run:
        yield run
