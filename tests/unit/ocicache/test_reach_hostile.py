"""What is reachable, when layouts lie in odd places and images name what they like: nothing needed goes, and the rest does."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import Corrupt
from mothball.ocicache import layouts, reach, sparing, work
from mothball.ocicache.reach import Reach
from tests.unit.ocicache.conftest import LAYER, MANIFEST, CacheYard, names

SOON = CachePolicy(older_than=1, grace=0, quarantine=3_600_000)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SETTLE_S", 0.0)
    monkeypatch.setattr(sparing, "_WAIT_S", 0.2)


@pytest.fixture
def pool(yard: CacheYard) -> Path:
    return yard.path / "blobs" / "sha256"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just written is no pull."""
    monkeypatch.setattr(sparing, "QUIET_NS", 0)


def test_our_own_quarantine_beside_the_cache_is_neither_a_layout_nor_a_pull(
    yard: CacheYard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared folder lies below the folder of its layouts, and so do its asides."""
    shared = yard.path / "sha256"
    yard.index(yard.home / "one", [yard.image(shared, "needed")])
    monkeypatch.setattr(layouts, "_MAX_LAYOUTS", 5)
    for turn in range(2):
        for number in range(6):
            yard.layer(shared, f"of nobody {turn} {number}")
        found = yard.prune(SOON, layouts=[yard.home])
        assert (found.blobs_freed, found.kept, found.errors) == (6, {"reachable": 3}, [])


def test_a_layout_whose_name_is_much_like_that_of_an_aside_is_seen(yard: CacheYard) -> None:
    shared = yard.path / "sha256"
    yard.index(yard.home / "layouts" / "x.mothball-aside-copy", [yard.image(shared, "needed")])
    yard.index(yard.home / "layouts" / "one", [])
    assert yard.prune(layouts=[yard.home / "layouts"]).blobs_freed == 0


@pytest.mark.usefixtures("quiet")
def test_n03_what_a_referrer_names_is_found_though_an_image_names_a_digest_that_begins_alike(yard: CacheYard, pool: Path) -> None:
    subject = yard.image(pool, "subject")
    signature = yard.image(pool, "signature", subject=subject)
    alias = {"mediaType": LAYER, "digest": signature["digest"][:23] + "0" * 48, "size": 1, "urls": ["https://example.org"]}
    attacker = yard.document(pool, {"layers": [alias]}, MANIFEST)
    yard.index(yard.path, [attacker, subject])
    before = names(pool)
    assert (yard.prune().blobs_freed, names(pool)) == (0, before)


@pytest.mark.usefixtures("quiet")
def test_n03_referrers_of_referrers_are_each_looked_at_once(yard: CacheYard, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes an image could else let a prune take for days."""
    last = yard.image(pool, "subject")
    yard.index(yard.path, [last])
    for number in range(200):
        last = yard.document(pool, {"mediaType": MANIFEST, "n": number, "subject": last}, MANIFEST)
    yard.document(pool, {"mediaType": MANIFEST, "subject": {"digest": f"sha256:{'0' * 64}"}}, MANIFEST)
    looked: list[str] = []
    add = Reach.add

    def counted(self: Reach, digest: str) -> None:
        looked.append(digest)
        add(self, digest)

    monkeypatch.setattr(Reach, "add", counted)
    found = yard.prune()
    assert (found.blobs_freed, len(names(pool)), len(looked)) == (1, 203, 200)


@pytest.mark.usefixtures("quiet")
def test_n03_referrers_of_what_an_index_names_during_the_prune_stay_too(yard: CacheYard, pool: Path) -> None:
    subject = yard.image(pool, "subject")
    yard.image(pool, "signature", subject=subject)
    yard.index(yard.path, [])
    ticks: list[int] = []

    def tick(count: int) -> None:
        ticks.append(count)
        if len(ticks) == 2:  # the first is that of the look for referrers, this one comes just before something goes
            yard.index(yard.path, [subject])

    before = names(pool)
    found = yard.prune(tick=tick)
    assert (found.blobs_freed, found.kept, names(pool)) == (0, {"reachable": 6}, before)


@pytest.mark.parametrize("where", ["index", "manifest"])
def test_bad_input_a_text_of_millions_of_values_is_not_taken_apart(
    yard: CacheYard, pool: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard.layer(pool, "old")
    text = b'{"manifests":[' + b"{}," * 700_000 + b"{}]}"
    manifest = yard.blob(pool, text, 100)
    yard.index(yard.path, [{"mediaType": MANIFEST, "digest": f"sha256:{manifest.name}", "size": len(text)}])
    if where == "index":
        (yard.path / "index.json").write_bytes(text)
    taken: list[int] = []
    read_json = reach.read_json

    def seen(data: bytes, *of: Any, **how: Any) -> Any:
        taken.append(len(data))
        return read_json(data, *of, **how)

    monkeypatch.setattr(reach, "read_json", seen)
    with pytest.raises(Corrupt, match=r"more than 600,000 values; nothing was deleted"):
        yard.prune()
    assert len(names(pool)) == 2
    assert max(taken, default=0) < 1000


def test_n03_the_largest_index_that_can_be_read_is_no_such_text(yard: CacheYard, pool: Path) -> None:
    one = {"mediaType": MANIFEST, "digest": f"sha256:{'1' * 64}", "size": 1234, "annotations": {layouts.INDEX: "some tag or other"}}
    one["platform"] = {"os": "linux", "architecture": "amd64"}
    text = str(one)
    assert (text.count(",") + text.count("{")) * layouts.MAX_DOCUMENT / len(text) < 600_000


def test_a_cancelled_prune_ends_while_it_walks(yard: CacheYard, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cancelled(Exception):
        pass

    def tick(_: int) -> None:
        raise Cancelled

    yard.index(yard.path, [yard.document(pool, {"n": number}, MANIFEST) for number in range(100)])
    walked: list[str] = []
    monkeypatch.setattr(sparing.Sparing, "referrers", lambda *_: walked.append("all"))
    with pytest.raises(Cancelled):
        yard.prune(tick=tick)
    assert walked == []


def without_index(yard: CacheYard) -> tuple[Path, Path]:
    """The shared blobs, and the folder of layouts, in which `two` has no index: not yet, or no more."""
    shared, folder = yard.path / "sha256", yard.home / "layouts"
    (folder / "two").mkdir(parents=True)
    (folder / "two" / "oci-layout").touch()
    return shared, folder


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("comes", [True, False])
def test_a_layout_without_its_index_is_waited_for_and_else_ends_the_prune(
    yard: CacheYard, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "_WRITTEN_S", 1.0)
    shared, folder = without_index(yard)
    image = yard.image(shared, "needed")
    yard.index(folder / "one", [])

    def write() -> None:
        time.sleep(0.3)
        yard.index(folder / "two", [image])

    thread = threading.Thread(target=write)
    if comes:
        thread.start()
        assert yard.prune(layouts=[folder]).blobs_freed == 0
        thread.join()
    else:
        with pytest.raises(Corrupt, match="so nobody knows what it needs; nothing was deleted"):
            yard.prune(layouts=[folder])
    assert len(names(shared)) == 3


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("last", [False, True])
def test_a_layout_that_is_removed_while_it_is_looked_at_needs_nothing_and_when_it_was_the_last_nothing_is_known(
    yard: CacheYard, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "_WRITTEN_S", 20.0)
    shared, folder = without_index(yard)
    yard.image(shared, "of the removed one")
    if not last:
        yard.index(folder / "one", [yard.image(shared, "needed")])
    asked, look = threading.Event(), layouts.read_file

    def read_file(name: str, fd: int, limit: int, *, first: bytes = b"") -> bytes | None:
        try:
            return look(name, fd, limit, first=first)
        except FileNotFoundError:
            asked.set()
            raise

    def remove() -> None:
        asked.wait(10)
        shutil.rmtree(folder / "two")

    monkeypatch.setattr(layouts, "read_file", read_file)
    thread = threading.Thread(target=remove)
    thread.start()
    if last:
        with pytest.raises(Corrupt, match="there is no layout in"):
            yard.prune(layouts=[folder])
    else:
        assert yard.prune(layouts=[folder]).blobs_freed == 3
    thread.join()
    assert asked.is_set()
    assert len(names(shared)) == 3


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("below", [".hidden/index.json", ".hidden/deeper/layout/index.json", "plain/index.json"])
def test_bad_input_a_layout_that_lies_too_deep_ends_the_prune_also_in_a_hidden_folder(yard: CacheYard, below: str) -> None:
    shared, folder = yard.path / "sha256", yard.home / "layouts"
    image = yard.image(shared, "needed")
    yard.index(folder / "one", [])
    yard.index((folder / "a/b/c" / below).parent, [image])
    with pytest.raises(Corrupt, match="more than 3 levels deep"):
        yard.prune(layouts=[folder])
    assert len(names(shared)) == 3


@pytest.mark.usefixtures("quiet")
def test_folders_without_anything_to_follow_may_lie_as_deep_as_they_like(yard: CacheYard) -> None:
    folder = yard.home / "layouts"
    yard.image(yard.path / "sha256", "of nobody")
    yard.index(folder / "a/b/c", [])
    (folder / "a/b/c/.tmp-of-a-tool").mkdir()
    (folder / "a/b/c/extra").mkdir()
    (folder / "a/b/c/extra/file").touch()
    assert yard.prune(layouts=[folder]).blobs_freed == 3
