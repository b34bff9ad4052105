"""What deleting a repository would lose: a ``.git`` is in no capture, so what only it knows is gone with it.

A capture records the state of git and holds the files of the working tree. The commits themselves are held by whoever has the
remote-tracking refs, or by nobody. Everything that is asked here is asked as `mothball.capture.gitstate` asks: git never sees the
repository's own config, and nothing is followed that leads out of the allowed roots.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from mothball.capture.gitdir import MAX_CONFIG, SMALL, GitFault, Refs, open_below, plain_settings, read_file
from mothball.capture.gitstate import EMPTY_TREE, GITFILE, MAX_REPOSITORIES, TOTAL_SECONDS, Question, git_states
from mothball.capture.types import printable
from mothball.purge.receipt import Gap
from mothball.purge.remotes import held_prefixes
from mothball.store.below import FILE_FLAGS
from mothball.store.read import show

_IN_PROGRESS: Final = (
    "HEAD", "MERGE_HEAD", "MERGE_AUTOSTASH", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-merge/autostash", "rebase-merge/orig-head",
    "rebase-merge/stopped-sha", "rebase-apply/autostash", "rebase-apply/orig-head",
)  # fmt: skip
"""Files that name a commit while something is going on; an autostash is on no branch and in no list of stashes."""
_SHA: Final = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")
_MAX_NAMES: Final = 4 * 1024**2
_MAX_FOLDERS: Final = 200
_MODULE_DEPTH: Final = 8


def git_losses(
    root_fd: int, root: str, repositories: Sequence[bytes], allowed: Sequence[Path]
) -> tuple[list[Gap], list[dict[str, Any]]]:
    """What of the repositories in `repositories` (folders relative to `root`) nothing else holds, and their states for the receipt.

    Lost would be: commits that no remote-tracking ref of a remote that stays has, of any branch, tag or other ref, of a detached
    HEAD, of submodules that are not checked out and of linked worktrees; stashes; what is staged and neither committed nor on disk
    as it is; files of git-annex; working trees elsewhere that live from this repository. Whatever could not be found out counts as
    lost. A ``.git`` file is only a pointer: what it points to is not deleted, is a ``.git`` of its own here, or is captured as any
    folder is (`ignored_git_folders`).
    """
    gaps: list[Gap] = []
    folders: list[str] = []
    for place in repositories:
        path = os.fsdecode(place)
        try:
            kind = _kind(root_fd, path)
        except OSError as error:
            gaps.append(_gap(path, f"its .git cannot be read: {error.strerror}"))
            continue
        if kind == "dir":
            folders.append(path)
        elif kind != "file":
            gaps.append(_gap(path, "its .git is neither a git folder nor a pointer to one, and is not captured"))
    states = git_states(root_fd, root, folders[:MAX_REPOSITORIES], allowed)
    gaps += [
        _gap(path, f"it was not examined: there are more than {MAX_REPOSITORIES} repositories")
        for path in folders[MAX_REPOSITORIES:]
    ]
    deadline = time.monotonic() + TOTAL_SECONDS
    with tempfile.TemporaryDirectory(prefix="mothball-git-") as scratch:
        for path, state in zip(folders, states, strict=False):
            if state.get("error"):
                gaps.append(_gap(path, f"the repository could not be examined: {state['error']}"))
                continue
            if state["stashes"]:
                gaps.append(_gap(path, _many(state["stashes"], "stash", "stashes")))
            try:
                gaps += [_gap(path, text) for text in _Losses(root_fd, root, path, Path(scratch), deadline).run()]
            except GitFault as fault:
                gaps.append(_gap(path, f"the repository could not be examined: {printable(str(fault))[:300]}"))
            except (OSError, ValueError) as error:
                gaps.append(_gap(path, f"the repository could not be examined: {getattr(error, 'strerror', None) or error}"))
    return gaps, states


def ignored_git_folders(root_fd: int, root: bytes, repositories: Sequence[bytes], known: Container[bytes]) -> list[Gap]:
    """Git folders in the workspace that only a ``.git`` file leads to (``--separate-git-dir``) and that are not among the `known`.

    One that is no ``.git`` is captured like any other folder, unless the workspace's rules leave it out.
    """
    gaps = []
    for place in repositories:
        with suppress(OSError, GitFault):
            fd = open_below(root_fd, place)
            try:
                match = GITFILE.match(read_file(fd, ".git", SMALL) or b"")
            finally:
                os.close(fd)
            target = os.path.realpath(os.path.join(root, place, match[1].rstrip())) if match else b""  # noqa: PTH118 -- bytes
            below = target.removeprefix(root.rstrip(b"/") + b"/")
            if below != target and b".git" not in below.split(b"/") and below + b"/HEAD" not in known and os.path.isdir(target):  # noqa: PTH112
                gaps.append(_gap(os.fsdecode(place), f"its git folder {show(below)} is left out of captures"))
    return gaps


def _kind(root_fd: int, path: str) -> str:
    """``dir``; ``file`` for a pointer as git writes it; else ``other``."""
    fd = open_below(root_fd, path)
    try:
        mode = os.stat(".git", dir_fd=fd, follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            return "dir"
        with suppress(GitFault):
            if stat.S_ISREG(mode) and GITFILE.match(read_file(fd, ".git", SMALL) or b""):
                return "file"
        return "other"
    finally:
        os.close(fd)


def _gap(path: str, text: str) -> Gap:
    return Gap(show(os.fsencode(path)), "git", text)


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


class _Losses:
    """One repository whose git folder is in the workspace."""

    def __init__(self, root_fd: int, root: str, path: str, scratch: Path, deadline: float) -> None:
        self._root_fd = root_fd
        self._root = os.fsencode(root)
        self._path = path
        self._scratch = scratch
        self._deadline = deadline
        self._git = shutil.which("git")

    def run(self) -> list[str]:
        """What would be lost, one text each; raises `GitFault` and `OSError` for what could not be found out."""
        found: list[str] = []
        with ExitStack() as stack:

            def keep(fd: int) -> int:
                stack.callback(os.close, fd)
                return fd

            work = keep(open_below(self._root_fd, self._path))
            own = keep(open_below(work, ".git"))
            if read_file(own, "commondir", SMALL) is not None:
                raise GitFault("its git folder belongs to another one")
            found += self._commits(own, "")
            staged = self._staged(own, work)
            found += [f"{_many(staged, 'staged file is', 'staged files are')} neither committed nor on disk"] if staged else []
            found += self._worktrees(own)
            found += self._annexed(own)
            for name, module in _modules(own, "modules", 0):
                keep(module)
                found += self._commits(module, f" of the submodule {show(os.fsencode(name))}")
                if count := Refs(module, module).stashes():
                    found.append(f"{_many(count, 'stash', 'stashes')} of the submodule {show(os.fsencode(name))}")
        return found

    def _commits(self, own: int, whose: str) -> list[str]:
        refs = Refs(own, own)
        refs.head()
        work = os.path.join(self._root, os.fsencode(self._path))  # noqa: PTH118 -- bytes
        held = held_prefixes(read_file(own, "config", MAX_CONFIG) or b"", self._root, work)
        pushed = {sha for prefix in held for sha in refs.under(prefix)}
        stash = refs.resolve(b"refs/stash")  # counted as stashes
        tips = (refs.under(b"refs/") | _heads(own)) - pushed - {stash or b""}
        for name, _ in _folders(own, "worktrees"):
            fd = open_below(own, f"worktrees/{name}")
            try:
                tips |= _heads(fd) - pushed
            finally:
                os.close(fd)
        if not tips:
            return []
        lines = [*sorted(tips), *(b"^" + sha for sha in sorted(pushed))]
        with self._question(own) as question:
            process = question.start("rev-list", "--count", "--ignore-missing", "--stdin", stdin=b"\n".join(lines) + b"\n")
            code, text = question.finish(process)
        if code != 0 or not text.strip().isdigit():
            raise GitFault(question.fault or "git could not count its commits")
        count = int(text)
        return [f"{_many(count, 'commit', 'commits')}{whose} that no remote is known to have"] if count else []

    def _staged(self, own: int, work: int) -> int:
        """Files whose staged content is neither that of HEAD nor that on disk: it is in the index alone."""
        try:
            index = os.open("index", FILE_FLAGS, dir_fd=own)
        except FileNotFoundError:
            return 0
        try:
            if not stat.S_ISREG(os.fstat(index).st_mode):
                raise GitFault("its index is no regular file")
            head = Refs(own, own).head()
            with self._question(own) as question:
                plain = "--no-ext-diff", "--no-textconv", "--no-renames", "--ignore-submodules=all", "--name-only", "-z"
                against = head.commit or EMPTY_TREE[question.format]
                first = question.start("diff-index", "--cached", *plain, against, "--", index=index, work=work)
                second = question.start("diff", *plain, index=index, work=work)
                staged, changed = self._names(question, first), self._names(question, second)
            return len(staged & changed)
        finally:
            os.close(index)

    def _names(self, question: Question, process: subprocess.Popen[bytes] | None) -> set[bytes]:
        if process is None or process.stdout is None:
            raise GitFault(question.fault or "git could not be asked")
        output = bytearray()
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        while waiting.poll(max(0.0, self._deadline - time.monotonic()) * 1000):
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                break
            output += part
            if len(output) > _MAX_NAMES:
                raise GitFault("more files are staged than are looked at")
        code, _ = question.finish(process)
        if code != 0:
            raise GitFault(question.fault or "git could not compare the index")
        return set(bytes(output).split(b"\0")) - {b""}

    def _worktrees(self, own: int) -> list[str]:
        """Working trees outside of the workspace that this repository belongs to. None is touched: its path is enough."""
        outside = 0
        for _, fd in _folders(own, "worktrees", keep=True):
            try:
                place = (read_file(fd, "gitdir", SMALL) or b"").strip()
            finally:
                os.close(fd)
            real = os.path.normpath(place) if place.startswith(b"/") else b""
            if not real.startswith(self._root.rstrip(b"/") + b"/"):
                outside += 1
        return (
            [f"{_many(outside, 'working tree', 'working trees')} elsewhere (see `git worktree list`) live from it"]
            if outside
            else []
        )

    def _annexed(self, own: int) -> list[str]:
        """git-annex puts links into the working tree and keeps the files themselves in the git folder."""
        try:
            objects = open_below(own, "annex/objects")
        except (FileNotFoundError, NotADirectoryError):
            return []
        try:
            return ["files of git-annex are in its git folder alone (`git annex drop`)"] if os.listdir(objects) else []  # noqa: PTH208
        finally:
            os.close(objects)

    def _question(self, own: int) -> Question:
        objects = open_below(own, "objects")
        config = plain_settings(read_file(own, "config", MAX_CONFIG) or b"")
        try:
            return _Owned(self._git, self._scratch, objects, config, read_file(own, "shallow", MAX_CONFIG), self._deadline)
        except BaseException:
            os.close(objects)
            raise


class _Owned(Question):
    """A question that closes the descriptor of the objects it was given."""

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        os.close(self._objects)


def _heads(own: int) -> set[bytes]:
    """Commits that the files of a git folder itself name."""
    found = set()
    for name in _IN_PROGRESS:
        for line in (read_file(own, name, SMALL) or b"").split():
            if _SHA.match(line):
                found.add(line)
    return found


def _folders(own: int, name: str, *, keep: bool = False) -> Iterator[tuple[str, int]]:
    """The folders in the folder `name` of a git folder; with `keep` the caller closes each descriptor, else it is -1."""
    try:
        fd = open_below(own, name)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        names = sorted(os.listdir(fd))  # noqa: PTH208 -- of a descriptor
        if len(names) > _MAX_FOLDERS:
            raise GitFault(f"it has more than {_MAX_FOLDERS} {name}")
        for each in names:
            yield each, open_below(fd, each) if keep else -1
    finally:
        os.close(fd)


def _modules(own: int, path: str, depth: int) -> Iterator[tuple[str, int]]:
    """Git folders of submodules, however their names are nested; the caller closes the descriptors."""
    if depth > _MODULE_DEPTH:
        raise GitFault("its submodules are nested too deep")
    for name, _ in _folders(own, path):
        inner = f"{path}/{name}"
        try:
            fd = open_below(own, inner)
        except NotADirectoryError:
            raise GitFault(f"{show(os.fsencode(inner))} is no folder") from None
        try:
            found = read_file(fd, "HEAD", SMALL) is not None
        except GitFault:
            os.close(fd)
            raise
        if found:
            yield inner.partition("/")[2], fd
            yield from ((f"{inner.partition('/')[2]}/{deeper}", each) for deeper, each in _modules(fd, "modules", depth + 1))
        else:
            os.close(fd)
            yield from _modules(own, inner, depth + 1)
