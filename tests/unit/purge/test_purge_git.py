"""What only a git folder knows is in no capture: it refuses a purge, whatever corner it sits in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mothball.errors import Busy
from mothball.registry import encode
from tests.unit.purge.conftest import NOW, Git, PurgeYard


def missing(yard: PurgeYard) -> str:
    yard.taken()
    return "; ".join(yard.missing())


def test_a_clone_whose_commits_its_remote_has_may_go(yard: PurgeYard, pushed: Git) -> None:
    pushed("tag", "v1")
    pushed("checkout", "-q", "-b", "same")
    (pushed.folder / "f").write_text("dirty, and captured\n")
    (pushed.folder / "untracked").write_text("captured too\n")
    assert missing(yard) == ""
    receipt = yard.purge()
    assert [(each["path"], each["unpushed"], each["stashes"], each["dirty"]) for each in receipt.git] == [("repo", 0, 0, True)]
    assert not yard.ws.exists()


def _detached(git: Git) -> None:
    git("checkout", "-q", "--detach")
    git.commit("g")


def _tag(git: Git) -> None:
    _detached(git)
    git("tag", "wip")
    git("checkout", "-q", "main")


def _packed_tag(git: Git) -> None:
    _tag(git)
    git("pack-refs", "--all")


def _branch(git: Git) -> None:
    git("checkout", "-q", "-b", "work")
    git.commit("g")
    git("checkout", "-q", "main")


def _note(git: Git) -> None:
    git("notes", "add", "-m", "remember")


def _autostash(git: Git) -> None:
    """A rebase that stopped half-way, with changes put aside that no list of stashes names."""
    git.commit("f", "second\n")
    git("checkout", "-q", "-b", "side", "HEAD~1")
    git.commit("f", "another second\n")
    (git.folder / "h").write_text("base\n")
    git("add", "h")
    git("commit", "-qm", "h")
    git("push", "-q", "origin", "main", "side")
    (git.folder / "h").write_text("not committed\n")
    try:
        git("rebase", "--autostash", "main")
    except AssertionError:
        assert (git.folder / ".git" / "rebase-merge" / "autostash").exists()
    else:
        pytest.fail("the rebase did not stop")


def _no_remote(git: Git) -> None:
    git("remote", "remove", "origin")


@pytest.mark.parametrize("how", [_detached, _tag, _packed_tag, _branch, _note, _autostash, _no_remote])
def test_commits_that_no_remote_is_known_to_have_refuse_wherever_they_hang(
    yard: PurgeYard, pushed: Git, how: Callable[[Git], None]
) -> None:
    how(pushed)
    assert "that no remote is known to have" in missing(yard)


def test_stashes_refuse_by_number(yard: PurgeYard, pushed: Git) -> None:
    for number in (1, 2):
        (pushed.folder / "f").write_text(f"{number}\n")
        pushed("stash", "-q")
    assert missing(yard) == "repo: 2 stashes"


@pytest.mark.parametrize("then", ["changed", "deleted", "the same"])
def test_what_is_only_staged_refuses(yard: PurgeYard, pushed: Git, then: str) -> None:
    (pushed.folder / "f").write_text("staged\n")
    (pushed.folder / "new").write_text("staged too\n")
    pushed("add", "f", "new")
    if then == "changed":
        (pushed.folder / "f").write_text("on disk\n")
    elif then == "deleted":
        (pushed.folder / "new").unlink()
    expected = "" if then == "the same" else "repo: 1 staged file is neither committed nor on disk"
    assert missing(yard) == expected


def test_what_is_staged_and_changed_in_different_files_is_all_on_disk(yard: PurgeYard, pushed: Git) -> None:
    pushed.commit("g")
    pushed("push", "-q")
    (pushed.folder / "f").write_text("staged\n")
    pushed("add", "f")
    (pushed.folder / "g").write_text("not staged\n")
    assert missing(yard) == ""


def test_a_working_tree_elsewhere_lives_from_its_repository(yard: PurgeYard, pushed: Git) -> None:
    pushed("worktree", "add", "-q", str(yard.base / "elsewhere"), "-b", "side")
    assert "1 working tree elsewhere" in missing(yard)
    pushed("worktree", "remove", str(yard.base / "elsewhere"))
    assert missing(yard) == ""


def test_a_working_tree_inside_goes_with_its_repository_but_not_its_commits(yard: PurgeYard, pushed: Git) -> None:
    pushed("worktree", "add", "-q", "--detach", str(yard.ws / "side"))
    assert missing(yard) == ""
    inner = Git(yard.ws / "side")
    inner.commit("only here")
    assert "repo: 1 commit that no remote" in missing(yard)


def test_a_workspace_that_is_a_working_tree_leaves_its_commits_where_they_are(yard: PurgeYard, tmp_path: Path) -> None:
    main = Git(yard.base / "main")
    main("init", "-q")
    main.commit()
    main("worktree", "add", "-q", str(yard.ws / "tree"), "-b", "side")
    side = Git(yard.ws / "tree")
    commit = side.commit("g")
    assert missing(yard) == ""
    yard.purge()
    assert main("rev-parse", "side") == commit
    assert main("show", "side:g") == "first"


def test_a_submodule_that_is_not_checked_out_keeps_its_commits(yard: PurgeYard, pushed: Git) -> None:
    library = Git(yard.base / "library")
    library("init", "-q")
    library.commit()
    pushed("submodule", "add", "-q", str(library.folder), "lib")
    pushed("commit", "-qm", "with lib")
    pushed("push", "-q")
    assert missing(yard) == ""
    Git(pushed.folder / "lib").commit("g")
    assert "of the submodule lib" in missing(yard)
    pushed("submodule", "deinit", "-q", "-f", "lib")
    assert "1 commit of the submodule lib that no remote" in missing(yard)


def test_repositories_in_ignored_folders_are_asked_too(yard: PurgeYard, pushed: Git) -> None:
    (yard.ws / ".mothballignore").write_text("repo/\n")
    assert missing(yard) == ""
    pushed.commit("g")
    assert "repo: 1 commit" in missing(yard)


def test_clones_that_name_each_other_as_remotes_hold_nothing_when_both_go(yard: PurgeYard) -> None:
    first = Git(yard.ws / "first")
    first("init", "-q")
    first.commit()
    second = Git(yard.ws / "second")
    second("init", "-q")
    second("remote", "add", "origin", "../first")
    second("fetch", "-q", "origin")
    second("checkout", "-q", "main")
    first("remote", "add", "copy", str(second.folder))
    first("fetch", "-q", "copy")
    found = missing(yard)
    assert "first: 1 commit that no remote" in found
    assert "second: 1 commit that no remote" in found


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_remote_on_this_host_that_is_not_there_any_more_holds_nothing(yard: PurgeYard, pushed: Git, scheme: str) -> None:
    pushed("remote", "set-url", "origin", f"{scheme}{yard.base / 'remote.git'}")
    assert missing(yard) == ""
    (yard.base / "remote.git").rename(yard.base / "elsewhere.git")
    assert "repo: 1 commit that no remote" in missing(yard)


def test_refs_of_a_remote_that_was_never_configured_hold_nothing(yard: PurgeYard, pushed: Git) -> None:
    commit = pushed.commit("g")
    pushed("update-ref", "refs/remotes/mine/main", commit)
    assert "repo: 1 commit that no remote" in missing(yard)


def test_files_of_git_annex_lie_in_the_git_folder_alone(yard: PurgeYard, pushed: Git) -> None:
    content = pushed.folder / ".git" / "annex" / "objects" / "x1" / "SHA256E-s3"
    content.parent.mkdir(parents=True)
    content.write_text("big")
    (pushed.folder / "big.bin").symlink_to(os.path.relpath(content, pushed.folder))
    assert "files of git-annex" in missing(yard)


def test_a_git_folder_apart_that_the_rules_leave_out_refuses_and_a_captured_one_does_not(yard: PurgeYard) -> None:
    (yard.ws / "cache").mkdir()
    git = Git(yard.ws / "repo")
    git("init", "-q", "--separate-git-dir", str(yard.ws / "cache" / "store"))
    git.commit()
    assert missing(yard) == ""
    git.commit()
    with yard.opened() as purge:  # after its capture, so that the next one holds it
        known = purge.examine(content=False, now_ms=lambda: NOW)
    assert known is not None
    assert (known.gaps, known.changed != []) == ([], True)
    (yard.ws / ".mothballignore").write_text("cache/\n")
    assert "repo: its git folder cache/store is left out of captures" in missing(yard)


def test_a_repository_that_somebody_put_into_a_git_folder_is_one_too(yard: PurgeYard, pushed: Git) -> None:
    inner = Git(pushed.folder / ".git" / "inner")
    inner("init", "-q")
    inner.commit()
    assert "repo/.git/inner: 1 commit that no remote" in missing(yard)


def test_a_submodule_that_cannot_be_read_refuses_and_leaves_nothing_open(yard: PurgeYard, pushed: Git) -> None:
    (pushed.folder / ".git" / "modules" / "x").mkdir(parents=True)
    os.mkfifo(pushed.folder / ".git" / "modules" / "x" / "HEAD")
    yard.taken()
    before = len(os.listdir("/proc/self/fd"))
    assert yard.missing() == ["repo: the repository could not be examined: HEAD is not a regular file"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_receipt_of_many_repositories_in_deep_folders_fits_into_a_tombstone(yard: PurgeYard) -> None:
    deep = yard.ws.joinpath(*("d" * 200 for _ in range(5)))
    deep.mkdir(parents=True)
    Git(deep / "r")("init", "-q")
    for number in range(49):
        shutil.copytree(deep / "r", deep / f"r{number}")
    for number in range(40):
        os.mkfifo(deep / f"pipe{number}")
    yard.taken()
    receipt = yard.purge(force=True)
    assert 10 < len(receipt.git) < 50
    assert len(receipt.forced) > 10
    encode.dumps(receipt.to_dict(), "receipt", encode.MAX_DOCUMENT_BYTES)


def _garbage(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "notes.txt").write_text("not git at all")


def _file(folder: Path) -> None:
    (folder / ".git").write_text("not a pointer")


def _link(folder: Path) -> None:
    (folder / ".git").symlink_to("/nowhere")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / ".git")


def _no_objects(folder: Path) -> None:
    git = Git(folder)
    git("init", "-q")
    git.commit()
    (folder / ".git" / "objects").rename(folder / "objects")


def _reftable(folder: Path) -> None:
    Git(folder)("init", "-q")
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/.invalid\n")


@pytest.mark.parametrize("make", [_garbage, _file, _link, _fifo, _no_objects, _reftable])
def test_what_cannot_be_found_out_counts_as_lost(yard: PurgeYard, make: Callable[[Path], None]) -> None:
    make(yard.ws / "sub")
    assert missing(yard).startswith("sub: ")


def test_more_repositories_than_are_examined_refuse(yard: PurgeYard, pushed: Git) -> None:
    for number in range(51):
        (yard.ws / f"r{number:02}").mkdir()
        Git(yard.ws / f"r{number:02}")("init", "-q")
    assert "was not examined: there are more than 50" in missing(yard)


def test_a_guard_that_the_policy_switched_off_asks_nothing(yard: PurgeYard, pushed: Git) -> None:
    pushed.commit("g")
    yard.git_guard = False
    assert missing(yard) == ""
    assert yard.purge().git == []


def test_a_commit_in_the_last_moment_puts_the_directory_back(yard: PurgeYard, pushed: Git) -> None:
    yard.taken()

    def commit() -> None:
        pushed("commit", "-q", "--allow-empty", "-m", "late")

    with pytest.raises(Busy, match="a repository of it changed"):
        yard.purge(between=commit)
    assert pushed("log", "-1", "--format=%s") == "late"


def test_git_never_sees_the_config_of_the_repository(yard: PurgeYard, pushed: Git) -> None:
    trap = yard.base / "trapped"
    for name in ("core.fsmonitor", "diff.external", "core.sshCommand", "filter.x.clean"):
        pushed("config", name, f"touch {trap}")
    (pushed.folder / ".gitattributes").write_text("* filter=x\n")
    (pushed.folder / "f").write_text("changed\n")
    with yard.opened() as purge:
        known = purge.examine(content=False, now_ms=lambda: NOW)
    assert known is not None
    assert not trap.exists()
