"""The table of contents: what goes in comes out, and a damaged or lying one is `Corrupt`, never anything else."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mothball.errors import Corrupt
from mothball.store import tocformat as toc_module
from mothball.store.manifest import TOC_DIGEST, TOC_OFFSET, TOC_SIZE
from mothball.store.toc import Toc, encode_toc, read_frame, skippable_frame, sort_key
from tests.unit.store.build import Blob, Dir, File, Hard, Link, Mtime, layer, pack

DIGEST = bytes(range(32))


def file_row(path: bytes, size: int = 10, frame: int = 0, offset: int = 0, **changes: Any) -> tuple[Any, ...]:
    names = ("path", "type", "mode", "uid", "gid", "mtime_ns", "size", "sha256", "link", "frame", "offset")
    row = dict(zip(names, (path, "f", 0o644, 0, 0, 1, size, DIGEST, b"", frame, offset), strict=True))
    return tuple({**row, **changes}.values())


ROOT_ROW = (b"", "d", 0o755, 0, 0, 1, 0, b"", b"", 0, 0)


_files: list[Any] = []


def load(data: bytes, annotations: dict[str, str] | None = None) -> Toc:
    """`Toc` over a real file; the last few stay open for what reads on."""
    while len(_files) >= 4:
        _files.pop(0).close()
    file = tempfile.TemporaryFile()  # noqa: SIM115 -- the toc reads from it as long as it lives
    _files.append(file)
    file.write(data)
    file.flush()
    return Toc.load(file, "sha256:test", annotations)


@pytest.fixture(autouse=True)
def _close_files() -> Iterator[None]:
    yield
    while _files:
        _files.pop().close()


def everything(toc: Toc) -> tuple[Any, ...]:
    return ([row.as_tuple() for row in toc.rows()], toc.removed, list(toc.frames), toc.content, toc.entries)


def sample(count: int = 2500) -> Blob:
    spec: dict[bytes, Any] = {b"": Dir(), b"a": Dir(0o700), b"a/x": File(b"hello" * 700, 0o755), b"a/y": Hard(b"a/x")}
    spec |= {b"z%04d" % number: File(b"%d" % number) for number in range(count)}
    spec |= {b"l": Link(b"../../etc/passwd"), b"m": Mtime(5), b"name\nwith\xff\x01": File()}
    return layer(spec, [b"gone", b"old/thing"], frame_bytes=4096)


def test_a_layer_reads_back_as_written_by_annotations_and_by_trailer() -> None:
    blob = sample()
    for notes in (blob.annotations, None):
        toc = load(blob.data, notes)
        assert everything(toc)[0] == sorted(blob.rows, key=lambda row: sort_key(row[0]))
        assert toc.removed == [b"gone", b"old/thing"]
        assert len(toc.blocks) > 2
        assert toc.find(b"a/x") is not None
        assert toc.find(b"a/w") is None
        assert toc.find(b"zzz") is None
    row = toc.find(b"a/x")
    assert row is not None
    file = _files[-1]
    content = b"".join(read_frame(file, toc, number) for number in range(row.frame, len(toc.frames)))
    assert content[row.offset : row.offset + row.size] == b"hello" * 700


def test_every_zstd_decoder_passes_over_the_table() -> None:
    blob = sample(10)
    out = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob.data), read_across_frames=True).read()
    assert "sha256:" + hashlib.sha256(out).hexdigest() == blob.diff_id


def test_the_same_rows_give_the_same_bytes() -> None:
    assert sample(50).data == sample(50).data


def test_rows_from_a_key_begin_with_the_first_that_is_not_smaller() -> None:
    toc = load(sample().data)
    assert next(toc.rows(sort_key(b"a") + b"\0")).path == b"a/x"
    assert next(toc.rows(b"z1")).path == b"z1000"
    assert list(toc.rows(b"zz")) == []


def test_rows_between_two_keys_are_those_of_all_rows_however_few_or_many() -> None:
    toc = load(sample().data)
    rows = list(toc.rows())
    keys = [sort_key(row.path) for row in rows]
    dice = random.Random(3)
    for _ in range(300):
        first = dice.randrange(len(keys))
        start = keys[first] + dice.choice([b"", b"\0", b"x"])
        stop = dice.choice([None, start, start + b"\0", keys[min(first + dice.choice([1, 50, 70, 1500]), len(keys) - 1)]])
        wanted = [row for row, key in zip(rows, keys, strict=True) if start <= key and (stop is None or key < stop)]
        assert list(toc.between(start, stop)) == wanted, (start, stop)
    assert all(toc.find(row.path) == row for row in rows[::37])


def test_an_empty_layer_has_a_table_too() -> None:
    toc = load(pack(bytes(1024), []).data)
    assert list(toc.rows()) == []
    assert toc.find(b"x") is None


def test_sixty_five_thousand_rows_come_back_as_they_were() -> None:
    rng = random.Random(7)
    rows: list[Any] = [ROOT_ROW]
    for number in range(3000):
        folder = b"p%05d" % number
        rows.append((folder, "d", 0o755, 0, 0, number, 0, b"", b"", 0, 0))
        rows += [file_row(folder + b"/file-%02d.js" % j, 100 + j, sha256=rng.randbytes(32), mtime_ns=number * j) for j in range(21)]
    encoded = encode_toc(rows, [(0, 100, 4096)], [], 0)
    found = [row.path for row in load(bytes(100) + skippable_frame(encoded.payload)).rows()]
    assert found == [row[0] for row in rows]


_name = st.binary(min_size=1, max_size=12).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."} and not name.startswith(b".wh.")
)
_path = st.lists(_name, min_size=1, max_size=4).map(b"/".join)


@st.composite
def tables(draw: Callable[..., Any]) -> tuple[list[Any], list[bytes]]:
    rows: list[Any] = []
    for path in sorted(draw(st.sets(_path, max_size=30)), key=sort_key):
        kind = draw(st.sampled_from("fdlhm"))
        mtime = draw(st.integers(-(2**62), 2**62))
        if kind in "fh":
            size = draw(st.integers(0, 4000))
            link = b"first/name" if kind == "h" else b""
            rows.append(file_row(path, size, 0, draw(st.integers(0, 90)), type=kind, link=link, mtime_ns=mtime))
        else:
            rows.append((path, kind, 0o644, 1, 2, mtime, 0, b"", b"target" if kind == "l" else b"", 0, 0))
    return rows, sorted(draw(st.sets(_path, max_size=10)), key=sort_key)


@given(tables())
@settings(max_examples=60, deadline=None)
def test_whatever_a_writer_gives_comes_back(table: tuple[list[Any], list[bytes]]) -> None:
    rows, removed = table
    toc = load(pack(bytes(4096 + 1024), rows, removed, frame_bytes=2048).data)
    assert [row.as_tuple() for row in toc.rows()] == rows
    assert toc.removed == removed
    for row in rows:
        found = toc.find(row[0])
        assert found is not None
        assert found.as_tuple() == row


SMALL = sample(3)


def test_truncation_at_any_byte_is_corrupt() -> None:
    for size in range(len(SMALL.data)):
        for notes in (SMALL.annotations, None):
            with pytest.raises(Corrupt, match="sha256:test"):
                everything(load(SMALL.data[:size], notes))


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_bits_are_corrupt_or_change_nothing(data: st.DataObject) -> None:
    start = int(SMALL.annotations[TOC_OFFSET]) - 8
    changed = bytearray(SMALL.data)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(start, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    original = everything(load(SMALL.data))
    try:
        found = everything(load(bytes(changed), SMALL.annotations))
    except Corrupt as error:
        assert "sha256:test" in error.message
    else:
        assert found == original
    with contextlib.suppress(Corrupt):  # without the manifest's digest the index may be believed; no other error may come
        everything(load(bytes(changed)))


@given(st.binary(max_size=400))
@settings(max_examples=150, deadline=None)
def test_noise_in_place_of_the_index_is_corrupt_and_nothing_else(noise: bytes) -> None:
    payload = noise + struct.pack("<Q8s", len(noise), b"MBTOC001")
    with pytest.raises(Corrupt):
        everything(load(bytes(30) + skippable_frame(payload)))


def index_of(blob: Blob) -> dict[str, Any]:
    length = struct.unpack("<Q", blob.data[-16:-8])[0]
    found: dict[str, Any] = msgspec.msgpack.decode(blob.data[-16 - length : -16])
    return found


def with_index(blob: Blob, **changes: Any) -> tuple[bytes, dict[str, str]]:
    """`blob` with another index, its digest, lengths and annotations made to fit: an enemy's work, not an accident."""
    length = struct.unpack("<Q", blob.data[-16:-8])[0]
    start = int(blob.annotations[TOC_OFFSET])
    blocks = blob.data[start : len(blob.data) - 16 - length]
    index = msgspec.msgpack.encode({**index_of(blob), **changes})
    payload = blocks + index + struct.pack("<Q8s", len(index), b"MBTOC001")
    notes = {
        TOC_OFFSET: str(start),
        TOC_SIZE: str(len(payload)),
        TOC_DIGEST: "sha256:" + hashlib.sha256(index).hexdigest(),
    }
    return blob.data[: start - 8] + skippable_frame(payload), notes


