"""Collection: what is taken, what is spared, and what a kill, a doubt or a race may never cost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import Busy, Cancelled, Corrupt, NotFound, TransientFailure
from mothball.names import slug
from mothball.store import Ref, Store
from mothball.store.blobs import file_lock
from mothball.store.manifest import load_manifest
from mothball.store.refs import RELEASED
from mothball.store.survey import Standing
from mothball.store.trash import Trash, undelete
from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.unit.store.build import File, capture, layer, new_store
from tests.unit.store.collecting import DAY, GRACE, TOMBSTONE, TRASH, Registry, age, blob_names, blobs_of, forget, garbage, run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_a_blob_is_moved_after_the_grace_and_deleted_after_the_window(store: Store) -> None:
    kept = capture(store, layer({b"a": File(b"one")}), workspace="w")
    loose = garbage(store)
    first = run(store)
    assert (first.moved_blobs, first.waiting_blobs, first.waiting_bytes) == (0, 1, 15)
    assert store.blobs.exists(loose)
    age(store, GRACE + 1)
    second = run(store)
    assert (second.moved_blobs, second.moved_bytes, second.trash_blobs, second.deleted_blobs) == (1, 15, 1, 0)
    assert not store.blobs.exists(loose)
    assert Trash(store).find(loose) is not None
    age(store, TRASH - 10)
    assert run(store).trash_blobs == 1
    age(store, 20)
    third = run(store)
    assert (third.deleted_blobs, third.deleted_bytes, third.trash_blobs) == (1, 15, 0)
    assert list(Trash(store).blobs.iterdir()) == []
    assert blob_names(store) == set(blobs_of(store, kept))
    assert verify(store, level="content").problems == []


def test_whatever_an_index_names_is_never_taken_however_old(store: Store) -> None:
    shared = layer({b"base": File(b"x" * 5000)})
    digests = [capture(store, shared, layer({b"own": File(b"%d" % n)}), workspace=f"w{n}") for n in range(5)]
    age(store, 400 * DAY)
    report = run(store)
    assert (report.moved_blobs, report.missing) == (0, [])
    for digest in digests:
        with Tree.open(store, digest) as tree:
            assert tree.read("base") == b"x" * 5000


def test_a_touched_blob_waits_the_whole_grace_again(store: Store) -> None:
    loose = garbage(store)
    age(store)
    assert store.blobs.reuse(loose, 15)
    assert run(store).waiting_blobs == 1
    assert store.blobs.exists(loose)


def test_a_zero_window_deletes_at_once_and_never_what_is_young(store: Store) -> None:
    old = garbage(store)
    age(store)
    young = garbage(store, b"just written")
    report = run(store, trash_s=0)
    assert (report.deleted_blobs, report.trash_blobs, report.waiting_blobs) == (1, 0, 1)
    assert blob_names(store) == {young}
    assert old != young


def test_empty_trash_gives_up_undelete_and_never_the_grace(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    capture(store, layer({b"a": File(b"2")}), workspace="w", ref="snap-1")
    gone = forget(store, "w", "snap-1")
    age(store, GRACE + 60)
    run(store)
    young = garbage(store, b"a capture that is being written")
    old = garbage(store, b"old garbage")
    os.utime(store.blobs.path(old), (1, 1))
    report = run(store, empty_trash=True)
    assert (report.deleted_blobs, report.trash_blobs, report.refs_expired) == (4, 0, 1)
    assert store.blobs.exists(young)
    assert not store.blobs.exists(old)
    with pytest.raises(NotFound, match="has no forgotten capture 'snap-1'"):
        undelete(store, "w", "snap-1")
    assert not store.blobs.exists(gone.digest)


def test_a_wrong_clock_once_does_not_keep_garbage_for_years(store: Store) -> None:
    loose = garbage(store)
    os.utime(store.blobs.path(loose), (time.time() + 900 * DAY,) * 2)
    assert run(store).waiting_blobs == 1
    age(store, GRACE + 60)
    assert run(store).moved_blobs == 1
    folder = next(Trash(store).blobs.iterdir())
    folder.rename(folder.with_name(str(int((time.time() + 900 * DAY) * 1000))))
    assert run(store).trash_blobs == 1
    age(store, TRASH + 60)
    assert run(store).deleted_blobs == 1


def test_what_is_no_blob_is_counted_and_left_alone(store: Store) -> None:
    stranger = store.blobs.folder / "notes.txt"
    stranger.write_text("mine")
    age(store)
    assert run(store).strange == 1
    assert stranger.read_text() == "mine"


# -- doubt -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["index", "index-empty", "manifest-cut", "manifest-gone", "digest"])
def test_a_damaged_index_or_manifest_stops_all_deletion_and_is_named(store: Store, damage: str) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="good")
    digest = capture(store, layer({b"b": File(b"2")}), workspace="bad")
    garbage(store)
    index = store.refs("bad").folder / "index.json"
    if damage == "index":
        index.write_bytes(index.read_bytes()[:-9])
    elif damage == "index-empty":
        index.write_bytes(b"")
    elif damage == "manifest-cut":
        path = store.blobs.path(digest)
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "manifest-gone":
        store.blobs.path(digest).unlink()
    else:
        index.write_bytes(index.read_bytes().replace(digest.encode(), b"sha256:../../etc/passwd"))
    age(store)
    before = blob_names(store)
    with pytest.raises(Corrupt, match="nothing was collected") as caught:
        run(store)
    assert "bad" in caught.value.message
    assert "good" not in caught.value.message
    assert blob_names(store) == before
    with pytest.raises(Corrupt):
        run(store, dry_run=True)


def test_every_damage_is_named_in_one_error(store: Store) -> None:
    for name in ("one", "two", "three"):
        capture(store, layer({b"a": File(name.encode())}), workspace=name)
    for name in ("one", "two"):
        (store.refs(name).folder / "index.json").write_bytes(b"{")
    store.blobs.path(store.refs("three").get().digest).unlink()
    with pytest.raises(Corrupt) as caught:
        run(store)
    assert all(name in caught.value.message for name in ("one", "two", "three"))


def test_an_index_that_vanished_stops_all_deletion_when_the_registry_knows_the_capture(store: Store) -> None:
    digest = capture(store, layer({b"a": File(b"1")}), workspace="w")
    (store.refs("w").folder / "index.json").unlink()
    age(store)
    facts = Registry(w="known")
    facts.digests["w"] = digest
    with pytest.raises(Corrupt, match=r"its index .* is gone"):
        run(store, facts=facts)
    assert store.blobs.exists(digest)


def test_missing_blobs_are_reported_and_stop_nothing(store: Store) -> None:
    digest = capture(store, layer({b"a": File(b"1")}), workspace="w")
    lost = load_manifest(store.blobs, digest).layers[0].digest
    store.blobs.path(lost).unlink()
    garbage(store)
    age(store)
    report = run(store)
    assert report.missing == [(lost, "w:latest")]
    assert report.moved_blobs == 1


# -- the trash gives back ----------------------------------------------------------------------------------------------


def test_what_is_reachable_and_lies_in_the_trash_is_put_back(store: Store) -> None:
    """An index that came back from a backup names blobs that a collection moved."""
    digest = capture(store, layer({b"a": File(b"1")}), workspace="w")
    index = store.refs("w").folder / "index.json"
    saved = index.read_bytes()
    store.refs("w").replace(lambda _before: [])
    age(store)
    assert run(store).moved_blobs == 3
    index.write_bytes(saved)
    look = run(store, dry_run=True)
    assert (look.put_back, look.missing) == (3, [])
    report = run(store, empty_trash=True)
    assert (report.put_back, report.deleted_blobs, report.missing) == (3, 0, [])
    with Tree.open(store, digest) as tree:
        assert tree.read("a") == b"1"


def test_undelete_brings_ref_and_blobs_back_whole(store: Store) -> None:
    capture(store, layer({b"a": File(b"now")}), workspace="w")
    digest = capture(store, layer({b"a": File(b"then")}), workspace="w", ref="snap-1")
    forget(store, "w", "snap-1")
    age(store, GRACE + 60)
    assert run(store).moved_blobs == 3
    [back] = undelete(store, "w", "snap-1")
    assert (back.was, back.name, back.digest) == ("snap-1", "snap-1", digest)
    ref = store.refs("w").get("snap-1")
    assert ref.get("keep") == "1"
    with Tree.open(store, digest) as tree:
        assert tree.read("a") == b"then"
    assert undelete(store, "w", "snap-1") == [back]
    assert [each.name for each in store.refs("w").list()] == ["latest", "snap-1"]
    age(store, 400 * DAY)
    assert run(store, empty_trash=True).moved_blobs == 0
    assert verify(store, level="content").problems == []


def test_undelete_before_any_collection_needs_no_trash(store: Store) -> None:
    capture(store, layer({b"a": File(b"now")}), workspace="w")
    capture(store, layer({b"a": File(b"then")}), workspace="w", ref="snap-1")
    forget(store, "w", "snap-1")
    undelete(store, "w")
    assert [each.name for each in store.refs("w").list()] == ["latest", "snap-1"]


def test_undelete_never_takes_the_name_of_another_capture(store: Store) -> None:
    old = capture(store, layer({b"a": File(b"old")}), workspace="w", ref="snap-1")
    forget(store, "w", "snap-1")
    shutil.rmtree(store.refs("w").folder)
    new = capture(store, layer({b"a": File(b"new")}), workspace="w", ref="snap-1")
    for _ in range(2):
        [back] = undelete(store, "w")
        assert back.name == "snap-2"
    refs = {ref.name: ref.digest for ref in store.refs("w").list()}
    assert refs == {"snap-1": new, "snap-2": old}
    assert store.refs("w").get("snap-2").get("snapshot") == "2"


def test_undelete_says_when_a_blob_is_gone_for_good(store: Store) -> None:
    digest = capture(store, layer({b"a": File(b"1")}), workspace="w", ref="snap-1")
    lost = load_manifest(store.blobs, digest).layers[0].digest
    forget(store, "w", "snap-1")
    store.blobs.path(lost).unlink()
    with pytest.raises(Corrupt, match=f"blob {lost} is neither in the store nor in the trash"):
        undelete(store, "w", "snap-1")
    assert store.refs("w").list() == []


def test_a_forgotten_ref_can_be_undeleted_as_long_as_the_window_says(store: Store) -> None:
    """The ref is buried, its blobs wait for the grace and then for the window: they outlive the ref, never the other way."""
    capture(store, layer({b"a": File(b"1")}), workspace="w", ref="snap-1")
    forget(store, "w", "snap-1")
    for _ in range(int(TRASH // 600) - 1):
        age(store, 600)
        run(store)
        entry = Trash(store).buried("w")[0]
        assert all(store.blobs.exists(each) or Trash(store).find(each) for each in [entry.ref.digest])
    undelete(store, "w")
    assert verify(store, level="content").problems == []


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_a_layout_leaves_only_after_its_tombstone_was_seen_and_is_over(store: Store) -> None:
    digest = capture(store, layer({b"a": File(b"1")}), workspace="w")
    (store.cache / "w").mkdir()
    facts = Registry(w="known")
    assert (run(store, facts=facts).released, (store.refs("w").folder / RELEASED).exists()) == ([], False)
    facts.known["w"] = "gone"
    assert run(store, facts=facts).released == ["w"]
    facts.known["w"] = "unknown"
    assert run(store, facts=facts).removed == []
    age(store, TOMBSTONE + 60)
    # A released file that says when: age it as well.
    mark = store.refs("w").folder / RELEASED
    text = mark.read_text()
    at = int(text.split('"at":')[1].split(",")[0])
    mark.write_text(text.replace(str(at), str(at - int((TOMBSTONE + 60) * 1000))))
    assert run(store, facts=facts, dry_run=True).removed == ["w"]
    assert store.refs("w").exists
    report = run(store, facts=facts)
    assert (report.removed, report.moved_blobs) == (["w"], 0)
    assert not store.refs("w").folder.exists()
    age(store, GRACE + 1)
    assert run(store, facts=facts).moved_blobs == 3
    assert not (store.cache / "w").exists()
    [back] = undelete(store, "w")
    assert (back.name, back.digest) == ("latest", digest)
    with Tree.open(store, digest) as tree:
        assert tree.read("a") == b"1"


def test_without_any_evidence_a_layout_is_kept_and_reported(store: Store) -> None:
    """Redis lost its data: it knows nothing of any workspace, and nothing may go."""
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    age(store, 400 * DAY)
    for _ in range(3):
        report = run(store, facts=Registry())
        assert (report.orphans, report.removed, report.moved_blobs) == (["w"], [], 0)
        age(store, 400 * DAY)
    assert run(store, facts=Registry(), forget_orphans=["w"]).released == ["w"]
    assert store.refs("w").exists


def test_only_an_orphan_can_be_given_up(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    with pytest.raises(NotFound, match="'w' is no orphan of this store"):
        run(store, facts=Registry(w="known"), forget_orphans=["w"])
    with pytest.raises(NotFound, match="without the registry"):
        run(store, forget_orphans=["w"])
    assert not (store.refs("w").folder / RELEASED).exists()


def test_a_workspace_that_is_registered_again_loses_its_mark(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    facts = Registry(w="gone")
    run(store, facts=facts)
    facts.known["w"] = "known"
    run(store, facts=facts)
    assert not (store.refs("w").folder / RELEASED).exists()


class Returning(Registry):
    """A workspace that is registered again between the decision and the deed."""

    def standing(self, workspace: str) -> Standing:
        self.asked = getattr(self, "asked", 0) + 1
        return "unknown" if self.asked == 1 else "known"


def test_a_layout_that_comes_back_into_use_at_the_last_moment_stays(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    (store.refs("w").folder / RELEASED).write_text('{"workspace":"w","at":1,"reason":"released"}')
    age(store)
    report = run(store, facts=Returning())
    assert (report.removed, len(report.skipped)) == ([], 1)
    assert store.refs("w").get().name == "latest"


def test_a_layout_whose_index_changed_within_the_grace_stays(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    (store.refs("w").folder / RELEASED).write_text('{"workspace":"w","at":1,"reason":"released"}')
    age(store)
    store.refs("w").replace(lambda before: before)
    assert run(store, facts=Registry()).removed == []
    age(store, GRACE + 1)
    assert run(store, facts=Registry()).removed == ["w"]


def test_a_layout_with_a_strangers_file_is_left_whole(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    folder = store.refs("w").folder
    (folder / RELEASED).write_text('{"workspace":"w","at":1,"reason":"released"}')
    (folder / "notes").write_text("mine")
    age(store)
    report = run(store, facts=Registry())
    assert (report.removed, store.refs("w").exists) == ([], True)
    assert "notes" in report.skipped[0]


def test_a_layout_without_any_capture_goes_when_nobody_knows_its_workspace(store: Store) -> None:
    for name in ("failed", "live"):
        store.refs(name).prepare()
        store.refs(name).take_fence(1, "job")
    facts = Registry(live="known")
    assert run(store, facts=facts).removed == []
    age(store)
    assert run(store, facts=facts).removed == [slug("failed")]
    assert [path.name for path in store.workspaces()] == ["live"]


def test_taking_a_fence_where_a_collector_took_the_layout_makes_it_again(store: Store) -> None:
    refs = store.refs("w")
    refs.prepare()
    shutil.rmtree(refs.folder)
    refs.take_fence(3, "job")
    assert (refs.folder / "oci-layout").exists()


def test_a_waiter_for_a_lock_that_was_taken_away_locks_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path, "it"):
        script = (
            "import sys; from pathlib import Path; from mothball.store.blobs import file_lock\n"
            "with file_lock(Path(sys.argv[1]), 'it') : print('in', flush=True); sys.stdin.readline()"
        )
        child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        time.sleep(0.5)
        path.unlink()
    assert child.stdout is not None
    assert child.stdout.readline() == b"in\n"
    with pytest.raises(Busy), file_lock(path, "it", wait=0.05):
        pass
    child.communicate(b"\n", timeout=10)


# -- races and kills ---------------------------------------------------------------------------------------------------


def test_two_collections_at_once_are_busy(store: Store) -> None:
    with file_lock(store.root / "collect.lock", "it"), pytest.raises(Busy, match="collection"):
        run(store)


def test_a_ref_published_after_the_survey_keeps_its_blobs(store: Store) -> None:
    """The writer touches what it names, so the second look under the lock finds it young."""
    capture(store, layer({b"a": File(b"0")}), workspace="other")
    digest = capture(store, layer({b"a": File(b"1")}))
    size = store.blobs.size(digest)
    refs = store.refs("w")
    refs.prepare()
    age(store)

    def publish(step: str, **_: object) -> None:
        if step == "look":
            refs.replace(lambda before: [*before, Ref("latest", digest, size)])

    report = run(store, progress=publish)
    assert (report.moved_blobs, report.waiting_blobs) == (0, 3)
    with Tree.open(store, digest) as tree:
        assert tree.read("a") == b"1"


def test_a_writer_that_slept_too_long_is_refused_and_not_published_broken(store: Store) -> None:
    digest = capture(store, layer({b"a": File(b"1")}))
    size = store.blobs.size(digest)
    refs = store.refs("w")
    refs.prepare()
    age(store)
    assert run(store).moved_blobs == 3
    with pytest.raises(TransientFailure, match="written again"):
        refs.replace(lambda before: [*before, Ref("latest", digest, size)])
    assert refs.list() == []


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that gets SIGKILL right before its file operation number `operation`; False when it has fewer."""
    child = os.fork()
    if not child:
        done = 0

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal done
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.symlink", "shutil.rmtree"}:
                if done == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        sys.addaudithook(count)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in {0, signal.SIGKILL}, f"the child ended with {status}"
    return status != 0


