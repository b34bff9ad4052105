"""age files with a passphrase, streamed. Written from https://age-encryption.org/v1 on hashlib's scrypt and libsodium.

The library used for keys holds the whole file in memory when it is given a passphrase. What is written here is opened by the `age`
and `rage` programs and the other way round.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any, BinaryIO, Final

from mothball.errors import InvalidParams, SealError
from mothball.seal.age import Progress
from mothball.seal.age_header import VERSION, Header, b64, broken, read_header, unb64
from mothball.seal.armor import dearmored

WORK_FACTOR: Final = 18
"""log2 of scrypt's N when sealing: 256 MiB and about a second per guess, the default of `age`."""
MAX_WORK_FACTOR: Final = 20
"""The largest that is opened: 1 GiB. A file asks for it before its passphrase is known, so anybody could ask for anything."""
CHUNK: Final = 64 * 1024
TAG: Final = 16
_KEY: Final = 16
_SALT: Final = 16
_NONCE: Final = 16
_LABEL: Final = b"age-encryption.org/v1/scrypt"
_LAST: Final = 1
_COUNTER: Final = 11
_ZERO: Final = bytes(12)
_REPORT: Final = 1024**2


def check_passphrase(passphrase: bytes) -> None:
    """`InvalidParams` for an empty passphrase (B-126)."""
    if not passphrase:
        raise InvalidParams("password is required for encryption: an empty passphrase protects nothing")


def encrypt(
    src: BinaryIO, out: BinaryIO, passphrase: bytes, progress: Progress | None = None, *, work_factor: int = WORK_FACTOR
) -> None:
    """Seal the rest of `src` into `out` with `passphrase`."""
    check_passphrase(passphrase)
    file_key, salt = os.urandom(_KEY), os.urandom(_SALT)
    wrapped = _seal(_wrap_key(passphrase, salt, work_factor), _ZERO, file_key)
    signed = VERSION + b"-> scrypt %b %d\n%b\n---" % (b64(salt), work_factor, b64(wrapped))
    out.write(signed + b" " + b64(_mac(file_key, signed)) + b"\n")
    nonce = os.urandom(_NONCE)
    out.write(nonce)
    key, number, done, told = _hkdf(file_key, nonce, b"payload"), 0, 0, 0
    piece = _full(src)
    while True:
        following = _full(src) if len(piece) == CHUNK else b""
        out.write(_seal(key, _chunk_nonce(number, last=not following), piece))
        done += len(piece)
        if progress is not None and done - told >= _REPORT:
            told = done
            progress(done)
        if not following:
            return
        piece, number = following, number + 1


def decrypt(src: BinaryIO, out: BinaryIO, passphrase: bytes, progress: Progress | None = None) -> None:
    """Open `src` into `out`: `SealError` for a wrong passphrase and for a file that is damaged, cut or continued at any byte.

    `out` has got what stood before the damage by then, and must not be used.
    """
    reader = dearmored(src)
    header = read_header(reader)
    file_key = _unwrap(header, passphrase)
    if not hmac.compare_digest(_mac(file_key, header.signed), header.mac):
        raise broken("its checksum is wrong")
    nonce = _full(reader, _NONCE)
    if len(nonce) != _NONCE:
        raise _damaged()
    key, number, done, told = _hkdf(file_key, nonce, b"payload"), 0, 0, 0
    piece = _full(reader, CHUNK + TAG)
    while True:
        following = _full(reader, CHUNK + TAG) if len(piece) == CHUNK + TAG else b""
        clear = _open(key, _chunk_nonce(number, last=not following), piece)
        if clear is None or (not clear and number):  # an empty chunk stands only for an empty file
            raise _damaged()
        out.write(clear)
        done += len(clear)
        if progress is not None and done - told >= _REPORT:
            told = done
            progress(done)
        if not following:
            return
        piece, number = following, number + 1


def _unwrap(header: Header, passphrase: bytes) -> bytes:
    stanza = header.stanzas[0]
    if stanza.type != "scrypt":
        raise SealError(what="this file", reason="it is not sealed with a passphrase")
    if len(stanza.arguments) != 2:  # noqa: PLR2004 -- salt and work factor
        raise broken("a passphrase without salt and work factor")
    salt, factor = unb64(stanza.arguments[0].encode()), stanza.arguments[1]
    if len(salt) != _SALT or len(stanza.body) != _KEY + TAG:
        raise broken("a salt or a key of a wrong length")
    if not factor.isdecimal() or factor.startswith("0") or len(factor) > 2:  # noqa: PLR2004 -- digits
        raise broken("a work factor that is none")
    if int(factor) > MAX_WORK_FACTOR:
        raise SealError(
            what="this file",
            reason=f"it asks for scrypt with work factor {factor}, {1 << (int(factor) - MAX_WORK_FACTOR)} GiB of memory; at most "
            f"{MAX_WORK_FACTOR}, 1 GiB, is done here. If you trust where it comes from, `age -d` opens it",
        )
    file_key = _open(_wrap_key(passphrase, salt, int(factor)), _ZERO, stanza.body)
    if file_key is None:
        raise SealError(what="this file", reason="the passphrase is wrong")
    return file_key


def _damaged() -> SealError:
    return SealError(what="this file", reason="it is damaged or cut")


def _full(src: Any, count: int = CHUNK) -> bytes:
    """Exactly `count` bytes, fewer only at the end."""
    data: bytes = src.read(count)
    while data and len(data) < count:
        more = src.read(count - len(data))
        if not more:
            break
        data += more
    return data


def _wrap_key(passphrase: bytes, salt: bytes, work_factor: int) -> bytes:
    n, r = 1 << work_factor, 8
    try:
        # OpenSSL refuses to use more than `maxmem`; a little more than the table itself is needed.
        return hashlib.scrypt(passphrase, salt=_LABEL + salt, n=n, r=r, p=1, maxmem=128 * r * (n + 64), dklen=32)
    except (MemoryError, ValueError) as error:
        raise SealError(what="this file", reason=f"scrypt needs {128 * r * n >> 20} MiB of memory, which is not there") from error


def _hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) for 32 bytes, which is one block."""
    return hmac.digest(hmac.digest(salt or bytes(32), secret, "sha256"), info + b"\x01", "sha256")


def _mac(file_key: bytes, signed: bytes) -> bytes:
    return hmac.digest(_hkdf(file_key, b"", b"header"), signed, "sha256")


def _chunk_nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(_COUNTER, "big") + (b"\x01" if last else b"\x00")


def _seal(key: bytes, nonce: bytes, clear: bytes) -> bytes:
    from nacl.bindings import crypto_aead_chacha20poly1305_ietf_encrypt as seal

    return seal(clear, None, nonce, key)


def _open(key: bytes, nonce: bytes, sealed: bytes) -> bytes | None:
    """None for a wrong key and for what is damaged."""
    from nacl.bindings import crypto_aead_chacha20poly1305_ietf_decrypt as opened
    from nacl.exceptions import CryptoError

    if len(sealed) < TAG:
        return None
    try:
        return opened(sealed, None, nonce, key)
    except CryptoError:
        return None
