"""Restoring into a new directory: everything comes back, a run that was ended goes on, and nothing wrong is ever published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import (
    AlreadyExists,
    Busy,
    Cancelled,
    Corrupt,
    InvalidParams,
    NoSpace,
    NotFound,
    OperationFailed,
    PathNotAllowed,
)
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.restore import bounded, discard
from mothball.store.restore_target import open_sibling, open_target
from mothball.store.tree import Tree
from tests.support import not_permitted
from tests.unit.capture.harness import Yard, settle
from tests.unit.store.build import Dir, File, Hard, Link, capture, damage, layer, new_store, pack
from tests.unit.store.restoring import AS_ROOT, bring_back, contents, facts, leftovers, rich_tree

MANY = {b"d%d/f%02d" % (number % 5, number): File(b"content %d" % number * 40) for number in range(60)} | {
    b"d%d" % number: Dir() for number in range(5)
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


@pytest.fixture
def yard(tmp_path: Path, make_settings: Callable[..., Settings]) -> Yard:
    root = tmp_path / "yard"
    root.mkdir()
    return Yard(tmp_path, make_settings(workspace_roots=(root,), frame_bytes=64 * 1024, fsync=False))


def stop_after(calls: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[str, dict[str, Any]], None]:
    """A progress function that ends the restore at its `calls`-th call of the step ``write``."""
    left = [calls]

    def progress(step: str, _counts: dict[str, Any]) -> None:
        if step == "write":
            left[0] -= 1
            if not left[0]:
                raise error("ended by the test")

    return progress


# -- everything comes back ---------------------------------------------------------------------------------------------------


def test_a_tree_comes_back_as_it_was_bit_for_bit(yard: Yard, tmp_path: Path) -> None:
    rich_tree(yard.folder())
    settle(yard.folder())
    got = yard.capture()
    result = bring_back(yard.store, got.digest, tmp_path / "back")
    assert facts(tmp_path / "back") == facts(yard.folder())
    assert (tmp_path / "back" / "again").stat().st_ino == (tmp_path / "back" / "src" / "main.py").stat().st_ino
    assert (tmp_path / "back" / "sparse").stat().st_blocks * 512 < 500_000  # holes are holes
    assert (result.files, result.written) == (got.files, len(facts(tmp_path / "back")))
    assert result.owner_skipped == 0
    assert leftovers(tmp_path) == []


def test_each_of_many_generations_comes_back(yard: Yard, tmp_path: Path) -> None:
    root = yard.folder()
    rich_tree(root)
    expected = []
    for number in range(5):
        (root / f"new-{number}").write_text(str(number))
        (root / "src" / "main.py").write_text(f"version {number}")
        if number == 1:
            (root / "link").unlink()
            (root / "link").mkdir()
            (root / "link" / "inside").write_text("now a folder")
        if number == 2:
            (root / "again").unlink()  # one name of three
            (root / "src" / "tool").unlink()
        if number == 3:
            (root / "src" / "main.py").unlink()
            (root / "src" / "main.py").write_text("its own file now")
        settle(root, when_ns=1_500_000_000_000_000_000 + number)
        expected.append((yard.capture().digest, facts(root)))
    for number, (digest, before) in enumerate(expected):
        bring_back(yard.store, digest, tmp_path / f"back-{number}")
        assert facts(tmp_path / f"back-{number}") == before, number


def test_a_further_name_whose_first_is_gone_is_a_file_and_its_peers_link_to_it(store: Store, tmp_path: Path) -> None:
    below = layer({b"a": File(b"one"), b"b": Hard(b"a"), b"c": Hard(b"a")})
    digest = capture(store, below, layer({b"a": File(b"other")}))
    bring_back(store, digest, tmp_path / "back")
    assert contents(tmp_path / "back") == {"a": "other", "b": "one", "c": "one"}
    assert (tmp_path / "back" / "b").stat().st_ino == (tmp_path / "back" / "c").stat().st_ino
    assert (tmp_path / "back" / "a").stat().st_nlink == 1


def test_an_empty_target_is_filled_and_a_deep_tree_needs_no_deep_stack(store: Store, tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    deep = [b"/".join([b"d"] * depth) for depth in range(1, 700)]
    digest = capture(store, layer({path: Dir() for path in deep} | {deep[-1] + b"/f": File(b"down here")}))
    assert bring_back(store, digest, tmp_path / "back").folders == 700
    fd = os.open(tmp_path / "back", os.O_RDONLY)
    for _ in range(699):
        fd, before = os.open("d", os.O_RDONLY, dir_fd=fd), fd
        os.close(before)
    assert os.listdir(fd) == ["f"]
    os.close(fd)
    with pytest.raises(Cancelled):
        bring_back(store, digest, tmp_path / "other", progress=stop_after(3, lambda _text: Cancelled(job="j")))  # type: ignore[arg-type]
    assert leftovers(tmp_path) == []  # also what is 700 folders deep


# -- choosing ----------------------------------------------------------------------------------------------------------------

CHOICE = {
    b"src": Dir(), b"src/a.py": File(b"a"), b"src/a.pyc": File(b"x"), b"src/lib": Dir(), b"src/lib/b.py": File(b"b"),
    b"doc": Dir(), b"doc/index.md": File(b"m"), b"doc/src": Dir(), b"doc/src/n.txt": File(b"n"), b"!odd": File(b"!"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "files"),
    [
        (["*.py"], {"src/a.py", "src/lib/b.py"}),
        (["src/"], {"src/a.py", "src/a.pyc", "src/lib/b.py", "doc/src/n.txt"}),
        (["/src"], {"src/a.py", "src/a.pyc", "src/lib/b.py"}),
        (["src/*.py"], {"src/a.py"}),
        (["doc/**", "src/lib/b.py"], {"doc/index.md", "doc/src/n.txt", "src/lib/b.py"}),
        (["\\!odd"], {"!odd"}),
    ],
)
def test_patterns_choose_as_those_of_gitignore_do(store: Store, tmp_path: Path, patterns: list[str], files: set[str]) -> None:
    result = bring_back(store, capture(store, layer(CHOICE)), tmp_path / "back", include=patterns)
    found = contents(tmp_path / "back")
    assert {name for name, text in found.items() if text != "/"} == files
    assert result.files == len(files)
    wanted = {name.rpartition("/")[0] for name in files if "/" in name}
    assert {name for name, text in found.items() if text == "/"} <= wanted | {each.partition("/")[0] for each in wanted}


@pytest.mark.parametrize("pattern", ["!src", "", "/", "../x", "a/../b", "[", "x\0y", "\ud800"])
def test_a_pattern_that_cannot_be_meant_is_refused(store: Store, tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InvalidParams):
        bring_back(store, capture(store, layer(CHOICE)), tmp_path / "back", include=[pattern])
    assert not (tmp_path / "back").exists()


def test_a_pattern_that_matches_nothing_is_named_and_nothing_is_made(store: Store, tmp_path: Path) -> None:
    """One of several as well: whoever mistyped it must not believe that all came back."""
    digest = capture(store, layer(CHOICE))
    with pytest.raises(NotFound, match=r"include pattern '\*\.rs'; nothing"):
        bring_back(store, digest, tmp_path / "back", include=["*.py", "*.rs"])
    assert leftovers(tmp_path) == [] and not (tmp_path / "back").exists()


def test_a_pattern_below_a_chosen_folder_matches_too(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer({b"d": Dir(), b"d/a": File(b"x"), b"d/b": File(b"y")}))
    bring_back(store, digest, tmp_path / "back", include=["d/", "/d/a"])
    assert contents(tmp_path / "back") == {"d": "/", "d/a": "x", "d/b": "y"}


def test_chosen_names_of_one_file_stay_one_file(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer({b"a": File(b"one"), b"d": Dir(), b"d/b": Hard(b"a"), b"d/c": Hard(b"a")}))
    bring_back(store, digest, tmp_path / "back", include=["d"])
    assert (tmp_path / "back" / "d" / "b").stat().st_ino == (tmp_path / "back" / "d" / "c").stat().st_ino
    assert not (tmp_path / "back" / "a").exists()


# -- where to ----------------------------------------------------------------------------------------------------------------


def test_targets_that_are_refused(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer({b"f": File(b"x")}))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("full")
    (tmp_path / "dangling").symlink_to("nowhere")
    cases: list[tuple[str, type[Exception], str]] = [
        ("file", AlreadyExists, "no folder"),
        ("full", AlreadyExists, "overwrite"),
        ("link", PathNotAllowed, "symbolic link"),
        ("dangling", PathNotAllowed, "symbolic link"),
        ("absent/below", OperationFailed, "make it first"),
        ("file/below", OperationFailed, "cannot be opened"),
        ("store/blobs/x", PathNotAllowed, "store"),
        ("full/..", InvalidParams, "name"),
    ]
    for name, kind, text in cases:
        for dry_run in (False, True):
            with pytest.raises(kind, match=text):
                bring_back(store, digest, tmp_path / name, dry_run=dry_run)
    assert AlreadyExists.exit_code == 73
    assert contents(tmp_path / "full") == {"mine": "mine"}
    assert leftovers(tmp_path) == []


def test_with_roots_nothing_outside_and_no_link_on_the_way(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer({b"f": File(b"x")}))
    roots = (tmp_path / "allowed",)
    (tmp_path / "allowed" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "allowed" / "way").symlink_to("../elsewhere")
    for path in (tmp_path / "elsewhere" / "t", tmp_path / "allowed", Path("relative"), tmp_path / "allowed" / "way" / "t"):
        with pytest.raises((PathNotAllowed, InvalidParams)):
            bring_back(store, digest, path, roots=roots)
    with pytest.raises(InvalidParams, match=r"\.\."):
        bring_back(store, digest, tmp_path / "allowed" / ".." / "elsewhere" / "t", roots=roots)
    assert os.listdir(tmp_path / "elsewhere") == []
    bring_back(store, digest, tmp_path / "allowed" / "real" / "t", roots=roots)
    assert contents(tmp_path / "allowed" / "real" / "t") == {"f": "x"}


def test_a_dry_run_of_a_new_target_writes_nothing(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer(CHOICE))
    before = facts(tmp_path)
    result = bring_back(store, digest, tmp_path / "back", dry_run=True, include=["*.py"])
    assert facts(tmp_path) == before
    assert [(each.action, each.path) for each in result.actions if each.path.endswith("py")] == [
        ("write", "src/a.py"), ("write", "src/lib/b.py"),
    ]  # fmt: skip
    assert result.dry_run


@pytest.mark.parametrize("options", [{}, {"overwrite": "never"}, {"overwrite": "changed", "delete_extra": True, "dry_run": True}])
def test_a_folder_that_holds_the_store_is_refused_by_whatever_name(store: Store, tmp_path: Path, options: dict[str, Any]) -> None:
    """Deleting what is foreign there would delete every capture, the one that is restored too."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    store.root.rename(home / "data" / "store")
    moved = Store(home / "data" / "store", fsync=False)
    digest = capture(moved, layer({b"a": File(b"a")}))
    (tmp_path / "alias").symlink_to(tmp_path)
    for target in (home, home / "data", tmp_path / "alias" / "home"):
        with pytest.raises(PathNotAllowed, match="holds the store"):
            bring_back(moved, digest, target, **options)
    assert sorted(os.listdir(home)) == ["data"]
    bring_back(moved, digest, home / "beside")


