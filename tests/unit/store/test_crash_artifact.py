"""A crash report in the store: whoever keeps it keeps the capture it is about, and everybody who follows refs copes with it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mothball.doctor.layouts import read_layout
from mothball.errors import Corrupt, InvalidParams, LeaseLost, NotFound, Oversize, TransientFailure
from mothball.package.layout import export_layout
from mothball.store import Store
from mothball.store import artifact as artifact_module
from mothball.store.artifact import (
    CRASH_TYPE,
    REPORT_MEDIA,
    check_crash_name,
    find_report,
    forget_report,
    load_report,
    publish_report,
    subject_of,
)
from mothball.store.diff import diff
from mothball.store.manifest import MEDIA_EMPTY, MEDIA_MANIFEST, Descriptor, canonical, load_manifest, reach
from mothball.store.snapshots import add_snapshot, snapshots
from mothball.store.trash import undelete
from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.support import require_tool
from tests.unit.store.build import File, capture, damage, layer, new_store
from tests.unit.store.collecting import GRACE, TRASH, age, blob_names, blobs_of, forget, run

CRASH = "crash-repo-issue-7-20261121-101500Z-0a1b2c3d"
REPORT = b'{"schema":"dev.mothball.crash-report/1"}'


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def crash(store: Store, *, workspace: str = "w", report: bytes = REPORT, name: str = CRASH, ref: str = "latest") -> tuple[str, str]:
    """(manifest of the report, manifest of the capture), the capture being what `ref` names."""
    about = store.refs(workspace).get(ref)
    digest = publish_report(
        store, workspace, id=name, report=report, subject=Descriptor(MEDIA_MANIFEST, about.digest, about.size),
        annotations={"at": "1700000000000"}, fence=1, job="job",
    )  # fmt: skip
    return digest, about.digest


def test_a_report_is_an_artifact_whose_subject_is_the_capture(store: Store) -> None:
    about = capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, _ = crash(store)
    document = json.loads(store.blobs.read(digest))
    assert document["artifactType"] == CRASH_TYPE
    assert document["config"] == {"mediaType": MEDIA_EMPTY, "digest": "sha256:" + hashlib.sha256(b"{}").hexdigest(), "size": 2}
    assert document["subject"] == {"mediaType": MEDIA_MANIFEST, "digest": about, "size": store.blobs.size(about)}
    assert [each["mediaType"] for each in document["layers"]] == [REPORT_MEDIA]
    assert load_report(store, digest) == REPORT
    assert subject_of(store, digest).digest == about
    ref = find_report(store, "w", CRASH)
    assert (ref.digest, ref.get("at"), ref.get("workspace")) == (digest, "1700000000000", "w")


def test_a_report_that_is_stored_twice_is_the_same_and_an_amended_one_takes_its_place(store: Store) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    first, _ = crash(store)
    assert crash(store)[0] == first
    second, _ = crash(store, report=REPORT + b"\n")
    assert second != first
    assert [ref.digest for ref in store.refs("w").list() if ref.name == CRASH] == [second]


@pytest.mark.parametrize(
    "name", ["latest", "snap-1", "crash-", "crash-../x", "crash-a/b", "crash-\u012e\u012e\u012f", "crash-" + "a" * 200, 7]
)
def test_b60_only_an_id_of_a_crash_report_names_one(name: object) -> None:
    with pytest.raises(InvalidParams, match="no id of a crash report"):
        check_crash_name(name)


def test_a_capture_is_no_crash_report(store: Store) -> None:
    digest = capture(store, layer({b"a": File(b"one")}), workspace="w")
    with pytest.raises(InvalidParams, match="not a crash report"):
        load_report(store, digest)
    with pytest.raises(NotFound):
        find_report(store, "w", CRASH)


def test_a_report_that_is_too_large_is_refused_before_anything_is_stored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    before = blob_names(store)
    monkeypatch.setattr(artifact_module, "REPORT_LIMIT", len(REPORT) - 1)
    with pytest.raises(Oversize):
        crash(store)
    assert blob_names(store) == before


def test_a_report_is_not_published_by_a_job_that_lost_its_lease(store: Store) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    store.refs("w").take_fence(2, "newer")
    with pytest.raises(LeaseLost):
        crash(store)


def test_a_report_about_a_capture_that_a_collector_took_is_not_published(store: Store) -> None:
    digest = capture(store, layer({b"a": File(b"one")}), workspace="w")
    store.blobs.path(load_manifest(store.blobs, digest).layers[0].digest).unlink()
    with pytest.raises(TransientFailure):
        crash(store)
    assert store.refs("w").find(CRASH) is None


# -- collection --------------------------------------------------------------------------------------------------------


def test_collection_never_takes_a_crash_report_nor_the_capture_it_is_about(store: Store) -> None:
    about = capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, _ = crash(store)
    capture(store, layer({b"a": File(b"two")}), workspace="w")
    age(store, 10 * GRACE)
    report = run(store)
    assert report.moved_blobs == 0
    assert set(blobs_of(store, about)) | set(blobs_of(store, digest)) <= blob_names(store)
    with Tree.open(store, digest) as tree:
        assert tree.read("a") == b"one"
    assert verify(store, level="content").problems == []


def test_a_report_that_was_forgotten_goes_with_its_capture_and_comes_back_with_it(store: Store) -> None:
    about = capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, _ = crash(store)
    capture(store, layer({b"a": File(b"two")}), workspace="w")
    assert forget_report(store, "w", CRASH, reason="test", at_ms=1)
    assert not forget_report(store, "w", CRASH, reason="test", at_ms=1)
    age(store, GRACE + 1)
    dry = run(store, dry_run=True)
    done = run(store)
    assert dry.moved_blobs == done.moved_blobs == len({*blobs_of(store_trash(store), about), *blobs_of(store_trash(store), digest)})
    assert not store.blobs.exists(about)
    back = undelete(store, "w", CRASH)
    assert [(each.name, each.problem) for each in back] == [(CRASH, "")]
    with Tree.open(store, digest) as tree:
        assert tree.read("a") == b"one"
    assert verify(store, level="content").problems == []


def store_trash(store: Store) -> Store:
    """A store whose blobs are those of the newest collection's folder in the trash."""
    view = Store(store.root)
    runs = sorted((store.root / "trash" / "blobs").iterdir())
    view.blobs.folder = runs[-1] if runs else view.blobs.folder
    return view


