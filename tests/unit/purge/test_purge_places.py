"""Where a purge never deletes, and how little somebody gains who swaps things under it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mothball.errors import Busy, InvalidParams, MothballError, OperationFailed, PathNotAllowed
from mothball.purge import removal
from mothball.purge.survey import survey
from mothball.settings import Settings
from tests.support import not_permitted
from tests.unit.purge.conftest import NOW, PurgeYard

TREE = (".ws.mothball-purge", "tree")


def refused(yard: PurgeYard, path: Path | str, match: str, **given: object) -> None:
    with pytest.raises(PathNotAllowed, match=match), yard.opened(path=str(path), **given):
        pytest.fail("it was opened")
    assert (yard.ws / "sub" / "deep" / "c.txt").exists()


def test_only_what_lies_strictly_below_a_root_is_ever_deleted(yard: PurgeYard) -> None:
    refused(yard, yard.root, "not below an allowed root")
    refused(yard, yard.base, "not below an allowed root")
    refused(yard, "/etc", "not below an allowed root")
    for odd in (f"{yard.root}/ws/../ws", "ws", f"{yard.root}/w\0s", ""):
        with pytest.raises(InvalidParams), yard.opened(path=odd):
            pytest.fail("it was opened")


def test_a_root_below_another_root_is_no_workspace(yard: PurgeYard) -> None:
    inner = yard.ws / "sub"
    settings = yard.with_settings(workspace_roots=(yard.root, inner))
    refused(yard, inner, "workspace root", settings=settings)
    refused(yard, yard.ws, "workspace root", settings=settings)
    link = yard.base / "alias"
    link.symlink_to(inner)
    refused(yard, yard.ws, "workspace root", settings=yard.with_settings(workspace_roots=(yard.root, link)))


@pytest.mark.parametrize("inside", ["data", "store", "store_itself"])
def test_the_store_is_never_deleted_whoever_registered_it(yard: PurgeYard, inside: str) -> None:
    data = yard.ws / "sub" / "data"
    settings = yard.with_settings(data_dir=data)
    settings.store_dir.mkdir(parents=True)
    settings.run_dir.mkdir()
    if inside == "data":
        refused(yard, yard.ws, "Mothball's data", settings=settings)
    elif inside == "store":
        (settings.store_dir / "blobs").mkdir()
        refused(yard, settings.store_dir / "blobs", "Mothball's own folder", settings=settings)
        (settings.run_dir / "x").mkdir()
        refused(yard, settings.run_dir / "x", "Mothball's own folder", settings=settings)
    else:
        refused(yard, settings.store_dir, "the store", settings=settings)


def test_a_folder_with_another_registered_workspace_in_it_or_around_it_is_not_deleted(yard: PurgeYard) -> None:
    yard.others = [("far", "/elsewhere"), ("near", str(yard.ws / "sub" / "deep"))]
    refused(yard, yard.ws, "holds workspace 'near'")
    yard.others = [("twin", str(yard.ws))]
    refused(yard, yard.ws, "holds workspace 'twin'")
    yard.others = [("outer", str(yard.ws))]
    refused(yard, yard.ws / "sub", "lies in workspace 'outer'")
    alias = yard.base / "alias"
    alias.symlink_to(yard.ws / "sub")
    yard.others = [("by another name", str(alias))]
    refused(yard, yard.ws, "by another name")
    yard.others = [("beside", str(yard.root / "ws2")), ("gone", str(yard.root / "gone" / "x"))]
    assert yard.purge().directory == "deleted"


def test_the_code_that_runs_and_the_folder_it_runs_in_are_not_deleted(yard: PurgeYard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(yard.ws / "sub")
    refused(yard, yard.ws, "runs in")
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "prefix", str(yard.ws / "sub"))
    refused(yard, yard.ws, "the Python that runs this")
    monkeypatch.undo()
    refused(yard, yard.ws, "runtime commands", settings=yard.with_settings(runtime_commands=str(yard.ws / "sub")))


@pytest.mark.parametrize("where", ["itself", "above"])
def test_a_link_in_the_place_of_the_workspace_or_above_it_is_not_followed(yard: PurgeYard, where: str) -> None:
    victim = yard.base / "victim"
    (victim / "ws").mkdir(parents=True)
    (victim / "ws" / "precious").write_text("x")
    if where == "itself":
        yard.ws.rename(yard.base / "kept")
        yard.ws.symlink_to(victim / "ws")
        with yard.opened() as purge, pytest.raises(PathNotAllowed, match="symbolic link"):
            purge.examine(content=True, now_ms=lambda: NOW)
    else:
        (yard.root / "above").symlink_to(victim)
        with pytest.raises(PathNotAllowed, match="symbolic link"), yard.opened(path=str(yard.root / "above" / "ws")):
            pytest.fail("it was opened")
    assert (victim / "ws" / "precious").exists()


@pytest.mark.parametrize("swapped", ["link", "folder", "file", "nothing"])
def test_what_takes_the_name_between_the_look_and_the_move_is_put_back(yard: PurgeYard, swapped: str) -> None:
    victim = yard.base / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")

    def swap() -> None:
        yard.ws.rename(yard.base / "kept")
        if swapped == "link":
            yard.ws.symlink_to(victim)
        elif swapped == "folder":
            victim.rename(yard.ws)
        elif swapped == "file":
            yard.ws.write_text("precious")

    with pytest.raises((Busy, PathNotAllowed)):
        yard.purge(between=swap, force=True)
    assert os.listdir(yard.root) == ([] if swapped == "nothing" else ["ws"])
    assert (yard.base / "kept" / "sub" / "deep" / "c.txt").exists()
    if swapped in {"link", "folder"}:
        assert (yard.ws / "precious").read_text() == "x"


@contextmanager
def mounted(source: Path, target: Path) -> Iterator[None]:
    if subprocess.run(["mount", "--bind", source, target], check=False, capture_output=True).returncode:
        not_permitted("mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", target], check=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["folder", "ignored folder", "file", "itself", "while it is looked at"])
def test_nothing_is_deleted_through_a_mount_not_even_of_the_same_file_system_and_not_by_force(
    yard: PurgeYard, what: str, force: bool
) -> None:
    victim = yard.base / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    (yard.ws / ".mothballignore").write_text("cache/\n")
    (yard.ws / "cache" / "deep").mkdir(parents=True)
    yard.taken()
    source, target = victim, yard.ws / "sub" / "deep"
    if what == "ignored folder":
        target = yard.ws / "cache" / "deep"
    elif what == "file":
        source, target = victim / "precious", yard.ws / "a.txt"
    elif what == "itself":
        target = yard.ws
    if what == "while it is looked at":
        with pytest.raises(PathNotAllowed, match="mounted"):
            late = mounted(source, target)
            try:
                yard.purge(force=force, between=late.__enter__)
            finally:
                late.__exit__(None, None, None)
    else:
        with mounted(source, target):
            assert any("mounted" in text for text in yard.missing())
            with pytest.raises(PathNotAllowed, match="mount"):
                yard.purge(force=force)
            assert yard.ws.exists()
    assert (victim / "precious").read_text() == "x"
    assert os.listdir(yard.root) == ["ws"]
    assert yard.purge().directory == "deleted"


@pytest.mark.parametrize("use", ["works in it", "folder of it open", "open for writing", "mapped for writing"])
def test_who_could_still_write_keeps_the_directory(yard: PurgeYard, use: str) -> None:
    program = {
        "works in it": f"import os; os.chdir({str(yard.ws / 'sub')!r})",
        "folder of it open": f"import os; keep = os.open({str(yard.ws / 'sub' / 'deep')!r}, os.O_RDONLY)",
        "open for writing": f"keep = open({str(yard.ws / 'a.txt')!r}, 'a')",
        "mapped for writing": f"import ctypes, os; f = os.open({str(yard.ws / 'a.txt')!r}, os.O_RDWR)"
        "; ctypes.CDLL(None).mmap(None, 4096, 3, 1, f, 0); os.close(f)",
    }[use]
    code = f"{program}\nprint('ready', flush=True)\nimport sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with yard.opened() as purge:
            known = purge.examine(content=True, now_ms=lambda: NOW)
        assert known is not None
        assert [gap.reason for gap in known.busy] == ["in_use"]
        with pytest.raises(Busy, match=f"process {process.pid} .* {use}"):
            yard.purge()
        assert (yard.ws / "sub" / "deep" / "c.txt").exists()
        process.communicate()
    assert yard.purge().forced == []


def test_a_process_that_only_reads_does_not_keep_it(yard: PurgeYard) -> None:
    code = f"keep = open({str(yard.ws / 'a.txt')!r}); print('ready', flush=True)\nimport sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/") as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert yard.purge().directory == "deleted"
        process.communicate()


@pytest.mark.parametrize("what", ["file", "folder", "changed", "replaced", "folder replaced"])
def test_what_comes_or_changes_while_it_is_deleted_stays_and_is_named(
    yard: PurgeYard, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Somebody with a way in moves a folder into the tree in the middle of the deletion: nobody looked at that, so it stays."""
    precious = yard.base / "precious"
    precious.mkdir()
    (precious / "work").write_text("x")
    real = removal._Removal.run
    tree = yard.root.joinpath(*TREE)

    def run(self: removal._Removal, items: list[removal.Item]) -> None:
        if any(item.path == b"a.txt" for item in items):
            if what == "file":
                (tree / "sub" / "late").write_text("x")
            elif what == "folder":
                precious.rename(tree / "sub" / "deep" / "moved in")
            elif what == "changed":
                (tree / "sub" / "b.txt").write_text("x")
            elif what == "replaced":
                (precious / "work").rename(tree / "sub" / "b.txt")
            else:
                (tree / "sub").rename(yard.base / "taken out")
                precious.rename(tree / "sub")
        real(self, items)

    monkeypatch.setattr(removal._Removal, "run", run)
    with pytest.raises(OperationFailed, match="completely") as caught:
        yard.purge()
    left = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    expected = {
        "file": {"sub/late"}, "folder": {"sub/deep/moved in/work"}, "changed": {"sub/b.txt"}, "replaced": {"sub/b.txt"},
        "folder replaced": {"sub/work"},
    }[what]  # fmt: skip
    assert left == expected
    assert str(tree) in caught.value.message
    if what == "folder replaced":
        assert (yard.base / "taken out" / "deep" / "c.txt").exists()
    monkeypatch.undo()
    with yard.opened() as purge, pytest.raises(OperationFailed, match="is not what was examined"):
        purge.recover()
    with yard.opened() as purge:
        receipt = purge.recover(force=True)
        assert receipt is not None
        assert receipt.directory == "deleted"
        purge.forget()
    assert os.listdir(yard.root) == []