def sweep_dead_temp(store: Store) -> None:
    """Time passes until temp files are old enough."""
    for path in store.blobs.temp.iterdir():
        os.utime(path, (1, 1))


def test_a_kill_before_any_file_operation_loses_nothing_and_leaves_nothing(store: Store) -> None:
    """Every place at once where a collection can die: expired trash, fresh garbage, a buried ref, a layout that ends."""
    template = store.root.parent / "template"
    kept = capture(store, layer({b"a": File(b"1")}), workspace="w")
    capture(store, layer({b"a": File(b"2")}), workspace="w", ref="snap-1")
    ends = capture(store, layer({b"a": File(b"3")}), workspace="ends")
    (store.refs("ends").folder / RELEASED).write_text('{"workspace":"ends","at":1,"reason":"released"}')
    (store.cache / "ends").mkdir()
    first = [garbage(store, b"first %d" % number) for number in range(3)]
    age(store)
    run(store, facts=Registry(ends="known", w="known"))
    (store.refs("ends").folder / RELEASED).write_text('{"workspace":"ends","at":1,"reason":"released"}')
    assert Trash(store).find(first[0])
    age(store)
    forget(store, "w", "snap-1")
    for number in range(3):
        os.utime(store.blobs.path(garbage(store, b"second %d" % number)), (1, 1))
    shutil.copytree(store.root, template, symlinks=True)
    facts = Registry(w="known")
    at = 0
    while killed_at(at, lambda: run(store, facts=facts, reserve_bytes=4096)):
        assert set(blobs_of(store, kept)) <= blob_names(store)
        # What a layout held is in the layout or in the trash, with all its blobs.
        undelete(store, "ends") if not store.refs("ends").exists else None
        assert store.refs("ends").get().digest == ends
        undelete(store, "w", "snap-1")
        assert verify(store, level="content").problems == []
        sweep_dead_temp(store)
        for _ in range(3):
            age(store, TRASH + DAY)
            run(store, facts=Registry(w="known", ends="known"), reserve_bytes=4096)
        assert list(store.blobs.temp.iterdir()) == []
        assert [path for path in Trash(store).root.rglob("*") if path.is_file()] == []
        assert len(blob_names(store)) == 9
        shutil.rmtree(store.root)
        shutil.copytree(template, store.root, symlinks=True)
        at += 1
    assert at > 25


