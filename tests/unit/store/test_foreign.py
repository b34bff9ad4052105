"""JSON from elsewhere: what is hostile is damaged, and never takes down what reads it or what is written beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import Corrupt, InvalidParams
from mothball.store import Store
from mothball.store.blobs import BlobStore
from mothball.store.foreign import MAX_DEPTH, read_json
from mothball.store.manifest import PREFIX, Descriptor, Manifest, build_config, load_config, load_manifest
from mothball.store.refs import Ref
from mothball.store.snapshots import add_snapshot, clean_states, snapshots
from tests.unit.store.build import File, capture, layer, new_store

DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "surrogate": '"\\ud800"',
    "deep": DEEP,
    "nan": "NaN",
    "latin-1": '"\xe9"',
    "cut": "[1",
    "number": "9" * 5000,
    "nothing": "",
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_another_reader_would_not_take_is_corrupt_and_says_what_it_was(text: str) -> None:
    with pytest.raises(Corrupt, match=r"the thing is damaged: .") as caught:
        read_json(f'{{"x":{text}}}'.encode("latin-1"), dict, "the thing", digest="sha256:1")
    assert caught.value.fields["digest"] == "sha256:1"


def test_what_nests_deeper_than_others_can_write_is_corrupt() -> None:
    levels = MAX_DEPTH - 1
    assert read_json(b'{"a":' + b"[" * levels + b"]" * levels + b"}", dict, "it")
    with pytest.raises(Corrupt, match="nested deeper"):
        read_json(b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", dict, "it")


def test_a_text_is_read_as_its_bytes_are_and_a_surrogate_in_it_is_no_text() -> None:
    assert read_json('["\xe9"]', list, "it") == ["\xe9"]
    with pytest.raises(Corrupt, match="UTF-8"):
        read_json('["\ud800"]', list, "it")


def test_what_is_too_large_is_not_looked_at() -> None:
    with pytest.raises(Corrupt, match="more than 10 bytes"):
        read_json(b"[" * 11, list, "it", limit=10)


@pytest.mark.parametrize("text", [DEEP, '"\\ud800"'], ids=["deep", "surrogate"])
def test_a_hostile_manifest_or_config_is_corrupt(store: Store, text: str) -> None:
    blobs: BlobStore = store.blobs
    good = load_manifest(blobs, capture(store, layer({b"a": File(b"a")})))
    data = json.dumps({"schemaVersion": 2, "config": {}, "layers": []})[:-1] + f',"x":{text}}}'
    digest, _ = blobs.put(data.encode())
    with pytest.raises(Corrupt, match=digest):
        load_manifest(blobs, digest)
    config = build_config(diff_ids=[], labels={}).decode()[:-1] + f',"x":{text}}}'
    digest, _ = blobs.put(config.encode())
    with pytest.raises(Corrupt, match=digest) as caught:
        load_config(blobs, Manifest(2, Descriptor("", digest, len(config)), good.layers))
    assert caught.value.fields["digest"] == digest


@pytest.mark.parametrize("value", ["\ud800", 5, ["list"]], ids=["surrogate", "number", "list"])
def test_an_index_that_could_not_be_read_again_is_not_written(store: Store, value: Any) -> None:
    digest = capture(store, layer({b"a": File(b"a")}), workspace="w")
    refs = store.refs("w")
    before = (refs.folder / "index.json").read_bytes()
    evil = Ref("", digest, store.blobs.size(digest), {PREFIX + "git": value})
    with pytest.raises(InvalidParams, match="nothing was changed"):
        add_snapshot(refs, fence=1, job="j", at_ms=1, source=evil)
    assert (refs.folder / "index.json").read_bytes() == before
    assert [ref.name for ref in refs.list()] == ["latest"]


@pytest.mark.parametrize("text", [DEEP, '[{"path":"\\ud800"}]', "no json"], ids=["deep", "surrogate", "text"])
def test_a_git_state_that_cannot_be_read_is_none_in_a_listing(store: Store, text: str) -> None:
    digest = capture(store, layer({b"a": File(b"a")}), workspace="w")
    source = Ref("", digest, store.blobs.size(digest), {PREFIX + "git": text})
    add_snapshot(store.refs("w"), fence=1, job="j", at_ms=1, source=source)
    (found,) = snapshots(store.refs("w"))
    assert found.git == []


def test_a_foreign_git_state_is_taken_when_it_has_the_shape_of_one() -> None:
    mine = [{"path": "x", "kind": "dir", "head": "1" * 40, "branch": None, "dirty": False, "unpushed": 3, "stashes": 0}]
    (kept,) = json.loads(clean_states(json.dumps(mine), 1000))
    assert kept == {key: value for key, value in mine[0].items() if value is not None}
    for text in ("", DEEP, "\ud800", '[{"path":"\\ud800"}]', '[{"path":["x"]}]', '[{"path":"x","head":{"a":1}}]', "{}", None, 5):
        assert clean_states(text, 10_000_000) == ""
    assert clean_states(json.dumps(mine), 10) == ""