def test_somebody_elses_file_or_folder_in_the_place_of_the_hidden_one_is_not_touched(yard: PurgeYard) -> None:
    yard.aside.write_text("mine")
    with pytest.raises(PathNotAllowed, match="move it away"):
        yard.purge()
    yard.aside.unlink()
    yard.aside.symlink_to(yard.base)
    with pytest.raises(PathNotAllowed, match="move it away"):
        yard.purge()
    yard.aside.unlink()
    yard.aside.mkdir()
    (yard.aside / "tree").mkdir()
    (yard.aside / "tree" / "precious").write_text("x")
    with yard.opened() as purge, pytest.raises(OperationFailed, match="nothing more is known"):
        purge.recover()
    with pytest.raises(Busy):
        yard.purge()
    assert (yard.aside / "tree" / "precious").exists()
    assert yard.ws.exists()
    if os.geteuid() == 0:
        os.chown(yard.aside, 12345, 12345)
        with yard.opened() as purge, pytest.raises(PathNotAllowed, match="another user"):
            purge.recover()


def test_a_long_name_has_its_hidden_folder_too(yard: PurgeYard) -> None:
    long = yard.root / ("n" * 250)
    yard.ws.rename(long)
    yard.capture(path=long)
    with yard.opened(path=str(long)) as purge:
        known = purge.examine(content=False, now_ms=lambda: NOW)
        assert known is not None
        purge.run(known, force=False, decided=lambda _: None)
        purge.forget()
    assert os.listdir(yard.root) == []