def test_a_report_that_was_forgotten_is_deleted_when_the_window_is_over(store: Store) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, about = crash(store)
    latest = capture(store, layer({b"a": File(b"two")}), workspace="w")
    forget_report(store, "w", CRASH, reason="test", at_ms=1)
    age(store, TRASH + GRACE)
    run(store)
    age(store, TRASH + GRACE)
    run(store)
    assert blob_names(store) == set(blobs_of(store, latest))
    assert list((store.root / "trash" / "blobs").iterdir()) == []
    with pytest.raises(NotFound):
        undelete(store, "w", CRASH)
    assert about not in blob_names(store)
    assert digest not in blob_names(store)


def test_an_amended_report_never_comes_back_as_a_snapshot(store: Store) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    crash(store)
    forget_report(store, "w", CRASH, reason="test", at_ms=1)
    second, _ = crash(store, report=REPORT + b"\n")
    undelete(store, "w")
    assert {ref.name: ref.digest for ref in store.refs("w").list()}[CRASH] == second
    assert snapshots(store.refs("w")) == []


def test_usage_counts_what_a_report_keeps(store: Store) -> None:
    capture(store, layer({b"a": File(b"x" * 5000)}), workspace="w")
    before = run(store, dry_run=True)
    crash(store)
    capture(store, layer({b"a": File(b"two")}), workspace="w")
    after = run(store, dry_run=True)
    assert after.workspaces[0].stored > before.workspaces[0].stored
    assert after.workspaces[0].stored == sum(path.stat().st_size for path in store.blobs.folder.iterdir())


# -- readers -----------------------------------------------------------------------------------------------------------


def test_the_tree_of_a_report_is_that_of_its_capture(store: Store) -> None:
    about = capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, _ = crash(store)
    capture(store, layer({b"a": File(b"two")}), workspace="w")
    with store.tree("w", CRASH) as tree, store.tree("w") as latest:
        assert tree.digest == about
        assert [entry.path for entry in tree.walk()] == ["a"]
        assert [change.path for change in diff(tree, latest)] == ["a"]
    assert load_manifest(store.blobs, digest).is_artifact


def test_a_snapshot_of_latest_and_a_report_live_side_by_side(store: Store) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    crash(store)
    ref = add_snapshot(store.refs("w"), fence=1, job="other", at_ms=5)
    assert ref.name == "snap-1"
    assert [each.name for each in snapshots(store.refs("w"))] == ["snap-1"]
    assert [each.name for each in store.refs("w").list()] == [CRASH, "latest", "snap-1"]


