"""What differs between two captures.

Two generations of one workspace share their lower layers. Whatever no layer above the shared ones names is the same in both,
so only those paths, and what lies below the removed and replaced ones, are looked up; captures that share nothing are walked
side by side. Content is compared by its sha256 and never read.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import Literal

import msgspec

from mothball.errors import NotFound
from mothball.store.merge import Event, Found, Hidden, Range, Run, flat, grouped, in_folders, layer_events, top_of
from mothball.store.read import clean_path, show
from mothball.store.toc import Toc, row_key, sort_key
from mothball.store.tree import Entry, Tree, entry_of

Kind = Literal["added", "deleted", "type", "changed", "mode", "owner", "time"]
ASPECTS: tuple[Kind, ...] = ("type", "changed", "mode", "owner", "time")
"""What can differ in an entry that both captures have, the weightiest first. ``changed`` is content, or a link's target."""


class Change(msgspec.Struct, frozen=True):
    """One path that differs. `kind` is the weightiest of `aspects`; `before` is None for ``added``, `after` for ``deleted``.

    A hard link counts as the file it is: two captures whose names share content in other ways do not differ.
    """

    path: str
    kind: Kind
    before: Entry | None
    after: Entry | None
    aspects: tuple[str, ...] = ()


class DiffTotals(msgspec.Struct):
    """Counts by kind; the bytes are those of files that are new, gone, or had and have other content."""

    added: int = 0
    deleted: int = 0
    changed: int = 0
    mode: int = 0
    owner: int = 0
    time: int = 0
    bytes_added: int = 0
    bytes_deleted: int = 0

    def count(self, change: Change) -> None:
        """Add one change; another type counts as changed."""
        kind = "changed" if change.kind == "type" else change.kind
        setattr(self, kind, getattr(self, kind) + 1)
        if change.kind in {"added", "deleted", "changed", "type"}:
            self.bytes_added += change.after.size if change.after else 0
            self.bytes_deleted += change.before.size if change.before else 0


def diff(a: Tree, b: Tree, prefix: str | bytes = "") -> Iterator[Change]:
    """What makes `b` of `a`, sorted by path components; with `prefix` only that path and what lies below it.

    `NotFound` when neither has `prefix`, `InvalidParams` when it is no relative path, `Corrupt` as `Tree.walk`.
    """
    folder = clean_path(prefix)
    before, after = a.locate(folder), b.locate(folder)
    if before is None and after is None:
        raise NotFound(f"not found in either capture: {show(folder)}", what="file", id=show(folder))
    if shared := _shared(a, b):
        below = _named_above(a, b, folder, shared)
    else:
        below = (
            (iter(a.below(folder)) if _is_folder(before) else iter(())),
            (iter(b.below(folder)) if _is_folder(after) else iter(())),
        )
    return _changes(_with(before, below[0]), _with(after, below[1]))


def compare(before: Entry, after: Entry) -> tuple[Kind, ...]:
    """The aspects in which two entries of one path differ."""
    kinds = {"hardlink": "file"}
    if kinds.get(before.type, before.type) != kinds.get(after.type, after.type):
        return ("type",)
    differs = {
        "changed": (before.size, before.link if before.type == "symlink" else before.size and before.sha256)
        != (after.size, after.link if after.type == "symlink" else after.size and after.sha256),
        "mode": before.mode != after.mode,
        "owner": (before.uid, before.gid) != (after.uid, after.gid),
        "time": before.mtime_ns != after.mtime_ns,
    }
    return tuple(aspect for aspect in ASPECTS if differs.get(aspect))


def change_of(before: Entry | None, after: Entry | None) -> Change | None:
    """The change of one path, None when there is none."""
    if before is None or after is None:
        entry = before or after
        return Change(entry.path, "deleted" if before else "added", before, after) if entry else None
    aspects = compare(before, after)
    return Change(before.path, aspects[0], before, after, aspects) if aspects else None


def _shared(a: Tree, b: Tree) -> int:
    """How many of the lower layers are the same in both."""
    count = 0
    for one, other in zip(a.layers, b.layers, strict=False):
        if one.digest != other.digest:
            break
        count += 1
    return count


