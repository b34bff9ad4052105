"""Is an image in the store what its manifest, its config and its tables of contents say?

Asked of everything that comes from elsewhere before a ref names it: digests prove that the bytes are the sender's, not
that the sender's tables tell the truth about them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from mothball.errors import Corrupt
from mothball.store import Store
from mothball.store.content import check_diff_id, compare_layer
from mothball.store.manifest import Manifest, diff_ids, load_manifest
from mothball.store.tree import Tree

T = TypeVar("T")
_ENTRIES: Final = 1024
"""Entries between two reports."""


def check_contents(store: Store, digest: str, report: Callable[[int], None], again: Callable[[str], bool]) -> None:
    """Read the capture `digest` as a whole; raises `Corrupt`, which names the blob that is at fault.

    `report` is called with the bytes read so far. `again` may replace a blob that is damaged here (by its digest) and says
    whether it did; then the blob is looked at once more.
    """
    manifest = load_manifest(store.blobs, digest)
    expected = _checked(manifest.config.digest, lambda: diff_ids(store.blobs, manifest), again)
    done = 0
    for number, descriptor in enumerate(manifest.layers):
        look = partial(_layer, store, manifest, number, expected, lambda seen, done=done: report(done + seen))  # type: ignore[misc]
        done += _checked(descriptor.digest, look, again)
    with Tree.open(store, digest) as tree:
        for number, _ in enumerate(tree.walk()):
            if number % _ENTRIES == 0:
                report(done)


def _checked(digest: str, look: Callable[[], T], again: Callable[[str], bool]) -> T:
    try:
        return look()
    except Corrupt:
        if not again(digest):
            raise
    return look()


def _layer(store: Store, manifest: Manifest, number: int, expected: list[str], report: Callable[[int], None]) -> int:
    """Bytes of the layer's tar."""
    found, size = compare_layer(store, manifest.layers[number], number, report)
    check_diff_id(manifest.layers[number], found, expected[number])
    return size
