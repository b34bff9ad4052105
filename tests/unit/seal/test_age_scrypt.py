"""age with a passphrase: what we write others open, what others write we open, and nothing else opens."""

from __future__ import annotations

import io

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.errors import InvalidParams, MothballError, SealError
from mothball.seal import age_scrypt
from mothball.seal.age_scrypt import CHUNK

PASSPHRASE = b"correct horse battery staple"
QUICK = 10
"""Work factor of the tests: the real one takes a second each time."""


def sealed(data: bytes, passphrase: bytes = PASSPHRASE, work_factor: int = QUICK) -> bytes:
    out = io.BytesIO()
    age_scrypt.encrypt(io.BytesIO(data), out, passphrase, work_factor=work_factor)
    return out.getvalue()


def opened(data: bytes, passphrase: bytes = PASSPHRASE) -> bytes:
    out = io.BytesIO()
    age_scrypt.decrypt(io.BytesIO(data), out, passphrase)
    return out.getvalue()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 17])
def test_the_age_library_opens_what_we_seal(size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    assert pyrage.passphrase.decrypt(sealed(data), PASSPHRASE.decode()) == data
    assert opened(sealed(data)) == data


@pytest.mark.parametrize("armor", [False, True])
def test_we_open_what_the_age_library_seals(armor: bool) -> None:
    data = b"0123456789" * 20_000
    theirs = pyrage.passphrase.encrypt(data, PASSPHRASE.decode(), armored=armor)
    assert opened(theirs) == data
    with pytest.raises(SealError, match="passphrase is wrong"):
        opened(theirs, b"another")


def test_the_work_factor_of_a_sealed_file_is_that_of_age() -> None:
    assert b"-> scrypt " in sealed(b"x", work_factor=age_scrypt.WORK_FACTOR)
    out = io.BytesIO()
    age_scrypt.encrypt(io.BytesIO(b"x"), out, PASSPHRASE)
    assert out.getvalue().split(b"\n")[1].endswith(b" 18")


def test_a_wrong_passphrase_says_so_and_repeats_nothing_of_it() -> None:
    with pytest.raises(SealError, match="passphrase is wrong") as caught:
        opened(sealed(b"x"), b"hunter2-hunter2")
    assert "hunter2" not in str(caught.value)


def test_an_empty_passphrase_is_refused() -> None:
    with pytest.raises(InvalidParams, match="password is required"):
        sealed(b"x", b"")


def test_two_files_of_one_passphrase_have_nothing_in_common() -> None:
    one, two = sealed(b"the same"), sealed(b"the same")
    assert one.split(b"\n")[1:] != two.split(b"\n")[1:]
    assert one[-24:] != two[-24:]


def test_a_file_cut_at_any_byte_does_not_open() -> None:
    data = sealed(b"a short secret")
    for end in range(len(data)):
        with pytest.raises(SealError):
            opened(data[:end])


@pytest.mark.parametrize("size", [CHUNK, CHUNK + 5, 2 * CHUNK])
def test_a_file_cut_between_chunks_does_not_open(size: int) -> None:
    """Each chunk is whole there, and only the mark of the last one is missing."""
    data = sealed(bytes(size))
    head = len(data) - size - 16 * (-(-size // CHUNK))
    for end in {head, head + CHUNK + 16, len(data) - 1, len(data) - 16, head + 8}:
        if end < len(data):
            with pytest.raises(SealError):
                opened(data[:end])


def test_chunks_that_change_places_do_not_open() -> None:
    data = sealed(bytes(range(256)) * (3 * CHUNK // 256))
    head = len(data) - 3 * (CHUNK + 16)
    first, second, third = (data[head + number * (CHUNK + 16) :][: CHUNK + 16] for number in range(3))
    for order in ((second, first, third), (first, third), (first, second, second), (first, second, third, third)):
        with pytest.raises(SealError):
            opened(data[:head] + b"".join(order))


def test_a_file_that_goes_on_after_its_end_does_not_open() -> None:
    for size in (5, CHUNK):
        with pytest.raises(SealError):
            opened(sealed(bytes(size)) + b"\0")


def test_an_empty_last_chunk_is_only_for_an_empty_file() -> None:
    """The specification forbids it; a reader that accepts it accepts two files for one content."""
    from mothball.seal.age_header import read_header
    from mothball.seal.age_scrypt import _chunk_nonce, _hkdf, _seal, _unwrap

    whole = sealed(bytes(CHUNK))
    reader = io.BytesIO(whole)
    header = read_header(reader)
    key = _hkdf(_unwrap(header, PASSPHRASE), reader.read(16), b"payload")
    start = reader.tell()
    forged = whole[:start] + _seal(key, _chunk_nonce(0, last=False), bytes(CHUNK)) + _seal(key, _chunk_nonce(1, last=True), b"")
    with pytest.raises(SealError):
        opened(forged)


@pytest.mark.parametrize("place", ["salt", "factor", "body", "mac", "nonce", "payload"])
def test_a_flipped_bit_anywhere_does_not_open(place: str) -> None:
    data = bytearray(sealed(b"secret"))
    lines = bytes(data).split(b"\n")
    at = {
        "salt": len(lines[0]) + 12,
        "factor": len(lines[0]) + 1 + len(lines[1]) - 1,
        "body": len(lines[0]) + len(lines[1]) + 4,
        "mac": sum(len(line) + 1 for line in lines[:3]) + 6,
        "nonce": len(data) - 6 - 16 - 16,
        "payload": len(data) - 20,
    }[place]
    data[at] ^= 1
    with pytest.raises(SealError):
        opened(bytes(data))


@pytest.mark.parametrize("factor", [b"21", b"22", b"30", b"64", b"99"])
def test_a_work_factor_that_would_take_all_memory_is_refused_before_it_is_tried(factor: bytes) -> None:
    data = sealed(b"x").replace(b" 10\n", b" " + factor + b"\n", 1)
    with pytest.raises(SealError, match=rf"work factor {factor.decode()}.*1 GiB, is done here"):
        opened(data)


@pytest.mark.parametrize(
    "factor", [b"0", b"010", b"-1", b"x", b"1e1", b"100", b"999999999999999999", "\u0661\u0660".encode(), b"10 10"]
)
def test_a_work_factor_that_is_none_is_refused(factor: bytes) -> None:
    with pytest.raises(SealError):
        opened(sealed(b"x").replace(b" 10\n", b" " + factor + b"\n", 1))


def test_a_file_for_a_key_is_not_one_for_a_passphrase() -> None:
    data = pyrage.encrypt(b"x", [pyrage.x25519.Identity.generate().to_public()])
    with pytest.raises(SealError, match="not sealed with a passphrase"):
        opened(data)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_a_file_with_anything_written_over_it_never_opens_to_something_else(data: bytes, at: int, over: bytes) -> None:
    whole = bytearray(sealed(data, work_factor=1))
    at %= len(whole)
    before = bytes(whole)
    whole[at : at + len(over)] = over
    try:
        assert opened(bytes(whole)) == data
        assert bytes(whole) == before
    except MothballError as error:
        assert error.code == "sealed"


class Dribble(io.BytesIO):
    """Reads that come in small pieces, as from a pipe."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size, 1000) if size is not None and size >= 0 else size)


def test_sources_that_answer_in_small_pieces_are_sealed_whole() -> None:
    data = bytes(range(256)) * 1000
    out = io.BytesIO()
    age_scrypt.encrypt(Dribble(data), out, PASSPHRASE, work_factor=QUICK)
    back = io.BytesIO()
    age_scrypt.decrypt(Dribble(out.getvalue()), back, PASSPHRASE)
    assert back.getvalue() == data


def test_what_progress_raises_ends_the_work() -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        age_scrypt.encrypt(io.BytesIO(bytes(3 * 1024**2)), io.BytesIO(), PASSPHRASE, stop, work_factor=QUICK)
    data = sealed(bytes(3 * 1024**2))
    with pytest.raises(KeyboardInterrupt):
        age_scrypt.decrypt(io.BytesIO(data), io.BytesIO(), PASSPHRASE, stop)