def _frames(change: Callable[[list[int]], Sequence[int]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda index: {"frames": [change(index["frames"][0]), *index["frames"][1:]]}


def _blocks(change: Callable[[list[Any]], Sequence[Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda index: {"blocks": [change(index["blocks"][0]), *index["blocks"][1:]]}


LIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "version": lambda _: {"v": 2},
    "frame before the blob": _frames(lambda f: [2**63 - 1, f[1], f[2]]),
    "frame offset negative": _frames(lambda f: [-1, f[1], f[2]]),
    "frame beyond 64 bit": _frames(lambda f: [f[0], 2**64 - 1, f[2]]),
    "frame past the end": _frames(lambda f: [f[0], 10**12, f[2]]),
    "frame overlaps": lambda index: {"frames": [*index["frames"], index["frames"][0]]},
    "frame claims a bomb": _frames(lambda f: [f[0], f[1], 64 * 1024**2 + 1]),
    "frame claims nothing": _frames(lambda f: [f[0], f[1], 0]),
    "frames missing": lambda _: {"frames": []},
    "frames no list": lambda _: {"frames": 7},
    "block past the end": _blocks(lambda b: [b[0], b[1], 10**12, b[3], b[4]]),
    "block offset": _blocks(lambda b: [b[0], 1, b[2], b[3], b[4]]),
    "block rows": _blocks(lambda b: [b[0], b[1], b[2], b[3] - 1, b[4]]),
    "block too many rows": _blocks(lambda b: [b[0], b[1], b[2], 10**6, b[4]]),
    "block sha256": _blocks(lambda b: [b[0], b[1], b[2], b[3], bytes(32)]),
    "block sha256 short": _blocks(lambda b: [b[0], b[1], b[2], b[3], b""]),
    "block first path": _blocks(lambda b: [b"zz", b[1], b[2], b[3], b[4]]),
    "blocks missing": lambda _: {"blocks": []},
    "entries": lambda index: {"entries": index["entries"] + 1},
    "removed unsorted": lambda _: {"removed": [b"b", b"a"]},
    "removed the root": lambda _: {"removed": [b""]},
    "removed above": lambda _: {"removed": [b"../x"]},
    "removed absolute": lambda _: {"removed": [b"/etc"]},
    "removed with NUL": lambda _: {"removed": [b"a\0b"]},
    "content negative": lambda _: {"content": -1},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_corrupt(lie: str) -> None:
    data, notes = with_index(SMALL)
    assert everything(load(data, notes)) == everything(load(SMALL.data))
    data, notes = with_index(SMALL, **LIES[lie](index_of(SMALL)))
    for trusted in (notes, None):
        with pytest.raises(Corrupt, match="sha256:test"):
            everything(load(data, trusted))


@pytest.mark.parametrize("name", [TOC_OFFSET, TOC_SIZE, TOC_DIGEST])
@pytest.mark.parametrize("value", ["", "0", "-1", "18446744073709551616", "x", None])
def test_annotations_that_lie_are_corrupt(name: str, value: str | None) -> None:
    notes = {key: item for key, item in {**SMALL.annotations, name: value}.items() if item is not None}
    with pytest.raises(Corrupt):
        load(SMALL.data, notes)


def unchecked(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A blob whose rows no honest writer would write."""
    with monkeypatch.context() as patch:
        patch.setattr(toc_module, "_check_writer", lambda *_: None)
        return pack(bytes(2048), rows, frame_bytes=1024).data


LYING_ROWS: dict[str, list[Any]] = {
    "B-80 parent": [file_row(b"../x")],
    "B-80 parent inside": [file_row(b"a/../../x")],
    "B-80 absolute": [file_row(b"/etc/passwd")],
    "B-80 NUL": [file_row(b"a\0b")],
    "B-80 empty component": [file_row(b"a//b")],
    "B-80 dot": [file_row(b"a/./b")],
    "trailing slash": [file_row(b"a/")],
    "a whiteout as a file": [file_row(b"a/.wh.b")],
    "twice": [file_row(b"a"), file_row(b"a")],
    "unsorted": [file_row(b"b"), file_row(b"a")],
    "two roots": [ROOT_ROW, ROOT_ROW],
    "hard link out": [file_row(b"a", type="h", link=b"../../etc/passwd")],
    "hard link absolute": [file_row(b"a", type="h", link=b"/etc/passwd")],
    "hard link to nothing": [file_row(b"a", type="h", link=b"")],
    "symlink without target": [file_row(b"a", 0, type="l", link=b"")],
    "symlink with NUL": [file_row(b"a", 0, type="l", link=b"a\0b")],
    "device": [file_row(b"a", type="c")],
    "setuid and more": [file_row(b"a", mode=0o104755)],
    "negative uid": [file_row(b"a", uid=-1)],
    "huge gid": [file_row(b"a", gid=2**32)],
    "negative size": [file_row(b"a", -1)],
    "size past the frames": [file_row(b"a", 4096)],
    "size near 2^63": [file_row(b"a", 2**63 - 1, offset=1)],
    "frame that is not there": [file_row(b"a", 1, 2)],
    "frame beyond 64 bit": [file_row(b"a", 1, 2**64 - 1)],
    "offset past its frame": [file_row(b"a", 1, 0, 1024)],
    "offset beyond": [file_row(b"a", 1, 0, 2**62)],
    "no sha256": [file_row(b"a", sha256=b"")],
    "sha256 short": [file_row(b"a", sha256=b"abc")],
    "folder with a size": [(b"a", "d", 0o755, 0, 0, 1, 5, b"", b"", 0, 0)],
    "row too short": [(b"a", "f", 0o644)],
    "row of wrong types": [("a", "f", "0644", 0, 0, 1, 0, b"", b"", 0, 0)],
    "extents overlap": [(*file_row(b"a", 100), [[0, 50], [40, 10]])],
    "extents leave the file": [(*file_row(b"a", 100), [[90, 11]])],
    "extents overflow": [(*file_row(b"a", 100), [[2**63 - 1, 2**63 - 1]])],
    "extents negative": [(*file_row(b"a", 100), [[-5, 1]])],
    "extents past the frames": [(*file_row(b"a", 10**9), [[0, 4096]])],
    "no rows at all": [[]],
}


@pytest.mark.parametrize("lie", LYING_ROWS)
def test_a_row_that_lies_is_corrupt(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = LYING_ROWS[lie]
    if lie == "no rows at all":
        rows = [()]
    with monkeypatch.context() as patch:
        if len(rows[0]) < 7:
            patch.setattr("tests.unit.store.build.sum", lambda _: 0, raising=False)
        if lie in {"row too short", "no rows at all", "row of wrong types"}:
            patch.setattr(toc_module, "_chunks", lambda rows: [([(b"a",)], msgspec.msgpack.encode(rows))])
        data = unchecked(rows, monkeypatch)
    with pytest.raises(Corrupt, match="sha256:test"):
        everything(load(data))
    with pytest.raises(Corrupt, match="sha256:test"):  # one by one: see `Toc.between`
        list(load(data).between(b"", None))


def test_a_writer_is_told_about_rows_no_reader_would_take() -> None:
    for rows in ([file_row(b"b"), file_row(b"a")], [file_row(b"../x")], [file_row(b"a"), file_row(b"a")]):
        with pytest.raises(ValueError, match="path"):
            encode_toc(rows, [], [], 0)
    with pytest.raises(ValueError, match="removals"):
        encode_toc([], [], [b""], 0)


def test_blocks_of_long_names_stay_small_enough_to_read() -> None:
    deep = b"/".join([b"n" * 255] * 40)
    rows = [file_row(deep + b"/%05d" % number) for number in range(2000)]
    toc = load(pack(bytes(2048), rows).data)
    assert sum(block.rows for block in toc.blocks) == 2000
    assert len(toc.blocks) > 4
    assert toc.find(deep + b"/01234") is not None


def test_a_block_that_is_a_bomb_is_refused_before_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toc_module, "_chunks", lambda _: [([(b"a",)], bytes(300 * 1024**2))])
    blob = pack(bytes(1024), [file_row(b"a")])
    with pytest.raises(Corrupt, match="claims 314572800 bytes"):
        load(blob.data).find(b"a")


def test_a_frame_that_is_a_bomb_is_refused_before_it_grows() -> None:
    stored = zstandard.ZstdCompressor().compress(bytes(300 * 1024**2))
    encoded = encode_toc([], [(0, len(stored), 1000)], [], 0)
    toc = load(stored + skippable_frame(encoded.payload))
    with pytest.raises(Corrupt, match="claims 314572800 bytes"):
        read_frame(_files[-1], toc, 0)


def test_a_frame_with_a_flipped_bit_does_not_pass_its_checksum() -> None:
    blob = pack(os.urandom(4096), [], frame_bytes=4096)
    data = bytearray(blob.data)
    data[2000] ^= 1
    toc = load(bytes(data), blob.annotations)
    with pytest.raises(Corrupt, match="cannot be decompressed"):
        read_frame(_files[-1], toc, 0)


def test_a_blob_that_shrinks_after_opening_is_corrupt() -> None:
    toc = load(SMALL.data)
    _files[-1].truncate(100)
    with pytest.raises(Corrupt, match="it ends at"):
        everything(toc)
