"""Where the demo's image cache lies, and where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from mothball.settings import Settings
from workers.demo_cache import settings_of


def test_the_demos_cache_lies_in_its_own_folder_and_the_settings_accept_it(tmp_path: Path) -> None:
    found = settings_of(tmp_path)
    loaded = Settings.load(data_dir=tmp_path / "data", workspace_roots=(tmp_path / "workspaces",), **found)
    assert [cache.path for cache in loaded.caches] == [str(tmp_path / "pull-cache")]


@pytest.mark.parametrize("name", ["a,b", "a;b", "a,kind=flat", "/usr/tmp/x", "a;/b"])
def test_a_temporary_folder_in_which_no_cache_can_be_declared_leaves_the_demo_without_one(tmp_path: Path, name: str) -> None:
    found = settings_of(tmp_path / name)
    assert found == {}
    assert Settings.load(data_dir=tmp_path / "data", **found).caches == ()
