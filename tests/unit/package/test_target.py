"""Where exports are written: never into a store, and nothing stays of one that was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from mothball.errors import PathNotAllowed
from mothball.package.layout import export_archive, export_layout
from mothball.package.target import new_file, new_folder
from mothball.store import Store
from tests.unit.store.build import File, capture, layer, new_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def begin_and_die(place: Path, store: Path) -> None:
    with new_file(place, store) as out:
        out.write(b"begun")
        out.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def killed(place: Path, store: Path) -> list[Path]:
    """What an export of `place` leaves when it is killed."""
    process = multiprocessing.get_context("fork").Process(target=begin_and_die, args=(place, store))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    return sorted(place.parent.glob(".*mothball-export-*"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_what_a_killed_export_left_goes_with_the_next_of_its_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert len(killed(out / "a.tar", tmp_path / "store")) == 1
    assert len(killed(out / "b.tar", tmp_path / "store")) == 2
    (out / ".a.tar.mothball-export-other").mkdir()
    with new_folder(out / "a.tar", tmp_path / "store") as folder:
        (folder / "x").write_text("x")
        (mine,) = out.glob(".a.tar.mothball-export-????????????????")
        with new_file(out / "a.tar", tmp_path / "store") as second:
            second.write(b"y")
            assert len(list(out.glob(".a.tar.mothball-export-????????????????"))) == 2, "a live export was taken for a dead one"
        assert mine.exists()
        (out / "a.tar").unlink()
    assert sorted(path.name for path in out.iterdir() if path.name.startswith((".a", "a"))) == [
        ".a.tar.mothball-export-other",
        "a.tar",
    ]
    assert len(list(out.glob(".b.tar.*"))) == 1, "that of another name was touched"


def test_the_longest_name_can_be_exported(tmp_path: Path) -> None:
    place = tmp_path / ("n" * 255)
    with new_file(place, tmp_path / "store") as out:
        out.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


@pytest.mark.parametrize("place", ["x", "tmp/x", "blobs/sha256/x", "workspaces/x"])
def test_an_export_into_the_store_is_refused(store: Store, tmp_path: Path, place: str) -> None:
    digest = capture(store, layer({b"a": File(b"a")}))
    (tmp_path / "link").symlink_to(store.root)
    before = sorted(store.root.rglob("*"))
    for root in (store.root, tmp_path / "link", store.root / "tmp" / ".."):
        for export in (export_layout, export_archive):
            with pytest.raises(PathNotAllowed, match="inside the store"):
                export(store, digest, root / place)
        with pytest.raises(PathNotAllowed), new_file(root / place, store.root):
            pass
    assert sorted(store.root.rglob("*")) == before
    export_layout(store, digest, store.root.parent / "beside")
