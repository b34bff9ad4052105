"""The file a package is written to: parts appended by a thread, and stretches of it that make room for others."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball.crash import outfile
from mothball.errors import OperationFailed
from mothball.store.tarhead import END_OF_ARCHIVE, header


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8), st.integers(1, 16))
def test_stretches_that_move_within_a_file_arrive_whole_whatever_their_order(sizes: list[tuple[int, int]], piece: int) -> None:
    # Each stretch is followed by a gap, which becomes longer or shorter: what is behind it moves.
    before, after, moves = bytearray(), bytearray(), []
    for number, (length, gap) in enumerate(sizes):
        content = bytes([65 + number]) * length + bytes(range(length))
        moves.append(outfile.Move(len(before), len(before) + len(content), len(after) - len(before)))
        before += content + b"." * gap
        after += content + b"." * (40 - gap)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        patch.setattr(outfile, "_PIECE", piece)
        file.write(before)
        file.flush()
        outfile.shifted(file.fileno(), moves, lambda _: None)
        for move in moves:
            there = os.pread(file.fileno(), move.end - move.start, move.start + move.by)
            assert there == bytes(before[move.start : move.end])


def test_a_file_that_ends_before_what_is_moved_is_told_and_not_padded(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"12345")
    with path.open("r+b") as file, pytest.raises(OperationFailed):
        outfile.shifted(file.fileno(), [outfile.Move(2, 9, 1)], lambda _: None)


def test_many_small_parts_are_written_whole(tmp_path: Path) -> None:
    parts = [b"%d," % number for number in range(5000)]
    with (tmp_path / "out").open("w+b") as file:
        with outfile.OutFile(file, 3, sync=True) as out:
            for part in parts:
                out.write(part, b"")
            assert out.place == 3 + sum(map(len, parts))
        file.seek(0)
        assert file.read() == b"\0\0\0" + b"".join(parts)


@pytest.mark.parametrize(
    ("seconds", "nanoseconds", "said"),
    [(0, 1, "0.000000001"), (1_700_000_000, 120_000_000, "1700000000.12"), (8**11 - 1, 999_999_999, "8589934591.999999999")],
)
def test_the_time_of_a_member_has_its_nanoseconds_whatever_its_name(seconds: int, nanoseconds: int, said: str) -> None:
    names = ["short", "folder/" * 20 + "long", "\u00e9", "x" * 300]
    data = b"".join(header(os.fsencode(name), b"0", 0o644, 0, 0, 0, seconds, b"", nanoseconds) for name in names)
    with tarfile.open(fileobj=io.BytesIO(data + END_OF_ARCHIVE), mode="r:") as tar:
        assert [(each.name, each.pax_headers["mtime"]) for each in tar] == [(name, said) for name in names]
