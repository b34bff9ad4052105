"""What images, layouts and names may look like that somebody else made: nothing that is needed goes, and nothing takes for ever."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import Corrupt
from mothball.ocicache import sparing, work
from mothball.ocicache.table import Digests
from tests.unit.ocicache.conftest import CONFIG, INDEX, LAYER, MANIFEST, CacheYard, names


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SETTLE_S", 0.0)
    monkeypatch.setattr(sparing, "_WAIT_S", 0.2)
    monkeypatch.setattr(sparing, "QUIET_NS", 0)


@pytest.fixture
def pool(yard: CacheYard) -> Path:
    return yard.path / "blobs" / "sha256"


def sha512_of(pool: Path, value: dict[str, Any], media: str) -> dict[str, Any]:
    """Store a document under its sha512."""
    data = json.dumps(value).encode()
    digest = hashlib.sha512(data).hexdigest()
    (pool.parent / "sha512").mkdir(exist_ok=True)
    (pool.parent / "sha512" / digest).write_bytes(data)
    return {"mediaType": media, "digest": f"sha512:{digest}", "size": len(data)}


def test_n03_what_a_manifest_with_another_kind_of_digest_names_stays(yard: CacheYard, pool: Path) -> None:
    layers = [yard.layer(pool, "of a manifest with a sha512")]
    manifest = sha512_of(pool, {"config": yard.document(pool, {}, CONFIG), "layers": layers}, MANIFEST)
    yard.index(yard.path, [manifest])
    before = names(pool)
    yard.layer(pool, "of nobody")
    found = yard.prune()
    assert (found.blobs_freed, names(pool), found.errors) == (1, before, [])
    gone = manifest["digest"].partition(":")[2]
    (yard.path / "blobs/sha512" / gone).unlink()
    assert [each.path for each in yard.prune(dry_run=True).errors] == [f"sha512:{gone}"]


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("kind", ["layout", "blobs"])
def test_blobs_of_another_kind_of_digest_are_left_alone_and_counted(
    yard: CacheYard, pool: Path, everything: bool, dry_run: bool, kind: str
) -> None:
    yard.layer(pool, "of nobody")
    if kind == "layout":
        yard.index(yard.path, [])
    sha512_of(pool, {"of": "nobody"}, "application/json")
    found = yard.prune(CachePolicy(older_than=1, grace=0, quarantine=0), everything=everything, dry_run=dry_run)
    assert (found.blobs_freed, found.kept) == (1, {"algorithm": 1})
    assert len(names(yard.path / "blobs/sha512")) == 1
    assert len(names(pool)) == dry_run


@pytest.mark.parametrize("where", ["blobs/thesis/chapter", "blobs/notes"])
def test_n12_what_lies_beside_the_blobs_stays_in_a_full_prune_unless_the_kind_was_declared(yard: CacheYard, where: str) -> None:
    for kind in (None, "blobs"):
        yard.blob(yard.path / "blobs/sha256", b"old", 40)
        other = yard.path / where
        other.parent.mkdir(exist_ok=True)
        other.write_text("x" * 5000)
        promised = yard.prune(everything=True, kind=kind, dry_run=True)
        found = yard.prune(everything=True, kind=kind)
        assert (found.blobs_freed, found.bytes_freed) == (promised.blobs_freed, promised.bytes_freed)
        assert (found.blobs_freed, other.exists()) == ((1, True) if kind is None else (2, False))


@pytest.mark.parametrize("first", [True, False])
def test_n03_what_is_named_as_a_layer_and_as_a_manifest_is_followed(yard: CacheYard, pool: Path, first: bool) -> None:
    """An image may name what it likes; it must not hide from the walk what another image needs."""
    victim = yard.image(pool, "victim")
    nested = yard.document(pool, {"mediaType": INDEX, "manifests": [victim]}, INDEX)
    alias = {"mediaType": LAYER, "digest": victim["digest"], "size": 10**12, "urls": ["https://example.org"]}
    same_start = {"mediaType": LAYER, "digest": victim["digest"][:23] + "0" * 48, "size": 1, "urls": ["https://example.org"]}
    attacker = yard.document(pool, {"config": yard.document(pool, {}, CONFIG), "layers": [alias, same_start]}, MANIFEST)
    yard.index(yard.path, [attacker, nested] if first else [nested, attacker])
    before = names(pool)
    assert (yard.prune().blobs_freed, names(pool)) == (0, before)


def test_n03_names_of_fields_count_in_any_case_as_go_reads_them(yard: CacheYard, pool: Path) -> None:
    text = json.dumps({"Config": yard.document(pool, {}, CONFIG), "Layers": [yard.layer(pool, "x")]}).replace(
        '"digest"', '"Digest"'
    )
    manifest = yard.blob(pool, text.encode(), 100)
    yard.index(yard.path, [{"MediaType": MANIFEST, "Digest": f"sha256:{manifest.name}", "size": len(text)}])
    before = names(pool)
    assert (len(before), yard.prune().blobs_freed, names(pool)) == (3, 0, before)


@pytest.mark.parametrize("what", ["folder", "pipe", "large"])
def test_bad_input_a_manifest_that_is_no_manifest_means_that_nothing_is_deleted(yard: CacheYard, pool: Path, what: str) -> None:
    manifest = yard.image(pool, "x")
    path = pool / manifest["digest"][7:]
    if what == "large":
        path.write_bytes(path.read_bytes() + b" " * 17 * 1024**2)
    else:
        path.unlink()
        path.mkdir() if what == "folder" else os.mkfifo(path)
    yard.index(yard.path, [manifest])
    before = names(pool)
    with pytest.raises(Corrupt, match="nothing was deleted"):
        yard.prune()
    assert names(pool) == before


def shared(yard: CacheYard) -> tuple[Path, Path, dict[str, Any]]:
    """A shared blob folder with an old image, the folder of its layouts, and the image's descriptor."""
    layouts = yard.home / "layouts"
    layouts.mkdir()
    image = yard.image(yard.path / "sha256", "needed")
    return yard.path / "sha256", layouts, image