def test_a_bind_mount_of_the_store_is_the_store(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer({b"a": File(b"a")}))
    (tmp_path / "bound").mkdir()
    done = subprocess.run(["mount", "--bind", str(store.root), str(tmp_path / "bound")], capture_output=True, check=False)
    if done.returncode:
        not_permitted("mount a folder at another place")
    try:
        with pytest.raises(PathNotAllowed, match="lies in the store"):
            bring_back(store, digest, tmp_path / "bound" / "workspaces" / "x")
    finally:
        subprocess.run(["umount", str(tmp_path / "bound")], check=True)


# -- going on ----------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_ended_is_continued_and_what_is_wrong_is_written_anew(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer(MANY, frame_bytes=4096))
    target = tmp_path / "back"
    with pytest.raises(KeyboardInterrupt):
        bring_back(store, digest, target, progress=stop_after(5))
    assert not target.exists()
    tree = tmp_path / ".back.mothball-restore" / "tree"
    written = sorted(path for path in tree.rglob("f*") if path.is_file())
    assert 0 < len(written) < 60
    written[0].write_bytes(written[0].read_bytes()[:-1] + b"?")  # as a power cut leaves it
    (tree / "d1" / ".mothball-restore-").write_text("of a run that was killed between write and rename")
    result = bring_back(store, digest, target)
    assert result.resumed
    assert result.unchanged >= len(written) - 1
    assert result.written >= 60 - len(written) + 1
    assert {os.fsencode(name): text.encode() for name, text in contents(target).items() if text != "/"} == {
        path: item.content for path, item in MANY.items() if isinstance(item, File)
    }
    assert leftovers(tmp_path) == []


