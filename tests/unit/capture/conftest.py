"""Fixtures of capture's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mothball.settings import Settings
from tests.unit.capture.harness import Yard


@pytest.fixture
def yard(tmp_path: Path, make_settings: Callable[..., Settings]) -> Yard:
    """A private store with small frames, so that a few hundred KiB already span several."""
    roots = tmp_path / "roots"
    roots.mkdir()
    settings = make_settings(workspace_roots=(roots,), frame_bytes=64 * 1024, fsync=False)
    return Yard(tmp_path, settings)