def _with(entry: Found | None, below: Iterable[Found]) -> Iterator[Found]:
    if entry is not None:
        yield entry
    yield from below


def _is_folder(found: Found | None) -> bool:
    return found is not None and found.row.type == "d"


def _changes(before: Iterator[Found], after: Iterator[Found]) -> Iterator[Change]:
    """The changes between two sorted walks."""
    old, new = next(before, None), next(after, None)
    while old is not None or new is not None:
        order = _order(old, new)
        if order == 0 and old is not None and new is not None:
            # The very row of a layer that both have: only what stands above it can differ.
            if old.row is not new.row or old.mtime_ns != new.mtime_ns:
                change = change_of(entry_of(old), entry_of(new))
                if change is not None:
                    yield change
        elif change := change_of(entry_of(old) if old and order < 0 else None, entry_of(new) if new and order > 0 else None):
            yield change
        old = next(before, None) if order <= 0 else old
        new = next(after, None) if order >= 0 else new


def _order(old: Found | None, new: Found | None) -> int:
    if old is None or new is None:
        return -1 if new is None else 1
    if old.row.path == new.row.path:
        return 0
    return -1 if row_key(old.row) < row_key(new.row) else 1


# -- generations that share layers -----------------------------------------------------------------------------------------


def _named_above(a: Tree, b: Tree, folder: bytes, shared: int) -> tuple[Iterator[Found], Iterator[Found]]:
    """Both trees below `folder`, only where a layer above the `shared` ones says something; the shared ones are read once."""
    base = sort_key(folder)
    everything: Range = (base + b"\0", base + b"\1") if base else (b"\0", None)
    ranges = _ranges([layer.toc for layer in (*a.layers[shared:], *b.layers[shared:])], folder, everything)
    common = tee(heapq.merge(*(layer_events(layer.toc, layer.number, ranges) for layer in a.layers[:shared])))

    def below(tree: Tree, events: Iterator[Event]) -> Iterator[Found]:
        # All that these layers name lies in `ranges`, so there is nothing to choose.
        above = [layer_events(layer.toc, layer.number, [everything]) for layer in tree.layers[shared:]]
        return flat(in_folders(tree.layers, folder, _visible([events, *above], tree.hidden_at(folder))))

    return below(a, common[0]), below(b, common[1])


def _visible(streams: Sequence[Iterator[Event]], hidden: Hidden) -> Iterator[Run]:
    for key, group in grouped(streams):
        if (found := top_of(key, group, hidden)) is not None:
            yield [found.row], found.layer, found.mtime_ns


def _ranges(tocs: Sequence[Toc], folder: bytes, everything: Range) -> list[Range]:
    """The keys of `everything` below `folder` at which trees with these layers on top can differ: sorted, apart from each other.

    A folder or an mtime speaks of itself alone; whatever else has a name here hides or shows all below it. The folders above
    are looked at too, for what a shared layer hides with one of them is hidden in both.
    """
    points: set[bytes] = set()
    trees: set[bytes] = set()
    for toc in tocs:
        if _speaks_of(toc, folder):
            return [everything]
        for key, _, _, row in layer_events(toc, 1, [everything]):
            (points if row is not None and row.type in "dm" else trees).add(key)
    for key in [*points, *trees]:
        end = key.rfind(b"\0")
        while end > len(folder) and (above := key[:end]) not in points:
            points.add(above)
            end = key.rfind(b"\0", 0, end)
    ranges: list[Range] = []
    limit = b""
    for key in sorted(points | trees):
        if key < limit:
            continue
        limit = key + (b"\1" if key in trees else b"\0")
        ranges.append((key, limit))
    return ranges


def _speaks_of(toc: Toc, folder: bytes) -> bool:
    """True when this layer takes away or replaces `folder` or one above it: then all below may differ."""
    parts = folder.split(b"/") if folder else []
    paths = [b"/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(toc.removes(path) or ((row := toc.find(path)) is not None and row.type not in "dm") for path in paths)