def test_what_waits_of_another_capture_is_neither_mixed_nor_thrown_away(store: Store, tmp_path: Path) -> None:
    one, two = capture(store, layer(MANY, frame_bytes=4096)), capture(store, layer({b"f": File(b"two")}))
    with pytest.raises(KeyboardInterrupt):
        bring_back(store, one, tmp_path / "back", progress=stop_after(5), by="job-1")
    with pytest.raises(Busy, match="unfinished restore of capture sha256") as caught:
        bring_back(store, two, tmp_path / "back")
    assert str(tmp_path / ".back.mothball-restore") in caught.value.message
    with pytest.raises(Busy, match="other include patterns"):
        bring_back(store, one, tmp_path / "back", include=["d1"])
    assert not discard(tmp_path / "back", store=store.root, by="job-2")
    assert bring_back(store, one, tmp_path / "back").resumed


def test_two_runs_for_one_target_meet(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer(MANY))
    with open_target(tmp_path / "back", None, store.root) as target, open_sibling(target), pytest.raises(Busy, match="another"):
        bring_back(store, digest, tmp_path / "back")
    bring_back(store, digest, tmp_path / "back")


def test_a_run_that_was_killed_after_the_rename_is_finished_by_the_next(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer({b"": Dir(mode=0o750, mtime=10**18), b"f": File(b"x")}))
    target = tmp_path / "back"
    bring_back(store, digest, target)
    target.chmod(0o700)
    there = target.stat()
    left = tmp_path / ".back.mothball-restore"
    left.mkdir()
    state = {"version": 1, "digest": digest, "include": [], "inode": [there.st_dev, there.st_ino]}
    (left / "state").write_text(json.dumps(state))
    result = bring_back(store, digest, target)
    assert (result.resumed, result.written, target.stat().st_mode & 0o777, target.stat().st_mtime_ns) == (True, 0, 0o750, 10**18)
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not AS_ROOT, reason="only root may give a folder away")
def test_a_folder_of_somebody_else_with_the_name_is_not_used(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer({b"f": File(b"x")}))
    planted = tmp_path / ".back.mothball-restore"
    planted.mkdir(mode=0o777)
    os.chown(planted, 12345, 12345)
    with pytest.raises(PathNotAllowed, match="another user"):
        bring_back(store, digest, tmp_path / "back")
    planted.rmdir()
    planted.symlink_to(tmp_path)
    with pytest.raises(PathNotAllowed):
        bring_back(store, digest, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "tree").exists()


