"""What a capture left out, so that nothing of it is taken for foreign: its list, and the rules by which it was made.

The list alone is not enough. What a rule leaves out may be made any time after the capture, and a workspace's own ignore
files say what is not to be captured, not what may be deleted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from mothball.store.below import read_small
from mothball.store.foreign import read_json
from mothball.store.ignore import IgnoreRules
from mothball.store.manifest import PREFIX, load_config
from mothball.store.tree import Tree

OMISSIONS: Final = PREFIX + "omissions"
RULES: Final = PREFIX + "rules"
IGNORE_FILE: Final = ".mothballignore"
IGNORE_FILE_LIMIT: Final = 1024**2
WHITEOUT: Final = b".wh."
CACHE_TAG: Final = "CACHEDIR.TAG"
CACHE_SIGNATURE: Final = b"Signature: 8a477f597d28d172789f06886806bc55"
"""The first 43 bytes of a valid tag, see bford.info/cachedir."""


def is_cache(fd: int) -> bool:
    """True when the open folder has a valid tag, which says that all else in it can be made again."""
    text = read_small(fd, CACHE_TAG, 64 * 1024)
    return text is not None and text.startswith(CACHE_SIGNATURE)


class Rules(msgspec.Struct, frozen=True):
    """By which rules a capture left out, as its config records them. The defaults leave out most: those of a capture without."""

    ignore: tuple[str, ...] = ()
    """Patterns given with the capture, beside those in the ignore files of the tree."""
    gitignore: bool = True
    caches: bool = True
    max_file_bytes: int | None = None


def ignore_files(*, gitignore: bool) -> tuple[str, ...]:
    """Names of the ignore files, the weaker first: a later rule wins."""
    return (".gitignore", IGNORE_FILE) if gitignore else (IGNORE_FILE,)


class _Path(msgspec.Struct):
    path: str


class _List(msgspec.Struct):
    listed: list[_Path]
    further: int


class LeftOut:
    """What the capture `tree` left out. `cut`: its list had no room for everything. Paths are bytes relative to the root.

    `Corrupt` for labels that cannot be read: nothing may be deleted by guess.
    """

    def __init__(self, tree: Tree) -> None:
        config = load_config(tree.blobs, tree.manifest).get("config")
        labels = config.get("Labels") if isinstance(config, Mapping) else None
        found = labels if isinstance(labels, Mapping) else {}
        digest = tree.manifest.config.digest
        listed = read_json(
            _text(found, OMISSIONS, '{"listed":[],"further":0}'), _List, "the list of what was left out", digest=digest
        )
        self.cut = bool(listed.further)
        self.rules: Rules = read_json(
            _text(found, RULES, "{}"), Rules, "the record of the rules of what was left out", digest=digest
        )
        self._paths = {item.path for item in listed.listed}
        self._tree = tree
        self._known = {b"": IgnoreRules.root(self.rules.ignore)}
        self._done: set[bytes] = set()

    def holds(self, path: bytes) -> bool:
        """True for a path of the list; its names are texts, so two odd ones may look alike, and then both are meant."""
        return path.decode("utf-8", "backslashreplace") in self._paths

    def within(self, folder: bytes) -> bool:
        """True for a folder whose content was left out, itself or one above it."""
        while folder:
            if self.holds(folder):
                return True
            folder = folder.rpartition(b"/")[0]
        return False

    def inside(self, folder: bytes, on_disk: Callable[[bytes, str], bytes | None]) -> IgnoreRules:
        """The ignore rules inside a folder of the capture; `InvalidParams` for broken ones.

        `on_disk` reads an ignore file, by folder and name, which itself was left out (it ignores itself, say) and ruled.
        """
        rules = self._known[b""]
        parts = folder.split(b"/") if folder else []
        for count in range(len(parts) + 1):
            place = b"/".join(parts[:count])
            if place in self._done:
                rules = self._known[place]
                continue
            texts = self._texts(place, on_disk)
            rules = self._known[place] = rules.descend(os.fsdecode(place), list(texts.values()), list(texts))
            self._done.add(place)
        return rules

    def _texts(self, folder: bytes, on_disk: Callable[[bytes, str], bytes | None]) -> dict[str, bytes]:
        found = {}
        for name in ignore_files(gitignore=self.rules.gitignore):
            path = folder + b"/" + name.encode() if folder else name.encode()
            row = self._tree.locate(path)
            text = None
            if row is not None:
                if row.row.type in {"f", "h"} and row.row.size <= IGNORE_FILE_LIMIT:
                    text = self._tree.read(path)
            elif self.holds(path):
                text = on_disk(folder, name)
            if text is not None:
                found[name] = text
        return found


def _text(labels: Mapping[Any, Any], name: str, default: str) -> str:
    found = labels.get(name)
    return default if found is None else str(found)
