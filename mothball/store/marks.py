"""Marks: which blobs are reachable, and who holds them, in a few bytes per blob.

A blob is known here by the first eight bytes of its digest, in an open-addressing table of plain arrays: a million blobs are
tens of megabytes, where a set of texts would be hundreds. Two digests that agree in those bytes (nobody has ever seen it
happen by chance) make the collector keep a blob that it could take, never the other way round.
"""

from __future__ import annotations

from array import array
from typing import Final

import msgspec

_FIRST_SLOTS: Final = 1 << 12
_FULL: Final = 0.66
"""Share of slots in use at which the table doubles."""
_NAME: Final = 64
_EVERYBODY: Final = -1
"""Owner of a blob that workspaces of several repos hold. An owner of -2 - r means: several workspaces of repo r."""


class Usage(msgspec.Struct):
    """What a workspace or a repo holds, bytes. `logical`: the files of its captures, each counted in full; `stored`: the blobs
    that hold them; `exclusive`: those that nobody else holds; `shared`: the rest; `reclaimable`: what only its forgotten
    captures still hold; `charged`: each blob in full to the first that holds it, so that the sum over all is what there is.
    `released_at`: ms, when the collector saw that the workspace was released."""

    name: str
    repo: str = ""
    captures: int = 0
    logical: int = 0
    stored: int = 0
    exclusive: int = 0
    reclaimable: int = 0
    charged: int = 0
    released_at: int | None = None

    @property
    def shared(self) -> int:
        return self.stored - self.exclusive

    def to_dict(self) -> dict[str, object]:
        """The figures in JSON types."""
        return {**msgspec.structs.asdict(self), "shared": self.shared}


class Marks:
    """The reachable blobs and the accounts of those who hold them.

    Owners must come one after the other, and those of one repo together: that is how a blob is counted once for each.
    """

    def __init__(self) -> None:
        self._mask = _FIRST_SLOTS - 1
        self._keys = array("Q", bytes(8 * _FIRST_SLOTS))
        self._owner = array("i", bytes(4 * _FIRST_SLOTS))
        self._last = array("i", bytes(4 * _FIRST_SLOTS))
        self._limit = int(_FIRST_SLOTS * _FULL)
        self._repo_of: list[int] = []
        self.workspaces: list[Usage] = []
        self.repos: list[Usage] = []
        self.count = 0
        self.bytes = 0

    def owner(self, workspace: str, repo: str) -> int:
        """Begin with the next workspace; what `add` is given from now on is its."""
        if not self.repos or self.repos[-1].name != repo:
            self.repos.append(Usage(repo, repo))
        self._repo_of.append(len(self.repos) - 1)
        self.workspaces.append(Usage(workspace, repo))
        return len(self.workspaces) - 1

    def capture(self, logical: int) -> None:
        """The workspace that is being counted has one more capture, whose files have `logical` bytes."""
        for usage in (self.workspaces[-1], self.repos[-1]):
            usage.captures += 1
            usage.logical += logical

    def add(self, digest: str, size: int) -> None:
        """The workspace that is being counted holds this blob of `size` bytes; twice is once."""
        key = int(digest[7:23], 16) or 1
        keys, mask = self._keys, self._mask
        slot = key & mask
        while (found := keys[slot]) != key:
            if not found:
                self._insert(slot, key, size)
                return
            slot = (slot + 1) & mask
        here = len(self.workspaces) - 1
        last = self._last[slot]
        if last == here:
            return
        self._last[slot] = here
        repo = self._repo_of[here]
        self.workspaces[here].stored += size
        if self._repo_of[last] != repo:
            self.repos[repo].stored += size
        self._share(slot, repo, size)

    def _insert(self, slot: int, key: int, size: int) -> None:
        here = len(self.workspaces) - 1
        self._keys[slot] = key
        self._owner[slot] = self._last[slot] = here
        for usage in (self.workspaces[here], self.repos[self._repo_of[here]]):
            usage.stored += size
            usage.exclusive += size
            usage.charged += size
        self.count += 1
        self.bytes += size
        if self.count > self._limit:
            self._grow()

    def _share(self, slot: int, repo: int, size: int) -> None:
        """One more workspace, of `repo`, holds this blob: it stops being somebody's alone."""
        owner = self._owner[slot]
        if owner == _EVERYBODY:
            return
        alone = owner >= 0
        before = self._repo_of[owner] if alone else -2 - owner
        if alone:
            self.workspaces[owner].exclusive -= size
        if before == repo:
            self._owner[slot] = -2 - repo
        else:
            self.repos[before].exclusive -= size
            self._owner[slot] = _EVERYBODY

    def _grow(self) -> None:
        slots = 2 * (self._mask + 1)
        mask = slots - 1
        keys, owner, last = array("Q", bytes(8 * slots)), array("i", bytes(4 * slots)), array("i", bytes(4 * slots))
        for old, key in enumerate(self._keys):
            if key:
                slot = key & mask
                while keys[slot]:
                    slot = (slot + 1) & mask
                keys[slot], owner[slot], last[slot] = key, self._owner[old], self._last[old]
        self._keys, self._owner, self._last, self._mask = keys, owner, last, mask
        self._limit = int(slots * _FULL)

    def has(self, name: str) -> bool:
        """True when the blob with this name (64 hex digits) is reachable; False for any other text."""
        try:
            key = int(name[:16], 16) or 1
        except ValueError:
            return False
        keys, mask = self._keys, self._mask
        slot = key & mask
        while (found := keys[slot]) != key:
            if not found:
                return False
            slot = (slot + 1) & mask
        return len(name) == _NAME

    @property
    def table_bytes(self) -> int:
        """Memory of the table."""
        return 16 * (self._mask + 1)
