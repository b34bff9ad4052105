"""The state of the git repositories in a workspace: HEAD, branch, dirty, unpushed, stashes (behaviours.md B-22).

The repository belongs to somebody else, and git runs what a repository's config tells it to: hooks, a file system monitor,
filters, external diffs, ssh commands, fetches of missing objects. So git never sees that config. What needs objects is
asked of a git folder of our own, made for the question, that borrows the other's objects, index and files by descriptor;
everything else is read by `gitdir`. Each git process is bounded in time and memory and killed with its group.
"""

from __future__ import annotations

import os
import re
import resource
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from mothball.capture.gitdir import (
    MAX_CONFIG,
    MAX_INDEX,
    SMALL,
    GitFault,
    Head,
    Refs,
    check_alternates,
    open_allowed,
    open_below,
    plain_settings,
    read_file,
)
from mothball.capture.types import printable
from mothball.store.below import FILE_FLAGS

MAX_REPOSITORIES: Final = 50
COMMAND_SECONDS: Final = 5.0
"""Longest run of one git process."""
TOTAL_SECONDS: Final = 20.0
"""Longest time for all repositories of one capture; those left over are recorded with an error."""
MEMORY_BYTES: Final = 2 * 1024**3
EMPTY_TREE = {
    "sha1": "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
    "sha256": "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321",
}
_TOO_LONG = "git took too long"
_ENVIRONMENT: Final = {
    "HOME": "/nonexistent",
    "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_PAGER": "cat",
}
_SAFE: Final = (
    "-c",
    "core.fsmonitor=false",
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "safe.directory=*",
    "-c",
    "protocol.allow=never",
)
_HARMLESS = ("core.filemode", "core.symlinks", "core.ignorecase", "core.autocrlf", "core.eol", "core.trustctime", "core.checkstat")
_HARMLESS_VALUE = re.compile(r"(?:true|false|yes|no|on|off|0|1|input|lf|crlf|native|default|minimal)\Z")
GITFILE = re.compile(rb"gitdir:[ \t]*([^\r\n]+)[\r\n]*\Z")


def git_states(root_fd: int, root: str, found: Sequence[str], allowed_roots: Sequence[Path]) -> list[dict[str, Any]]:
    """The state of each repository in `found`, the folders (relative to `root`) that hold a ``.git``; at most 50.

    ``{path, kind, head, branch, dirty, unpushed, stashes, error?}``: `kind` is ``dir``, ``worktree`` or ``submodule``;
    `branch` None when HEAD is detached; `dirty` says whether tracked files or the index differ from HEAD; `unpushed`
    counts the commits of all local branches (of a worktree: of its HEAD) that no remote-tracking ref has. What could not
    be found out is None, with the reason in `error`. Never raises for what a repository contains.
    """
    deadline = time.monotonic() + TOTAL_SECONDS
    out: list[dict[str, Any]] = []
    if not found:
        return out
    git = shutil.which("git")
    with tempfile.TemporaryDirectory(prefix="mothball-git-") as scratch:
        for path in found[:MAX_REPOSITORIES]:
            state: dict[str, Any] = {
                "path": printable(path),
                "kind": "dir",
                **dict.fromkeys(("head", "branch", "dirty", "unpushed", "stashes")),
            }
            try:
                if time.monotonic() > deadline:
                    raise GitFault("not examined: the repositories of this workspace took too long")
                with ExitStack() as stack:
                    _Repository(stack, root_fd, root, path, allowed_roots).examine(state, git, Path(scratch), deadline)
            except GitFault as fault:
                state["error"] = printable(str(fault))[:500]
            except (OSError, ValueError) as error:
                state["error"] = f"cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}"
            out.append(state)
    return out


