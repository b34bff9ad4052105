"""A capture beside the directory as it is now: what the next capture would change, without making it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.capture import CaptureOptions
from mothball.capture.disk import DiskComparison, compare_with_disk
from mothball.capture.reading import Reader
from mothball.errors import NotFound, PathNotAllowed, SourceMissing
from mothball.settings import Settings
from mothball.store.diff import Change, diff
from mothball.store.textdiff import patch
from mothball.store.tree import Tree
from tests.support import require_tool
from tests.unit.capture.harness import Yard, settle
from tests.unit.capture.test_histories import GENERATIONS, Gardener


def looked(yard: Yard, digest: str, look: Callable[[DiskComparison], Any], *, path: Path | None = None, **options: Any) -> Any:
    with (
        Tree.open(yard.store, digest) as tree,
        compare_with_disk(
            tree, str(path or yard.root / "ws"), yard.settings, CaptureOptions.merge(yard.settings, options),
            store=yard.store, workspace="ws",
        ) as disk,
    ):  # fmt: skip
        return look(disk)


def kinds(changes: Any) -> dict[str, str]:
    return {change.path: change.kind for change in changes}


def against_disk(yard: Yard, digest: str, prefix: str = "", **options: Any) -> dict[str, str]:
    found: dict[str, str] = looked(yard, digest, lambda disk: kinds(disk.changes(prefix)), **options)
    return found


@pytest.fixture
def digest(yard: Yard) -> str:
    folder = yard.folder()
    for name in ("a", "b", "sub/c", "sub/d", "gone/e"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode() * 300)
    (folder / "link").symlink_to("a")
    settle(folder)
    return yard.capture().digest


def test_nothing_changed_is_no_difference_and_reads_no_file(yard: Yard, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr("mothball.capture.baseline.RACY_NS", 0)  # the files were written a moment ago
    settle(yard.root / "ws")
    second = yard.capture().digest
    monkeypatch.setattr(Reader, "open", refuse)
    assert against_disk(yard, second) == {}


@pytest.mark.parametrize("index", [True, False])
def test_every_kind_of_change_is_found_with_and_without_the_stat_index(yard: Yard, digest: str, index: bool) -> None:
    folder = yard.root / "ws"
    (folder / "a").write_bytes(b"A" * 300)  # another size
    was = (folder / "b").stat()
    (folder / "b").write_bytes(b"B" * 300)  # the same size and time
    os.utime(folder / "b", ns=(was.st_atime_ns, was.st_mtime_ns))
    (folder / "sub" / "c").chmod(0o755)
    shutil.rmtree(folder / "gone")
    (folder / "new").mkdir()
    (folder / "new" / "f").write_bytes(b"")
    (folder / "link").unlink()
    (folder / "link").symlink_to("b")
    if not index:
        shutil.rmtree(yard.store.cache)
    found = against_disk(yard, digest)
    expected = {
        "": "time", "a": "changed", "b": "changed", "gone": "deleted", "gone/e": "deleted", "link": "changed", "new": "added",
        "new/f": "added", "sub/c": "mode",
    }  # fmt: skip
    assert found == expected
    for prefix in ("sub", "a", "gone", "new"):
        assert against_disk(yard, digest, prefix) == {
            path: kind for path, kind in expected.items() if path == prefix or path.startswith(prefix + "/")
        }
    with pytest.raises(NotFound):
        against_disk(yard, digest, "nowhere")


def test_what_a_rule_leaves_out_now_is_deleted_and_said(yard: Yard, digest: str) -> None:
    (yard.root / "ws" / "sub" / "noise").write_bytes(b"x")

    def look(disk: DiskComparison) -> Any:
        return kinds(disk.changes("sub")), {omission.path: omission.reason for omission in disk.omissions}

    found, omitted = looked(yard, digest, look, ignore=["sub/c", "noise"])
    assert found == {"sub": "time", "sub/c": "deleted"}
    assert omitted == {"sub/c": "ignored", "sub/noise": "ignored"}


def test_a_folder_that_is_not_there_or_not_allowed_is_an_error_and_not_an_empty_tree(
    yard: Yard, digest: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceMissing):
        looked(yard, digest, lambda disk: None, path=yard.root / "nowhere")
    with pytest.raises(PathNotAllowed):
        looked(yard, digest, lambda disk: None, path=tmp_path)


def test_a_link_in_place_of_a_folder_is_never_followed(yard: Yard, digest: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(yard.root / "ws" / "sub", outside)
    (yard.root / "ws" / "sub").symlink_to(outside)
    found = against_disk(yard, digest)
    assert (found["sub"], found["sub/c"], found["sub/d"]) == ("type", "deleted", "deleted")


def test_git_applies_the_patch_between_a_capture_and_the_disk(yard: Yard, digest: str, tmp_path: Path) -> None:
    require_tool("git")
    folder = yard.root / "ws"
    before = tmp_path / "before"
    shutil.copytree(folder, before, symlinks=True)
    (folder / "a").write_bytes(b"one\ntwo\n" * 50)
    (folder / "sub" / "c").write_bytes(b"sub/c" * 299)
    (folder / "b").unlink()
    (folder / "link").unlink()
    (folder / "link").write_text("a file now\n")
    (folder / 'odd "name"\n\\').write_bytes(b"odd\n")
    (folder / "sub" / "d").chmod(0o755)
    (folder / "new").mkdir()
    (folder / "new" / "empty").write_bytes(b"")

    with Tree.open(yard.store, digest) as tree:
        text = looked(
            yard, digest, lambda disk: b"".join(line for change in disk.changes() for line in patch(change, tree.read, disk.read))
        )
    subprocess.run(["git", "apply", "--unsafe-paths", "-"], cwd=before, input=text, check=True, capture_output=True)
    assert contents(before) == contents(folder)


def contents(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in root.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(root))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(root))] = (path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), edits=st.lists(st.integers(0, 12), min_size=3, max_size=GENERATIONS), lost=st.booleans())
def test_the_disk_differs_from_every_generation_as_the_next_capture_does(seed: int, edits: list[int], lost: bool) -> None:
    with TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "roots").mkdir()
        yard = Yard(
            base,
            Settings(workspace_roots=(base / "roots",), data_dir=base / "data", frame_bytes=64 * 1024, fsync=False, max_layers=3),
        )
        gardener = Gardener(yard.folder(), seed)
        digests = []
        for count in edits:
            for _ in range(count):
                gardener.edit()
            if lost:
                shutil.rmtree(yard.store.cache / "ws", ignore_errors=True)
            seen = {digest: looked(yard, digest, _all_changes) for digest in digests}
            now = yard.capture().digest
            for digest, changes in seen.items():
                with Tree.open(yard.store, digest) as old, Tree.open(yard.store, now) as new:
                    assert changes == [(change.path, change.kind, change.aspects) for change in diff(old, new)]
            digests.append(now)


def _all_changes(disk: DiskComparison) -> list[tuple[str, str, tuple[str, ...]]]:
    def facts(change: Change) -> tuple[str, str, tuple[str, ...]]:
        return change.path, change.kind, change.aspects

    return [facts(change) for change in disk.changes()]
