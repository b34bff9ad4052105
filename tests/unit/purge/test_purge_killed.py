"""A purge that is killed, doubled or run into by others: nothing is lost, and the next run ends it."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from mothball.errors import Busy, MothballError, NoSpace, OperationFailed, PathNotAllowed
from mothball.purge import aside, removal
from mothball.purge.aside import State, open_aside
from mothball.purge.survey import Item
from mothball.store.tree import Tree
from tests.unit.purge.conftest import PurgeYard


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and not path.is_symlink()}


def test_killed_at_any_moment_the_files_are_all_there_or_all_in_the_capture(yard: PurgeYard) -> None:
    """A real SIGKILL at a random time, again and again: each next run puts back or finishes."""
    for number in range(300):
        folder = yard.ws / f"d{number % 20}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(f"{number}\n")
    yard.taken()
    whole = content(yard.ws)
    dice = random.Random(7)
    kept = 0
    for _ in range(40):
        pid = os.fork()
        if not pid:
            try:
                with yard.opened() as purge:
                    if purge.recover() is None:
                        known = purge.examine(content=False, now_ms=lambda: 1)
                        if known is not None:
                            purge.run(known, force=False, decided=lambda _: None)
            finally:
                os._exit(0)
        time.sleep(dice.uniform(0.005, 0.25))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with yard.opened() as purge:
            if purge.begun():
                if not (yard.aside / "tree").exists():
                    break
                continue
            if yard.ws.exists() or (yard.aside / "tree").exists():
                where = yard.ws if yard.ws.exists() else yard.aside / "tree"
                assert content(where) == whole
                kept += 1
    with yard.opened() as purge:
        receipt = purge.recover()
        if receipt is None:
            known = purge.examine(content=False, now_ms=lambda: 1)
            assert known is not None
            receipt = purge.run(known, force=False, decided=lambda _: None)
        purge.forget()
    assert os.listdir(yard.root) == []
    assert kept  # the first ones come too early for anything else
    with Tree.open(yard.store, receipt.digest or "") as tree:
        assert {path: tree.read(path) for path in whole} == whole


def test_two_purges_at_once_are_one(yard: PurgeYard) -> None:
    with yard.opened() as first, yard.opened() as second:
        known = first.examine(content=False, now_ms=lambda: 1)
        assert known is not None

        def meanwhile(_: object) -> None:
            with pytest.raises(Busy, match="another purge of it is running"):
                second.recover()
            with pytest.raises(Busy, match="another purge of it is running"):
                second.run(known, force=True, decided=lambda _: None)

        receipt = first.run(known, force=False, decided=meanwhile)
        assert second.recover() == receipt
        first.forget()
        assert second.recover() is None


def left(yard: PurgeYard, stage: str, **fields: object) -> None:
    """What a killed run leaves: the directory moved aside."""
    with yard.opened() as purge:
        known = purge.examine(content=False, now_ms=lambda: 1)
        assert known is not None
        values = {
            "workspace": "ws", "registration": "r1", "device": known.identity[0], "inode": known.identity[1],
            "digest": known.ref.digest if known.ref else None, "repositories": list(known.repositories.values()),
            "receipt": purge._receipt(known, aside_look(), []).to_dict(), **fields,
        }  # fmt: skip
        with open_aside(purge.place, make=True) as hidden:
            assert hidden is not None
            os.close(hidden.take(State(stage="aside", **values)))  # type: ignore[arg-type]
            hidden.say(State(stage=stage, **values))  # type: ignore[arg-type]


def aside_look() -> object:
    from mothball.purge.look import Look

    return Look()


def test_what_was_only_moved_goes_back_and_what_is_there_says_so(yard: PurgeYard) -> None:
    whole = content(yard.ws)
    left(yard, "aside")
    with yard.opened() as purge:
        assert "what it moved lies in" in purge.left_over()
        assert not purge.begun()
        assert purge.recover() is None
        assert purge.left_over() == ""
    assert content(yard.ws) == whole
    assert os.listdir(yard.root) == ["ws"]


def test_a_name_that_was_taken_meanwhile_is_not_replaced(yard: PurgeYard) -> None:
    left(yard, "aside")
    yard.ws.mkdir()
    (yard.ws / "new").write_text("x")
    with yard.opened() as purge, pytest.raises(Busy, match="something else took its name"):
        purge.recover()
    assert (yard.ws / "new").read_text() == "x"
    assert (yard.aside / "tree" / "a.txt").exists()
    (yard.ws / "new").unlink()
    with yard.opened() as purge:
        assert purge.recover() is None  # an empty folder makes room
    assert (yard.ws / "a.txt").exists()


def test_a_new_folder_under_the_name_of_what_is_being_deleted_is_left_alone(yard: PurgeYard) -> None:
    left(yard, "deleting")
    yard.ws.mkdir()
    (yard.ws / "new").write_text("x")
    with yard.opened() as purge, pytest.raises(OperationFailed, match="a new folder has that name"):
        purge.recover()
    assert os.listdir(yard.root) == ["ws"]
    assert os.listdir(yard.ws) == ["new"]


@pytest.mark.parametrize("what", ["late file", "late repository", "changed file", "folder moved in"])
def test_what_came_after_a_deletion_began_is_not_deleted_by_the_run_that_finishes_it(yard: PurgeYard, what: str) -> None:
    left(yard, "deleting")
    tree = yard.aside / "tree"
    if what == "late file":
        (tree / "late").write_text("x")
    elif what == "late repository":
        (tree / "sub" / ".git").mkdir()
        (tree / "sub" / ".git" / "HEAD").write_text("x")
    elif what == "changed file":
        (tree / "a.txt").write_text("x")
    else:
        (yard.base / "other").mkdir()
        (yard.base / "other" / "work").write_text("x")
        (yard.base / "other").rename(tree / "other")
    with yard.opened() as purge, pytest.raises(OperationFailed, match="is not what was examined"):
        purge.recover()
    assert (tree / "sub" / "deep" / "c.txt").exists()
    with yard.opened() as purge:
        assert purge.recover(force=True) is not None
        purge.forget()
    assert os.listdir(yard.root) == []


def test_what_is_left_of_a_deletion_is_finished_whatever_part_is_gone(yard: PurgeYard) -> None:
    (yard.ws / ".mothballignore").write_text("cache/\n")
    (yard.ws / "cache").mkdir()
    (yard.ws / "cache" / "x").write_text("x")
    yard.taken()
    left(yard, "deleting")
    tree = yard.aside / "tree"
    (tree / "sub" / "b.txt").unlink()
    with yard.opened() as purge:
        assert purge.begun()
        receipt = purge.recover()
        assert receipt is not None
        assert not tree.exists()
        assert purge.recover() == receipt  # nobody has told the registry yet
        purge.forget()
        assert purge.recover() is None


@pytest.mark.parametrize("name", ["state", "notes.txt"])
def test_somebodys_folder_that_has_the_name_of_a_purges_is_not_touched(yard: PurgeYard, name: str) -> None:
    yard.aside.mkdir(mode=0o755)
    (yard.aside / name).write_text("mine")
    for step in (yard.purge, lambda: recovered(yard)):
        with pytest.raises(PathNotAllowed, match="move it away"):
            step()
    assert content(yard.aside) == {name: b"mine"}
    assert yard.aside.stat().st_mode & 0o777 == 0o755
    assert (yard.ws / "a.txt").exists()


def recovered(yard: PurgeYard) -> None:
    with yard.opened() as purge:
        purge.recover()


def test_a_deletion_of_what_its_own_ignore_file_leaves_out_is_finished_wherever_it_was_killed(
    yard: PurgeYard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ignore file is left out too, so it goes with what no capture holds: but last, or nobody knows what was left out."""
    (yard.ws / ".mothballignore").write_text("*.log\n.mothballignore\n")
    for name in ("!first.log", "z.log", "sub/x.log"):
        (yard.ws / name).write_text("x")
    yard.taken()

    class Killed(BaseException):
        pass

    real = removal._Removal._one

    def one(self: removal._Removal, item: Item) -> None:
        real(self, item)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(removal._Removal, "_one", one)
        with pytest.raises(Killed):
            yard.purge()
        for _ in range(len(whole := os.listdir(yard.aside / "tree"))):
            with yard.opened() as purge, pytest.raises(Killed):
                purge.recover()
    assert len(os.listdir(yard.aside / "tree")) < len(whole)
    with yard.opened() as purge:
        assert purge.recover() is not None
        purge.forget()
    assert os.listdir(yard.root) == []


