"""A damaged store made whole again from a real registry."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mothball.errors import InvalidParams, RegistryUnavailable
from mothball.package.mend import verify_and_repair
from mothball.package.remote import push
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.manifest import load_manifest
from mothball.store.verify import Level
from tests.acceptance.registry import ImageRegistry, image_registry
from tests.unit.store.build import Dir, File, capture, damage, layer, new_store

__all__ = ["image_registry"]  # a fixture


@pytest.fixture
def given(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    """Settings without a login."""
    return make_settings(docker_config=tmp_path / "none.json")


@pytest.fixture
def pushed(tmp_path: Path, given: Settings, image_registry: ImageRegistry) -> tuple[Store, str]:
    """A store with two captures, of which the first was pushed, and its digest."""
    store = new_store(tmp_path / "store")
    first = capture(store, layer({b"a": File(b"a" * 9000), b"d": Dir()}), layer({b"b": File(b"b")}), workspace="one")
    capture(store, layer({b"own": File(b"never pushed" * 99)}), workspace="two")
    push(store, first, f"{image_registry.address}/o/r:1", given)
    return store, first


@pytest.mark.parametrize("level", ["structure", "sample", "deep", "content"])
def test_what_was_pushed_is_fetched_again_and_what_was_not_is_named(
    pushed: tuple[Store, str], given: Settings, image_registry: ImageRegistry, level: Level
) -> None:
    store, first = pushed
    manifest = load_manifest(store.blobs, first)
    own = load_manifest(store.blobs, store.refs("two").get().digest).layers[0].digest
    damage(store, manifest.layers[0].digest, size=40)
    store.blobs.path(manifest.config.digest).unlink()
    damage(store, own, size=40)
    found = verify_and_repair(store, given, level=level, sample=100, source=f"{image_registry.address}/o/r")
    assert found.repair is not None
    assert sorted(found.repair.repaired) == sorted([manifest.layers[0].digest, manifest.config.digest])
    assert [(problem.digest, problem.refs) for problem in found.report.problems] == [(own, ["two:latest"])]
    assert [digest for digest, _ in found.repair.failed] == [own]
    with store.tree("one") as tree:
        assert tree.read("a") == b"a" * 9000


def test_a_manifest_and_rotten_bytes_come_back(pushed: tuple[Store, str], given: Settings, image_registry: ImageRegistry) -> None:
    store, first = pushed
    layer_digest = load_manifest(store.blobs, first).layers[1].digest
    damage(store, layer_digest, 30)
    damage(store, first, 30)
    # What the manifest names is known only once it is back.
    source = f"{image_registry.address}/o/r"
    found = verify_and_repair(store, given, "one", "deep", source=source)
    assert found.report.problems == []
    assert found.repair is not None
    assert found.repair.repaired == [first, layer_digest]
    assert verify_and_repair(store, given, "one", "content", source=source).repair is None


def test_a_whole_store_asks_no_registry(pushed: tuple[Store, str], given: Settings, image_registry: ImageRegistry) -> None:
    store, _ = pushed
    image_registry.stop()
    found = verify_and_repair(store, given, level="deep", source=f"{image_registry.address}/o/r")
    assert (found.repair, found.report.problems) == (None, [])


def test_a_registry_that_is_down_and_no_reference_are_errors(
    pushed: tuple[Store, str], given: Settings, image_registry: ImageRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first = pushed
    monkeypatch.setattr("mothball.package.distribution.PAUSE_SECONDS", 0.01)
    damage(store, load_manifest(store.blobs, first).layers[0].digest, size=40)
    image_registry.stop()
    with pytest.raises(RegistryUnavailable):
        verify_and_repair(store, given, source=f"{image_registry.address}/o/r")
    with pytest.raises(InvalidParams):
        verify_and_repair(store, given, source="not a reference")


@pytest.mark.parametrize("kind", ["gone", "link", "fifo", "folder"])
def test_a_blob_comes_back_in_the_place_of_whatever_stands_there(
    pushed: tuple[Store, str], given: Settings, image_registry: ImageRegistry, tmp_path: Path, kind: str
) -> None:
    """But for a folder, which may hold somebody's work: that is said, and the others come back."""
    store, first = pushed
    victim = tmp_path / "victim"
    victim.write_text("mine")
    manifest = load_manifest(store.blobs, first)
    digests = [first, *(layer.digest for layer in manifest.layers)]
    for digest in digests:
        place = store.blobs.path(digest)
        place.unlink()
        if kind == "link":
            place.symlink_to(victim)
        elif kind == "fifo":
            os.mkfifo(place)
        elif kind == "folder" and digest == digests[1]:
            place.mkdir()
    found = verify_and_repair(store, given, "one", "deep", source=f"{image_registry.address}/o/r")
    assert found.repair is not None
    left = digests[1:2] if kind == "folder" else []
    assert sorted(found.repair.repaired) == sorted(set(digests) - set(left))
    assert [problem.digest for problem in found.report.problems] == left
    assert all("is a folder; move it away" in reason for _, reason in found.repair.failed)
    assert victim.read_text() == "mine"
    assert list(store.blobs.temp.iterdir()) == []
