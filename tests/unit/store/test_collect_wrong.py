"""Collection where something is wrong: the clock, the content of the store, a hand that was quicker, a registry that forgot."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mothball.errors import Corrupt
from mothball.store import Store
from mothball.store.collect import CollectReport, _Collection
from mothball.store.refs import RELEASED
from mothball.store.snapshots import add_snapshot, forget, snapshots
from mothball.store.survey import Survey
from mothball.store.trash import Trash, undelete
from mothball.store.tree import Tree
from mothball.store.verify import verify
from mothball.store.view import StoreView
from tests.unit.store.build import File, capture, layer, new_store
from tests.unit.store.collecting import DAY, GRACE, TOMBSTONE, TRASH, Registry, age, garbage, run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


@contextmanager
def at_once() -> Iterator[None]:
    """A read that waits for ever (of a FIFO) ends as an error of its own."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def release(store: Store, workspace: str, facts: Registry) -> None:
    """The workspace is released, a collection sees that, and the tombstone's time goes by."""
    facts.known[workspace] = "gone"
    assert workspace in run(store, facts=facts).released
    facts.known[workspace] = "unknown"


def long_after(store: Store, facts: Registry) -> CollectReport:
    """A collection when the time of every tombstone is over."""
    return run(store, facts=facts, clock=lambda: time.time() + TOMBSTONE + GRACE + 60, trash_s=400 * DAY)


# -- clocks ------------------------------------------------------------------------------------------------------------


def test_several_collections_by_a_clock_that_was_ahead_are_given_true_times_and_expire(store: Store) -> None:
    capture(store, layer({b"a": File(b"kept")}), workspace="w")
    ahead = time.time() + 400 * DAY
    for number in range(3):
        garbage(store, b"by the wrong clock %d" % number)
        assert run(store, clock=lambda at=ahead + number: at).moved_blobs == 1  # type: ignore[misc]
    os.utime(store.blobs.path(garbage(store, b"of today")), (1, 1))
    told, done = run(store, dry_run=True), run(store)
    assert (done.moved_blobs, done.trash_blobs) == (1, 4)
    assert [each.bytes for each in told.freed] == [each.bytes for each in done.freed]
    age(store, TRASH + 60)
    assert run(store).deleted_blobs == 4
    assert Trash(store).runs() == []