def test_a_survey_follows_no_link_and_finds_every_name(yard: PurgeYard) -> None:
    outside = yard.base / "outside"
    outside.mkdir()
    (outside / "x").write_text("x")
    (yard.ws / "out").symlink_to(outside)
    fd = os.open(yard.ws, os.O_RDONLY)
    try:
        seen = survey(fd, lambda _n, _d: None)
    finally:
        os.close(fd)
    assert {os.fsdecode(item.path) for item in seen.items} == {str(path.relative_to(yard.ws)) for path in yard.ws.rglob("*")}
    assert seen.gaps == []
    yard.taken()
    yard.purge()
    assert (outside / "x").exists()


def test_an_unprivileged_worker_deletes_read_only_folders_of_its_own(make_settings: Callable[..., Settings]) -> None:
    if os.geteuid() != 0:
        not_permitted("become another user")
    with tempfile.TemporaryDirectory() as folder:  # the folders of the test runner are for their owner alone
        base = Path(folder)
        yard = PurgeYard(base, make_settings(workspace_roots=(base / "roots",), data_dir=base / "data"))
        (yard.folder() / "go" / "mod").mkdir(parents=True)
        (yard.ws / "go" / "mod" / "f").write_text("x")
        (yard.ws / "go" / "mod").chmod(0o500)
        yard.taken()
        hidden = yard.ws / "go" / "hidden"
        hidden.mkdir()
        (hidden / "x").write_text("x")
        hidden.chmod(0)
        for path in [base, *base.rglob("*")]:
            os.lchown(path, 1234, 1234)
        yard.settings = yard.with_settings(owner="clamp")
        assert as_user(1234, lambda: "; ".join(yard.missing())) == "go/hidden: cannot be listed: Permission denied"
        (hidden / "x").unlink()
        hidden.rmdir()
        assert as_user(1234, lambda: yard.purge(force=True).directory) == "deleted"
        assert not yard.ws.exists()


