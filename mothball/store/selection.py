"""Which entries of a capture a restore brings back, and in which order: folders by path, files as they lie in the layers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Final

from mothball.errors import InvalidParams, NotFound, Oversize
from mothball.store.read import show
from mothball.store.toc import sort_key
from mothball.store.tree import Found, Tree
from mothball.store.wildmatch import SPECIAL, BrokenPattern, compile_glob

MAX_ENTRIES: Final = 20_000_000
"""Most entries of one restore: a table of contents of a few megabytes can name many millions, and each needs memory here."""
MAX_PATTERNS: Final = 1000
_SHOWN: Final = 5
BLOCK: Final = 4096
"""Bytes that the smallest file takes on usual file systems; for estimates."""


Rule = tuple[re.Pattern[bytes], bool, bool]
"""What a name or path has to match, whether it is the path, and whether only folders count."""


class Patterns:
    """The patterns of ``--include``. A path is chosen when it, or a folder above it, matches one; without any, everything is.

    As in .gitignore: a slash in it (but for one at the end) ties a pattern to the root, without one it matches a name at
    any depth, a slash at the end means folders only. There is no ``!``.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        if len(patterns) > MAX_PATTERNS:
            raise InvalidParams(f"{len(patterns)} include patterns; at most {MAX_PATTERNS} are allowed")
        self._rules = [_rule(pattern) for pattern in patterns]
        self._folders: dict[bytes, bool] = {}
        self._idle = dict(zip(patterns, self._rules, strict=True))

    def __bool__(self) -> bool:
        return bool(self._rules)

    def chooses(self, path: bytes, is_folder: bool) -> bool:
        """True when `path` is chosen; ask for a folder before what it holds, else folders above are looked at again."""
        if not self._rules:
            return True
        parent, _, name = path.rpartition(b"/")
        found = (bool(parent) and self._folder(parent)) or self._matches(path, name, is_folder)
        if is_folder:
            if len(self._folders) >= 100_000:  # noqa: PLR2004 - memory must not grow with the tree
                self._folders.clear()
            self._folders[path] = found
        return found

    def look(self, path: bytes, is_folder: bool) -> None:
        """Note which patterns match `path`, so that `idle` can name those that matched nothing."""
        name = path.rpartition(b"/")[2]
        for pattern, rule in list(self._idle.items()):
            if _applies(rule, path, name, is_folder):
                del self._idle[pattern]

    @property
    def idle(self) -> list[str]:
        """The patterns that matched no path they were shown, in the order given."""
        return list(self._idle)

    def _folder(self, path: bytes) -> bool:
        known = self._folders.get(path)
        if known is not None:
            return known
        parts = path.split(b"/")
        return any(self._matches(b"/".join(parts[:count]), parts[count - 1], True) for count in range(1, len(parts) + 1))

    def _matches(self, path: bytes, name: bytes, is_folder: bool) -> bool:
        return any(_applies(rule, path, name, is_folder) for rule in self._rules)


def _applies(rule: Rule, path: bytes, name: bytes, is_folder: bool) -> bool:
    expression, anchored, folders_only = rule
    return (is_folder or not folders_only) and expression.fullmatch(path if anchored else name) is not None


def _rule(pattern: str) -> Rule:
    try:
        raw = os.fsencode(pattern)
    except (UnicodeEncodeError, TypeError):
        raise InvalidParams(f"include pattern {pattern!r} is not a text that file names can have") from None
    shown = show(raw)
    if raw.startswith(b"!"):
        raise InvalidParams(f"include pattern {shown!r}: none is negative; for a name that begins with '!' write '\\!'")
    folders_only = raw.endswith(b"/")
    text = raw.rstrip(b"/")
    anchored = b"/" in text
    text = text.removeprefix(b"/").removeprefix(b"./")
    if not text or b"\0" in text or b".." in text.split(b"/"):
        raise InvalidParams(f"include pattern {shown!r} must name something below the workspace's root")
    try:
        if not any(char in SPECIAL for char in text):
            return re.compile(re.escape(text)), anchored, folders_only
        return compile_glob(text, path=anchored), anchored, folders_only
    except BrokenPattern as error:
        raise InvalidParams(f"include pattern {shown!r} can never match: {error}") from None


