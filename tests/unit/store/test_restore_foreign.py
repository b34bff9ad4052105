"""Deleting what is foreign never deletes what a capture left out, by its list or by its rules, nor what is mounted there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mothball.errors import AlreadyExists, Corrupt
from mothball.settings import Settings
from mothball.store.left_out import CACHE_SIGNATURE
from mothball.store.manifest import MEDIA_CONFIG, Descriptor, build_config, build_manifest, load_config, load_manifest
from tests.support import not_permitted
from tests.unit.capture.harness import Yard, settle
from tests.unit.store.build import File, capture, layer
from tests.unit.store.restoring import bring_back, contents

MAKE = Callable[..., Yard]


@pytest.fixture
def make_yard(tmp_path: Path, make_settings: Callable[..., Settings]) -> MAKE:
    (tmp_path / "yard").mkdir()

    def make(**settings: object) -> Yard:
        return Yard(tmp_path, make_settings(workspace_roots=(tmp_path / "yard",), fsync=False, **settings))

    return make


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def clean(yard: Yard, digest: str, target: Path, **options: object) -> set[str]:
    """Restore and delete what is foreign; what was deleted."""
    result = bring_back(yard.store, digest, target, overwrite="changed", delete_extra=True, **options)
    gone = {action.path for action in result.actions if action.action == "delete"}
    assert result.deleted == len(gone)
    return gone


@contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    done = subprocess.run(["mount", "--bind", str(source), str(target)], capture_output=True, check=False)
    if done.returncode:
        not_permitted("mount a folder at another place")
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_what_the_rules_leave_out_is_spared_though_it_was_made_after_the_capture(make_yard: MAKE) -> None:
    yard = make_yard(use_gitignore=True)
    ws = yard.folder()
    write(ws, **{".gitignore": ".env\n/out/\n!keep.tmp\n", ".mothballignore": "*.log\n", "sub/.gitignore": "*.tmp\n", "sub/a": "a"})
    digest = yard.capture(options={"ignore": ["given*"]}).digest
    write(ws, **{".env": "SECRET", "out/b/c": "x", "sub/x.log": "x", "sub/t.tmp": "x", "sub/keep.tmp": "x", "given-1": "x"})
    write(ws, **{"new/deep/y.log": "x", "new/deep/z": "x", "t.tmp": "x", "extra": "x", ".env.old": "x", "sub/out/f": "x"})
    assert clean(yard, digest, ws, dry_run=True) == clean(yard, digest, ws)
    left = {path for path, text in contents(ws).items() if text != "/"}
    assert left == {
        ".gitignore", ".mothballignore", "sub/.gitignore", "sub/a",
        ".env", "out/b/c", "sub/x.log", "sub/t.tmp", "sub/keep.tmp", "given-1", "new/deep/y.log",
    }  # fmt: skip


def test_an_ignore_file_that_ignores_itself_still_rules(make_yard: MAKE) -> None:
    """As tools write into the folders of their caches: it is in no capture, so it is read where it stands."""
    yard = make_yard(use_gitignore=True)
    ws = yard.folder()
    write(ws, **{".venv/.gitignore": "*\n", ".venv/bin/python": "x", "a": "a"})
    digest = yard.capture().digest
    write(ws, **{".venv/lib/new.py": "made later"})
    assert clean(yard, digest, ws) == set()


def test_without_gitignore_its_rules_do_not_count(make_yard: MAKE) -> None:
    yard = make_yard(use_gitignore=False)
    ws = yard.folder()
    write(ws, **{".gitignore": "*.log\n", "a": "a"})
    digest = yard.capture().digest
    write(ws, **{"x.log": "x"})
    assert clean(yard, digest, ws) == {"x.log"}


def test_a_cache_is_not_entered_neither_the_old_nor_the_new(make_yard: MAKE) -> None:
    yard = make_yard(exclude_caches=True)
    ws = yard.folder()
    tag = CACHE_SIGNATURE.decode() + "\n"
    write(ws, **{"c/CACHEDIR.TAG": tag, "c/d/x": "keep", "later/a": "a"})
    digest = yard.capture().digest
    write(ws, **{"later/CACHEDIR.TAG": tag, "later/b": "x", "new/CACHEDIR.TAG": tag, "new/b": "x", "c/d/y": "x"})
    write(ws, **{"no/CACHEDIR.TAG": "not the signature", "no/b": "x"})
    assert clean(yard, digest, ws) == {"no/CACHEDIR.TAG", "no/b", "no"}


def test_what_no_capture_holds_and_what_is_too_large_is_not_foreign(make_yard: MAKE) -> None:
    yard = make_yard(max_file_bytes=1000)
    ws = yard.folder()
    write(ws, a="a")
    digest = yard.capture().digest
    write(ws, **{"big": "x" * 1001, "small": "x" * 1000, ".wh.name": "x", "d/big": "x" * 1001})
    os.mkfifo(ws / "fifo")
    assert clean(yard, digest, ws) == {"small"}


def test_a_capture_that_found_no_change_names_what_is_left_out_today(make_yard: MAKE) -> None:
    """Only the rules changed: same layers and generation, and the list under the ref is that of the last capture."""
    yard = make_yard()
    ws = yard.folder()
    write(ws, **{"sub/a": "a"})
    settle(ws)
    first = yard.capture()
    times = (ws / "sub").stat()
    write(ws, **{"sub/precious.log": "mine"})
    os.utime(ws / "sub", ns=(times.st_atime_ns, times.st_mtime_ns))
    options = {"ignore": ["*.log"]}
    second = yard.capture(options=options)
    assert (second.changed, second.generation, second.layers) == (False, first.generation, first.layers)
    assert second.digest != first.digest
    layers = [load_manifest(yard.store.blobs, each.digest).layers for each in (first, second)]
    assert layers[0] == layers[1]
    ref = yard.store.refs("ws").get()
    assert (ref.digest, ref.generation) == (second.digest, first.generation)
    assert clean(yard, second.digest, ws) == set()
    # From now on nothing is new, whatever the size of what is left out; and the next generation builds on it.
    write(ws, **{"sub/precious.log": "mine, and longer"})
    os.utime(ws / "sub", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert yard.capture(options=options).digest == second.digest
    write(ws, **{"sub/b": "b"})
    third = yard.capture(options=options)
    assert (third.parent, third.generation, third.added) == (second.digest, 2, 1)


def test_a_bind_mount_below_the_target_is_never_emptied(make_yard: MAKE, tmp_path: Path) -> None:
    yard = make_yard()
    ws = yard.folder()
    write(ws, **{"a": "a", "d/b": "b", "f": "file"})
    digest = yard.capture().digest
    target, outside = tmp_path / "target", tmp_path / "outside"
    write(outside, precious="mine")
    for name in ("foreign/here", "d", "f"):  # below what is foreign, a folder of the capture, and where it has a file
        (target / name).mkdir(parents=True)
    with bound(outside, target / "foreign/here"), bound(outside, target / "d"):
        (target / "f").rmdir()
        assert clean(yard, digest, target) == set()
        assert contents(outside) == {"precious": "mine", "b": "b"}
        (target / "f").unlink()
        (target / "f").mkdir()
        with bound(outside, target / "f"), pytest.raises(AlreadyExists):
            clean(yard, digest, target)
    assert contents(outside) == {"precious": "mine", "b": "b"}


@pytest.mark.parametrize("bad", ["[]", '{"ignore": 1}', '{"ignore": "' + "x" * 100, '{"max_file_bytes": "1"}'])
def test_rules_that_cannot_be_read_delete_nothing(make_yard: MAKE, tmp_path: Path, bad: str) -> None:
    yard = make_yard()
    yard.store.prepare()
    digest = capture(yard.store, layer({b"a": File(b"a")}))
    manifest = load_manifest(yard.store.blobs, digest)
    config = build_config(
        diff_ids=load_config(yard.store.blobs, manifest)["rootfs"]["diff_ids"], labels={"dev.mothball.rules": bad}
    )
    named, _ = yard.store.blobs.put(config)
    document = build_manifest(config=Descriptor(MEDIA_CONFIG, named, len(config)), layers=manifest.layers, annotations={})
    write(tmp_path / "t", extra="x")
    with pytest.raises(Corrupt, match="rules of what was left out"):
        clean(yard, yard.store.blobs.put(document)[0], tmp_path / "t")
    assert contents(tmp_path / "t") == {"extra": "x"}


def test_the_rules_are_recorded_and_names_that_are_no_text_widen_them(make_yard: MAKE) -> None:
    yard = make_yard(use_gitignore=True)
    ws = yard.folder()
    write(ws, a="a")
    odd = os.fsdecode(b"\xff*")
    digest = yard.capture(options={"ignore": ["x y", odd, "!" + odd], "profile": "light"}).digest
    labels = load_config(yard.store.blobs, load_manifest(yard.store.blobs, digest))["config"]["Labels"]
    rules = json.loads(labels["dev.mothball.rules"])
    assert rules == {"ignore": ["x y", "?*"], "gitignore": True, "caches": False, "max_file_bytes": 1_048_576}
    Path(os.fsdecode(os.fsencode(ws) + b"/\xffname")).write_text("left out")
    assert clean(yard, digest, ws) == set()


def test_what_is_deleted_to_make_way_is_counted(make_yard: MAKE, tmp_path: Path) -> None:
    yard = make_yard()
    write(yard.folder(), a="file")
    digest = yard.capture().digest
    write(tmp_path / "t", **{"a/1": "x", "a/2": "x"})
    assert clean(yard, digest, tmp_path / "t", dry_run=True) == {"a", "a/1", "a/2"} == clean(yard, digest, tmp_path / "t")


def test_a_foreign_folder_with_much_that_stays_loses_only_the_rest(make_yard: MAKE, tmp_path: Path) -> None:
    yard = make_yard()
    write(yard.folder(), **{"a": "a", ".mothballignore": "*.log\n"})
    digest = yard.capture().digest
    for number in range(300):
        write(tmp_path / "t", **{f"d/{number}.log": "", f"d/{number}": ""})
    assert len(clean(yard, digest, tmp_path / "t")) == 300