@pytest.mark.parametrize("name", ["a/b/c/d/layout", "link"])
def test_bad_input_a_layout_that_may_not_be_seen_means_that_nothing_is_deleted(yard: CacheYard, name: str) -> None:
    pool, layouts, image = shared(yard)
    yard.index(layouts / "other", [])
    if name == "link":
        yard.index(yard.home / "elsewhere", [image])
        (layouts / name).symlink_to(yard.home / "elsewhere")
    else:
        yard.index(layouts / name, [image])
    with pytest.raises(Corrupt, match="nothing was deleted"):
        yard.prune(layouts=[layouts])
    assert len(names(pool)) == 3


def test_bad_input_a_folder_without_any_layout_means_that_nothing_is_deleted(yard: CacheYard) -> None:
    """Its disk is not mounted, for example."""
    pool, layouts, _ = shared(yard)
    with pytest.raises(Corrupt, match="is its disk mounted"):
        yard.prune(layouts=[layouts])
    assert len(names(pool)) == 3


@pytest.mark.parametrize("name", ["0" * 64, "in/outer", "a/b/layout"])
def test_n03_layouts_are_seen_wherever_they_lie(yard: CacheYard, name: str) -> None:
    pool, layouts, image = shared(yard)
    yard.index(layouts / "in", [])
    yard.index(layouts / name, [image])
    (layouts / "latest").symlink_to("in")
    found = yard.prune(layouts=[layouts])
    assert (found.blobs_freed, len(names(pool))) == (0, 3)


def test_digests_that_are_chosen_to_meet_are_as_quick_as_others() -> None:
    started = time.process_time()
    digests = Digests()
    for number in range(20_000):
        digests.add(f"{number << 44:016x}" + "0" * 48)
    assert len(digests) == 20_000
    assert time.process_time() - started < 5
