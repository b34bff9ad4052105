"""The reference system's `.stim`: a bundle under a password, byte for byte as it writes and reads it (B-120 to B-126).

For interop only. Its key is one SHA-256 of the password, without a salt: a password that a person can remember is found by trying.
Its header is not authenticated, and parts of two files with one password can be swapped. Seal with age what has to stay secret.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from typing import Any, BinaryIO, Final, NamedTuple

from mothball.errors import InvalidParams, Oversize, SealError
from mothball.store.read import show

MAGIC: Final = b"STIM"
VERSION: Final = 2
MAX_HEADER: Final = 16 * 1024**2
"""Largest header that is read, bytes (B-126)."""
MAX_PART: Final = 512 * 1024**2
"""Largest part that is written or read, bytes: each has one authentication tag and so has to be in memory as a whole, up to four
times at the peak."""
NONCE: Final = 24
TAG: Final = 16
OVERHEAD: Final = NONCE + TAG
MAX_CLEAR: Final = MAX_PART - OVERHEAD
"""Largest part before it is encrypted, bytes."""
SUFFIX: Final = ".stim"
_BLOCK: Final = 32
_PIECE: Final = 64 * 1024
_FIXED: Final = 9
_LENGTH: Final = 4
_HASHES: Final = frozenset({"md5", "sha1", "sha256", "sha512"})
"""Checksums that the container's own library knows; its further one (lthn) is no cryptographic hash."""


class StimHeader(NamedTuple):
    """What can be read without the password: the JSON `fields`, where the payload begins (`start`) and its `payload` bytes."""

    fields: dict[str, Any]
    start: int
    payload: int


class StimLayout(NamedTuple):
    """`config` and `rootfs`: bytes of the encrypted parts; `start`, where the first begins."""

    config: int
    rootfs: int
    start: int


def derive_key(password: bytes) -> bytes:
    """B-124: one SHA-256, which is why this format is weak; `InvalidParams` for an empty password."""
    if not password:
        raise InvalidParams("password is required for encryption")
    return hashlib.sha256(password).digest()


def pack_stim(out: BinaryIO, config: bytes, rootfs: bytes, password: bytes) -> int:
    """Write `config` (the bytes of config.json) and `rootfs` (a tar without ``rootfs/`` in front of its names); returns the bytes.

    `Oversize` for a part of more than `MAX_PART`.
    """
    return pack_with_nonces(out, config, rootfs, password, os.urandom(NONCE), os.urandom(NONCE))


def pack_with_nonces(out: BinaryIO, config: bytes, rootfs: bytes, password: bytes, first: bytes, second: bytes) -> int:
    """`pack_stim` with given nonces, for known answers only: a nonce that is used twice gives the key stream away."""
    key = derive_key(password)
    for name, part in (("config.json", config), ("rootfs", rootfs)):
        if len(part) > MAX_CLEAR:
            raise Oversize(
                f"{name} has {len(part)} bytes; a .stim is encrypted in one piece in memory, at most {MAX_CLEAR} here. "
                "age has no limit",
                size=len(part),
                limit=MAX_CLEAR,
            )
    sealed_config = first + _encrypt(key, first, config)
    sizes = {"config_size": len(sealed_config), "rootfs_size": len(rootfs) + OVERHEAD}
    header = json.dumps(
        {**sizes, "encryption_algorithm": "chacha20poly1305", "tim": True, "version": "1.0"}, sort_keys=True, separators=(",", ":")
    ).encode()
    size = 0
    for data in (MAGIC, bytes((VERSION,)), len(header).to_bytes(4, "big"), header, len(sealed_config).to_bytes(4, "big")):
        size += len(data)
        out.write(data)
    out.write(sealed_config)
    out.write(second)
    body = _encrypt(key, second, rootfs)
    out.write(body)
    return size + len(sealed_config) + NONCE + len(body)


def unpack_stim(src: BinaryIO, password: bytes) -> tuple[bytes, bytes]:
    """(config, rootfs tar) of the container at the beginning of `src`, which is seekable; `SealError` with the causes of B-126."""
    key = derive_key(password)
    header = read_stim_header(src)
    layout = read_stim_layout(src, header)
    for name, size in (("config.json", layout.config), ("rootfs", layout.rootfs)):
        if size > MAX_PART:
            raise Oversize(f"{name} has {size} bytes; at most {MAX_PART} are opened in memory here", size=size, limit=MAX_PART)
    src.seek(layout.start)
    config = _open(key, src, layout.config, "config.json")
    return config, _open(key, src, layout.rootfs, "rootfs")


