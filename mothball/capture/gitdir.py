"""Reading a git folder that belongs to somebody else, without git: HEAD, refs, stashes, a few settings.

Every file is opened below a descriptor with ``O_NOFOLLOW | O_NONBLOCK``, must be a regular file and small. A pointer to another
place (a ``.git`` file, ``commondir``, ``alternates``) is followed only when its real path lies below an allowed root.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from mothball.store.below import FILE_FLAGS, FOLDER_FLAGS

SMALL: Final = 4096
MAX_PACKED_REFS: Final = 32 * 1024**2
MAX_LOG: Final = 8 * 1024**2
MAX_CONFIG: Final = 1024**2
MAX_INDEX: Final = 1024**3
MAX_REFS: Final = 10_000
MAX_REF_DEPTH: Final = 16
MAX_ALTERNATES: Final = 5
_SHA = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")
_OUTSIDE = "is missing or lies outside the workspace roots"


class GitFault(Exception):
    """What keeps a git folder from being read, for the record; the capture goes on."""


class Head(NamedTuple):
    """What HEAD says: the commit (None before the first one) and the branch (None when detached)."""

    commit: str | None
    branch: str | None


def open_below(folder: int, path: str | bytes, flags: int = FOLDER_FLAGS) -> int:
    """A descriptor for `path` below `folder`; no component may be a link. Raises `OSError`."""
    parts = [part for part in os.fsencode(path).split(b"/") if part not in {b"", b"."}]
    if b".." in parts:
        raise OSError("a path with ..")
    if not parts:
        return os.open(b".", flags, dir_fd=folder)
    current = folder
    try:
        for number, part in enumerate(parts):
            following = os.open(part, flags if number == len(parts) - 1 else FOLDER_FLAGS, dir_fd=current)
            if current != folder:
                os.close(current)
            current = following
        return current
    except BaseException:
        if current != folder:
            os.close(current)
        raise


def read_file(folder: int, path: str | bytes, limit: int) -> bytes | None:
    """A regular file of at most `limit` bytes; None when there is none. `GitFault` for a link, a FIFO or a larger file."""
    try:
        fd = open_below(folder, path, FILE_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise GitFault(f"{os.fsdecode(path)} cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise GitFault(f"{os.fsdecode(path)} is not a regular file")
        parts: list[bytes] = []
        left = limit + 1
        while left > 0 and (part := os.read(fd, left)):
            parts.append(part)
            left -= len(part)
        if left <= 0:
            raise GitFault(f"{os.fsdecode(path)} is larger than {limit} bytes")
        return b"".join(parts)
    except OSError as error:
        raise GitFault(f"{os.fsdecode(path)} cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


def open_allowed(start: str, target: bytes, allowed: Sequence[Path], what: str) -> tuple[int, str]:
    """A descriptor and the real path of the folder that `target` means, seen from the folder `start`.

    The answer for what is missing and for what lies outside is the same, so nothing is learned about the host.
    """
    try:
        if b"\0" in target or not target:
            raise OSError("no path")
        real = os.path.realpath(os.path.join(os.fsencode(start), target), strict=True)  # noqa: PTH118 -- bytes
        for root in allowed:
            base = os.fsencode(os.path.realpath(root))
            if real == base or real.startswith(base.rstrip(b"/") + b"/"):
                root_fd = os.open(base, FOLDER_FLAGS)
                try:
                    # Component by component without links: whoever swaps one after the check gains nothing.
                    return open_below(root_fd, real[len(base) :]), os.fsdecode(real)
                finally:
                    os.close(root_fd)
    except OSError:
        pass
    raise GitFault(f"{what} {_OUTSIDE}")


def check_alternates(objects: int, objects_path: str, allowed: Sequence[Path], depth: int = 0) -> None:
    """Raise `GitFault` when the object store borrows from a place outside the allowed roots."""
    with suppress(FileNotFoundError):
        if stat.S_ISLNK(os.stat("pack", dir_fd=objects, follow_symlinks=False).st_mode):
            raise GitFault("objects/pack is a symbolic link")
    text = read_file(objects, "info/alternates", SMALL)
    for line in (text or b"").split(b"\n"):
        if not line or line.startswith(b"#"):
            continue
        if depth >= MAX_ALTERNATES:
            raise GitFault("its objects borrow from too many other stores")
        fd, path = open_allowed(objects_path, line, allowed, "a store that its objects borrow from")
        try:
            check_alternates(fd, path, allowed, depth + 1)
        finally:
            os.close(fd)


class Refs:
    """The refs of a repository: `own` is the folder of this working tree, `common` the one it shares with others."""

    def __init__(self, own: int, common: int) -> None:
        self._own = own
        self._common = common
        self._packed: dict[bytes, bytes] | None = None

    def head(self) -> Head:
        """HEAD, resolved. Raises `GitFault`."""
        text = read_file(self._own, "HEAD", SMALL)
        if text is None:
            raise GitFault("it has no HEAD")
        text = text.strip()
        if _SHA.match(text):
            return Head(text.decode(), None)
        if not text.startswith(b"ref:"):
            raise GitFault("its HEAD cannot be understood")
        name = text[4:].strip()
        if not name.startswith(b"refs/") or b".." in name or b"\0" in name:
            raise GitFault("its HEAD names no ref")
        if name == b"refs/heads/.invalid":
            raise GitFault("its refs are stored in a format that is not read here (reftable)")
        found = self.resolve(name)
        return Head(found.decode() if found else None, os.fsdecode(name.removeprefix(b"refs/heads/")))

    def resolve(self, name: bytes) -> bytes | None:
        """The commit of a ref, through up to five symbolic refs; None when it does not exist."""
        for _ in range(5):
            text = read_file(self._common, name, SMALL)
            if text is None:
                return self.packed().get(name)
            text = text.strip()
            if _SHA.match(text):
                return text
            name = text[4:].strip()
            if not text.startswith(b"ref:") or not name.startswith(b"refs/") or b".." in name or b"\0" in name:
                break
        raise GitFault("one of its refs cannot be understood")

    def under(self, prefix: bytes) -> set[bytes]:
        """The commits of all refs below `prefix` (``refs/heads/``); loose ones win over packed ones."""
        found = {name: sha for name, sha in self.packed().items() if name.startswith(prefix)}
        for name in self._loose(prefix.rstrip(b"/"), 0):
            # `origin/HEAD` is symbolic: what it names is among the others.
            text = (read_file(self._common, name, SMALL) or b"").strip()
            if _SHA.match(text):
                found[name] = text
            if len(found) > MAX_REFS:
                raise GitFault(f"it has more than {MAX_REFS} refs")
        return set(found.values())

    def stashes(self) -> int:
        """How many stashes there are."""
        if self.resolve(b"refs/stash") is None:
            return 0
        log = read_file(self._common, "logs/refs/stash", MAX_LOG)
        return max(1, (log or b"").count(b"\n"))

    def packed(self) -> dict[bytes, bytes]:
        if self._packed is None:
            self._packed = {}
            for line in (read_file(self._common, "packed-refs", MAX_PACKED_REFS) or b"").splitlines():
                sha, _, name = line.partition(b" ")
                if _SHA.match(sha) and name.startswith(b"refs/"):
                    self._packed[name] = sha
        return self._packed

    def _loose(self, folder: bytes, depth: int) -> Iterator[bytes]:
        try:
            fd = open_below(self._common, folder)
        except OSError:
            return
        try:
            with os.scandir(fd) as scan:
                items = [(os.fsencode(item.name), item.is_dir(follow_symlinks=False)) for _, item in zip(range(MAX_REFS), scan)]  # noqa: B905 -- a cut
        finally:
            os.close(fd)
        for name, is_dir in items:
            path = folder + b"/" + name
            if not is_dir:
                yield path
            elif depth < MAX_REF_DEPTH:
                yield from self._loose(path, depth + 1)


_SECTION = re.compile(rb'\[\s*([A-Za-z0-9.-]+)\s*(?:"((?:[^"\\]|\\.)*)")?\s*\]')
_KEY = re.compile(rb"([A-Za-z][A-Za-z0-9-]*)\s*(?:=\s*(.*))?\Z")


def plain_settings(text: bytes) -> dict[str, str]:
    """``section.key`` to value for the plain sections of a git config; includes and subsections are passed over."""
    found: dict[str, str] = {}
    section: str | None = None
    for line in text.splitlines():
        rest = line.strip()
        if (match := _SECTION.match(rest)) is not None:
            section = None if match[2] is not None else match[1].decode().lower()
            rest = rest[match.end() :].strip()
        key = _KEY.match(rest)
        if section and key:
            value = re.split(rb"[#;]", key[2] or b"true")[0].strip().strip(b'"')
            found[f"{section}.{key[1].decode().lower()}"] = value.decode("ascii", "replace").lower()
    return found