def test_a_target_that_appears_meanwhile_is_not_replaced(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer(MANY))

    def meanwhile(step: str, _counts: dict[str, Any]) -> None:
        if step == "finish":
            (tmp_path / "back").mkdir(exist_ok=True)
            (tmp_path / "back" / "mine").write_text("mine")

    with pytest.raises(AlreadyExists, match="appeared"):
        bring_back(store, digest, tmp_path / "back", progress=meanwhile)
    assert contents(tmp_path / "back") == {"mine": "mine"}
    assert leftovers(tmp_path) == []


# -- what is wrong is never published ----------------------------------------------------------------------------------------


def lying(rows: Callable[[list[Any]], list[Any]]) -> Any:
    """A layer whose table of contents says of its second file (after the root) what `rows` makes of its row."""
    honest = layer({b"a": File(b"A" * 700), b"b": File(b"B" * 700), b"z": File(b"Z" * 3000)}, frame_bytes=1024)
    import zstandard

    tar = b"".join(
        zstandard.ZstdDecompressor().decompress(honest.data[offset : offset + size]) for offset, size, _ in honest.frames
    )
    return pack(tar, [tuple(rows(list(row))) if row[0] in {b"b", b"z"} else row for row in honest.rows], frame_bytes=1024)


@pytest.mark.parametrize(
    "lie",
    [
        lambda row: [*row[:7], b"\1" * 32, *row[8:]],  # another sha256
        lambda row: [*row[:10], row[10] + 1],  # a byte later
        lambda row: [*row[:6], row[6] - 1, *row[7:]],  # a byte shorter
        lambda row: [*row, [[0, 10]]],  # its content is a hole
        lambda row: [*row, [[row[6] - 10, 10]]],
    ],
)
def test_a_table_of_contents_that_lies_restores_nothing(
    store: Store, tmp_path: Path, lie: Callable[[list[Any]], list[Any]]
) -> None:
    for name in (b"b", b"z"):
        digest = capture(store, lying(lambda row, name=name: lie(row) if row[0] == name else row))  # type: ignore[misc]
        with pytest.raises(Corrupt):
            bring_back(store, digest, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        assert leftovers(tmp_path) == []
        # Into a folder with content: whatever is there keeps what it had.
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / os.fsdecode(name)).write_text("old")
        with pytest.raises(Corrupt):
            bring_back(store, digest, tmp_path / "full", overwrite="always")
        assert (tmp_path / "full" / os.fsdecode(name)).read_text() == "old"
        assert leftovers(tmp_path) == []