def test_an_export_of_a_report_is_refused_and_says_what_to_use(store: Store, tmp_path: Path) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, _ = crash(store)
    with pytest.raises(InvalidParams, match="crash-reports fetch"):
        export_layout(store, digest, tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists()


def test_the_doctor_reads_a_layout_with_a_report(store: Store) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    _, about = crash(store)
    found = read_layout(store, store.refs("w").folder)
    assert found.damaged == {}
    capture(store, layer({b"a": File(b"two")}), workspace="w")
    store.blobs.path(load_manifest(store.blobs, about).layers[0].digest).unlink()
    assert set(read_layout(store, store.refs("w").folder).damaged) == {CRASH}


# -- damage ------------------------------------------------------------------------------------------------------------


def harmed(store: Store) -> set[str]:
    return {ref for problem in verify(store, level="deep").problems for ref in problem.refs}


@pytest.mark.parametrize("what", ["report", "empty config", "subject", "layer of the subject"])
def test_verify_says_what_of_a_report_is_damaged(store: Store, what: str) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, about = crash(store)
    capture(store, layer({b"a": File(b"two")}), workspace="w")
    assert verify(store, level="content").problems == []
    manifest = load_manifest(store.blobs, digest)
    blob = {
        "report": manifest.layers[0].digest,
        "empty config": manifest.config.digest,
        "subject": about,
        "layer of the subject": load_manifest(store.blobs, about).layers[0].digest,
    }[what]
    damage(store, blob, at=0)
    problems = verify(store, level="deep").problems
    assert [problem.digest for problem in problems if problem.digest == blob] == [blob]
    assert {ref for problem in problems for ref in problem.refs} == {f"w:{CRASH}"}
    store.blobs.path(blob).unlink()
    assert harmed(store) == {f"w:{CRASH}"}


def test_damage_of_a_report_never_lets_a_collection_delete(store: Store) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, about = crash(store)
    capture(store, layer({b"a": File(b"two")}), workspace="w")
    store.blobs.path(about).unlink()
    age(store, 10 * GRACE)
    before = blob_names(store)
    with pytest.raises(Corrupt, match=CRASH):
        run(store)
    assert blob_names(store) == before
    forget(store, "w", CRASH)
    run(store)
    assert digest not in blob_names(store)


@pytest.mark.parametrize("subject", ["itself an artifact", "no digest", "no manifest", "none"])
def test_a_report_whose_subject_is_no_capture_is_damage_and_leads_nowhere(store: Store, subject: str) -> None:
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    first, about = crash(store)
    document = json.loads(store.blobs.read(first))
    if subject == "none":
        del document["subject"]
    elif subject == "itself an artifact":
        document["subject"] |= {"digest": first, "size": store.blobs.size(first)}
    elif subject == "no digest":
        document["subject"]["digest"] = "sha256:../../etc/passwd"
    else:
        document["subject"]["mediaType"] = "application/octet-stream"
    digest, _ = store.blobs.put(canonical(document))
    with pytest.raises(Corrupt):
        Tree.open(store, digest)
    if subject != "none":
        with pytest.raises(Corrupt):
            reach(lambda each: load_manifest(store.blobs, each), digest, 1)
        with pytest.raises(Corrupt):
            store.refs("w").publish("crash-x", digest, store.blobs.size(digest), {}, fence=1, job="job")
    assert about


# -- other tools -------------------------------------------------------------------------------------------------------


def test_skopeo_reads_the_captures_of_a_layout_with_a_report_and_copies_the_report(store: Store, tmp_path: Path) -> None:
    skopeo = require_tool("skopeo")
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, _ = crash(store)
    folder = store.refs("w").folder
    said = subprocess.run([skopeo, "inspect", f"oci:{folder}:latest"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(said.stdout)["Digest"] == store.refs("w").get().digest
    target = tmp_path / "copied"
    subprocess.run([skopeo, "copy", "-q", f"oci:{folder}:{CRASH}", f"oci:{target}:x"], check=True, timeout=60, capture_output=True)
    index = json.loads((target / "index.json").read_text())
    assert [each["digest"] for each in index["manifests"]] == [digest]


def test_umoci_gc_of_a_copied_layout_keeps_the_report_readable(store: Store, tmp_path: Path) -> None:
    umoci = require_tool("umoci")
    capture(store, layer({b"a": File(b"one")}), workspace="w")
    digest, about = crash(store)
    capture(store, layer({b"a": File(b"two")}), workspace="w")
    copied = tmp_path / "layout"
    shutil.copytree(store.refs("w").folder, copied, symlinks=False, ignore=shutil.ignore_patterns("lock", "fence"))
    (copied / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"nobody names me")
    subprocess.run([umoci, "gc", "--layout", str(copied)], check=True, timeout=60, capture_output=True)
    left = {path.name for path in (copied / "blobs" / "sha256").iterdir()}
    assert {each[7:] for each in (*blobs_of(store, about), *blobs_of(store, digest))} <= left
    assert "0" * 64 not in left
