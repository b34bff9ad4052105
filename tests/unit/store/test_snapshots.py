"""Snapshots on disk: numbers that are never given twice, marks, forgetting into the trash, retention under the lock."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import Busy, Corrupt, InvalidParams, LeaseLost, NotFound, TransientFailure
from mothball.registry import encode
from mothball.retention import Policy
from mothball.store import Ref, RefIndex, Store
from mothball.store import retain as retain_module
from mothball.store.blobs import file_lock
from mothball.store.manifest import PREFIX
from mothball.store.retain import AT_ONCE, RetainReport, Taken, retain, retain_workspace
from mothball.store.snapshots import add_snapshot, forget, mark, mark_all, snapshots
from mothball.store.trash import Trash, undelete
from mothball.store.tree import Tree
from tests.unit.store.build import File, capture, layer, new_store

DAY = 86_400_000
NOW = 1_736_344_031_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def captured(store: Store, workspace: str = "w", content: bytes = b"one") -> RefIndex:
    """A workspace with one capture, and its index with fence 1."""
    capture(store, layer({b"a": File(content)}), workspace=workspace)
    return store.refs(workspace)


def snap(refs: RefIndex, number: int, *, at: int = NOW, **fields: Any) -> Ref:
    return add_snapshot(refs, fence=1, job=f"job-{number}", at_ms=at, **fields)


def many(store: Store, days: Sequence[float], workspace: str = "w") -> RefIndex:
    """Snapshots of these ages in days, in the order given."""
    refs = captured(store, workspace)
    for number, age in enumerate(days, 1):
        snap(refs, number, at=NOW - int(age * DAY))
    return refs


def names(refs: RefIndex) -> list[str]:
    return [each.name for each in snapshots(refs)]


def everything(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below `root`: inode, mtime and content."""
    found = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in found}


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_snapshot_names_the_current_capture_and_says_what_it_is(store: Store) -> None:
    refs = captured(store)
    latest = refs.get()
    refs.publish("latest", latest.digest, latest.size, {"dev.mothball.generation": "7", "dev.mothball.files": "3",
        "dev.mothball.bytes": "12", "dev.mothball.git": json.dumps([{"branch": "main"}])}, fence=1, job="j")  # fmt: skip
    made = snap(refs, 1, label="before the merge", note="line 1\nline 2", keep=True)
    assert made == refs.get("snap-1")
    (found,) = snapshots(refs)
    assert (found.name, found.number, found.digest, found.at) == ("snap-1", 1, latest.digest, NOW)
    assert (found.label, found.note, found.keep) == ("before the merge", "line 1\nline 2", True)
    assert (found.generation, found.files, found.bytes, found.git) == (7, 3, 12, [{"branch": "main"}])
    assert refs.get().annotations.get("dev.mothball.label") is None


def test_b30_a_number_is_never_given_twice(store: Store) -> None:
    """Not after the highest was forgotten, and not by an index that was written by a new process."""
    refs = many(store, [3, 2, 1])
    forget(store, "w", ["snap-3", "snap-2"], reason="r", at_ms=NOW)
    assert names(refs) == ["snap-1"]
    assert snap(store.refs("w"), 9).name == "snap-4"


def test_the_same_job_makes_one_snapshot_however_often_it_runs(store: Store) -> None:
    refs = captured(store)
    first = snap(refs, 1, label="a")
    assert snap(refs, 1, label="b") == first
    assert names(refs) == ["snap-1"]


def test_without_a_capture_there_is_nothing_to_number(store: Store) -> None:
    refs = store.refs("w")
    refs.prepare()
    refs.take_fence(1, "j")
    with pytest.raises(NotFound, match="--fresh"):
        snap(refs, 1)


def test_an_older_fence_numbers_nothing(store: Store) -> None:
    refs = captured(store)
    refs.take_fence(5, "other")
    with pytest.raises(LeaseLost):
        snap(refs, 1)
    assert names(refs) == []