@pytest.mark.parametrize("wrong", [{"workspace": "other"}, {"registration": "r0"}, {"inode": 1}])
def test_what_another_purge_left_there_is_not_this_ones_to_delete(yard: PurgeYard, wrong: dict[str, object]) -> None:
    left(yard, "deleting")
    with yard.opened() as purge, open_aside(purge.place, make=False) as hidden:
        assert hidden is not None
        state = hidden.state()
        assert state is not None
        values = {name: getattr(state, name) for name in state.__struct_fields__}
        hidden.say(State(**{**values, **wrong}))
    with yard.opened() as purge, pytest.raises(OperationFailed, match="nothing more is known"):
        purge.recover()
    assert (yard.aside / "tree" / "a.txt").exists()


@pytest.mark.parametrize("moved", [False, True])
def test_a_full_disk_leaves_the_directory_where_it_is(yard: PurgeYard, monkeypatch: pytest.MonkeyPatch, moved: bool) -> None:
    real = os.fsync

    def full(fd: int) -> None:
        if (yard.aside / "state.new").exists() and (yard.aside / "tree").exists() == moved:
            raise OSError(28, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(aside.os, "fsync", full)
        with pytest.raises(NoSpace, match="nothing was deleted"):
            yard.purge()
    assert os.listdir(yard.root) == ["ws"]
    assert (yard.ws / "a.txt").exists()
    assert yard.purge().directory == "deleted"


def test_a_state_that_cannot_be_read_deletes_nothing(yard: PurgeYard) -> None:
    left(yard, "deleting")
    for text in (b"", b"{", b'{"stage": "deleting"}', b"\xff" * 100, b'{"stage": "gone", "workspace": "ws"}'):
        (yard.aside / "state").write_bytes(text)
        with yard.opened() as purge, pytest.raises(MothballError, match="nothing more is known"):
            purge.recover()
        assert (yard.aside / "tree" / "a.txt").exists()