def read_stim_header(src: BinaryIO, magic: bytes = MAGIC) -> StimHeader:
    """The header at the beginning of `src`, without a password, its checksum verified if there is one (B-120).

    `magic` ``b"TRIX"`` is the same container with something else in it.
    """
    src.seek(0, os.SEEK_END)
    whole = src.tell()
    src.seek(0)
    fixed = src.read(_FIXED)
    if fixed[:4] != magic:
        raise _undecoded(f"invalid magic: expected {magic.decode()}, got {show(fixed[:4])}")
    if len(fixed) < _FIXED:
        raise _undecoded("it ends within its header")
    if fixed[4] != VERSION:
        raise _undecoded(f"invalid version {fixed[4]}, only {VERSION} is known")
    length = int.from_bytes(fixed[5:9], "big")
    if length > MAX_HEADER:
        raise _undecoded(f"header of {length} bytes, at most {MAX_HEADER} are possible")
    if length > whole - _FIXED:
        raise _undecoded(f"header of {length} bytes in a file of {whole}")
    fields = _fields(src.read(length))
    header = StimHeader(fields, _FIXED + length, whole - _FIXED - length)
    _check_sum(src, header)
    return header


def read_stim_layout(src: BinaryIO, header: StimHeader) -> StimLayout:
    """Where the two parts lie (B-121), all bounds in whole numbers; `SealError` when lengths do not add up."""
    src.seek(header.start)
    raw = src.read(_LENGTH)
    length = int.from_bytes(raw, "big")
    if len(raw) < _LENGTH or _LENGTH + length > header.payload:
        raise SealError("invalid stim payload: it is shorter than the lengths in it say")
    layout = StimLayout(length, header.payload - _LENGTH - length, header.start + _LENGTH)
    for name, found in (("config_size", layout.config), ("rootfs_size", layout.rootfs)):
        said = header.fields.get(name, found)
        if type(said) not in (int, float) or said != found:
            raise SealError(
                f"invalid stim payload: {name} in its header is {show(repr(said)[:40].encode())}, there are {found} bytes"
            )
    return layout


def _fields(text: bytes) -> dict[str, Any]:
    try:
        # What is no JSON (NaN, 1e999) is read by some and would make JSON of ours that others cannot read.
        fields = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise _undecoded("its header is not JSON") from None
    if not isinstance(fields, dict):
        raise _undecoded("its header is not a JSON object")
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _check_sum(src: BinaryIO, header: StimHeader) -> None:
    said = header.fields.get("checksum")
    if not isinstance(said, str):
        return
    name = header.fields.get("checksum_algo")
    if not isinstance(name, str) or name not in _HASHES:
        raise _undecoded("it has a checksum of an algorithm that is not known")
    found = hashlib.new(name, usedforsecurity=False)
    src.seek(header.start)
    while piece := src.read(1024**2):
        found.update(piece)
    if said != found.hexdigest():
        raise _undecoded("checksum mismatch")


def _undecoded(cause: str) -> SealError:
    return SealError(f"failed to decode stim: {cause}")


def _exactly(src: BinaryIO, count: int) -> bytes:
    data = src.read(count)
    if len(data) != count:
        raise SealError("invalid stim payload: it changed while it was read")
    return data


def obfuscated(nonce: bytes, data: bytes) -> bytes:
    """B-123: `data` XORed with SHA-256(nonce + counter) block by block; twice is once undone. It protects nothing."""
    out = bytearray(data)
    start = hashlib.sha256(nonce)
    number = 0
    for place in range(0, len(out), _PIECE):
        piece = out[place : place + _PIECE]
        blocks = []
        for _ in range(0, len(piece), _BLOCK):
            block = start.copy()
            block.update(number.to_bytes(8, "big"))
            blocks.append(block.digest())
            number += 1
        stream = b"".join(blocks)[: len(piece)]
        out[place : place + _PIECE] = (int.from_bytes(piece, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(piece), "big")
    return bytes(out)


def _encrypt(key: bytes, nonce: bytes, clear: bytes) -> bytes:
    from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt as seal

    return seal(obfuscated(nonce, clear), None, nonce, key)


def _open(key: bytes, src: BinaryIO, size: int, name: str) -> bytes:
    from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt as opened
    from nacl.exceptions import CryptoError

    if size < OVERHEAD:
        raise SealError(f"decryption failed (wrong password?): {name} has {size} bytes, which is too few")
    nonce = _exactly(src, NONCE)
    try:
        clear = opened(_exactly(src, size - NONCE), None, nonce, key)
    except CryptoError:
        raise SealError(f"decryption failed (wrong password?): {name} does not open, or it is damaged") from None
    return obfuscated(nonce, clear)