def test_a_source_that_left_the_store_gets_no_number(store: Store) -> None:
    """A ref to what a collector took would be a snapshot of nothing."""
    refs = captured(store)
    other = capture(store, layer({b"b": File(b"other")}))
    size = store.blobs.size(other)
    made = snap(refs, 1, source=Ref("pulled", other, size, {"dev.mothball.pulled-from": "registry/repo:1"}))
    assert (made.name, made.digest, made.get("pulled-from")) == ("snap-1", other, "registry/repo:1")
    lost = capture(store, layer({b"c": File(b"lost")}))
    with Tree.open(store, lost) as tree:
        store.blobs.path(tree.manifest.layers[0].digest).unlink()
    with pytest.raises(TransientFailure):
        snap(refs, 2, source=Ref("pulled", lost, store.blobs.size(lost)))
    assert names(refs) == ["snap-1"]


@pytest.mark.parametrize(
    "bad", [{"label": "x" * 101}, {"label": "a\nb"}, {"label": "\x1b[2J"}, {"label": 3}, {"note": "x" * 2001}, {"note": "\udcff"}]
)
def test_texts_that_no_listing_can_show_are_refused(store: Store, bad: dict[str, Any]) -> None:
    refs = captured(store)
    with pytest.raises(InvalidParams):
        snap(refs, 1, **bad)
    assert names(refs) == []


def test_annotations_that_make_no_sense_do_not_hide_a_snapshot(store: Store) -> None:
    """Another tool may have copied or written the index."""
    refs = captured(store)
    digest, size = refs.get().digest, refs.get().size
    junk = {"dev.mothball.at": "\u0663", "dev.mothball.generation": "-1", "dev.mothball.git": "{", "dev.mothball.files": "9" * 40}
    refs.publish("snap-2", digest, size, junk, fence=1, job="j")
    refs.publish("snap-02", digest, size, {}, fence=1, job="j")
    (found,) = snapshots(refs)
    assert (found.name, found.at, found.generation, found.files, found.git) == ("snap-2", 0, 0, 0, [])
    assert snap(refs, 1).name == "snap-3"


