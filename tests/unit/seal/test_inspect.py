"""What a sealed file is, said without its key."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.errors import SealError
from mothball.seal import age_scrypt, stim
from mothball.seal.inspect import MAX_SHOWN, look
from tests.unit.seal.keys import ssh_key

KEY = pyrage.x25519.Identity.generate()
SIZES = (0, 1, 64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, 200_000)


def seen(data: bytes) -> dict[str, Any]:
    found = look(io.BytesIO(data))
    assert found is not None
    json.dumps(found)
    return found


def by_passphrase(data: bytes) -> bytes:
    out = io.BytesIO()
    age_scrypt.encrypt(io.BytesIO(data), out, b"pw", work_factor=2)
    return out.getvalue()


@pytest.mark.parametrize("size", SIZES)
def test_b119_the_clear_size_of_an_age_file_is_known_without_its_key(size: int) -> None:
    for data in (pyrage.encrypt(bytes(size), [KEY.to_public()]), by_passphrase(bytes(size))):
        found = seen(data)
        assert (found["format"], found["clear_size"], found["cut"], found["armored"]) == ("age", size, False, False)


def test_b119_recipients_are_named_by_kind_and_a_passphrase_by_its_work() -> None:
    data = pyrage.encrypt(b"x", [KEY.to_public(), pyrage.ssh.Recipient.from_str(ssh_key()[1])])
    assert sorted(each["type"] for each in seen(data)["recipients"]) == ["X25519", "ssh-ed25519"]
    assert next(each for each in seen(data)["recipients"] if each["type"] == "ssh-ed25519")["key"]
    assert seen(by_passphrase(b"x"))["recipients"] == [{"type": "scrypt", "work_factor": 2}]
    assert seen(by_passphrase(b"x"))["passphrase"]
    assert not seen(data)["passphrase"]


def test_b119_armor_is_looked_through() -> None:
    found = seen(pyrage.encrypt(b"x" * 1000, [KEY.to_public()], armored=True))
    assert (found["armored"], found["clear_size"]) == (True, 1000)


def test_an_age_file_that_is_cut_is_told_where_that_shows() -> None:
    data = pyrage.encrypt(b"", [KEY.to_public()])
    assert seen(data[:-1])["cut"]
    assert seen(data[:-1])["clear_size"] is None
    with pytest.raises(SealError):
        look(io.BytesIO(data[:100]))


def test_b119_a_stim_shows_magic_header_and_sizes() -> None:
    out = io.BytesIO()
    stim.pack_stim(out, b"{}", bytes(1024), b"pw")
    found = seen(out.getvalue())
    assert (found["format"], found["magic"], found["version"]) == ("stim", "STIM", 2)
    assert found["header"] == {
        "config_size": 42, "encryption_algorithm": "chacha20poly1305", "rootfs_size": 1064, "tim": True, "version": "1.0",
    }  # fmt: skip
    assert (found["payload_size"], found["config_size"], found["rootfs_size"]) == (4 + 42 + 1064, 42, 1064)
    with pytest.raises(SealError):
        look(io.BytesIO(out.getvalue()[:-1]))


def test_b127_a_trix_is_named_and_not_opened() -> None:
    found = seen(b"TRIX\x02\0\0\0\x02{}rest")
    assert (found["format"], found["header"], found["payload_size"]) == ("trix", {}, 4)


def test_a_header_as_large_as_it_may_be_is_not_repeated() -> None:
    text = json.dumps({"a": "x" * MAX_SHOWN}).encode()
    assert seen(b"TRIX\x02" + len(text).to_bytes(4, "big") + text)["header"] == ["a"]


@pytest.mark.parametrize("data", [b"", b"x", b"STI", b"hello world", bytes(2000), b"AGE-encryption"])
def test_what_is_not_sealed_is_none(data: bytes) -> None:
    assert look(io.BytesIO(data)) is None


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"age-encryption.org/v1\n", b"STIM\x02\0\0\0\x02{}", b"TRIX", b"-----BEGIN AGE ENCRYPTED FILE-----\n"]),
    st.binary(),
)
def test_bytes_of_any_kind_are_an_answer_or_a_seal_error(head: bytes, data: bytes) -> None:
    for body in (data, base64.b64encode(data) + b"\n-----END AGE ENCRYPTED FILE-----\n"):
        try:
            json.dumps(look(io.BytesIO(head + body)))
        except SealError as error:
            assert error.message.isprintable()
