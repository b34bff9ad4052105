"""The reference system's container, byte for byte, and everything that is not it."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.errors import InvalidParams, MothballError, Oversize, SealError
from mothball.seal import stim
from mothball.seal.stim import StimLayout

PASSWORD = b"correct horse"
FIRST, SECOND = bytes(range(24)), bytes(range(24, 48))
CONFIG = b'{"Header":{},"Payload":null}'
EMPTY_TAR = bytes(1024)
HEADER = b'{"config_size":68,"encryption_algorithm":"chacha20poly1305","rootfs_size":1064,"tim":true,"version":"1.0"}'
CONFIG_PART = bytes.fromhex(
    "000102030405060708090a0b0c0d0e0f1011121314151617c0b6bda4e7b9bf9c8d2b3176c4bb8827bc2d5c4a7e7c6b81300e5d672a84bbdb50732953"
    "e56698263f9cf3fc"
)


def known() -> bytes:
    """The container of the known answer."""
    out = io.BytesIO()
    assert stim.pack_with_nonces(out, CONFIG, EMPTY_TAR, PASSWORD, FIRST, SECOND) == 1251
    return out.getvalue()


def container(header: Any, payload: bytes, *, magic: bytes = b"STIM", version: int = 2) -> io.BytesIO:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return io.BytesIO(magic + bytes([version]) + len(text).to_bytes(4, "big") + text + payload)


def opened(data: bytes, password: bytes = PASSWORD) -> tuple[bytes, bytes]:
    return stim.unpack_stim(io.BytesIO(data), password)


def test_b124_the_key_is_one_sha256_of_the_password() -> None:
    assert stim.derive_key(PASSWORD).hex() == "4104d36f8da2c254349f85836793ebe029e0c957063a34c91c2e9203187b5631"


def test_b123_the_keystream_is_sha256_of_nonce_and_block_number() -> None:
    stream = stim.obfuscated(FIRST, bytes(64))
    assert stream[:32].hex() == "4de61c1aa198c6f64da60919b751f4a96d5d93898d2816537ec70f78425bf7ed"
    assert stream[32:] == hashlib.sha256(FIRST + (1).to_bytes(8, "big")).digest()


def test_b120_b121_b122_the_known_answer_is_written_byte_for_byte() -> None:
    data = known()
    assert hashlib.sha256(data).hexdigest() == "560eae76800dfd0a04e19b06c8e36dea9dfd1c3a4442ecd68335810b7ab8c29f"
    assert data[:9] == b"STIM\x02" + (106).to_bytes(4, "big")
    assert data[9:115] == HEADER
    assert data[115:119] == (68).to_bytes(4, "big")
    assert data[119:187] == CONFIG_PART
    assert len(data[187:]) == 1064


def test_b120_b121_b122_the_known_answer_is_read() -> None:
    assert opened(known()) == (CONFIG, EMPTY_TAR)


def test_two_containers_of_one_bundle_have_other_nonces() -> None:
    one, two = io.BytesIO(), io.BytesIO()
    for out in (one, two):
        stim.pack_stim(out, CONFIG, EMPTY_TAR, PASSWORD)
    assert one.getvalue()[119:143] != two.getvalue()[119:143]
    assert opened(one.getvalue()) == opened(two.getvalue())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 200_000), st.binary(min_size=1, max_size=40))
def test_what_is_packed_is_unpacked(config: bytes, size: int, password: bytes) -> None:
    rootfs = bytes(range(256)) * (size // 256 + 1)
    out = io.BytesIO()
    stim.pack_stim(out, config, rootfs[:size], password)
    assert opened(out.getvalue(), password) == (config, rootfs[:size])


def test_b126_an_empty_password_is_refused_both_ways() -> None:
    with pytest.raises(InvalidParams, match="password is required for encryption"):
        stim.pack_stim(io.BytesIO(), CONFIG, EMPTY_TAR, b"")
    with pytest.raises(InvalidParams, match="password is required for encryption"):
        opened(known(), b"")


def test_b126_a_wrong_password_says_so_and_repeats_nothing_of_it() -> None:
    with pytest.raises(SealError, match=r"decryption failed \(wrong password\?\)") as caught:
        opened(known(), b"Correct Horse")
    assert "orse" not in str(caught.value)


@pytest.mark.parametrize("at", [0, 4, 5, 8, 115, 119, 150, 187, 500, 1250])
def test_a_flipped_bit_is_an_error(at: int) -> None:
    data = bytearray(known())
    data[at] ^= 1
    with pytest.raises(SealError):
        opened(bytes(data))


def test_b121_a_container_cut_at_any_byte_is_an_error() -> None:
    data = known()
    for end in range(len(data)):
        with pytest.raises(SealError):
            opened(data[:end])
    with pytest.raises(SealError):
        opened(data + b"\0")


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFC, 0x80000000, 1065 + 68, 1133])
def test_b121_a_lying_length_is_invalid_and_not_an_allocation(length: int) -> None:
    data = bytearray(known())
    data[115:119] = length.to_bytes(4, "big")
    with pytest.raises(SealError, match="invalid stim payload"):
        opened(bytes(data))


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0\0\0", b"\0\0\0\x01"])
def test_b126_a_payload_that_is_too_short_is_invalid(payload: bytes) -> None:
    with pytest.raises(SealError, match="invalid stim payload"):
        stim.unpack_stim(container({}, payload), PASSWORD)


def test_b126_a_part_without_room_for_nonce_and_tag_does_not_decrypt() -> None:
    with pytest.raises(SealError, match="decryption failed"):
        stim.unpack_stim(container({}, (39).to_bytes(4, "big") + bytes(39) + bytes(40)), PASSWORD)


@pytest.mark.parametrize("sizes", [{"config_size": 67}, {"rootfs_size": 1}, {"config_size": "68"}, {"rootfs_size": True}])
def test_sizes_in_the_header_that_are_not_those_of_the_payload_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(SealError, match="in its header is"):
        stim.unpack_stim(container(sizes, known()[115:]), PASSWORD)


@pytest.mark.parametrize("fields", [{}, {"tim": True, "config_size": 68.0}, {"more": [1, {"a": None}]}])
def test_b120_a_header_of_another_version_of_the_reference_system_is_read(fields: dict[str, Any]) -> None:
    assert stim.unpack_stim(container(fields, known()[115:]), PASSWORD) == (CONFIG, EMPTY_TAR)


@pytest.mark.parametrize("name", ["md5", "sha1", "sha256", "sha512"])
def test_b120_a_checksum_is_verified_when_there_is_one(name: str) -> None:
    payload = known()[115:]
    digest = hashlib.new(name, payload).hexdigest()
    assert stim.unpack_stim(container({"checksum": digest, "checksum_algo": name}, payload), PASSWORD)[0] == CONFIG
    with pytest.raises(SealError, match="checksum mismatch"):
        stim.read_stim_header(container({"checksum": digest, "checksum_algo": name}, payload[:-1] + b"x"))


@pytest.mark.parametrize(
    "fields", [{"checksum": "aa"}, {"checksum": "aa", "checksum_algo": "lthn"}, {"checksum": "", "checksum_algo": 1}]
)
def test_b120_a_checksum_that_cannot_be_computed_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SealError, match="algorithm that is not known"):
        stim.read_stim_header(container(fields, b"1234"))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "invalid magic"),
        (b"TRIX\x02", "invalid magic: expected STIM, got TRIX"),
        (b"\x1b[2J\x02", r"got \\x1b\[2J"),
        (b"STIM", "ends within its header"),
        (b"STIM\x01\0\0\0\0", "invalid version 1"),
        (b"STIM\x02\xff\xff\xff\xff", "header of 4294967295 bytes, at most 16777216"),
        (b"STIM\x02\x01\0\0\x01", "at most 16777216"),
        (b"STIM\x02\x01\0\0\0", "header of 16777216 bytes in a file of 9"),
        (b"STIM\x02\0\0\0\x02[]", "not a JSON object"),
        (b"STIM\x02\0\0\0\x02{]", "not JSON"),
        (b"STIM\x02\0\0\0\x02\xff\xff", "not JSON"),
        (b'STIM\x02\0\0\0\x09{"a":NaN}', "not JSON"),
        (b'STIM\x02\0\0\0\x0b{"a":1e999}', "not JSON"),
    ],
)
def test_b126_a_bad_container_says_what_is_wrong(data: bytes, cause: str) -> None:
    with pytest.raises(SealError, match="failed to decode stim: ") as caught:
        stim.read_stim_header(io.BytesIO(data))
    with pytest.raises(SealError, match=cause):
        raise caught.value


def test_a_header_nested_without_end_is_not_a_crash() -> None:
    text = b"[" * 1_000_000
    with pytest.raises(SealError, match="not JSON"):
        stim.read_stim_header(container(text, b""))


def test_the_largest_header_is_read() -> None:
    text = b'{"a":"' + b"x" * (stim.MAX_HEADER - 8) + b'"}'
    assert len(text) == 16 * 1024**2
    assert stim.read_stim_header(container(text, b"1234")).payload == 4


def test_a_part_that_does_not_fit_in_memory_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = known(), io.BytesIO()
    monkeypatch.setattr(stim, "MAX_CLEAR", 1023)
    with pytest.raises(Oversize, match="age has no limit"):
        stim.pack_stim(out, CONFIG, EMPTY_TAR, PASSWORD)
    assert out.getvalue() == b""
    monkeypatch.setattr(stim, "MAX_PART", 1063)
    with pytest.raises(Oversize, match="rootfs has 1064 bytes"):
        opened(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_one_of_our_errors(data: bytes) -> None:
    for prefix in (b"", b"STIM\x02", b"STIM\x02\0\0\0\x02{}"):
        with pytest.raises(MothballError):
            opened(prefix + data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 400))
def test_the_layout_never_leaves_the_payload(length: int, size: int) -> None:
    file = container({}, length.to_bytes(4, "big") + bytes(size))
    header = stim.read_stim_header(file)
    if length > size:
        with pytest.raises(SealError, match="invalid stim payload"):
            stim.read_stim_layout(file, header)
    else:
        assert stim.read_stim_layout(file, header) == StimLayout(length, size - length, 15)
