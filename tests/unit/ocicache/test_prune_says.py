"""What a prune says of what it does not do, or does in another way than was asked; and that a dry run says the same."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable

import msgspec
import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import InvalidParams
from mothball.ocicache import aside, work
from mothball.ocicache.measure import usage
from mothball.ocicache.types import Pressure
from mothball.ocicache.undelete import undelete
from mothball.ocicache.verify import verify
from tests.support import not_permitted
from tests.unit.ocicache.conftest import MANIFEST, OLD, CacheYard, asides, disk, names
from tests.unit.ocicache.test_prune_bad_input import as_user, for_everybody, mounted


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SETTLE_S", 0.0)


@pytest.mark.parametrize("everything", [True, False])
def test_a_dry_run_by_a_user_who_may_not_write_the_cache_promises_nothing_and_says_who_may(
    yard: CacheYard, everything: bool
) -> None:
    yard.flat(40, 41)
    for_everybody(yard)
    yard.path.chmod(0o755)
    out = as_user(yard, f"r = yard.prune(dry_run=True, everything={everything})\nprint(r.bytes_freed, r.kept, r.errors)")
    assert out.startswith("0 {'permission': 2}")
    assert "this is user 1234, and it belongs to user 0" in out
    out = as_user(yard, f"try:\n    yard.prune(everything={everything})\nexcept Exception as e: print(type(e).__name__, e)")
    assert out.startswith("OperationFailed")
    assert "Permission denied; this is user 1234, and it belongs to user 0, who may (so may root); nothing was changed" in out
    assert len(names(yard.path)) == 2


def test_verify_of_another_tools_store_reads_nothing_and_names_its_command(yard: CacheYard) -> None:
    (yard.path / "overlay-images").mkdir(parents=True)
    (yard.path / "storage.lock").touch()
    found = verify(yard.cache(), data_dir=yard.data_dir)
    assert (found.blobs, found.errors, found.kind) == (0, [], "containers-storage")
    assert "podman system prune" in found.advice


@pytest.mark.parametrize(
    ("made", "where", "command"),
    [
        (["buildkitd.lock", "cache.db"], "runc-overlayfs/content", "buildctl prune"),
        (["buildkitd.lock"], "somewhere/content", "buildctl prune"),
        (["io.containerd.metadata.v1.bolt/meta.db"], "io.containerd.content.v1.content", "crictl rmi"),
        (["engine-id"], "containerd/daemon/content", "docker system prune"),
        (["storage.lock", "overlay-images/x", "overlay-layers/x"], "libpod/cache", "podman system prune"),
    ],
)
@pytest.mark.parametrize("declared", [None, "blobs"])
def test_n12_a_folder_of_blobs_inside_another_tools_store_is_not_taken_for_a_cache(
    yard: CacheYard, made: list[str], where: str, command: str, declared: str | None
) -> None:
    store = yard.home / "store"
    for name in made:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
    blob = yard.blob(store / where / "blobs/sha256", b"x" * 5000, 40)
    for everything in (True, False):
        found = yard.prune(path=store / where, everything=everything, kind=declared)
        assert (found.blobs_freed, command in found.advice) == (0, True)
    assert blob.exists()


def test_n12_the_content_store_of_containerd_is_told_by_what_is_being_written_into_it(yard: CacheYard) -> None:
    yard.blob(yard.path / "blobs/sha256", b"x", 40)
    (yard.path / "ingest").mkdir()
    assert "crictl rmi" in yard.prune(everything=True).advice


def test_n12_blobs_that_manifests_beside_them_need_are_no_cache_unless_it_was_declared(yard: CacheYard) -> None:
    """So ollama keeps models."""
    yard.blob(yard.home / "models/blobs", b"model", 40, name="sha256-{}")
    (yard.home / "models/manifests").mkdir()
    for everything in (True, False):
        with pytest.raises(InvalidParams, match="manifests"):
            yard.prune(path=yard.home / "models/blobs", everything=everything)
    assert yard.prune(path=yard.home / "models/blobs", kind="flat").blobs_freed == 1


def test_a_full_disk_that_leaves_no_room_for_a_quarantine_is_said(yard: CacheYard) -> None:
    with mounted(yard.home, "nr_inodes=12,size=4m"):
        yard.flat(*range(40, 50))
        assert yard.prune(OLD).notes == [
            "the disk is so full that nothing can be put into quarantine: what went was deleted at once and cannot be brought "
            "back; pull again what is missed"
        ]
        assert undelete(yard.cache(), data_dir=yard.data_dir).blobs == 0


def test_n01_only_files_are_counted_as_blobs(yard: CacheYard) -> None:
    yard.flat(1, 2)
    (yard.path / "folder/empty").mkdir(parents=True)
    (yard.path / "link").symlink_to("nowhere")
    os.mkfifo(yard.path / "folder/pipe")
    promised = yard.prune(everything=True, kind="flat", dry_run=True)
    found = yard.prune(everything=True, kind="flat")
    assert (found.blobs_freed, found.others_freed) == (2, 2)
    assert (promised.blobs_freed, promised.others_freed, promised.bytes_freed) == (2, 2, found.bytes_freed)


@pytest.mark.parametrize("due", [True, False])
def test_n09_a_dry_run_knows_what_of_a_quarantine_would_be_given_back(yard: CacheYard, due: bool) -> None:
    pool = yard.path / "blobs/sha256"
    yard.index(yard.path, [])
    image = yard.image(pool, "pulled again")
    lone = yard.layer(pool, "named by the manifest of the other quarantine")
    yard.prune(CachePolicy(older_than=1, grace=0, quarantine=1 if due else 10**6, keep=(lone["digest"][7:],)))
    manifest = yard.document(pool, {"config": image, "layers": [lone]}, "application/vnd.oci.image.manifest.v1+json")
    yard.prune(CachePolicy(older_than=1, grace=0, quarantine=1 if due else 10**6))
    yard.layer(pool, "of nobody")
    yard.index(yard.path, [manifest])
    assert len(asides(yard.home)) == (1 if due else 2)
    policy = CachePolicy(max_bytes=1, grace=0, quarantine=0)
    promised = yard.prune(policy, dry_run=True)
    found = yard.prune(policy)
    for name in ("bytes_freed", "blobs_freed", "expired_bytes", "given_back", "kept", "before_bytes", "after_bytes"):
        assert getattr(promised, name) == getattr(found, name), name
    assert (found.given_back > 0, found.errors == []) == (True, not due)
    assert found.after_bytes == disk(pool)


def test_row30_what_the_manifest_in_one_quarantine_names_comes_back_out_of_another_that_ends(
    yard: CacheYard, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = iter(["0" * 16, "1" * 16, "2" * 16])
    monkeypatch.setattr(aside.secrets, "token_hex", lambda _: next(marks))
    pool = yard.path / "blobs/sha256"
    yard.index(yard.path, [])
    later = CachePolicy(older_than=1, grace=0, quarantine=10**7)
    layer = yard.layer(pool, "in the first")
    assert yard.prune(later).blobs_freed == 1
    manifest = yard.document(pool, {"layers": [layer]}, MANIFEST)
    assert yard.prune(later).blobs_freed == 1
    yard.index(yard.path, [manifest])
    # The disk is full, so that both end.
    found = yard.prune(CachePolicy(min_free_percent=99.99))
    assert (found.errors, found.given_back, found.expired_bytes) == ([], 2, 0)
    assert names(pool) == {each["digest"][7:] for each in (layer, manifest)}


def test_n10_what_is_held_by_names_elsewhere_does_not_make_the_cap_take_everything_else(yard: CacheYard) -> None:
    """A copy of the cache by hard links, as backups make one."""
    paths = yard.flat(44, 43, 42, 41, size=9000)
    one = paths[0].stat().st_blocks * 512
    for each in paths[:2]:
        os.link(each, yard.home / each.name)
        yard.age(each, 44)
    found = yard.prune(CachePolicy(max_bytes=2 * one, grace=0, quarantine=0))
    assert (found.blobs_freed, found.bytes_freed) == (2, 0)
    assert names(yard.path) == {each.name for each in paths[2:]}


@pytest.mark.parametrize("then", [usage, undelete])
def test_what_another_user_left_in_quarantine_is_said_and_root_takes_that_of_the_caches_owner(
    yard: CacheYard, then: Callable[..., object]
) -> None:
    if os.geteuid() != 0:
        not_permitted("act as another user")
    for_everybody(yard)
    yard.flat(40, 1)
    os.chown(yard.home, 1234, 1234)
    os.chown(yard.path, 1234, 1234)
    for path in yard.path.iterdir():
        os.chown(path, 1234, 1234)
    yard.prune(OLD)
    assert "a prune by user 0 left in quarantine" in as_user(yard, "print(yard.prune().notes)")
    assert undelete(yard.cache(), data_dir=yard.data_dir).blobs == 1
    for path in yard.path.iterdir():
        os.chown(path, 1234, 1234)
        yard.age(path, 40)
    assert as_user(yard, "print(yard.prune(c.OLD).quarantined_bytes > 0)") == "True"
    then(yard.cache(), data_dir=yard.data_dir)
    found = yard.prune(OLD, pressure=Pressure(high=0.001, low=0.0005))
    assert (found.notes, asides(yard.home)) == ([], [])


def test_hostile_names_reach_neither_a_terminal_nor_break_the_result(yard: CacheYard) -> None:
    yard.flat(1)
    evil = os.fsencode(yard.path) + b"/" + (b"x\n\x1b[31m\xff\xfe" * 28)[:255]
    with open(evil, "wb"):
        pass
    if os.geteuid() != 0 or subprocess.run(["chattr", "+i", evil], capture_output=True, check=False).returncode:
        not_permitted("make a file immutable (on this file system)")
    try:
        found = yard.prune(everything=True, kind="flat")
        [problem] = found.errors
        assert "\\n\\x1b[31m" in problem.path
        assert problem.path.isprintable()
        msgspec.json.encode(found.to_dict())
        json.dumps(found.to_dict()).encode()
    finally:
        for each in yard.home.rglob("*"):
            subprocess.run(["chattr", "-i", os.fsencode(each)], capture_output=True, check=False)