def test_a_kill_before_any_file_operation_of_an_undelete_loses_nothing(store: Store) -> None:
    template = store.root.parent / "template"
    capture(store, layer({b"a": File(b"now")}), workspace="w")
    digest = capture(store, layer({b"a": File(b"then")}), workspace="w", ref="snap-1")
    forget(store, "w", "snap-1")
    age(store, GRACE + 60)
    run(store)
    shutil.copytree(store.root, template, symlinks=True)
    at = 0
    while killed_at(at, lambda: undelete(store, "w")):
        run(store)
        undelete(store, "w")
        with Tree.open(store, digest) as tree:
            assert tree.read("a") == b"then"
        assert [ref.name for ref in store.refs("w").list()] == ["latest", "snap-1"]
        shutil.rmtree(store.root)
        shutil.copytree(template, store.root, symlinks=True)
        at += 1
    assert at > 8


def test_cancelling_goes_through(store: Store) -> None:
    garbage(store)

    def cancel(_step: str, **_: object) -> None:
        raise Cancelled(job="j")

    with pytest.raises(Cancelled):
        run(store, progress=cancel)


def test_temp_files_of_dead_writers_go(store: Store) -> None:
    (store.blobs.temp / "blob-1-dead").write_bytes(b"half")
    age(store)
    assert run(store).temp_files == 1
    assert list(store.blobs.temp.iterdir()) == []


