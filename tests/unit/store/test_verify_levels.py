"""What each level of verification looks at, and what it must not take for damage."""

from __future__ import annotations

import random
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import Cancelled, InvalidParams
from mothball.store import Store
from mothball.store import hashing as hashing_module
from mothball.store import verify as verify_module
from mothball.store.manifest import load_manifest
from mothball.store.refs import Ref
from mothball.store.toc import Toc, read_frame
from mothball.store.verify import Level, verify
from tests.unit.store.build import Blob, File, capture, damage, layer, new_store, pack


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def layers(store: Store, number: int, size: int = 4000) -> list[Blob]:
    """`number` captures of one layer each, all of about the same size."""
    made = [layer({b"f": File(random.Random(seed).randbytes(size))}) for seed in range(number)]
    for place, item in enumerate(made):
        capture(store, item, workspace=f"w{place}")
    return made


def bad(store: Store, level: Level, **given: Any) -> list[str]:
    return [problem.digest for problem in verify(store, level=level, **given).problems]


def test_structure_reads_tables_and_documents_and_no_content(store: Store) -> None:
    item = layers(store, 1)[0]
    digest = store.refs("w0").get().digest
    config = load_manifest(store.blobs, digest).config
    report = verify(store)
    assert (report.level, report.hashed, report.hashed_bytes) == ("structure", 2, config.size + store.blobs.size(digest))
    damage(store, item.digest, 40)  # in a frame
    assert bad(store, "structure") == []
    assert bad(store, "deep") == [item.digest]
    damage(store, item.digest, 40)
    damage(store, item.digest, len(item.data) - 200)  # in the table of contents
    assert bad(store, "structure") == [item.digest]


def test_deep_finds_every_changed_byte_and_content_finds_lies_as_well(store: Store) -> None:
    honest = layers(store, 1)[0]
    assert bad(store, "deep") == []
    rows = [(*row[:5], row[5] + 10**9, *row[6:]) if row[0] == b"f" else row for row in honest.rows]
    lying = pack(b"".join(tar_of(store, honest)), rows)
    capture(store, lying, workspace="liar")
    assert bad(store, "deep") == []
    assert bad(store, "content") == [lying.digest]


def tar_of(store: Store, item: Blob) -> list[bytes]:
    with store.blobs.open(item.digest) as file:
        toc = Toc.load(file, item.digest, item.annotations)
        return [read_frame(file, toc, number) for number in range(len(toc.frames))]


def test_a_sample_is_the_share_that_was_asked_for_and_can_be_taken_again(store: Store) -> None:
    made = layers(store, 40)
    total = sum(len(item.data) for item in made)
    documents = verify(store).hashed_bytes
    taken = []
    for seed in range(60):
        report = verify(store, level="sample", sample=10, seed=seed)
        assert (report.seed, report.sample) == (seed, 10)
        taken.append(report.hashed_bytes - documents)
    assert max(taken) <= total * 0.13
    assert 0.09 <= sum(taken) / len(taken) / total <= 0.11
    for item in made:
        damage(store, item.digest, 40)
    first = bad(store, "sample", sample=25, seed=7)
    assert 8 <= len(first) <= 11
    assert sorted(bad(store, "sample", sample=25, seed=7)) == sorted(first)
    assert sorted(bad(store, "sample", sample=25, seed=8)) != sorted(first)
    assert len(bad(store, "sample", sample=100)) == 40


def test_a_sample_of_one_large_layer_reads_it_now_and_then(store: Store) -> None:
    layers(store, 1)
    documents = verify(store).hashed_bytes
    read = sum(verify(store, level="sample", sample=30, seed=seed).hashed_bytes > documents for seed in range(200))
    assert 35 <= read <= 85


@pytest.mark.parametrize("sample", [0, -1, 100.5, float("nan")])
def test_an_impossible_share_or_level_is_refused(store: Store, sample: float) -> None:
    with pytest.raises(InvalidParams):
        verify(store, level="sample", sample=sample)
    with pytest.raises(InvalidParams):
        verify(store, level="deeper")  # type: ignore[arg-type]


def test_what_is_forgotten_and_collected_meanwhile_is_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layers(store, 3)

    def forgets(*args: Any) -> Any:
        for number in (0, 1):
            store.refs(f"w{number}").replace(lambda _: [])
            store.blobs.path(made[number].digest).unlink()
        store.blobs.path(made[2].digest).unlink()
        return original(*args)

    original = verify_module.rehash
    monkeypatch.setattr(verify_module, "rehash", forgets)
    problems = verify(store, level="deep").problems
    assert [(problem.digest, problem.refs) for problem in problems] == [(made[2].digest, ["w2:latest"])]


def test_a_damaged_layer_is_named_although_its_capture_has_a_successor_by_now(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = layers(store, 1)[0]
    damage(store, item.digest, 40)
    newer = capture(store, item, layer({b"g": File(b"g")}))

    def captures(*args: Any) -> Any:
        size = store.blobs.size(newer)
        store.refs("w0").replace(lambda refs: [Ref("latest", newer, size, refs[0].annotations)])
        return original(*args)

    store.blobs.path(item.digest).write_bytes(item.data)
    original = verify_module.rehash
    damage(store, item.digest, 40)
    monkeypatch.setattr(verify_module, "rehash", captures)
    assert [(problem.digest, problem.refs) for problem in verify(store, level="deep").problems] == [(item.digest, ["w0:latest"])]


def test_hashing_uses_several_threads_and_stops_when_it_is_told_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing_module.os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=20)
    calls = count()
    original = store.blobs.open

    def opening(digest: str) -> Any:
        if next(calls) < 2:
            both.wait()  # breaks unless a second thread opens another blob
        return original(digest)

    threads = threading.active_count()
    digests = [item.digest for item in layers(store, 6, size=300_000)]
    monkeypatch.setattr(store.blobs, "open", opening)
    done = list(hashing_module.rehash(store.blobs, digests, lambda _: None))
    assert sorted(done) == [(digest, None) for digest in sorted(digests)]

    def stop(_: int) -> None:
        raise Cancelled(job="j")

    with pytest.raises(Cancelled):
        list(hashing_module.rehash(store.blobs, digests, stop))
    assert threading.active_count() == threads