def test_a_clock_that_is_set_back_during_a_collection_costs_no_capture(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(store, layer({b"a": File(b"0")}), workspace="other")
    clock = [time.time() + 2 * DAY]  # two days ahead, until somebody corrects it
    real = _Collection._blobs  # between the survey and the move

    def corrected(self: _Collection) -> int:
        clock[0] = time.time()
        capture(store, layer({b"a": File(b"1")}), workspace="w")
        return real(self)

    monkeypatch.setattr(_Collection, "_blobs", corrected)
    run(store, clock=lambda: clock[0], empty_trash=True)
    with Tree.open(store, store.refs("w").get().digest) as tree:
        assert tree.read("a") == b"1"


def test_a_mark_of_release_from_the_future_is_written_again(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    facts = Registry(w="gone")
    mark = store.refs("w").folder / RELEASED
    for standing in ("gone", "unknown"):
        facts.known["w"] = standing  # type: ignore[assignment]
        mark.write_text(json.dumps({"workspace": "w", "at": int((time.time() + 400 * DAY) * 1000), "reason": "released"}))
        assert run(store, facts=facts).released == ["w"]
        assert json.loads(mark.read_bytes())["at"] <= time.time() * 1000
    assert json.loads(mark.read_bytes())["reason"] == "released"


def test_a_temp_file_from_the_future_goes(store: Store) -> None:
    path = store.blobs.temp / "blob-1-dead"
    path.write_bytes(b"half")
    os.utime(path, (time.time() + 400 * DAY,) * 2)
    assert run(store).temp_files == 1


# -- the registry forgot -------------------------------------------------------------------------------------------------


def test_a_life_that_began_after_the_release_is_not_ended_by_the_mark_of_the_last(store: Store) -> None:
    """Released, marked, registered again and captured; then Redis is lost before a collection has seen the new life."""
    facts = Registry()
    capture(store, layer({b"a": File(b"old")}), workspace="w")
    release(store, "w", facts)
    capture(store, layer({b"a": File(b"new")}), workspace="w")
    store.refs("w").take_fence(7, "job")
    report = long_after(store, facts)
    assert (report.removed, report.orphans) == ([], ["w"])
    with Tree.open(store, store.refs("w").get().digest) as tree:
        assert tree.read("a") == b"new"


def test_a_mark_is_not_written_when_the_workspace_comes_back_at_the_last_moment(store: Store) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")

    class Returning(Registry):
        asked = 0

        def standing(self, workspace: str) -> str:  # type: ignore[override]
            self.asked += 1
            return "gone" if self.asked == 1 else "known"

    report = run(store, facts=Returning())
    assert (report.released, len(report.skipped)) == ([], 1)
    assert not (store.refs("w").folder / RELEASED).exists()


def test_b30_a_number_is_not_given_again_after_the_layout_has_left_and_the_trash_was_emptied(store: Store) -> None:
    facts = Registry()
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    refs = store.refs("w")
    refs.take_fence(1, "j")
    for number in (1, 2):
        add_snapshot(refs, fence=1, job=f"job-{number}", at_ms=number)
    (store.cache / "w").mkdir(parents=True)
    release(store, "w", facts)
    assert long_after(store, facts).removed == ["w"]
    for _ in range(3):
        age(store, 10 * DAY)
        report = run(store, facts=facts)
    assert (report.removed, report.orphans, report.workspaces) == ([], [], [])
    assert (list(store.blobs.folder.iterdir()), Trash(store).runs(), list(store.cache.iterdir())) == ([], [], [])
    assert verify(store).problems == []
    capture(store, layer({b"a": File(b"2")}), workspace="w")
    refs.take_fence(2, "j")
    assert add_snapshot(refs, fence=2, job="other", at_ms=9).name == "snap-3"


# -- undelete ------------------------------------------------------------------------------------------------------------


def numbered(store: Store, count: int) -> list[str]:
    """A workspace ``w`` with so many snapshots of different content, and another capture after them; digests of the snapshots."""
    refs = store.refs("w")
    found = []
    for number in range(1, count + 1):
        found.append(capture(store, layer({b"a": File(b"%d" % number)}), workspace="w"))
        refs.take_fence(1, "j")
        add_snapshot(refs, fence=1, job=f"job-{number}", at_ms=number)
    capture(store, layer({b"a": File(b"last")}), workspace="w")
    return found


def test_a_damaged_capture_keeps_no_other_from_coming_back(store: Store) -> None:
    digests = numbered(store, 3)
    store.blobs.path(digests[0]).unlink()
    forget(store, "w", ["snap-1"], reason="damaged", at_ms=1)
    forget(store, "w", ["snap-2", "snap-3"], reason="oops", at_ms=2)
    back = undelete(store, "w")
    assert [(each.was, each.name) for each in back] == [("snap-1", ""), ("snap-2", "snap-2"), ("snap-3", "snap-3")]
    assert digests[0] in back[0].problem
    assert [each.name for each in snapshots(store.refs("w"))] == ["snap-2", "snap-3"]
    with pytest.raises(Corrupt, match="neither in the store nor in the trash"):
        undelete(store, "w", "snap-1")


def test_of_two_lives_in_the_trash_the_last_ones_latest_is_the_latest(store: Store) -> None:
    trash, refs = Trash(store), store.refs("w")
    for at, content in ((1, b"first life"), (2, b"second life")):
        capture(store, layer({b"a": File(content)}), workspace="w")
        trash.bury_ref("w", refs.get(), "released", at)
        refs.replace(lambda _before: [])
    assert [each.name for each in undelete(store, "w")] == ["snap-1", "latest"]
    with Tree.open(store, refs.get().digest) as tree:
        assert tree.read("a") == b"second life"


def test_undelete_beside_a_collector_that_takes_the_layout_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Registry()
    digest = capture(store, layer({b"a": File(b"1")}), workspace="w")
    Trash(store).bury_ref("w", store.refs("w").get(), "test", 1)
    release(store, "w", facts)
    real = Store.refs
    gone = []

    def taken(self: Store, workspace: str):  # type: ignore[no-untyped-def]
        refs = real(self, workspace)
        if not gone:
            prepare = refs.prepare

            def then_gone() -> None:
                prepare()
                if not gone:
                    gone.extend(long_after(store, facts).removed)

            refs.prepare = then_gone  # type: ignore[method-assign]
        return refs

    monkeypatch.setattr(Store, "refs", taken)
    [back] = undelete(store, "w")
    assert gone == ["w"]
    assert (back.name, store.refs("w").get().digest) == ("latest", digest)


def test_a_blob_that_a_collector_deletes_while_it_is_put_back_is_said_to_be_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = garbage(store)
    os.utime(store.blobs.path(digest), (1, 1))
    run(store)
    trash = Trash(store)
    real = trash.find

    def deleted_after_the_look(wanted: str) -> Path | None:
        found = real(wanted)
        if found is not None:
            found.unlink()
        return found

    monkeypatch.setattr(trash, "find", deleted_after_the_look)
    assert trash.put_back(digest) is False


# -- what does not belong there --------------------------------------------------------------------------------------------


def _folder_among_refs(store: Store, _outside: Path) -> None:
    old = Trash(store).refs / "x" / "folder"
    old.mkdir(parents=True)
    os.utime(old, (1, 1))


def _fifo_among_refs(store: Store, _outside: Path) -> None:
    (Trash(store).refs / "x").mkdir(parents=True)
    os.mkfifo(Trash(store).refs / "x" / "a.json")


def _link_among_refs(store: Store, outside: Path) -> None:
    Trash(store).refs.mkdir(exist_ok=True)
    (Trash(store).refs / "x").symlink_to(outside)


def _file_as_a_run(store: Store, _outside: Path) -> None:
    (Trash(store).blobs / "123").write_text("")


def _link_as_a_run(store: Store, outside: Path) -> None:
    (Trash(store).blobs / "123").symlink_to(outside)


def _folder_in_a_run(store: Store, _outside: Path) -> None:
    (Trash(store).blobs / "123" / "folder").mkdir(parents=True)


def _fifo_as_the_total(store: Store, _outside: Path) -> None:
    (Trash(store).blobs / "123").mkdir()
    os.mkfifo(Trash(store).blobs / "123" / "total")


def _fifo_as_a_mark(store: Store, _outside: Path) -> None:
    os.mkfifo(store.refs("w").folder / RELEASED)


def _folder_as_a_blob(store: Store, _outside: Path) -> None:
    path = store.blobs.folder / ("ab" * 32)
    path.mkdir()
    (path / "f").write_text("x")
    os.utime(path, (1, 1))


def _number_that_is_none(store: Store, _outside: Path) -> None:
    index = store.refs("w").folder / "index.json"
    document = json.loads(index.read_bytes())
    document["manifests"][0]["annotations"]["dev.mothball.bytes"] = "9" * 5000
    index.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "prepare",
    [
        _folder_among_refs, _fifo_among_refs, _link_among_refs, _file_as_a_run, _link_as_a_run, _folder_in_a_run,
        _fifo_as_the_total, _fifo_as_a_mark, _folder_as_a_blob, _number_that_is_none,
    ],
)  # fmt: skip
def test_what_does_not_belong_in_the_store_stops_nothing_and_leads_nowhere(
    store: Store, tmp_path: Path, prepare: Callable[[Store, Path], None]
) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    garbage(store)
    age(store)
    run(store, facts=Registry(w="known"))
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / "precious"
    precious.write_text("x")
    os.utime(precious, (1, 1))
    prepare(store, outside)
    with at_once():
        told = run(store, facts=Registry(w="known"), dry_run=True, empty_trash=True)
        done = run(store, facts=Registry(w="known"), empty_trash=True)
        run(store, facts=Registry(w="known"))
        assert Trash(store).buried() == []
    assert done.deleted_blobs == told.deleted_blobs == 1
    assert precious.read_text() == "x"
    assert verify(store).problems == []


def test_a_layout_is_not_taken_apart_through_a_link(store: Store, tmp_path: Path) -> None:
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    folder, outside = store.refs("w").folder, tmp_path / "outside"
    (folder / RELEASED).write_text('{"workspace":"w","at":1,"reason":"released"}')
    age(store)
    folder.rename(outside)
    folder.symlink_to(outside)
    before = sorted(path.name for path in outside.iterdir())
    report = run(store, facts=Registry())
    assert (report.removed, report.moved_blobs) == ([], 0)
    assert "is a link" in report.skipped[0]
    assert sorted(path.name for path in outside.iterdir()) == before


def test_a_fifo_as_an_index_is_damage_and_hangs_nobody(store: Store) -> None:
    folder = store.root / "workspaces" / "evil"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "index.json")
    with at_once(), pytest.raises(Corrupt, match="no regular file"):
        run(store)


def test_the_survey_keeps_little_of_each_ref(store: Store) -> None:
    """A record of 16 KiB stands with every ref; with a hundred thousand of them that would be gigabytes."""
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    refs = store.refs("w")
    ref = refs.get()
    record = {"dev.mothball.record": "x" * 16_000}
    refs.replace(lambda _: [type(ref)("latest", ref.digest, ref.size, {**ref.annotations, **record, "dev.mothball.bytes": "7"})])
    survey = Survey(StoreView(store), None, lambda _step, **_counts: None).run()
    assert all(len(json.dumps(each.annotations)) < 100 for layout in survey.layouts for each in layout.refs)
    assert survey.marks.workspaces[0].logical == 7
    assert len(StoreView(store).layout(refs.folder).refs[0].get("record")) == 16_000


def test_what_cannot_be_read_of_a_released_workspace_says_how_to_give_it_up(store: Store) -> None:
    facts = Registry()
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    release(store, "w", facts)
    store.blobs.path(store.refs("w").get().digest).unlink()
    with pytest.raises(Corrupt) as caught:
        long_after(store, facts)
    assert f"moving {store.refs('w').folder} out of the store gives its captures up" in caught.value.message
