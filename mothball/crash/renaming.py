"""Names in a crash package: a secret in a file's name is replaced too, and no two files end up with one name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

MAX_COMPONENT: Final = 255
"""Bytes that a name may have on disk; a pseudonym may be longer than what it stands for."""
_MARK: Final = 9


class Renaming:
    """The paths of one tree as a package has them, folders asked for before what they hold.

    `redact` changes one component of a path. `taken` says whether the tree has an entry at a path of its own.
    """

    def __init__(self, redact: Callable[[bytes], bytes], taken: Callable[[bytes], bool]) -> None:
        self._redact = redact
        self._taken = taken
        self._folders: dict[bytes, bytes] = {b"": b""}
        self._names: dict[bytes, bytes] = {}
        self._given: dict[bytes, bytes] = {}
        self.plain = False
        """Set by who knows that the names it asks for hold no secret: they are not looked at again."""

    def folder(self, path: bytes) -> bytes:
        """The new path of the folder `path`, remembered for what lies in it."""
        new = self._folders[path] = self.file(path)
        return new

    def file(self, path: bytes) -> bytes:
        """The new path of what is no folder."""
        if not path:
            return path
        above, slash, name = path.rpartition(b"/")
        new = name if self.plain else self._names.get(name)
        if new is None:
            new = self._names[name] = _short(self._redact(name))
        parent = self._folders.get(above)
        if parent is None:
            parent = self.folder(above)
        if new == name and parent == above:
            return path
        if new != name:
            new = self._free(above + slash, new, path)
        return parent + slash + new

    def _free(self, above: bytes, name: bytes, path: bytes) -> bytes:
        """`name`, or with a number when something else in that folder has it (a mark that somebody wrote by hand, say)."""
        number, out = 1, name
        while self._given.get(above + out, path) != path or self._taken(above + out):
            number += 1
            out = _short(b"%b~%d" % (name, number))
        self._given[above + out] = path
        return out


def _short(name: bytes) -> bytes:
    if len(name) <= MAX_COMPONENT:
        return name
    # The digest is of the redacted name: one of the secret itself could be tried out.
    return name[: MAX_COMPONENT - _MARK] + b"~" + hashlib.sha256(name).hexdigest()[: _MARK - 1].encode()


def leads_out(path: bytes, target: bytes) -> bool:
    """True when the symbolic link `path` of a workspace leads out of it by its text alone; nothing is looked at on disk."""
    if target.startswith(b"/"):
        return True
    depth = path.count(b"/")
    for part in target.split(b"/"):
        if part == b"..":
            depth -= 1
        elif part not in {b"", b"."}:
            depth += 1
        if depth < 0:
            return True
    return False
