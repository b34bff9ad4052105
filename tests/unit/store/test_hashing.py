"""Blobs that are open, held against their digests by a thread."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mothball.errors import Corrupt
from mothball.store.hashing import PIECE, Checking


def blob(folder: Path, data: bytes) -> tuple[int, str]:
    digest = hashlib.sha256(data).hexdigest()
    path = folder / digest
    path.write_bytes(data)
    return os.open(path, os.O_RDWR), f"sha256:{digest}"


def test_blobs_are_what_their_digests_say_wherever_their_descriptors_stand(tmp_path: Path) -> None:
    blobs = [blob(tmp_path, data) for data in (b"", b"one", os.urandom(2 * PIECE + 7))]
    os.lseek(blobs[1][0], 2, os.SEEK_SET)
    with Checking(blobs) as checking:
        checking.start()
        checking.start()
        checking.result()
    assert os.lseek(blobs[1][0], 0, os.SEEK_CUR) == 2
    for fd, _ in blobs:
        os.close(fd)


@pytest.mark.parametrize("place", [0, PIECE, 2 * PIECE + 6])
def test_one_byte_that_changed_is_told_with_the_digest(tmp_path: Path, place: int) -> None:
    good, bad = blob(tmp_path, b"good"), blob(tmp_path, b"\0" * (2 * PIECE + 7))
    os.pwrite(bad[0], b"!", place)
    with Checking([good, bad]) as checking, pytest.raises(Corrupt) as caught:
        checking.result()
    assert caught.value.fields["digest"] == bad[1]
    for fd, _ in (good, bad):
        os.close(fd)


def test_leaving_ends_it(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "large", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1024**4)  # an hour of reading
    with Checking([(fd, "sha256:" + "0" * 64)]) as checking:
        checking.start()
    os.close(fd)
