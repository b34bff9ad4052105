"""Restores that were ended anywhere: the same restore goes on, never takes what changed meanwhile for its own, leaves nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import AlreadyExists, Busy
from mothball.store import Store
from mothball.store import restore_target as restore_target_module
from mothball.store.restore import discard
from tests.support import not_permitted
from tests.unit.store.build import Dir, File, Hard, Link, capture, layer, new_store
from tests.unit.store.restoring import bring_back, contents, facts, leftovers

TREE = {b"": Dir(mode=0o711), b"a": File(b"one"), b"b": Hard(b"a"), b"d": Dir(mode=0o750), b"d/l": Link(b"x"), b"e": Dir()} | {
    b"e/f%03d" % number: File(b"content %d " % number * 100) for number in range(40)
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


@pytest.fixture
def digest(store: Store) -> str:
    return capture(store, layer(TREE, frame_bytes=4096))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An empty mount point: no folder made beside it can take its place."""
    (tmp_path / "mnt").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "mnt")], capture_output=True, check=False)
    if done.returncode:
        not_permitted("mount a file system")
    yield tmp_path / "mnt"
    subprocess.run(["umount", str(tmp_path / "mnt")], check=True)


def stop_after(count: int) -> Callable[[str, dict[str, Any]], None]:
    calls: list[str] = []

    def progress(step: str, _counts: dict[str, Any]) -> None:
        calls.append(step)
        if calls.count("write") == count:
            raise KeyboardInterrupt

    return progress


