"""What is said of a crash package while it is packed, and unsaid of what is written anew: its facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from mothball.crash.facts import LISTED, Binary, LeftOut, PackageFacts
from mothball.store.read import show

if TYPE_CHECKING:
    from mothball.crash.members import Key, Packed

_SHOWN: Final = 300


class Tally:
    """Counts are of the workspace's own entries; what is left out is told of the base too."""

    def __init__(self) -> None:
        self.folders = self.symlinks = self.links_outside = 0
        self.further_names = 0
        """Hard links, which have no content of their own."""
        self.redactions: Counter[str] = Counter()
        self.left: dict[Key, LeftOut] = {}
        self._binaries: dict[Key, Binary] = {}

    def packed(self, key: Key, path: bytes, packed: Packed) -> None:
        """A file is in the package; `path` is where it lies there, below the rootfs."""
        if packed.counts is not None:
            self.redactions += packed.counts
        if packed.binary and key[0] and len(self._binaries) < LISTED:
            self._binaries[key] = Binary(show(path)[:_SHOWN], packed.size)

    def dropped(self, key: Key, packed: Packed) -> None:
        """A file of the workspace is not in the package any more."""
        self._binaries.pop(key, None)
        if packed.counts is not None:
            self.redactions -= packed.counts

    def left_out(self, key: Key, path: bytes, reason: str, size: int, rules: list[str]) -> None:
        """A file is not in the package, and why."""
        self.left[key] = LeftOut(show(path)[:_SHOWN], reason, size, rules)

    def facts(self, files: Mapping[Key, Packed], base: str | None) -> PackageFacts:
        """What the package holds by now; `files` are all that are in it."""
        left = list(self.left.values())
        own = [packed for (ours, _), packed in files.items() if ours]
        binaries = [packed.size for packed in own if packed.binary]
        return PackageFacts(
            files=len(own) + self.further_names, bytes=sum(packed.size for packed in own), folders=self.folders,
            symlinks=self.symlinks, links_outside=self.links_outside,
            redacted_files=sum(packed.counts is not None for packed in own), redactions=dict(sorted(self.redactions.items())),
            binaries=list(self._binaries.values()), binary_files=len(binaries), binary_bytes=sum(binaries),
            left_out=left[:LISTED], left_out_counts=dict(sorted(Counter(each.reason for each in left).items())), base=base,
        )  # fmt: skip
