"""What a pulled image says of itself reaches the index only in a form that every listing can show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mothball.errors import Corrupt
from mothball.store.manifest import MEDIA_CONFIG, PREFIX, Descriptor, build_config, build_manifest, load_manifest
from mothball.store.refs import Ref
from mothball.store.snapshots import add_snapshot, snapshots
from tasks.transfer import _annotations
from tests.unit.cli.conftest import workspace
from tests.unit.store.build import File, capture, layer, new_store

DEEP = "[" * 30_000 + "]" * 30_000
STATE = {"path": "x", "kind": "dir", "head": "1" * 40, "branch": "main"}


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        (json.dumps([STATE]), [STATE]),
        ('[{"path":"\\ud800"}]', []),
        (DEEP, []),
        ('[{"path":"x","head":{"a":1}}]', []),
        (json.dumps([{**STATE, "branch": "b" * 70_000}]), []),
    ],
    ids=["good", "escaped surrogate", "deep", "other shape", "large"],
)
def test_the_labels_of_a_pulled_image_never_make_an_index_unreadable(tmp_path: Path, label: str, kept: list[object]) -> None:
    store = new_store(tmp_path / "store")
    blob = layer({b"a": File(b"a")})
    capture(store, blob, workspace="w")
    below = load_manifest(store.blobs, store.refs("w").get().digest)
    config = build_config(diff_ids=[blob.diff_id], labels={PREFIX + "git": label})
    digest, _ = store.blobs.put(config)
    annotations = {PREFIX + "format": "1", PREFIX + "files": "9" * 6000, PREFIX + "bytes": "12"}
    manifest = build_manifest(config=Descriptor(MEDIA_CONFIG, digest, len(config)), layers=below.layers, annotations=annotations)
    digest, _ = store.blobs.put(manifest)
    notes = _annotations(store, digest, workspace())
    add_snapshot(store.refs("w"), fence=1, job="j", at_ms=1, source=Ref("", digest, len(manifest), notes))
    (made,) = snapshots(store.refs("w"))
    assert (made.git, made.files, made.bytes) == (kept, 0, 12)
    assert [ref.name for ref in store.refs("w").list()] == ["latest", "snap-1"]


def test_a_config_that_no_reader_takes_ends_the_pull_and_changes_nothing(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    below = load_manifest(store.blobs, capture(store, layer({b"a": File(b"a")}), workspace="w"))
    config = build_config(diff_ids=["x"], labels={PREFIX + "git": "\ud800"})
    digest, _ = store.blobs.put(config)
    manifest = build_manifest(config=Descriptor(MEDIA_CONFIG, digest, len(config)), layers=below.layers, annotations={})
    digest, _ = store.blobs.put(manifest)
    with pytest.raises(Corrupt):
        _annotations(store, digest, workspace())
