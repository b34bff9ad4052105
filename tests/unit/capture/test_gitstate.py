"""The recorded state of git repositories, also of repositories made to run something or to read the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mothball.capture import gitstate
from mothball.capture.gitstate import git_states
from tests.support import require_tool


def git(folder: Path, *arguments: str, **environment: str) -> str:
    """Run git as a user would, with a config of the test's own."""
    known = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    done = subprocess.run(
        [require_tool("git"), "-C", str(folder), "-c", "protocol.file.allow=always", *arguments],
        env={**known, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def new_repository(folder: Path, *arguments: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q", "-b", "main", *arguments)
    (folder / "a.txt").write_text("a\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def states(root: Path, found: Sequence[str] = ("",), allowed: Sequence[Path] | None = None) -> list[dict[str, Any]]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        out = git_states(fd, str(root), found, [root] if allowed is None else allowed)
    finally:
        os.close(fd)
    json.dumps(out).encode()
    return out


def state(root: Path, path: str = "", allowed: Sequence[Path] | None = None) -> dict[str, Any]:
    (found,) = states(root, [path], allowed)
    assert found["path"] == path
    return found


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return new_repository(tmp_path / "repo")


@pytest.fixture
def clone(tmp_path: Path, repo: Path) -> Path:
    git(tmp_path, "clone", "-q", str(repo), "clone")
    return tmp_path / "clone"


def test_b22_a_clean_clone(clone: Path) -> None:
    assert state(clone) == {
        "path": "",
        "kind": "dir",
        "head": git(clone, "rev-parse", "HEAD"),
        "branch": "main",
        "dirty": False,
        "unpushed": 0,
        "stashes": 0,
    }


def test_b22_an_ordinary_clone_is_examined_quickly(clone: Path) -> None:
    best = 9.0
    for _ in range(5):
        begun = time.perf_counter()
        state(clone)
        best = min(best, time.perf_counter() - begun)
    assert best < 0.1  # about 10 ms on an idle machine


@pytest.mark.parametrize("staged", [False, True])
def test_a_changed_file_is_dirty_staged_or_not(clone: Path, staged: bool) -> None:
    (clone / "sub" / "b.txt").write_text("changed\n")
    if staged:
        git(clone, "add", ".")
    assert state(clone)["dirty"] is True


@pytest.mark.parametrize("change", ["delete", "mode", "stage and take back", "stage a new one", "replace by a folder"])
def test_every_kind_of_change_of_a_tracked_file_is_dirty(clone: Path, change: str) -> None:
    file = clone / "a.txt"
    if change == "delete":
        file.unlink()
    elif change == "mode":
        file.chmod(0o755)
    elif change == "stage and take back":
        file.write_text("staged\n")
        git(clone, "add", ".")
        file.write_text("a\n")
    elif change == "stage a new one":
        (clone / "new").write_text("new\n")
        git(clone, "add", "new")
    else:
        file.unlink()
        file.mkdir()
    assert state(clone)["dirty"] is True


def test_files_with_other_times_but_the_same_content_are_clean(clone: Path, tmp_path: Path) -> None:
    os.utime(clone / "a.txt", (1, 1))
    assert state(clone)["dirty"] is False
    shutil.copytree(clone, tmp_path / "copy", symlinks=True, copy_function=shutil.copyfile)
    assert state(tmp_path / "copy")["dirty"] is False


def test_unpushed_counts_the_commits_of_all_local_branches(clone: Path) -> None:
    git(clone, "commit", "-q", "--allow-empty", "-m", "one")
    git(clone, "checkout", "-q", "-b", "side")
    git(clone, "commit", "-q", "--allow-empty", "-m", "two")
    git(clone, "checkout", "-q", "main")
    assert state(clone)["unpushed"] == 2
    git(clone, "pack-refs", "--all")
    assert state(clone)["unpushed"] == 2
    git(clone, "push", "-q", "origin", "side")
    assert state(clone)["unpushed"] == 0


def test_without_a_remote_every_commit_is_unpushed(repo: Path) -> None:
    git(repo, "commit", "-q", "--allow-empty", "-m", "second")
    assert state(repo)["unpushed"] == 2


def test_stashes_are_counted(clone: Path) -> None:
    for number in range(3):
        (clone / "a.txt").write_text(f"{number}\n")
        git(clone, "stash")
    found = state(clone)
    assert (found["stashes"], found["dirty"]) == (3, False)
    git(clone, "stash", "clear")
    assert state(clone)["stashes"] == 0


def test_a_detached_head_has_no_branch(clone: Path) -> None:
    git(clone, "checkout", "-q", "--detach")
    git(clone, "commit", "-q", "--allow-empty", "-m", "loose")
    found = state(clone)
    assert found["branch"] is None
    assert found["head"] == git(clone, "rev-parse", "HEAD")
    assert found["unpushed"] == 1


def test_a_repository_without_commits(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "trunk")
    assert state(tmp_path) == {
        "path": "",
        "kind": "dir",
        "head": None,
        "branch": "trunk",
        "dirty": False,
        "unpushed": 0,
        "stashes": 0,
    }
    (tmp_path / "x").write_text("x")
    git(tmp_path, "add", "x")
    assert state(tmp_path)["dirty"] is True


def test_b22_a_worktree_whose_git_is_a_file(repo: Path, tmp_path: Path) -> None:
    git(repo, "worktree", "add", "-q", "-b", "feature", str(tmp_path / "tree"))
    tree = tmp_path / "tree"
    git(tree, "commit", "-q", "--allow-empty", "-m", "here")
    (tree / "a.txt").write_text("changed")
    found = state(tree, allowed=[tmp_path])
    assert found == {
        "path": "",
        "kind": "worktree",
        "head": git(tree, "rev-parse", "HEAD"),
        "branch": "feature",
        "dirty": True,
        "unpushed": 2,
        "stashes": 0,
    }


def test_a_worktree_of_a_repository_outside_the_roots_is_not_followed(repo: Path, tmp_path: Path) -> None:
    git(repo, "worktree", "add", "-q", str(tmp_path / "tree"))
    found = state(tmp_path / "tree")
    assert found["kind"] == "worktree"
    assert found["head"] is None
    assert "outside the workspace roots" in found["error"]


def test_a_submodule(repo: Path, tmp_path: Path) -> None:
    new_repository(tmp_path / "library")
    git(repo, "submodule", "--quiet", "add", str(tmp_path / "library"), "vendor/library")
    git(repo, "commit", "-q", "-m", "submodule")
    outer, inner = states(repo, ["", "vendor/library"])
    assert (outer["kind"], outer["dirty"]) == ("dir", False)
    assert (inner["kind"], inner["dirty"], inner["unpushed"], inner["branch"]) == ("submodule", False, 0, "main")
    (repo / "vendor" / "library" / "a.txt").write_text("changed")
    assert [found["dirty"] for found in states(repo, ["", "vendor/library"])] == [False, True]


def test_a_shallow_clone(repo: Path, tmp_path: Path) -> None:
    git(repo, "commit", "-q", "--allow-empty", "-m", "second")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repo}", "shallow")
    git(tmp_path / "shallow", "commit", "-q", "--allow-empty", "-m", "third")
    found = state(tmp_path / "shallow")
    assert (found["unpushed"], found["dirty"], found.get("error")) == (1, False, None)


def test_a_sha256_repository(tmp_path: Path) -> None:
    repo = new_repository(tmp_path / "long", "--object-format=sha256")
    found = state(repo)
    assert len(found["head"]) == 64
    assert (found["dirty"], found["unpushed"], found.get("error")) == (False, 1, None)


def test_line_endings_of_the_repository_are_respected(tmp_path: Path) -> None:
    repo = new_repository(tmp_path / "crlf")
    git(repo, "config", "core.autocrlf", "true")
    (repo / "a.txt").write_bytes(b"a\r\n")
    assert git(repo, "diff", "--name-only") == ""
    assert state(repo)["dirty"] is False


def test_repositories_in_folders_with_odd_names(tmp_path: Path) -> None:
    name = "odd \udce9\n"
    new_repository(tmp_path / name)
    (found,) = states(tmp_path, [name])
    assert found["path"] == "odd \\xe9\n"
    assert found["dirty"] is False


def test_at_most_fifty_repositories_are_examined(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert len(states(tmp_path, [""] * 60)) == 50


def test_without_git_only_what_needs_objects_is_unknown(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(clone, "rev-parse", "HEAD")
    git(clone, "commit", "-q", "--allow-empty", "-m", "x", "--amend")
    monkeypatch.setenv("PATH", "/nonexistent")
    found = state(clone)
    assert found["head"] not in {None, head}
    assert (found["branch"], found["stashes"], found["dirty"], found["unpushed"]) == ("main", 0, None, None)
    assert "git is not installed" in found["error"]


# -- hostile repositories -----------------------------------------------------------------------------------------------


def arm(repo: Path, canary: Path) -> None:
    """Everything in a repository that makes git run a program."""
    script = repo / "canary.sh"
    script.write_text(f'#!/bin/sh\necho "$0 $*" >> {canary}\ncat\n')
    script.chmod(0o755)
    hooks = repo / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for hook in ("post-index-change", "pre-commit", "reference-transaction", "fsmonitor-watchman", "post-checkout"):
        shutil.copy(script, hooks / hook)
    for key in (
        "core.fsmonitor",
        "core.sshCommand",
        "core.pager",
        "core.editor",
        "core.askPass",
        "core.gitProxy",
        "core.alternateRefsCommand",
        "diff.external",
        "diff.bad.command",
        "diff.bad.textconv",
        "filter.bad.clean",
        "filter.bad.smudge",
        "filter.bad.process",
        "credential.helper",
        "gpg.program",
        "alias.diff",
        "alias.rev-list",
        "uploadpack.packObjectsHook",
        "pager.diff",
    ):
        git(repo, "config", key, str(script))
    git(repo, "config", "filter.bad.required", "true")
    git(repo, "config", "remote.origin.url", f"ext::{script} %S")
    git(repo, "config", "remote.origin.promisor", "true")
    git(repo, "config", "extensions.partialClone", "origin")
    git(repo, "config", "core.repositoryFormatVersion", "1")
    (repo / ".gitattributes").write_text("* filter=bad diff=bad text ident\n")


def test_nothing_in_a_repository_is_executed(repo: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    arm(repo, canary)
    os.utime(repo / "a.txt", (1, 1))
    (repo / "sub" / "b.txt").write_text("x\n")
    found = state(repo)
    assert not canary.exists(), canary.read_text()
    assert found["dirty"] is True
    assert found["unpushed"] == 1
    # The same repository does run its programs for whoever asks git in the usual way; else this test would prove nothing.
    subprocess.run([require_tool("git"), "-C", str(repo), "status"], capture_output=True, check=False, timeout=60)
    assert canary.exists()


def test_a_missing_object_is_not_fetched(repo: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    arm(repo, canary)
    tree = git(repo, "-c", "core.fsmonitor=false", "rev-parse", "HEAD^{tree}")
    (repo / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    canary.unlink(missing_ok=True)
    found = state(repo)
    assert not canary.exists(), canary.read_text()
    assert found["dirty"] is None
    assert "git ended with" in found["error"]


def test_a_filter_of_the_repository_never_sees_a_changed_file(repo: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    arm(repo, canary)
    git(repo, "config", "--unset", "core.fsmonitor")
    (repo / "a.txt").write_text("b\n")
    os.utime(repo / "a.txt", (1, 1))
    canary.unlink(missing_ok=True)
    assert state(repo)["dirty"] is True
    assert not canary.exists(), canary.read_text()


@pytest.mark.parametrize("text", ["gitdir: /etc", "gitdir: ../../../../../../etc", "gitdir: ../outside/.git", "gitdir: link/.git"])
def test_a_git_file_that_points_outside_is_not_followed(tmp_path: Path, text: str) -> None:
    new_repository(tmp_path / "outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / ".git").write_text(text + "\n")
    found = state(root)
    assert found["error"] == "its git folder is missing or lies outside the workspace roots"
    assert (found["head"], found["branch"], found["dirty"]) == (None, None, None)


def test_a_git_file_that_points_to_nothing_answers_the_same(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: /etc/there-is-no-such-thing\n")
    assert state(tmp_path)["error"] == "its git folder is missing or lies outside the workspace roots"


@pytest.mark.parametrize(
    "text", ["", "root:x:0:0\n", "gitdir:", "gitdir: a\nb", "x" * 100_000, "gitdir: " + "a" * 9000, "gitdir: a\0b"]
)
def test_a_git_file_of_nonsense_is_an_error_without_its_content(tmp_path: Path, text: str) -> None:
    (tmp_path / ".git").write_text(text)
    assert "root:x" not in state(tmp_path)["error"]


@pytest.mark.parametrize(
    "name",
    [
        "HEAD",
        "index",
        "packed-refs",
        "config",
        "commondir",
        "shallow",
        "refs/heads/main",
        "logs/refs/stash",
        "objects/info/alternates",
    ],
)
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_fifos_links_and_folders_in_the_place_of_files_are_never_opened(repo: Path, name: str, kind: str) -> None:
    if name == "logs/refs/stash":
        (repo / "a.txt").write_text("x\n")
        git(repo, "stash")
    path = repo / ".git" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    secret = repo.parent / "secret"
    secret.write_text("0123456789" * 4)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(secret)
    else:
        path.mkdir()
    begun = time.monotonic()
    found = state(repo)
    assert time.monotonic() - begun < 3
    assert found["error"]
    assert "0123456789" not in json.dumps(found)


@pytest.mark.parametrize("name", ["", "objects", "refs", "refs/heads", "objects/pack"])
def test_folders_that_are_links_are_not_followed(repo: Path, name: str) -> None:
    path = repo / ".git" / name
    moved = repo.parent / "moved"
    path.rename(moved)
    path.symlink_to(moved)
    found = state(repo)
    if name.startswith("refs"):
        assert found["head"] is None
    else:
        assert found["error"]


def test_a_git_that_is_a_fifo_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".git")
    assert state(tmp_path)["error"] == "its .git is neither a folder nor a file"


@pytest.mark.parametrize("target", ["/etc", "../../outside/.git/objects", "/proc/self/root/etc"])
def test_objects_are_not_borrowed_from_outside(tmp_path: Path, target: str) -> None:
    new_repository(tmp_path / "outside")
    repo = new_repository(tmp_path / "root" / "repo")
    (repo / ".git" / "objects" / "info" / "alternates").write_text(target + "\n")
    found = state(repo)
    assert found["error"] == "a store that its objects borrow from is missing or lies outside the workspace roots"
    assert (found["dirty"], found["unpushed"]) == (None, None)


def test_objects_borrowed_inside_the_roots_are_fine(repo: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--shared", str(repo), "shared")
    found = state(tmp_path / "shared", allowed=[tmp_path])
    assert (found["dirty"], found["unpushed"], found.get("error")) == (False, 0, None)


def test_a_ring_of_borrowed_objects_ends(repo: Path) -> None:
    (repo / ".git" / "objects" / "info" / "alternates").write_text(str(repo / ".git" / "objects") + "\n")
    assert "too many" in state(repo)["error"]


def test_the_config_cannot_point_git_to_another_tree_or_file(repo: Path, tmp_path: Path) -> None:
    with (repo / ".git" / "config").open("a") as config:
        config.write("[core]\n\tworktree = /etc\n\tattributesFile = /etc/passwd\n[include]\n\tpath = /etc/passwd\n")
    found = state(repo)
    assert (found["dirty"], found.get("error")) == (False, None)


@pytest.mark.parametrize(
    "text",
    [
        b"ref: refs/heads/../../../../etc/passwd",
        b"ref: /etc/passwd",
        b"ref: HEAD",
        b"",
        b"\xff" * 50,
        b"ref: refs/heads/a\0b",
        b"ref: refs/heads/main\nx",
    ],
)
def test_a_head_that_names_no_ref_is_an_error(repo: Path, text: bytes) -> None:
    (repo / ".git" / "HEAD").write_bytes(text)
    found = state(repo)
    assert found["head"] is None
    assert found.get("error") or found["branch"]


def test_symbolic_refs_in_a_ring_end(repo: Path) -> None:
    (repo / ".git" / "refs" / "heads" / "main").write_text("ref: refs/heads/main\n")
    assert state(repo)["error"] == "one of its refs cannot be understood"


def test_a_git_that_hangs_is_killed_with_its_children(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "git").write_text(f"#!/bin/sh\nsleep 60 & echo $! >> {tmp_path}/pids; wait\n")
    (programs / "git").chmod(0o755)
    git(clone, "commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(gitstate, "COMMAND_SECONDS", 0.3)
    begun = time.monotonic()
    found = state(clone)
    assert time.monotonic() - begun < 5
    assert found["error"] == "git took too long"
    assert (found["branch"], found["dirty"], found["unpushed"]) == ("main", None, None)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert pids
    for pid in pids:
        for _ in range(100):
            if not alive(pid):
                break
            time.sleep(0.02)
        assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_many_slow_repositories_share_one_time_budget(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gitstate, "TOTAL_SECONDS", -1.0)
    assert "took too long" in state(clone)["error"]


def test_a_workspace_swapped_for_a_link_is_not_followed(tmp_path: Path) -> None:
    new_repository(tmp_path / "outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "repo").symlink_to(tmp_path / "outside")
    found = state(root, "repo")
    assert found["head"] is None
    assert found["error"]


def test_no_descriptor_and_no_file_is_left(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = sorted(os.listdir("/proc/self/fd"))
    files = sorted(path for path in clone.rglob("*"))
    states(clone, ["", "missing", "sub"])
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert list(scratch.iterdir()) == []
    assert sorted(path for path in clone.rglob("*")) == files
