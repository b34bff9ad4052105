"""OCI layouts and the blobs that they share: only what no index reaches goes, and nothing when that cannot be known."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import Corrupt, InvalidParams, PathNotAllowed
from mothball.ocicache import sparing, work
from mothball.ocicache.types import Lease, Problem
from mothball.ocicache.undelete import undelete
from mothball.ocicache.verify import verify
from tests.unit.ocicache.conftest import INDEX, MANIFEST, MS_DAY, OLD, OLD_NOW, CacheYard, asides, names


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SETTLE_S", 0.0)


@pytest.fixture
def pool(yard: CacheYard) -> Path:
    return yard.path / "blobs" / "sha256"


@pytest.fixture(autouse=True)
def _index_is_no_sign_of_a_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparing, "_WAIT_S", 0.2)


def test_n03_only_what_the_index_does_not_reach_goes(yard: CacheYard, pool: Path) -> None:
    nested = yard.document(pool, {"schemaVersion": 2, "mediaType": INDEX, "manifests": [yard.image(pool, "arm")]}, INDEX)
    signed = yard.image(pool, "signed", artifactType="application/vnd.example.sig", subject=yard.image(pool, "subject"))
    yard.index(yard.path, [yard.image(pool, "amd"), nested, signed])
    needed = names(pool)
    yard.image(pool, "forgotten")
    promised = yard.prune(dry_run=True)
    done = yard.prune()
    assert (done.kind, done.blobs_freed, done.kept) == ("layout", 3, {"reachable": len(needed)})
    assert (promised.blobs_freed, promised.bytes_freed, promised.kept) == (done.blobs_freed, done.bytes_freed, done.kept)
    assert names(pool) == needed
    assert {"index.json", "oci-layout"} <= names(yard.path)


def test_n03_what_refers_to_something_reachable_stays_also_when_no_index_names_it(yard: CacheYard, pool: Path) -> None:
    image = yard.image(pool, "image")
    yard.index(yard.path, [image])
    bill = yard.image(pool, "sbom", subject=image)
    yard.image(pool, "signature of the sbom", subject=bill)
    needed = names(pool)
    yard.image(pool, "of nothing", subject={"mediaType": MANIFEST, "digest": f"sha256:{'0' * 64}", "size": 1})
    assert (yard.prune().blobs_freed, names(pool)) == (3, needed)


def test_n03_unknown_media_types_are_followed_as_far_as_they_can_be_read(yard: CacheYard, pool: Path) -> None:
    inner = yard.layer(pool, "inner", media="application/vnd.example.thing")
    odd = yard.document(pool, {"parts": {"first": [inner]}}, "application/vnd.example.parts+json")
    sealed = yard.layer(pool, "not json at all", media="application/vnd.example.parts+json")
    yard.index(yard.path, [odd, sealed])
    assert yard.prune().blobs_freed == 0


def test_a_full_prune_of_a_layout_takes_the_unreachable_whatever_its_age_but_not_the_young(yard: CacheYard, pool: Path) -> None:
    yard.index(yard.path, [yard.image(pool, "image")])
    yard.image(pool, "forgotten", days=1)
    assert yard.prune(CachePolicy(), everything=True).kept == {"reachable": 3, "young": 3}
    assert yard.prune(CachePolicy(grace=0), everything=True).blobs_freed == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"manifests": {}}', "\xff", "[" * 100_000, '{"manifests": [' + "[" * 100])
def test_bad_input_an_index_that_cannot_be_read_means_that_nothing_is_deleted(yard: CacheYard, pool: Path, text: str) -> None:
    yard.image(pool, "image")
    yard.index(yard.path, [])
    (yard.path / "index.json").write_bytes(text.encode("latin-1"))
    before = names(pool)
    for how in ({}, {"dry_run": True}, {"everything": True}):
        with pytest.raises(Corrupt, match=r"index"):
            yard.prune(**how)
    assert (names(pool), asides(yard.home)) == (before, [])


@pytest.mark.parametrize("text", ['{"manifests": null}', '{"manifests": []}', "{}"])
def test_n03_an_index_without_images_reaches_nothing_however_its_tool_writes_that(yard: CacheYard, pool: Path, text: str) -> None:
    yard.image(pool, "image")
    yard.index(yard.path, [])
    (yard.path / "index.json").write_text(text)
    assert (yard.prune().blobs_freed, names(pool)) == (3, set())


def test_row30_an_index_that_a_tool_is_writing_in_place_is_read_when_it_is_whole(yard: CacheYard, pool: Path) -> None:
    yard.index(yard.path, [yard.image(pool, "image")])
    index = yard.path / "index.json"
    text = index.read_text()
    index.write_text(text[: len(text) // 2])
    writer = threading.Timer(0.4, index.write_text, [text])
    writer.start()
    try:
        done = yard.prune()
    finally:
        writer.join()
    assert (done.kept, done.blobs_freed, done.errors) == ({"reachable": 3}, 0, [])


def test_row30_what_was_pulled_again_after_it_went_is_no_error(yard: CacheYard, pool: Path) -> None:
    yard.index(yard.path, [])
    image = yard.image(pool, "image")
    policy = CachePolicy(older_than=1, grace=0, quarantine=MS_DAY)
    assert yard.prune(policy).blobs_freed == 3
    assert yard.image(pool, "image") == image
    yard.index(yard.path, [image])
    found = yard.prune(policy)
    assert (found.errors, found.given_back, found.kept) == ([], 0, {"reachable": 3})


def test_row30_what_an_index_names_by_now_comes_back_with_the_next_run_long_before_its_quarantine_ends(
    yard: CacheYard, pool: Path
) -> None:
    yard.index(yard.path, [])
    image = yard.image(pool, "image")
    yard.image(pool, "forgotten")
    before = names(pool)
    policy = CachePolicy(older_than=1, grace=0, quarantine=MS_DAY)
    assert yard.prune(policy).blobs_freed == 6
    yard.index(yard.path, [image])
    found = yard.prune(policy)
    assert (found.given_back, found.errors, len(names(pool))) == (3, [], 3)
    assert len(asides(yard.home)) == 1
    undelete(yard.cache(), data_dir=yard.data_dir)
    assert (names(pool), asides(yard.home)) == (before, [])


def test_n07_a_lease_keeps_every_blob_of_a_layout_for_a_pull_may_count_on_any_without_opening_it(
    yard: CacheYard, pool: Path
) -> None:
    yard.index(yard.path, [])
    yard.image(pool, "image")
    assert yard.prune(OLD_NOW, leases=lambda: [Lease(holder="a pull", age_ms=1)]).kept == {"leased": 3}
    assert yard.prune(OLD_NOW).blobs_freed == 3


def test_bad_input_a_layout_without_index_is_left_alone(yard: CacheYard, pool: Path) -> None:
    yard.image(pool, "image")
    (yard.path / "oci-layout").write_text("{}")
    with pytest.raises(Corrupt, match=r"nothing was deleted"):
        yard.prune()
    assert len(names(pool)) == 3


def test_bad_input_a_manifest_that_cannot_be_read_means_that_nothing_is_deleted(yard: CacheYard, pool: Path) -> None:
    image = yard.image(pool, "image")
    yard.index(yard.path, [image])
    (pool / image["digest"][7:]).write_text("{ torn")
    with pytest.raises(Corrupt, match=image["digest"]):
        yard.prune()
    assert len(names(pool)) == 3


def test_n04_a_damaged_manifest_is_found_by_verify_and_goes_when_asked(yard: CacheYard, pool: Path) -> None:
    image = yard.image(pool, "image")
    yard.index(yard.path, [image])
    (pool / image["digest"][7:]).write_text("{ torn")
    found = verify(yard.cache(), data_dir=yard.data_dir, grace_ms=0, delete=True)
    assert (found.bad_digests, found.deleted) == ([image["digest"]], 1)
    assert image["digest"] in {each.path for each in found.errors}
    yard.image(pool, "image")  # pulled again
    assert verify(yard.cache(), data_dir=yard.data_dir, grace_ms=0).bad == 0
    assert yard.prune().blobs_freed == 0


def test_bad_input_an_index_that_names_a_missing_blob_is_reported_and_deletes_nothing(yard: CacheYard, pool: Path) -> None:
    whole, torn = yard.image(pool, "whole"), yard.image(pool, "torn")
    missing = json.loads((pool / torn["digest"][7:]).read_text())["layers"][0]["digest"]
    (pool / missing[7:]).unlink()
    absent = {"mediaType": MANIFEST, "digest": f"sha256:{'1' * 64}", "size": 10}
    yard.index(yard.path, [whole, torn, absent])
    before = names(pool)
    found = yard.prune()
    assert (found.blobs_freed, names(pool)) == (0, before)
    assert {each.path for each in found.errors} == {missing, absent["digest"]}
    assert set(verify(yard.cache(), data_dir=yard.data_dir, grace_ms=0).missing) == {missing, absent["digest"]}


def test_bad_input_blobs_is_a_link_and_is_not_followed(yard: CacheYard) -> None:
    outside = yard.home / "outside" / "sha256"
    yard.image(outside, "image")
    yard.path.mkdir()
    (yard.path / "blobs").symlink_to(outside.parent)
    yard.index(yard.path, [])
    with pytest.raises(PathNotAllowed, match="link"):
        yard.prune()
    assert len(names(outside)) == 3


def test_shared_blobs_are_pruned_only_with_their_layouts(yard: CacheYard) -> None:
    pool = yard.path / "sha256"
    layouts = yard.home / "layouts"
    yard.index(layouts / "a" / "one", [yard.image(pool, "one")])
    yard.index(layouts / "two", [yard.image(pool, "two")])
    needed = names(pool)
    yard.image(pool, "three")
    with pytest.raises(InvalidParams, match="layouts="):
        yard.prune()
    found = yard.prune(layouts=[layouts])
    assert (found.kind, found.blobs_freed, names(pool)) == ("shared", 3, needed)
    with pytest.raises(Corrupt, match="nobody knows"):
        yard.prune(layouts=[yard.home / "not-mounted"])
    assert yard.prune(kind="blobs").blobs_freed == len(needed)


def test_row30_a_pull_in_progress_keeps_everything_that_it_may_count_on(yard: CacheYard, pool: Path) -> None:
    yard.index(yard.path, [])
    yard.image(pool, "found by the pull")
    partial = yard.path / "oci-put-blob123"
    partial.write_text("half")
    found = yard.prune()
    assert (found.blobs_freed, found.kept) == (0, {"pulling": 3})
    assert found.errors[0].path == partial.name
    partial.unlink()
    assert yard.prune().blobs_freed == 3


@pytest.mark.parametrize("name", ["one/oci-put-blob7", ".umoci-work", "new/deep/oci-put-blob1"])
def test_row30_a_pull_into_a_layout_elsewhere_is_seen_before_it_has_an_index(yard: CacheYard, name: str) -> None:
    pool, layouts = yard.path / "sha256", yard.home / "layouts"
    yard.index(layouts / "one", [])
    yard.image(pool, "found by the pull")
    (layouts / name).parent.mkdir(parents=True, exist_ok=True)
    (layouts / name).write_text("half")
    assert yard.prune(layouts=[layouts]).kept == {"pulling": 3}
    yard.age(layouts / name, 1)
    assert yard.prune(CachePolicy(), everything=True, layouts=[layouts]).kept in ({"young": 3}, {"pulling": 3})


def test_row30_what_an_index_names_right_after_it_went_comes_back(
    yard: CacheYard, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "SETTLE_S", 1.0)
    yard.index(yard.path, [])
    image = yard.image(pool, "image")
    before = names(pool)

    def pull() -> None:
        deadline = time.monotonic() + 10
        while names(pool) and time.monotonic() < deadline:
            time.sleep(0.001)
        yard.index(yard.path, [image])

    writer = threading.Thread(target=pull)
    writer.start()
    found = yard.prune()
    writer.join()
    assert (names(pool), found.blobs_freed, found.bytes_freed, found.kept) == (before, 0, 0, {"reachable": 3})


def test_row30_what_an_index_names_during_the_quarantine_comes_back_before_it_is_deleted(yard: CacheYard, pool: Path) -> None:
    yard.index(yard.path, [])
    image = yard.image(pool, "image")
    before = names(pool)
    assert yard.prune(CachePolicy(older_than=1, grace=0, quarantine=1)).blobs_freed == 3
    yard.index(yard.path, [image])
    time.sleep(0.01)
    # The index alone says so: of the manifest's own blobs nothing is known before it is back.
    yard.prune(OLD_NOW)
    assert names(pool) == before
    assert asides(yard.home) == []


def test_row30_an_image_that_appears_while_entries_go_is_spared(yard: CacheYard, pool: Path) -> None:
    yard.index(yard.path, [])
    image = yard.image(pool, "image")
    asked: list[int] = []

    def between(digests: Sequence[str]) -> Sequence[int | None]:
        asked.append(len(digests))
        if len(asked) == 1:  # the scan is over, nothing has gone yet
            yard.index(yard.path, [image])
        return [None] * len(digests)

    assert (yard.prune(OLD, last_use=between).kept, len(names(pool))) == ({"reachable": 3}, 3)


def test_a_blobinfo_cache_goes_whole_and_only_without_a_journal(yard: CacheYard) -> None:
    yard.path.mkdir()
    database = yard.path / "blob-info-cache-v1.sqlite"
    journal = yard.path / "blob-info-cache-v1.sqlite-wal"
    for path in (database, journal):
        path.write_text("x")
        yard.age(path, 40)
    assert yard.prune().kept == {"open": 2}
    journal.unlink()
    found = yard.prune()
    assert (found.kind, found.blobs_freed, names(yard.path)) == ("blobinfo", 1, set())


@pytest.mark.parametrize(
    ("made", "kind", "command"),
    [
        (["buildkitd.lock", "cache.db"], "buildkit", "buildctl prune"),
        (["io.containerd.content.v1.content/blobs/sha256/x"], "containerd", "crictl rmi --prune"),
        (["overlay-images/images.json", "storage.lock"], "containers-storage", "podman system prune"),
        (["engine-id", "image/overlay2/x", "containers/x", "volumes/x"], "docker", "docker system prune"),
        (["docker/registry/v2/blobs/x"], "registry", "registry garbage-collect"),
    ],
)
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("declared", [None, "flat"])
def test_n12_stores_of_other_tools_are_reported_with_the_right_command_and_never_touched(
    yard: CacheYard, made: list[str], kind: str, command: str, everything: bool, declared: str | None
) -> None:
    for name in made:
        path = yard.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 5000)
    yard.flat(40)
    before = sorted(yard.path.rglob("*"))
    found = yard.prune(everything=everything, kind=declared)
    assert (found.kind, found.blobs_freed, found.bytes_freed) == (kind, 0, 0)
    assert command in found.advice
    assert found.before_bytes > 5000
    assert sorted(yard.path.rglob("*")) == before


def test_a_missing_subject_is_no_problem(yard: CacheYard, pool: Path) -> None:
    subject = {"mediaType": MANIFEST, "digest": f"sha256:{'2' * 64}", "size": 1}
    yard.index(yard.path, [yard.image(pool, "x", subject=subject)])
    problems: list[Problem] = yard.prune().errors
    assert problems == []
    assert os.listdir(pool)