def test_a_link_row_that_lies_about_its_file_is_not_linked(store: Store, tmp_path: Path) -> None:
    honest = layer({b"a": File(b"A" * 100), b"b": File(b"B" * 100), b"c": Hard(b"a")})
    import zstandard

    tar = b"".join(zstandard.ZstdDecompressor().decompress(honest.data[at : at + size]) for at, size, _ in honest.frames)
    rows = [(*row[:8], b"b", *row[9:]) if row[0] == b"c" else row for row in honest.rows]
    bring_back(store, capture(store, pack(tar, rows)), tmp_path / "back")
    assert contents(tmp_path / "back")["c"] == "A" * 100  # what its own row says, not what `b` has
    assert (tmp_path / "back" / "b").stat().st_nlink == 1


def test_a_damaged_frame_names_the_layer(store: Store, tmp_path: Path) -> None:
    blob = layer(MANY)
    digest = capture(store, blob)
    damage(store, blob.digest, blob.frames[3][0] + 20)
    with pytest.raises(Corrupt, match=blob.digest):
        bring_back(store, digest, tmp_path / "back")
    assert leftovers(tmp_path) == []


def test_a_bomb_is_compared_with_the_free_space_before_anything_is_written(store: Store, tmp_path: Path) -> None:
    """16 MiB of zeros, named by so many rows that no disk holds them: a few kilobytes of table of contents."""
    size = 16 * 1024**2
    disk = os.statvfs(tmp_path)
    count = min(disk.f_bavail * disk.f_frsize // size + 1000, 200_000)
    import hashlib

    sha = hashlib.sha256(bytes(size)).digest()
    rows: list[tuple[Any, ...]] = [(b"", "d", 0o755, 0, 0, 0, 0, b"", b"", 0, 0)]
    rows += [(b"f%07d" % number, "f", 0o644, 0, 0, 0, size, sha, b"", 0, 0) for number in range(count)]
    digest = capture(store, pack(bytes(size), rows, frame_bytes=size))
    with pytest.raises(NoSpace, match="nothing was written"):
        bring_back(store, digest, tmp_path / "back")
    assert leftovers(tmp_path) == []


# -- as an ordinary user -----------------------------------------------------------------------------------------------------

AS_NOBODY = """
import json, os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from mothball.store import Store
from mothball.store.restore import restore
from mothball.store.tree import Tree
runs = [(Tree.open(Store(Path(sys.argv[1])), digest), options) for digest, options in json.loads(sys.argv[2])]
if os.geteuid() == 0:  # only now: interpreter and store may lie where nobody may read
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(json.dumps([restore(tree, Path(sys.argv[3]), **options).to_dict() for tree, options in runs]))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of an ordinary user, where that user gets to."""
    with tempfile.TemporaryDirectory(prefix="mothball-test-", ignore_cleanup_errors=True) as folder:
        if AS_ROOT:
            os.chown(folder, 65534, 65534)
        yield Path(folder)


def as_nobody(store: Store, target: Path, *runs: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Restore captures one after the other as an ordinary user."""
    code = AS_NOBODY.format(root=str(Path(__file__).resolve().parents[3]))
    command = [sys.executable, "-c", code, str(store.root), json.dumps(runs), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_an_ordinary_user_gets_everything_but_owners_and_what_is_read_only_is_no_obstacle(store: Store, place: Path) -> None:
    tree = {
        b"": Dir(mode=0o500), b"shut": Dir(mode=0o500, uid=4242), b"shut/f": File(b"one", mode=0o400),
        b"s": File(b"s", mode=0o6755, uid=4242), b"l": Link(b"shut"), b"dark": Dir(mode=0o000), b"dark/f": File(b"dark"),
    }  # fmt: skip
    one = capture(store, layer(tree))
    two = capture(store, layer({**tree, b"shut/f": File(b"two", mode=0o400), b"dark/f": File(b"darker")}))
    (result,) = as_nobody(store, place / "back", (one, {}))
    assert result["owner_skipped"] > 0
    back = place / "back"
    assert back.stat().st_mode & 0o7777 == 0o500
    assert (back / "s").stat().st_mode & 0o7777 == 0o755  # setuid to somebody else than captured is never made
    changed, again = as_nobody(store, back, (two, {"overwrite": "changed"}), (two, {"overwrite": "changed"}))
    assert changed["written"] == 2
    assert again["written"] == 0
    assert {path: (back / path).stat().st_mode & 0o7777 for path in ("", "shut", "dark", "shut/f")} == {
        "": 0o500, "shut": 0o500, "dark": 0, "shut/f": 0o400,
    }  # fmt: skip
    if AS_ROOT:
        assert (back / "dark" / "f").read_text() == "darker"
        assert (back / "shut" / "f").read_text() == "two"


def test_a_result_for_a_job_is_bounded_and_counts_what_it_leaves_out(store: Store, tmp_path: Path) -> None:
    digest = capture(store, layer({b"x" * 200 + b"%04d" % number: File(b"") for number in range(500)}))
    result = bring_back(store, digest, tmp_path / "back", dry_run=True)
    short = bounded(result)
    assert len(json.dumps(short.to_dict())) < 40_000
    assert len(short.actions) + short.further_actions == len(result.actions) == 501


def test_a_restore_needs_no_more_than_the_open_tree(store: Store, tmp_path: Path) -> None:
    """What a collector takes away meanwhile does not matter: an open blob stays readable."""
    digest = capture(store, layer(MANY))
    with Tree.open(store, digest) as tree:
        for blob in store.blobs.folder.iterdir():
            blob.unlink()
        from mothball.store.restore import restore

        assert restore(tree, tmp_path / "back").files == 60
