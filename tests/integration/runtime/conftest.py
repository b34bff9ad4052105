"""A bench with real processes; whatever a test started has ended after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mothball.settings import Settings
from tests.integration.runtime.support import Bench


@pytest.fixture
def bench(tmp_path: Path, make_settings: Callable[..., Settings]) -> Iterator[Bench]:
    made = Bench(tmp_path / "workspaces" / "w", make_settings())
    yield made
    made.end()