def as_user(uid: int, work: Callable[[], str]) -> str:
    """What `work` answers, or the error it raises, in a process of that user."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            answer = work()
        except MothballError as error:
            answer = error.message
        except BaseException as error:
            answer = repr(error)
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        answer = file.read().decode()
    os.waitpid(pid, 0)
    return answer


def test_what_may_not_be_deleted_stays_aside_and_the_next_run_finishes(yard: PurgeYard) -> None:
    (yard.ws / ".mothballignore").write_text("cache/\n")
    (yard.ws / "cache").mkdir()
    stuck = yard.ws / "cache" / "stuck"
    stuck.write_text("x")
    yard.taken()
    if subprocess.run(["chattr", "+i", stuck], check=False, capture_output=True).returncode:
        not_permitted("make a file immutable")
    moved = yard.root.joinpath(*TREE, "cache", "stuck")
    try:
        with pytest.raises(OperationFailed, match="cache/stuck: cannot be deleted"):
            yard.purge()
        assert moved.exists()
        assert (moved.parent.parent / ".mothballignore").exists()
        with yard.opened() as purge, pytest.raises(OperationFailed, match="cache/stuck"):
            purge.recover()
    finally:
        subprocess.run(["chattr", "-i", moved if moved.exists() else stuck], check=True)
    with yard.opened() as purge:
        receipt = purge.recover()
        assert receipt is not None
        assert receipt.omitted == {"ignored": 1}
        purge.forget()
    assert os.listdir(yard.root) == []
