"""Captures: what is stored is what was on disk, generation after generation."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from mothball.capture import CaptureResult
from mothball.errors import Corrupt, InvalidParams, LeaseLost, Oversize, PathNotAllowed, SourceMissing
from mothball.store.manifest import PREFIX, load_config, load_manifest
from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.support import not_permitted
from tests.unit.capture.harness import OLD_NS, Yard, on_disk, settle


def fill(root: Path) -> Path:
    """A small tree with one of everything that a layer can hold."""
    for name in ("src", "src/deep/er", "empty"):
        (root / name).mkdir(parents=True)
    (root / "README").write_text("hello\n")
    (root / "src" / "run.sh").write_text("#!/bin/sh\n")
    (root / "src" / "run.sh").chmod(0o755)
    (root / "src" / "deep" / "er" / "big.bin").write_bytes(os.urandom(300_000))
    (root / "src" / "none").touch()
    (root / "src" / "link").symlink_to("../README")
    (root / "src" / "dangling").symlink_to("/nowhere/at all")
    settle(root)
    return root


def test_b23_b28_first_capture_holds_modes_times_links_and_empty_folders(yard: Yard) -> None:
    root = fill(yard.folder())
    result = yard.capture()
    assert yard.facts(result) == on_disk(root)
    assert (result.generation, result.changed, result.layers, result.omitted) == (1, True, 1, {})
    assert result.files == 4
    assert result.bytes == 300_000 + 6 + 10


def test_an_unchanged_tree_gives_no_layer_no_generation_and_the_same_digest(yard: Yard) -> None:
    fill(yard.folder())
    first = yard.capture()
    before = yard.blob_bytes()
    again = yard.capture()
    assert (again.digest, again.generation, again.changed, again.stored_bytes) == (first.digest, 1, False, 0)
    assert yard.blob_bytes() == before
    assert (again.files, again.bytes) == (first.files, first.bytes)


def test_a_small_edit_gives_a_small_layer_on_top(yard: Yard) -> None:
    root = fill(yard.folder())
    first = yard.capture()
    (root / "README").write_text("changed\n")
    (root / "src" / "none").unlink()
    second = yard.capture()
    assert yard.facts(second) == on_disk(root)
    assert (second.generation, second.layers, second.modified, second.deleted, second.added) == (2, 2, 1, 1, 0)
    assert second.stored_bytes < 8_000 < first.stored_bytes
    assert "src/none" in yard.facts(first), "the generation before must stay readable"


def test_same_tree_same_metadata_gives_the_same_digest_whatever_the_threads(yard: Yard) -> None:
    root = fill(yard.folder("one"))
    subprocess.run(["cp", "-a", str(root), str(yard.root / "two")], check=True)
    one = yard.capture("one")
    two = yard.capture("two", settings=yard.with_settings(capture_threads=7, data_dir=yard.base / "other"))
    assert one.digest == two.digest


def test_same_tree_same_parent_gives_the_same_digest_with_and_without_a_stat_index(yard: Yard) -> None:
    root = fill(yard.folder())
    for number in range(40):
        (root / f"f{number}").write_bytes(os.urandom(5_000))
    settle(root)
    yard.capture()
    subprocess.run(["cp", "-a", str(yard.settings.data_dir), str(yard.base / "copy")], check=True)
    (root / "README").write_text("x")
    settle(root, when_ns=OLD_NS + 5_000_000_000_000)
    with_index = yard.capture()
    for path in (yard.base / "copy" / "store" / "cache").rglob("*.idx"):
        path.unlink()
    without = yard.capture(settings=yard.with_settings(data_dir=yard.base / "copy"))
    assert with_index.digest == without.digest


def test_a_layer_names_the_folders_above_its_changes_as_overlay_unpackers_need(yard: Yard) -> None:
    root = fill(yard.folder())
    (root / "src").chmod(0o2750)
    (root / "large").write_bytes(os.urandom(400_000))
    yard.capture()
    file = root / "src" / "deep" / "er" / "big.bin"
    file.write_bytes(b"small")
    second = yard.capture()
    with Tree.open(yard.store, second.digest) as tree:
        layers = {entry.path: entry.layer for entry in [tree.find(""), *tree.walk()]}
    assert [path for path, layer in layers.items() if layer == 1] == ["", "src", "src/deep", "src/deep/er", "src/deep/er/big.bin"]
    assert yard.facts(second) == on_disk(root)


def test_a_fifo_or_a_link_in_place_of_a_blob_is_corrupt_and_never_waits(yard: Yard) -> None:
    fill(yard.folder())
    digest = yard.capture().digest
    path = yard.store.blobs.path(digest)
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/etc/passwd"), path.mkdir):
        path.rename(path.with_suffix(".good"))
        make()
        with pytest.raises(Corrupt, match="no regular file"):
            yard.store.blobs.read(digest)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.with_suffix(".good").rename(path)


def test_b30_generations_grow_and_are_never_reset(yard: Yard) -> None:
    root = yard.folder()
    seen = []
    for number in range(5):
        (root / "f").write_text(str(number))
        seen.append(yard.capture().generation)
    assert seen == [1, 2, 3, 4, 5]


def test_generation_never_falls_behind_the_record_after_the_store_was_lost(yard: Yard) -> None:
    fill(yard.folder())
    assert yard.capture(generation_floor=7).generation == 8


def test_b22_git_as_a_file_truncates_nothing(yard: Yard) -> None:
    """The reference stopped at a `.git` file: whatever sorted after it was lost and the capture `succeeded`."""
    root = yard.folder()
    (root / ".git").write_text("gitdir: /somewhere/else\n")
    for name in (".a", ".gitattributes", "z", "sub/.git/config", "sub/after"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    result = yard.capture()
    assert set(yard.facts(result)) == {"", ".a", ".gitattributes", "z", "sub", "sub/after"}
    assert {item["path"] for item in result.git} == {"", "sub"} or {item["path"] for item in result.git} == {".", "sub"}


def test_b24_light_profile_keeps_a_file_of_exactly_one_mib_and_lists_a_larger_one(yard: Yard) -> None:
    root = yard.folder()
    (root / "fits").write_bytes(bytes(1_048_576))
    (root / "over").write_bytes(bytes(1_048_577))
    result = yard.capture(options={"profile": "light"})
    assert set(yard.facts(result)) == {"", "fits"}
    assert result.omissions == [{"path": "over", "reason": "too_large", "size": 1_048_577}]
    config = load_config(yard.store.blobs, load_manifest(yard.store.blobs, result.digest))
    assert json.loads(config["config"]["Labels"][PREFIX + "omissions"])["listed"] == result.omissions
    assert set(yard.facts(yard.capture())) == {"", "fits", "over"}, "no cap by default"


@pytest.mark.parametrize("make", ["missing", "file", "symlink"])
def test_b25_a_root_that_is_no_folder_is_an_error_and_keeps_the_last_capture(yard: Yard, make: str) -> None:
    root = fill(yard.folder())
    good = yard.capture()
    root.rename(yard.root / "moved")
    if make == "file":
        root.write_text("x")
    elif make == "symlink":
        root.symlink_to(yard.root / "moved")
    with pytest.raises(PathNotAllowed if make == "symlink" else SourceMissing) as caught:
        yard.capture()
    assert str(root) in caught.value.message
    assert yard.store.refs("ws").get().digest == good.digest


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/etc", PathNotAllowed),
        ("relative", InvalidParams),
        ("/a/../etc", InvalidParams),
        ("/a\0b", InvalidParams),
        ("", InvalidParams),
    ],
)
def test_a_path_outside_the_roots_is_refused_before_anything_is_written(yard: Yard, path: str, error: type[Exception]) -> None:
    from mothball.capture import CaptureRequest, capture_workspace

    with pytest.raises(error):
        capture_workspace(CaptureRequest(workspace="w", path=path, host="h", job="j", fence=1), yard.settings)
    assert not yard.settings.store_dir.exists()


def test_the_allowed_root_itself_is_no_workspace(yard: Yard) -> None:
    with pytest.raises(PathNotAllowed):
        yard.capture(path=yard.root)


def test_a_link_among_the_folders_above_the_workspace_is_refused(yard: Yard) -> None:
    (yard.root / "way").symlink_to("/etc")
    with pytest.raises(PathNotAllowed, match="symbolic link 'way'"):
        yard.capture(path=yard.root / "way" / "ssl")


def test_b26_links_are_stored_not_followed_and_specials_are_never_opened(yard: Yard) -> None:
    root = yard.folder()
    (root / "leak").symlink_to("/etc/passwd")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        os.mknod(root / "sock", stat.S_IFSOCK | 0o600)
        del server
    result = yard.capture()
    assert yard.facts(result)["leak"][0::3] == ("symlink", "/etc/passwd")
    assert yard.omissions(result) == {"fifo": "special", "sock": "special"}
    assert result.omitted == {"special": 2}


def test_b26_a_device_is_an_omission(yard: Yard) -> None:
    root = yard.folder()
    try:
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        not_permitted("make a device")
    assert yard.omissions(yard.capture()) == {"null": "special"}


def test_whiteout_names_are_refused_one_by_one_and_said(yard: Yard) -> None:
    root = yard.folder()
    (root / ".wh.x").write_text("x")
    (root / ".wh.dir").mkdir()
    (root / "x").write_text("kept")
    result = yard.capture()
    assert yard.omissions(result) == {".wh.x": "whiteout_name", ".wh.dir": "whiteout_name"}
    assert "x" in yard.facts(result)


def test_names_that_no_text_can_hold(yard: Yard) -> None:
    """Latin-1 bytes, a newline, 255 bytes under 40 folders."""
    root = yard.folder()
    base = os.fsencode(root)
    for name in (b"caf\xe9", b"line\nbreak", b"tab\t", "日本".encode(), b"\xff" * 200):
        Path(os.fsdecode(os.path.join(base, name))).write_bytes(name)
    deep = root
    for _ in range(40):
        deep = deep / "folder"
    deep.mkdir(parents=True)
    (deep / ("n" * 255)).write_text("deep")
    settle(root)
    result = yard.capture()
    assert yard.facts(result) == on_disk(root)
    assert verify(yard.store, "ws", level="content").problems == []


def test_hard_links_stay_one_file_and_are_stored_once(yard: Yard) -> None:
    root = yard.folder()
    (root / "b").write_bytes(os.urandom(100_000))
    for name in ("a", "z/c"):
        (root / name).parent.mkdir(exist_ok=True)
        os.link(root / "b", root / name)
    first = yard.capture()
    with Tree.open(yard.store, first.digest) as tree:
        kinds = {entry.path: (entry.type, entry.link) for entry in tree.walk()}
    assert kinds == {"a": ("file", None), "b": ("hardlink", "a"), "z": ("dir", None), "z/c": ("hardlink", "a")}
    assert first.bytes == 100_000
    assert first.stored_bytes < 120_000
    (root / "a").unlink()
    second = yard.capture()
    assert yard.facts(second) == on_disk(root)
    (root / "z/c").unlink()
    (root / "z/c").write_text("own now")
    third = yard.capture()
    assert yard.facts(third) == on_disk(root)
    assert verify(yard.store, "ws", level="content").problems == []


def test_a_hard_link_added_later_is_stored_with_its_file(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_text("content")
    yard.capture()
    os.link(root / "f", root / "g")
    second = yard.capture()
    assert yard.facts(second) == on_disk(root)
    assert verify(yard.store, "ws", level="content").problems == []


def test_a_folder_becomes_a_file_and_back(yard: Yard) -> None:
    root = yard.folder()
    (root / "x" / "y").mkdir(parents=True)
    (root / "x" / "y" / "z").write_text("deep")
    yard.capture()
    for round_ in range(2):
        subprocess.run(["rm", "-r", str(root / "x")], check=True)
        (root / "x").write_text("file")
        assert yard.facts(yard.capture()) == on_disk(root), round_
        (root / "x").unlink()
        (root / "x").mkdir()
        (root / "x" / "other").write_text("other")
        assert yard.facts(yard.capture()) == on_disk(root), round_
    assert verify(yard.store, "ws", level="content").problems == []


def test_only_a_moved_mtime_costs_a_row_not_the_content(yard: Yard) -> None:
    root = yard.folder()
    (root / "big").write_bytes(os.urandom(200_000))
    settle(root)
    yard.capture()
    os.utime(root / "big", ns=(OLD_NS, OLD_NS + 99))
    second = yard.capture()
    assert yard.facts(second) == on_disk(root)
    assert second.stored_bytes < 4_000


def test_content_that_changes_behind_an_unchanged_stat_is_found_when_the_producer_names_it(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_text("aaaa")
    settle(root)
    yard.capture()
    st = (root / "f").stat()
    (root / "f").write_text("bbbb")
    os.utime(root / "f", ns=(st.st_atime_ns, st.st_mtime_ns))
    with pytest.raises(InvalidParams, match="not in the workspace"):
        yard.capture(paths=("../f",))
    assert yard.capture(paths=(f"{root}/./f",)).modified == 1


def test_a_file_as_young_as_the_capture_is_always_read_again(yard: Yard) -> None:
    """Same size, same mtime, same inode, within one clock tick: only reading tells."""
    root = yard.folder()
    (root / "f").write_text("aaaa")
    yard.capture()
    stat_before = (root / "f").stat()
    with (root / "f").open("r+") as file:
        file.write("bbbb")
    os.utime(root / "f", ns=(stat_before.st_atime_ns, stat_before.st_mtime_ns))
    assert yard.facts(yard.capture()) == on_disk(root)


def test_more_than_max_layers_are_squashed_into_one(yard: Yard) -> None:
    root = yard.folder()
    for name in range(20):
        (root / f"keep{name}").write_bytes(os.urandom(2_000))
    settings = yard.with_settings(max_layers=3)
    layers, squashed = [], []
    for number in range(7):
        (root / "edit").write_text(str(number))
        result = yard.capture(settings=settings)
        layers.append(result.layers)
        squashed.append(result.squashed)
        assert yard.facts(result) == on_disk(root)
    assert layers == [1, 2, 3, 1, 2, 3, 1]
    assert squashed == [False, False, False, True, False, False, True]


def test_more_dead_than_live_bytes_are_squashed(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_bytes(os.urandom(50_000))
    (root / "g").write_bytes(os.urandom(10_000))
    yard.capture()
    (root / "f").write_bytes(os.urandom(50_000))
    second = yard.capture()
    (root / "f").write_bytes(os.urandom(50_000))
    third = yard.capture()
    assert (second.layers, third.layers, third.squashed) == (2, 1, True)
    assert yard.facts(third) == on_disk(root)


def test_a_clone_of_the_same_repository_costs_almost_nothing(yard: Yard) -> None:
    one = fill(yard.folder("one"))
    first = yard.capture("one")
    subprocess.run(["cp", "-r", "--no-dereference", "--preserve=mode,links", str(one), str(yard.root / "two")], check=True)
    second = yard.capture("two", parent_candidate="one")
    assert yard.facts(second) == on_disk(yard.root / "two"), "its own mtimes, although they differ"
    assert second.stored_bytes < first.stored_bytes / 20
    assert (second.generation, second.layers) == (1, 2)


def test_another_repository_is_no_parent(yard: Yard) -> None:
    fill(yard.folder("one"))
    yard.capture("one")
    (yard.folder("two") / "other").write_bytes(os.urandom(10_000))
    result = yard.capture("two", parent_candidate="one")
    assert (result.layers, result.parent) == (1, None)


def test_a_damaged_parent_leads_to_a_fresh_capture_not_to_a_loss(yard: Yard) -> None:
    root = fill(yard.folder())
    first = yard.capture()
    layer = load_manifest(yard.store.blobs, first.digest).layers[0].digest
    yard.store.blobs.path(layer).unlink()
    second = yard.capture()
    assert yard.facts(second) == on_disk(root)
    assert second.layers == 1
    assert verify(yard.store, "ws", level="content").problems == []


@pytest.mark.parametrize("bad", ["", "../x", "a/../b", "x" * 129, "-dash", "sp ace", None, 7])
def test_b20_a_wrong_workspace_is_one_typed_error_before_anything_is_written(yard: Yard, bad: object) -> None:
    from mothball.capture import CaptureRequest, capture_workspace

    yard.folder()
    request = CaptureRequest(workspace=bad, path=str(yard.root / "ws"), host="h", job="j", fence=1)  # type: ignore[arg-type]  # the point
    with pytest.raises(InvalidParams, match="workspace id"):
        capture_workspace(request, yard.settings)
    assert not yard.settings.store_dir.exists()


def test_b21_the_order_is_that_of_the_names_bytes_and_paths_are_relative_posix_names(yard: Yard) -> None:
    root = yard.folder()
    for name in ("b", "a.txt", "a/z", "a/A", "a-b", "back\\slash", "é"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff")).write_text("x")
    (root / "outside").symlink_to("/etc", target_is_directory=True)
    with Tree.open(yard.store, yard.capture().digest) as tree:
        paths = [entry.path for entry in tree.walk()]
    assert paths == ["a", "a/A", "a/z", "a-b", "a.txt", "b", "back\\slash", "outside", "é", "\udcff"]


def test_b27_budgets_of_the_workspace_are_refused_before_anything_is_written(yard: Yard) -> None:
    root = fill(yard.folder())
    with pytest.raises(Oversize, match="max_total_bytes"):
        yard.capture(options={"max_total_bytes": 100})
    with pytest.raises(Oversize, match="max_files"):
        yard.capture(options={"max_files": 3})
    assert list(yard.store.blobs.folder.iterdir()) == []
    exact = sum(1 for _ in root.rglob("*")) + 1
    assert yard.capture(options={"max_files": exact, "max_total_bytes": 300_016}).generation == 1


def test_unknown_and_wrong_options_are_one_clear_error(yard: Yard) -> None:
    yard.folder()
    for options in ({"profil": "light"}, {"profile": "heavy"}, {"max_files": "many"}, {"max_file_bytes": -1}):
        with pytest.raises(InvalidParams, match="capture options"):
            yard.capture(options=options)


def test_ignore_file_gitignore_and_cache_tags(yard: Yard) -> None:
    root = yard.folder()
    (root / ".mothballignore").write_text("*.log\n!keep.log\nbuild/\n")
    (root / ".gitignore").write_text("*.pyc\n")
    for name in ("a.log", "keep.log", "build/out", "m.pyc", "cache/CACHEDIR.TAG", "cache/blob"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
    result = yard.capture()
    assert yard.omissions(result) == {"a.log": "ignored", "build": "ignored"}
    assert {"m.pyc", "cache/blob", "keep.log", ".mothballignore"} <= set(yard.facts(result))
    result = yard.capture(options={"use_gitignore": True, "exclude_caches": True, "ignore": ["keep.log"]})
    assert yard.omissions(result)["m.pyc"] == "ignored"
    assert {"cache", "cache/CACHEDIR.TAG"} <= set(yard.facts(result))
    assert not {"m.pyc", "cache/blob", "build/out"} & set(yard.facts(result))


def test_thousands_of_long_omitted_names_fit_into_outcome_and_config(yard: Yard) -> None:
    """The outcome lives in Redis (256 KiB at most), the config must pass tools that refuse more than 4 MiB."""
    root = yard.folder()
    deep = root
    for _ in range(9):
        deep = deep / ("d" * 240)
    deep.mkdir(parents=True)
    fd = os.open(deep, os.O_RDONLY)
    for number in range(1_500):
        os.mkfifo(f"{number:04}" + "\udcff" * 240, dir_fd=fd)
    os.close(fd)
    result = yard.capture()
    assert result.omitted == {"special": 1_500}
    assert 5 < len(result.omissions) < 100
    assert len(json.dumps(result.to_dict())) < 128 * 1024
    manifest = load_manifest(yard.store.blobs, result.digest)
    assert manifest.config.size < 2 * 1024**2
    label = json.loads(load_config(yard.store.blobs, manifest)["config"]["Labels"][PREFIX + "omissions"])
    assert len(label["listed"]) + label["further"] == 1_500
    assert len(label["listed"]) > 100


def test_the_store_below_a_workspace_is_not_captured_into_itself(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_text("x")
    settings = yard.with_settings(data_dir=root / ".mothball")
    result = yard.capture(settings=settings)
    assert yard.omissions(result) == {".mothball/store": "ignored"}


def test_clamped_owners_are_written_as_root(yard: Yard) -> None:
    root = fill(yard.folder())
    if os.geteuid() == 0:
        os.chown(root / "README", 1234, 4321)
    owners = []
    for owner in ("captured", "clamp"):
        result = yard.capture(owner, path=root, options={"owner": owner})
        with Tree.open(yard.store, result.digest) as tree:
            entry = tree.find("README")
            owners.append((entry.uid, entry.gid))
    st = (root / "README").stat()
    assert owners == [(st.st_uid, st.st_gid), (0, 0)]


def test_a_stale_fence_cannot_publish(yard: Yard) -> None:
    """A worker paused past its lease wakes up after another has taken over."""
    root = fill(yard.folder())
    other: list[CaptureResult] = []

    def overtaken(name: str, _data: dict[str, object]) -> None:
        if name == "publish" and not other:
            (root / "later").write_text("seen by the second run only")
            other.append(yard.capture(fence=100, job="second"))

    with pytest.raises(LeaseLost):
        yard.capture(fence=99, job="first", checkpoint=overtaken)
    ref = yard.store.refs("ws").get()
    assert (ref.digest, ref.get("job")) == (other[0].digest, "second")
    with pytest.raises(LeaseLost):
        yard.capture(fence=98, job="late")


def test_a_run_that_died_after_publishing_finds_its_own_work(yard: Yard) -> None:
    """Killed between the ref and the record: the next run of the same job reports one generation, as its own."""
    fill(yard.folder())
    first = yard.capture(job="same")
    again = yard.capture(job="same")
    assert (again.generation, again.changed, again.digest) == (1, True, first.digest)
    assert (again.stored_bytes, again.added) == (first.stored_bytes, first.added)


def test_one_file_system_leaves_other_mounts_out(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_text("x")
    other = root / "mnt"
    other.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(other)], check=False, capture_output=True).returncode:
        not_permitted("mount a file system")
    try:
        (other / "g").write_text("y")
        assert yard.omissions(yard.capture("a", path=root)) == {"mnt": "other_filesystem"}
        assert "mnt/g" in yard.facts(yard.capture("b", path=root, options={"one_file_system": False}))
    finally:
        subprocess.run(["umount", str(other)], check=True)