# -- dry run -----------------------------------------------------------------------------------------------------------

AUDIT = """
import os, sys
from pathlib import Path
bad = []
def look(event, args):
    if event == "open" and args[2] is not None and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
        bad.append((event, args[0]))
    if event.split(".")[0] in {"os", "shutil", "fcntl", "tempfile"} and event not in {"os.scandir", "os.listdir", "os.walk"}:
        bad.append((event, args))
from mothball.store import Store
from mothball.store.collect import collect
import mothball.store.verify
store = Store(Path(sys.argv[1]))
class Facts:
    def standing(self, workspace): return "unknown"
    def registered(self): return []
sys.addaudithook(look)
r = collect(store, grace_s=3600, trash_s=1, tombstone_s=60, facts=Facts(), dry_run=True, empty_trash=True, reserve_bytes=1 << 20)
print(r.moved_blobs, r.deleted_blobs, r.refs_expired, r.removed, r.put_back)
assert not bad, bad
"""


def test_a_dry_run_opens_nothing_for_writing(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    capture(store, layer({b"a": File(b"2")}), workspace="w", ref="snap-1")
    capture(store, layer({b"a": File(b"3")}), workspace="released")
    (store.refs("released").folder / RELEASED).write_text('{"workspace":"released","at":1,"reason":"released"}')
    (store.blobs.temp / "blob-1-dead").write_bytes(b"half")
    forget(store, "w", "snap-1")
    age(store, GRACE + 60)
    run(store)
    garbage(store)
    age(store)
    before = {path: path.lstat() for path in store.root.rglob("*")}
    done = subprocess.run([sys.executable, "-c", AUDIT, str(store.root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "4", "1", "['released']", "0"]
    after = {path: path.lstat() for path in store.root.rglob("*")}
    assert {path: (s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in before.items()} == {
        path: (s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in after.items()
    }


@pytest.mark.parametrize("empty", [False, True])
def test_a_dry_run_tells_what_the_collection_then_does(store: Store, empty: bool) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    capture(store, layer({b"a": File(b"2")}), workspace="w", ref="snap-1")
    forget(store, "w", "snap-1")
    age(store, GRACE + 1)
    garbage(store, b"young")
    now = time.time()
    told, done = (run(store, dry_run=dry, clock=lambda: now, empty_trash=empty) for dry in (True, False))
    same = ("moved_blobs", "moved_bytes", "waiting_bytes", "trash_bytes", "deleted_blobs", "reachable_bytes", "freed", "workspaces")
    assert {name: getattr(told, name) for name in same} == {name: getattr(done, name) for name in same}


def test_a_dry_run_of_a_store_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    report = run(Store(tmp_path / "none"), dry_run=True)
    assert report.reachable_blobs == 0
    assert not (tmp_path / "none").exists()