def killed(store: Store, digest: str, target: Path, calls: tuple[str, ...], number: int, **options: Any) -> bool:
    """Restore in a process that is killed before its `number`th call of one of `calls` of `os`; False when it ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    status = 1
    try:
        count = 0

        def counted(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), 9)
            return real(*args, **kwargs)

        for name in calls:
            setattr(os, name, partial(counted, getattr(os, name)))
        bring_back(store, digest, target, **options)
        status = 0
    finally:
        os._exit(status)


def test_a_restore_killed_anywhere_around_its_end_is_ended_by_the_next(store: Store, digest: str, tmp_path: Path) -> None:
    """After the rename, while its folder beside the target is removed: the target is whole, and the next run says so."""
    bring_back(store, digest, tmp_path / "whole")
    want = facts(tmp_path / "whole")
    runs = 0
    while killed(store, digest, tmp_path / f"t{runs}", ("unlink", "rmdir", "rename", "fchmod"), runs + 1):
        target = tmp_path / f"t{runs}"
        assert bring_back(store, digest, target).resumed or runs < 3  # killed before there was a tree
        assert facts(target) == want
        assert leftovers(tmp_path) == []
        runs += 1
    assert runs > 50


def test_what_was_published_and_changed_since_is_not_taken_for_restored(store: Store, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "back"

    def publish(stop: int) -> None:
        """A run that is killed after the rename."""
        pid = os.fork()
        if not pid:
            real = restore_target_module.Sibling.publish

            def killed_after(self: restore_target_module.Sibling) -> None:
                real(self)
                os.kill(os.getpid(), stop)

            restore_target_module.Sibling.publish = killed_after  # type: ignore[method-assign]
            bring_back(store, digest, target)
        os.waitpid(pid, 0)

    publish(9)
    assert leftovers(tmp_path) != []
    (target / "a").write_text("EDITED")
    (target / "e" / "f000").unlink()
    with pytest.raises(AlreadyExists, match="not empty"):
        bring_back(store, digest, target)
    assert contents(target)["a"] == "EDITED"
    assert leftovers(tmp_path) == []
    (tmp_path / "back").rename(tmp_path / "aside")
    publish(9)
    (target / "a").write_text("EDITED")
    (target / "extra").write_text("x")
    result = bring_back(store, digest, target, overwrite="changed", delete_extra=True)
    assert (result.written, result.deleted) == (2, 1)  # both names of the file
    assert contents(target)["a"] == "one"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("stop", [1, 3, 8])
def test_an_empty_mount_point_that_was_half_filled_is_filled_by_the_same_restore(
    store: Store, digest: str, tmp_path: Path, mounted: Path, stop: int
) -> None:
    bring_back(store, digest, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        bring_back(store, digest, mounted, progress=stop_after(stop))
    before = contents(mounted)
    other = capture(store, layer({b"a": File(b"other")}))
    for wrong in ({"digest": other}, {"digest": digest, "include": ["a"]}):
        with pytest.raises(AlreadyExists, match="not empty"):
            bring_back(store, target=mounted, **wrong)  # type: ignore[arg-type]
    assert contents(mounted) == before
    planned = bring_back(store, digest, mounted, dry_run=True)
    result = bring_back(store, digest, mounted)
    assert result.resumed
    assert result.written == planned.written
    assert facts(mounted) == facts(tmp_path / "whole")
    with pytest.raises(AlreadyExists):
        bring_back(store, digest, mounted)


def test_a_half_filled_folder_loses_nothing_that_was_edited_in_it(store: Store, digest: str, mounted: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        bring_back(store, digest, mounted, progress=stop_after(8))
    edited = next(path for path in sorted((mounted / "e").iterdir()) if path.stat().st_size)
    edited.write_text("a day's work")
    (mounted / "mine").write_text("x")
    with pytest.raises(AlreadyExists, match=edited.name):
        bring_back(store, digest, mounted)
    assert edited.read_text() == "a day's work"
    assert bring_back(store, digest, mounted, overwrite="changed").deleted == 0
    assert (len(contents(mounted)), leftovers(mounted)) == (len(TREE), [])  # without the root, with `mine`


def test_the_current_folder_half_filled_goes_on(store: Store, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for number in (5, 30, 60):
        assert killed(store, digest, Path.cwd(), ("open", "rename", "utime", "mkdir"), number)
        assert (tmp_path / "here" / ".mothball-restore-unfinished").exists() or number == 5
    assert bring_back(store, digest, Path.cwd()).resumed
    assert leftovers(tmp_path) == []


def test_what_a_removal_that_was_ended_left_does_not_stand_in_the_way(store: Store, digest: str, tmp_path: Path) -> None:
    target, other = tmp_path / "back", capture(store, layer({b"f": File(b"x")}))
    with pytest.raises(KeyboardInterrupt):
        bring_back(store, digest, target, progress=stop_after(5), by="job-1")
    with pytest.raises(Busy):
        bring_back(store, other, target)
    (tmp_path / ".back.mothball-restore" / "state").unlink()  # the first thing that a removal does
    assert not bring_back(store, other, target).resumed
    assert contents(target) == {"f": "x"}
    assert leftovers(tmp_path) == []


def test_only_what_the_same_job_left_is_discarded(store: Store, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "back"
    for by in ("job-1", "job-2"):  # the second goes on with what the first left: it is its own from then on
        with pytest.raises(KeyboardInterrupt):
            bring_back(store, digest, target, progress=stop_after(2), by=by)
    assert not discard(target, store=store.root, by="job-1")
    assert discard(target, store=store.root, by="job-2")
    assert leftovers(tmp_path) == []


def test_a_merge_removes_what_the_same_restore_left_beside_the_target(store: Store, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "back"
    with pytest.raises(KeyboardInterrupt):
        bring_back(store, digest, target, progress=stop_after(5))
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(AlreadyExists):
        bring_back(store, digest, target)
    assert leftovers(tmp_path) != []
    bring_back(store, digest, target, overwrite="never")
    assert leftovers(tmp_path) == []


def test_a_capture_that_holds_a_restores_own_names_comes_back_whole(store: Store, tmp_path: Path) -> None:
    """Taken of a folder in which a restore was killed."""
    odd = {b".mothball-restore-": File(b"1"), b".mothball-restore-unfinished": File(b"2"), b".mothball-restore--": File(b"3")}
    tree = odd | {b"a": File(b"a"), b"z": File(b"z"), b"l": Link(b"a")}
    digest = capture(store, layer(tree))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a").write_text("other")
    bring_back(store, digest, tmp_path / "t", overwrite="always")
    want = {os.fsdecode(name): item.content.decode() for name, item in tree.items() if isinstance(item, File)} | {"l": "-> a"}
    assert contents(tmp_path / "t") == want
