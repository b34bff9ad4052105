"""The head of an age file and its armor: what is accepted, and that nothing else ever is."""

from __future__ import annotations

import base64
import io

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.errors import MothballError, SealError
from mothball.seal.age_header import MAX_HEADER, b64, read_header, unb64
from mothball.seal.armor import dearmored

KEY = pyrage.x25519.Identity.generate()
MAC = base64.b64encode(bytes(32)).rstrip(b"=")
STANZA = b"-> X25519 TEiF0ypqr+bpvcqXNyCVJpL7OuwPdVwPL7KQEbFDOCc\nEmECAEcKN+n/Vs9SbWiV+Hu0r+E8R77DdWYyd83nw7U\n"
GOOD = b"age-encryption.org/v1\n" + STANZA + b"--- " + MAC + b"\n"


def test_recipients_are_read_without_a_key() -> None:
    sealed = pyrage.encrypt(b"secret", [KEY.to_public(), pyrage.x25519.Identity.generate().to_public()])
    header = read_header(io.BytesIO(sealed))
    kinds = [stanza.type for stanza in header.stanzas]
    assert kinds.count("X25519") == 2
    assert not header.passphrase
    assert sealed[header.size - 1 : header.size] == b"\n"


def test_a_passphrase_is_told_from_a_recipient() -> None:
    assert read_header(
        io.BytesIO(b"age-encryption.org/v1\n-> scrypt AAAA 10\n" + b64(bytes(32)) + b"\n--- " + MAC + b"\n")
    ).passphrase


def test_what_the_checksum_is_of_ends_before_its_space() -> None:
    header = read_header(io.BytesIO(GOOD + b"payload"))
    assert header.signed == GOOD[: -len(MAC) - 2]
    assert header.size == len(GOOD)
    assert header.stanzas[0].arguments == ("TEiF0ypqr+bpvcqXNyCVJpL7OuwPdVwPL7KQEbFDOCc",)


def test_a_header_cut_at_any_byte_is_an_error() -> None:
    for end in range(len(GOOD)):
        with pytest.raises(SealError):
            read_header(io.BytesIO(GOOD[:end]))


@pytest.mark.parametrize(
    "data",
    [
        GOOD.replace(b"v1", b"v2"),
        GOOD.replace(b"\n", b"\r\n"),
        GOOD.replace(STANZA, b""),
        GOOD.replace(b"-> X", b"->  X"),
        GOOD.replace(b"-> X25519", b"-> X\x1b519"),
        GOOD.replace(b"-> X25519 ", b"-> X25519\t"),
        GOOD.replace(b"w7U\n", b"w7V\n"),
        GOOD.replace(b"w7U\n", b"w7U=\n"),
        GOOD.replace(b"EmEC", b"EmE\xff"),
        GOOD.replace(b"EmEC", b"E" * 70),
        GOOD.replace(MAC, MAC[:-2]),
        GOOD.replace(MAC, MAC + b"AA"),
        GOOD.replace(STANZA, STANZA + b"-> scrypt AAAA 10\nAAAA\n"),
        b"age-encryption.org/v1\n" + b"-> " + b"a" * 5000 + b"\n",
    ],
)
def test_a_header_that_is_not_exactly_one_is_refused(data: bytes) -> None:
    with pytest.raises(SealError):
        read_header(io.BytesIO(data))


def test_a_header_without_end_is_given_up() -> None:
    many = b"age-encryption.org/v1\n" + STANZA * (MAX_HEADER // len(STANZA) + 10)
    source = io.BytesIO(many)
    with pytest.raises(SealError):
        read_header(source)
    assert source.tell() <= MAX_HEADER + 5000


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_a_seal_error(data: bytes) -> None:
    for prefix in (b"", b"age-encryption.org/v1\n", b"age-encryption.org/v1\n-> "):
        with pytest.raises(MothballError):
            read_header(io.BytesIO(prefix + data))


@given(st.binary(max_size=100))
def test_base64_has_one_text_per_value(data: bytes) -> None:
    assert unb64(b64(data)) == data


@pytest.mark.parametrize("text", [b"A", b"AB", b"AAA=", b"AA A", b"AA\n", b"-_"])
def test_base64_of_another_form_is_refused(text: bytes) -> None:
    with pytest.raises(SealError):
        unb64(text)


def armored(data: bytes) -> bytes:
    text = base64.b64encode(data)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN AGE ENCRYPTED FILE-----", *lines, b"-----END AGE ENCRYPTED FILE-----", b""])


@settings(max_examples=100)
@given(st.binary(min_size=1, max_size=500), st.integers(1, 100))
def test_armor_is_read_in_pieces_of_any_size(data: bytes, step: int) -> None:
    reader = dearmored(io.BytesIO(armored(data)))
    out = b""
    while piece := reader.read(step):
        out += piece
    assert out == data
    assert dearmored(io.BytesIO(armored(data).replace(b"\n", b"\r\n"))).read() == data


@pytest.mark.parametrize("size", [47, 48, 49, 96, 300])
def test_armor_cut_at_any_byte_is_an_error(size: int) -> None:
    whole = armored(bytes(range(256)) * 2)[:-1] if size == 300 else armored(bytes(size))[:-1]
    for end in range(36, len(whole)):
        with pytest.raises(SealError, match="armor"):
            dearmored(io.BytesIO(whole[:end])).read()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"AAAA\n---", b"AAA*\n---"),
        (b"-----END", b"\n-----END"),
        (b"FILE-----\n", b"FILE-----\nAAAA\n"),
        (b"-----\n", b"-----\njunk\n"),
    ],
)
def test_armor_that_is_not_exactly_one_is_refused(old: bytes, new: bytes) -> None:
    good = armored(bytes(96))
    assert old in good
    with pytest.raises(SealError, match="armor"):
        dearmored(io.BytesIO(good.replace(old, new))).read()