class _Repository:
    """One repository, its folders held open until `stack` closes them."""

    def __init__(self, stack: ExitStack, root_fd: int, root: str, path: str, allowed: Sequence[Path]) -> None:
        self._stack = stack
        self._allowed = allowed
        self._place = os.path.join(root, path) if path else root  # noqa: PTH118 -- the name may be no UTF-8
        self.work = self._keep(open_below(root_fd, path))

    def _keep(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def examine(self, state: dict[str, Any], git: str | None, scratch: Path, deadline: float) -> None:
        """Fill `state` as far as it goes; raises `GitFault` with what stopped it."""
        own, own_path = self._git_folder(state)
        common, common_path = own, own_path
        pointer = read_file(own, "commondir", SMALL)
        if pointer is not None:
            state["kind"] = "worktree"
            fd, common_path = open_allowed(own_path, pointer.strip(), self._allowed, "its common git folder")
            common = self._keep(fd)
        refs = Refs(own, common)
        head = refs.head()
        state["head"] = head.commit
        state["branch"] = None if head.branch is None else printable(head.branch)
        state["stashes"] = refs.stashes()
        objects = self._keep(open_below(common, "objects"))
        check_alternates(objects, common_path + "/objects", self._allowed)
        config = plain_settings(read_file(common, "config", MAX_CONFIG) or b"")
        question = Question(git, scratch, objects, config, read_file(common, "shallow", MAX_CONFIG), deadline)
        with question:
            count = _count_unpushed(refs, head, question, only_head=state["kind"] == "worktree")
            if config.get("core.bare") not in {"true", "yes", "on", "1"}:
                state["dirty"] = self._dirty(own, head, question)
            state["unpushed"] = count() if callable(count) else count
        if question.fault:
            raise GitFault(question.fault)

    def _git_folder(self, state: dict[str, Any]) -> tuple[int, str]:
        kind = os.stat(".git", dir_fd=self.work, follow_symlinks=False).st_mode
        if stat.S_ISDIR(kind):
            return self._keep(open_below(self.work, ".git")), self._place + "/.git"
        if not stat.S_ISREG(kind):
            raise GitFault("its .git is neither a folder nor a file")
        match = GITFILE.match(read_file(self.work, ".git", SMALL) or b"")
        if match is None:
            raise GitFault("its .git file cannot be understood")
        target = match[1].rstrip()
        state["kind"] = "submodule" if b"/modules/" in target and b"/worktrees/" not in target else "worktree"
        fd, path = open_allowed(self._place, target, self._allowed, "its git folder")
        return self._keep(fd), path

    def _dirty(self, own: int, head: Head, question: Question) -> bool | None:
        try:
            index = self._keep(os.open("index", FILE_FLAGS, dir_fd=own))
        except FileNotFoundError:
            return head.commit is not None
        found = os.fstat(index)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_INDEX:
            raise GitFault("its index is not a regular file of a sensible size")
        against = head.commit or EMPTY_TREE[question.format]
        same = "--quiet", "--ignore-submodules=all"
        staged = question.start("diff-index", "--cached", *same, against, "--", index=index, work=self.work)
        plain = "--no-ext-diff", "--no-textconv", "--no-renames"
        changed = question.start("diff", *same, *plain, index=index, work=self.work)
        codes = question.code(staged), question.code(changed)
        if 1 in codes:
            return True
        return False if codes == (0, 0) else None


def _count_unpushed(refs: Refs, head: Head, question: Question, *, only_head: bool) -> int | Callable[[], int | None]:
    """The number, or (git is asked while other questions run) what will give it."""
    pushed = refs.under(b"refs/remotes/")
    tips = set() if only_head else refs.under(b"refs/heads/")
    if head.commit:
        tips.add(head.commit.encode())
    tips -= pushed
    if not tips:
        return 0
    lines = [*sorted(tips), *(b"^" + sha for sha in sorted(pushed))]
    process = question.start("rev-list", "--count", "--ignore-missing", "--stdin", stdin=b"\n".join(lines) + b"\n")

    def answer() -> int | None:
        code, text = question.finish(process)
        return int(text) if code == 0 and text.strip().isdigit() else None

    return answer


class Question:
    """A git folder of our own over the objects of somebody else's, in which git commands run side by side.

    Leaving the ``with`` block kills what still runs. `fault` says what went wrong first, if anything did.
    """

    def __init__(
        self, git: str | None, scratch: Path, objects: int, config: dict[str, str], shallow: bytes | None, deadline: float
    ) -> None:
        self._git = git
        self._folder = scratch / "git"
        self._objects = objects
        self._deadline = deadline
        self.format = "sha256" if config.get("extensions.objectformat") == "sha256" else "sha1"
        self._running: list[subprocess.Popen[bytes]] = []
        self.fault = "" if git else "git is not installed on this host"
        (self._folder / "refs").mkdir(parents=True, exist_ok=True)
        (self._folder / "HEAD").write_bytes(b"ref: refs/heads/none\n")
        lines = ["[core]", "bare = false", f"repositoryformatversion = {int(self.format != 'sha1')}"]
        lines += [f"{name[5:]} = {config[name]}" for name in _HARMLESS if _HARMLESS_VALUE.match(config.get(name, ""))]
        lines += ["fsmonitor = false", "hooksPath = /dev/null", "untrackedCache = false", "attributesFile = /dev/null"]
        # Large packs are mapped in pieces, so that the limit of memory stops an attack and not a large repository.
        lines += ["packedGitWindowSize = 32m", "packedGitLimit = 256m"]
        lines += [] if self.format == "sha1" else ["[extensions]", "objectFormat = sha256"]
        (self._folder / "config").write_text("\n".join(lines) + "\n")
        lines = [] if shallow is None else re.findall(r"^[0-9a-f]{40,64}$", shallow.decode("ascii", "replace"), re.MULTILINE)
        (self._folder / "shallow").unlink(missing_ok=True)
        if lines:
            (self._folder / "shallow").write_text("\n".join(lines) + "\n")

    def __enter__(self) -> Question:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def start(
        self, *command: str, index: int | None = None, work: int | None = None, stdin: bytes = b""
    ) -> subprocess.Popen[bytes] | None:
        """Start one git command; `code` waits for it. None without git or time."""
        if self._git is None or time.monotonic() > self._deadline:
            self.fault = self.fault or _TOO_LONG
            return None
        environment = {**_ENVIRONMENT, "GIT_DIR": str(self._folder), "GIT_OBJECT_DIRECTORY": f"/proc/self/fd/{self._objects}"}
        environment["PATH"] = os.environ.get("PATH", os.defpath)
        if index is not None and work is not None:
            environment |= {"GIT_INDEX_FILE": f"/proc/self/fd/{index}", "GIT_WORK_TREE": f"/proc/self/fd/{work}"}
        with tempfile.TemporaryFile(dir=self._folder) as source:
            source.write(stdin)
            source.seek(0)
            process = subprocess.Popen(
                [self._git, *_SAFE, *command], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=self._folder,
                env=environment, pass_fds=[fd for fd in (self._objects, index, work) if fd is not None], start_new_session=True,
            )  # fmt: skip
        self._running.append(process)
        with suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        return process

    def code(self, process: subprocess.Popen[bytes] | None) -> int | None:
        """The exit code, 0 or 1, of a command that was started; None, and a `fault`, when it failed or was cut off."""
        return self.finish(process)[0]

    def finish(self, process: subprocess.Popen[bytes] | None) -> tuple[int | None, bytes]:
        """`code` and what the command printed."""
        if process is None or process.stdout is None:
            return None, b""
        end = min(time.monotonic() + COMMAND_SECONDS, self._deadline)
        # Waiting for the end of the output wakes up at once, where `Popen.wait` with a limit sleeps and looks.
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        output = b""
        while len(output) < SMALL and waiting.poll(max(0.0, end - time.monotonic()) * 1000):
            part = os.read(process.stdout.fileno(), SMALL)
            if not part:
                break
            output += part
        try:
            code = process.wait(max(0.01, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.fault = self.fault or _TOO_LONG
            return None, b""
        if code not in {0, 1}:
            self.fault = self.fault or f"git ended with {code}"
            return None, b""
        return code, output