class Selection:
    """What is brought back of one capture. Lists of rows, sorted by path but for `files`.

    `folders` begins with the root; folders that only lie above something chosen are in it but not in `named`. `files` are
    sorted as their content lies in the layers. `groups`: path of a chosen file -> its further names. `known`: paths of the
    capture that were not chosen (for telling what is foreign).
    """

    def __init__(self) -> None:
        self.entries: list[Found] = []
        self.folders: list[Found] = []
        self.files: list[Found] = []
        self.links: list[Found] = []
        self.groups: dict[bytes, list[Found]] = {}
        self.named: set[bytes] = set()
        self.known: set[bytes] = set()

    @property
    def count(self) -> int:
        return len(self.entries)

    @property
    def size(self) -> int:
        """Bytes of content, holes included, each file once however many names it has."""
        return sum(found.row.size for found in self.files)


def select(tree: Tree, patterns: Patterns, *, known: bool = False) -> Selection:
    """The entries of `tree` that `patterns` choose; `known` asks for the paths of the others too.

    `NotFound` when a pattern matches nothing (a typing error must not look like a success), `Oversize`, and the errors of
    `Tree.rows` for a table of contents that lies.
    """
    out = Selection()
    further: list[Found] = []
    waiting: list[Found] = []  # folders above the current path that are not chosen themselves
    for found in tree.rows():
        row = found.row
        kind = row.type
        if patterns:
            path = row.path
            if patterns.idle and path:
                patterns.look(path, kind == "d")
            while waiting and waiting[-1].row.path and not path.startswith(waiting[-1].row.path + b"/"):
                waiting.pop()
            if not path or not patterns.chooses(path, kind == "d"):
                if kind == "d":
                    waiting.append(found)
                if known:
                    out.known.add(path)
                continue
            if waiting:
                out.folders += waiting
                out.entries += waiting
                waiting.clear()
        out.entries.append(found)
        if kind == "f":
            out.files.append(found)
        elif kind == "d":
            out.folders.append(found)
            out.named.add(row.path)
        elif kind == "l":
            out.links.append(found)
        else:
            further.append(found)
        if len(out.entries) > MAX_ENTRIES:
            raise Oversize(what="the capture (entries)", size=len(out.entries), limit=MAX_ENTRIES)
    if idle := patterns.idle:
        names = ", ".join(repr(pattern) for pattern in idle[:_SHOWN]) + (" and others" if len(idle) > _SHOWN else "")
        raise NotFound(f"nothing in the capture matches the include pattern {names}; nothing was restored", what="path", id=idle[0])
    _group(out, further)
    out.files.sort(key=lambda found: (found.layer, found.row.frame, found.row.offset) if found.row.size else (-1, 0, 0))
    return out


def _group(out: Selection, further: list[Found]) -> None:
    """Give each row ``h`` its first name; what has lost it (changed since, or not chosen) becomes a file, its peers link to that.

    Two rows share content only when they say the same of it: a table that claims a link between different files is not believed.
    """
    if not further:
        return
    wanted = {(found.layer, found.row.link) for found in further}
    first = {
        _content(found, found.row.path): found for found in out.files if (found.layer, found.row.path) in wanted
    }  # fmt: skip
    for found in further:
        key = _content(found, found.row.link)
        known = first.get(key)
        if known is None:
            first[key] = found
            out.files.append(found)
        else:
            out.groups.setdefault(known.row.path, []).append(found)


def _content(found: Found, name: bytes) -> tuple[int, bytes, int, int, int, bytes]:
    row = found.row
    return found.layer, name, row.frame, row.offset, row.size, row.sha256


def estimate(files: Iterable[Found]) -> int:
    """Bytes that `files` take on disk: holes are not counted, each file is rounded up to whole blocks."""
    total = 0
    for found in files:
        row = found.row
        size = row.size if row.extents is None else sum(length for _, length in row.extents)
        total += -(-size // BLOCK) * BLOCK
    return total


def by_path(found: Found) -> bytes:
    """The key under which entries sort as `Tree.walk` has them."""
    return sort_key(found.row.path)
