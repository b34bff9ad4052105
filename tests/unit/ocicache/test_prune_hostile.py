"""What images, layouts and names may look like that somebody else made: nothing that is needed goes, and nothing takes for ever."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import Busy, Corrupt, PathNotAllowed
from mothball.ocicache import layouts, sparing, whole, work
from mothball.ocicache.measure import usage
from mothball.ocicache.table import Digests
from mothball.ocicache.undelete import undelete
from tests.unit.ocicache.conftest import CONFIG, INDEX, LAYER, MANIFEST, CacheYard, asides, names
from tests.unit.ocicache.test_prune_bad_input import as_user, for_everybody


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


@pytest.mark.parametrize("stays", ["young", "kept"])
def test_what_stays_without_being_reached_stays_whole(yard: CacheYard, pool: Path, stays: str) -> None:
    subject = yard.image(pool, "subject")
    yard.index(yard.path, [subject])
    signature = yard.image(pool, "signature", subject=subject)
    loose = yard.image(pool, "loose")
    yard.image(pool, "of nobody")
    chosen = [each["digest"][7:] for each in (signature, loose)]
    for each in chosen if stays == "young" else ():
        yard.age(pool / each, 0)
    # Every file is new by its time of change: what is young is told by a grace that only the written ones are within.
    keep = tuple(chosen) if stays == "kept" else ()
    if stays == "young":
        time.sleep(1.1)
        for each in chosen:
            os.utime(pool / each)
    found = yard.prune(CachePolicy(older_than=1, grace=1000 if stays == "young" else 0, quarantine=0, keep=keep))
    assert (found.blobs_freed, len(names(pool))) == (3, 9)
    assert found.kept == {"reachable": 3 + 4, stays: 2}


@pytest.mark.parametrize("when", [-(10**9), 10**11])
def test_times_that_nobody_can_have_written_at_neither_end_a_prune_nor_keep_a_blob(yard: CacheYard, when: int) -> None:
    path = yard.flat(0)[0]
    os.utime(path, (when, when))
    if int(path.stat().st_mtime) != when:  # the file system holds no such time, and made another one of it
        assert abs(path.stat().st_mtime) > 10**9
    time.sleep(0.01)
    assert yard.prune(CachePolicy(max_bytes=1, grace=0, quarantine=0)).blobs_freed == 1


def test_a_cache_in_the_real_data_dir_is_refused_where_the_setting_is_a_link(yard: CacheYard) -> None:
    real = yard.home / "real"
    yard.blob(real / "store", b"capture", 40, name="sha256:{}")
    yard.data_dir.symlink_to(real)
    with pytest.raises(PathNotAllowed, match="lies in the data dir"):
        yard.prune(path=real / "store")
    assert len(names(real / "store")) == 1


def forged(yard: CacheYard, **state: Any) -> Path:
    """A folder beside the cache that looks like an aside of ours."""
    aside = yard.home / f".{yard.path.name}.mothball-aside-{'0' * 16}"
    aside.mkdir(mode=0o700)
    said = {"at": 1, "delete_after": 1, "cache": str(yard.path), "kind": "flat", "policy": "", "stage": "kept", **state}
    (aside / "state").write_text(json.dumps(said))
    return aside


@pytest.mark.parametrize("state", [{"folder": "../target"}, {"folder": "a\0b"}, {"kind": "bogus"}, {"folder": "/etc"}])
def test_an_aside_whose_state_leads_elsewhere_is_left_alone(yard: CacheYard, state: dict[str, Any]) -> None:
    yard.flat(1)
    aside = forged(yard, **state)
    (aside / "target").mkdir()
    (aside / "target" / "file").touch()
    (yard.home / "target").mkdir()
    assert yard.prune().errors == []
    assert undelete(yard.cache(), data_dir=yard.data_dir).blobs == 0
    assert (names(aside), names(yard.home / "target")) == ({"state", "target"}, set())


@pytest.mark.parametrize("what", ["pipe", "folder", "link", "writable"])
def test_an_aside_that_others_could_have_made_is_left_alone(yard: CacheYard, what: str) -> None:
    yard.flat(1)
    aside = forged(yard)
    (aside / "tree").mkdir()
    (aside / "tree" / "file").touch()
    state = aside / "state"
    if what == "writable":
        aside.chmod(0o777)
    else:
        state.rename(yard.home / "said")
        {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink(yard.home / "said", path)}[what](state)
    yard.prune()
    undelete(yard.cache(), data_dir=yard.data_dir)
    assert usage(yard.cache(), data_dir=yard.data_dir).quarantined == 0
    assert (aside / "tree" / "file").exists()


def test_a_quarantine_that_was_written_under_a_clock_that_was_ahead_ends(yard: CacheYard) -> None:
    yard.flat(1)
    ahead = int(time.time() * 1000) + 10**11
    aside = forged(yard, at=ahead, delete_after=ahead + 1)
    (aside / "tree").mkdir()
    (aside / "tree" / f"sha256:{'0' * 64}").write_text("x" * 5000)
    assert yard.prune().expired_bytes > 0
    assert not aside.exists()


def test_the_blobs_below_the_folder_of_layouts_are_no_layouts(yard: CacheYard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_MAX_LAYOUTS", 5)
    pool = yard.path / "sha256"
    yard.index(yard.home / "one", [yard.image(pool, "needed")])
    for number in range(10):
        yard.layer(pool, f"of nobody {number}")
    assert yard.prune(layouts=[yard.home]).blobs_freed == 10


@pytest.mark.parametrize("is_open", [True, False])
def test_a_blobinfo_cache_is_emptied_with_its_journals_and_never_while_it_is_open(yard: CacheYard, is_open: bool) -> None:
    yard.path.mkdir()
    with sqlite3.connect(yard.path / "blob-info-cache-v1.sqlite") as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE one (two)")
    assert len(names(yard.path)) == 3
    if is_open:
        with pytest.raises(Busy, match="open"):
            yard.prune(everything=True)
        assert len(names(yard.path)) == 3
        database.close()
        return
    left = {name: (yard.path / name).read_bytes() for name in names(yard.path)}
    database.close()
    for name, data in left.items():  # as a killed process leaves them
        (yard.path / name).write_bytes(data)
    promised = yard.prune(everything=True, dry_run=True)
    found = yard.prune(everything=True)
    assert (found.blobs_freed, found.bytes_freed) == (promised.blobs_freed, promised.bytes_freed)
    assert (found.blobs_freed, names(yard.path)) == (3, set())


def test_n09_a_kept_blob_with_another_name_elsewhere_does_not_change_what_is_promised(yard: CacheYard) -> None:
    kept, *_ = yard.flat(1, 2, size=9000)
    os.link(kept, yard.home / "elsewhere")
    policy = CachePolicy(keep=(kept.name[7:],))
    promised = yard.prune(policy, everything=True, dry_run=True)
    found = yard.prune(policy, everything=True)
    assert (promised.bytes_freed, promised.blobs_freed, promised.kept) == (found.bytes_freed, found.blobs_freed, found.kept)
    assert (promised.before_bytes, promised.kept_bytes) == (found.before_bytes, found.kept_bytes)
    assert found.bytes_freed > 0


def test_n06_an_acl_that_the_folder_above_gives_to_new_folders_does_not_come_into_the_cache(yard: CacheYard) -> None:
    yard.flat(1)
    entries = [(1, 7, 2**32 - 1), (2, 7, 12345), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1), (32, 5, 2**32 - 1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)
    try:
        os.setxattr(yard.home, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    yard.prune(everything=True)
    assert os.listxattr(yard.path) == []


def test_n06_a_cache_that_another_folder_took_the_place_of_leaves_no_aside(
    yard: CacheYard, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard.flat(1)
    monkeypatch.setattr(whole, "_is", lambda *_: False)
    with pytest.raises(Busy, match="took its place"):
        yard.prune(everything=True)
    assert (len(names(yard.path)), asides(yard.home)) == (1, [])


def test_what_another_user_owns_is_found_unused_though_it_was_read(yard: CacheYard) -> None:
    """Whoever is not the owner cannot read a file without changing when it was read."""
    pool = yard.path / "blobs/sha256"
    yard.index(yard.path, [])
    yard.image(pool, "of nobody")
    for_everybody(yard)
    for each in (yard.path, pool.parent, pool):
        each.chmod(0o777)
    assert as_user(yard, "print([yard.prune(dry_run=dry).blobs_freed for dry in (True, True, False)])") == "[3, 3, 3]"


def test_an_aside_in_the_folder_of_the_blobs_is_found_again(yard: CacheYard) -> None:
    """There it lies when that is the only folder that its user may write."""
    pool = yard.path / "blobs/sha256"
    yard.index(yard.path, [])
    yard.image(pool, "of nobody")
    for_everybody(yard)
    pool.chmod(0o777)
    code = """
from mothball.cache_fields import CachePolicy
from mothball.ocicache.measure import usage
from mothball.ocicache.undelete import undelete
found = [yard.prune(CachePolicy(older_than=1, grace=0)).quarantined_bytes > 0]
found += [usage(yard.cache(), data_dir=yard.data_dir).quarantined, undelete(yard.cache(), data_dir=yard.data_dir).blobs]
print(found)
"""
    assert as_user(yard, code) == "[True, 3, 3]"
    assert len(names(pool)) == 3