def test_two_processes_number_side_by_side(store: Store) -> None:
    """Whoever comes second sees the first one's number."""
    captured(store)
    workers = [threading.Thread(target=snap, args=(store.refs("w"), number)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert names(store.refs("w")) == [f"snap-{number}" for number in range(1, 9)]


# -- marks and forgetting ----------------------------------------------------------------------------------------------


def test_marks_change_what_is_said_and_nothing_else(store: Store) -> None:
    refs = many(store, [2, 1])
    before = refs.get("snap-1")
    assert mark(refs, "snap-1", keep=True, label="L").keep
    assert mark(refs, "snap-1", note="N").label == "L"
    assert not mark(refs, "snap-1", keep=False).keep
    assert (refs.get("snap-1").digest, refs.get("snap-1").get("at")) == (before.digest, before.get("at"))
    with pytest.raises(NotFound, match="snap-1, snap-2"):
        mark_all(refs, ["snap-2", "snap-9"], keep=True)
    assert not snapshots(refs)[1].keep
    for wrong in (["latest"], []):
        with pytest.raises(InvalidParams):
            mark_all(refs, wrong, keep=True)
    with pytest.raises(InvalidParams):
        mark(refs, "snap-1")


def test_what_is_forgotten_lies_in_the_trash_and_comes_back(store: Store) -> None:
    refs = many(store, [3, 2, 1])
    done = forget(store, "w", ["snap-2"], reason="no longer needed", at_ms=NOW)
    assert ([each.name for each in done.gone], done.already) == (["snap-2"], [])
    assert names(refs) == ["snap-1", "snap-3"]
    (buried,) = Trash(store).buried("w")
    assert (buried.ref.name, buried.reason, buried.at) == ("snap-2", "no longer needed", NOW)
    undelete(store, "w", "snap-2")
    assert names(refs) == ["snap-1", "snap-2", "snap-3"]
    assert snapshots(refs)[1].at == NOW - 2 * DAY


def test_forgetting_twice_is_no_error(store: Store) -> None:
    """The first run may have died before it could say so."""
    many(store, [3, 2, 1])
    forget(store, "w", ["snap-2"], reason="r", at_ms=NOW)
    done = forget(store, "w", ["snap-2", "snap-1"], reason="r", at_ms=NOW)
    assert ([each.name for each in done.gone], done.already) == (["snap-1"], ["snap-2"])


@pytest.mark.parametrize(("wrong", "error"), [("latest", InvalidParams), ("snap-9", NotFound), ("snap-0", InvalidParams)])
def test_a_wrong_name_forgets_none_of_them(store: Store, wrong: str, error: type[Exception]) -> None:
    refs = many(store, [2, 1])
    with pytest.raises(error):
        forget(store, "w", ["snap-1", wrong], reason="r", at_ms=NOW)
    assert names(refs) == ["snap-1", "snap-2"]
    assert Trash(store).buried("w") == []


def test_the_keep_flag_must_be_lifted_first(store: Store) -> None:
    refs = many(store, [2, 1])
    mark(refs, "snap-1", keep=True)
    with pytest.raises(InvalidParams, match="snap-1"):
        forget(store, "w", ["snap-2", "snap-1"], reason="r", at_ms=NOW)
    assert names(refs) == ["snap-1", "snap-2"]
    forget(store, "w", ["snap-1"], reason="r", at_ms=NOW, force_keep=True)
    assert names(refs) == ["snap-2"]


def test_forgetting_in_a_workspace_that_has_nothing_makes_nothing(store: Store) -> None:
    with pytest.raises(NotFound):
        forget(store, "w", ["snap-1"], reason="r", at_ms=NOW)
    assert not store.refs("w").folder.exists()


def test_a_fence_that_is_not_the_newest_forgets_nothing(store: Store) -> None:
    refs = many(store, [2, 1])
    refs.take_fence(5, "other")
    with pytest.raises(LeaseLost):
        forget(store, "w", ["snap-1"], reason="r", at_ms=NOW, fence=1, job="mine")
    assert names(refs) == ["snap-1", "snap-2"]
    assert Trash(store).buried("w") == []


# -- retention ---------------------------------------------------------------------------------------------------------


def test_retention_takes_snapshots_only_and_says_why(store: Store) -> None:
    refs = many(store, [40, 30, 20, 1])
    refs.publish("crash-1", refs.get().digest, refs.get().size, {}, fence=1, job="j")
    mark(refs, "snap-1", keep=True)
    done = retain_workspace(store, "w", Policy.parse("last=1,within=2d"), now_ms=NOW)
    assert (done.workspace, done.policy, done.count) == ("w", "last=1,within=2d", 2)
    assert [(taken.name, taken.reasons) for taken in done.taken] == [
        ("snap-2", ["not among the last 1", "not younger than 2d"]),
        ("snap-3", ["not among the last 1", "not younger than 2d"]),
    ]
    assert [ref.name for ref in refs.list()] == ["crash-1", "latest", "snap-1", "snap-4"]
    assert [entry.reason for entry in Trash(store).buried("w")] == ["retention last=1,within=2d"] * 2
    again = retain_workspace(store, "w", Policy.parse("last=1,within=2d"), now_ms=NOW)
    assert (again.count, again.taken) == (2, [])


def test_row_35_a_dry_run_says_the_same_and_changes_nothing(store: Store) -> None:
    many(store, [40, 30, 1])
    before = everything(store.root)
    folders = {path: path.stat().st_mtime_ns for path in store.root.rglob("*") if path.is_dir()}
    dry = retain(store, [("w", Policy.parse("last=1"))], now_ms=NOW, dry_run=True)
    assert everything(store.root) == before
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*") if path.is_dir()} == folders
    real = retain(store, [("w", Policy.parse("last=1"))], now_ms=NOW)
    assert (dry.taken, dry.removed, dry.kept) == (real.taken, 2, 1)
    assert names(store.refs("w")) == ["snap-3"]


def test_retention_of_very_many_lets_captures_and_collectors_in_between(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = captured(store)
    latest = refs.get()
    many = [Ref(f"snap-{number}", latest.digest, latest.size, {f"{PREFIX}at": str(number)}) for number in range(1, 301)]
    refs.replace(lambda before: [*before, *many])
    real, sizes = RefIndex.replace, []

    def counted(self: RefIndex, *args: Any, **options: Any) -> list[Ref]:
        before = len(self.list())
        after = real(self, *args, **options)
        sizes.append(before - len(after))
        return after

    monkeypatch.setattr(RefIndex, "replace", counted)
    retained = retain_workspace(store, "w", Policy.parse("last=1"), now_ms=NOW)
    assert max(sizes) <= AT_ONCE < sum(sizes) == len(retained.taken) == 299
    assert len({taken.name for taken in retained.taken}) == 299
    assert (retained.count, names(refs)) == (1, ["snap-300"])
    assert len(Trash(store).buried("w")) == 299


def test_a_report_of_very_many_fits_into_the_outcome_of_a_job() -> None:
    ids = [f"{'o' * 60}/{'r' * 60}#{number:06d}" for number in range(2000)]
    reasons = ["not among the last 10", "not younger than 365d", *(f"snap-123456789 stands for its {word}" for word in "abcd")]
    report = RetainReport(False, taken=[Taken(each, "snap-123456789", NOW, reasons) for each in ids], removed=2000)
    report.skipped = [(each, "its own policy was lost with the registry; `mothball retention` sets one") for each in ids]
    report.failed = [(each, "no_space: " + "/long" * 1000) for each in ids]
    shown = report.to_dict()
    assert len(encode.dumps(shown, "outcome", encode.MAX_OUTCOME_BYTES)) > 10_000
    assert (shown["complete"], shown["removed"]) == (False, 2000)


def test_the_decision_is_made_again_under_the_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the lock somebody protects one snapshot, and a fresh one takes the place of `last`."""
    refs = many(store, [9, 8, 7])
    decide = retain_module.decide
    calls = []

    def late(*args: Any) -> Any:
        calls.append(args)
        answer = decide(*args)
        if len(calls) == 1:
            mark(refs, "snap-1", keep=True)
            snap(refs, 4)
        return answer

    monkeypatch.setattr(retain_module, "decide", late)
    done = retain_workspace(store, "w", Policy.parse("last=1"), now_ms=NOW)
    assert [taken.name for taken in done.taken] == ["snap-2", "snap-3"]
    assert (done.count, names(refs)) == (2, ["snap-1", "snap-4"])


def test_one_bad_workspace_never_ends_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged index, a lock that is held, a policy nobody can follow, a workspace without captures."""
    monkeypatch.setitem(file_lock.__wrapped__.__kwdefaults__, "wait", 0.1)  # type: ignore[attr-defined]
    for workspace in ("a", "held", "torn", "z"):
        many(store, [9, 1], workspace)
    (store.refs("torn").folder / "index.json").write_bytes(b"{")
    policy = Policy.parse("last=1")
    wanted: list[tuple[str, Policy | str]] = [("a", policy), ("held", policy), ("torn", policy), ("never", policy)]
    wanted += [("left", "somebody holds it"), ("z", policy)]
    many(store, [9, 1], "left")
    done: list[str] = []
    with store.refs("held").locked():
        report = retain(store, wanted, now_ms=NOW, done=lambda retained: done.append(retained.workspace))
    assert done == ["a", "z"]
    assert (report.workspaces, report.removed, report.kept) == (2, 2, 2)
    assert report.skipped == [("left", "somebody holds it")]
    assert [workspace for workspace, _ in report.failed] == ["held", "torn"]
    assert [error.split(":")[0] for _, error in report.failed] == [Busy.code, Corrupt.code]
    assert names(store.refs("left")) == ["snap-1", "snap-2"]
    assert not store.refs("never").folder.exists()
    assert json.loads(json.dumps(report.to_dict()))["complete"] is True


def test_a_stop_between_two_workspaces_stops(store: Store) -> None:
    for workspace in ("a", "b"):
        many(store, [9, 1], workspace)

    def each(workspace: str) -> None:
        if workspace == "b":
            raise LeaseLost(job="j")

    with pytest.raises(LeaseLost):
        retain(store, [("a", Policy.parse("last=1")), ("b", Policy.parse("last=1"))], now_ms=NOW, each=each)
    assert (names(store.refs("a")), names(store.refs("b"))) == (["snap-2"], ["snap-1", "snap-2"])


def test_a_crash_between_trash_and_index_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ref is then in both places; the next run takes it again."""
    refs = many(store, [9, 1])
    replace = os.rename

    def fail(self: Path, target: Path) -> Path:
        if target.name == "index.json":
            raise OSError("power cut")
        replace(self, target)
        return target

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        report = retain(store, [("w", Policy.parse("last=1"))], now_ms=NOW)
    assert report.failed == [("w", "OSError: power cut")]
    assert names(refs) == ["snap-1", "snap-2"]
    assert [entry.ref.name for entry in Trash(store).buried("w")] == ["snap-1"]
    assert retain_workspace(store, "w", Policy.parse("last=1"), now_ms=NOW).count == 1
    assert len(Trash(store).buried("w")) == 1
