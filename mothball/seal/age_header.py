"""The head of an age file: to whom it is sealed, readable without a key.

Written from https://age-encryption.org/v1, strict and bounded.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, Final, NamedTuple

from mothball.errors import SealError

VERSION: Final = b"age-encryption.org/v1\n"
MAX_LINE: Final = 4096
MAX_HEADER: Final = 1024**2
"""A recipient needs a few hundred bytes; more than this is no header but an attack on whoever reads it."""
_COLUMNS: Final = 64
_ARGUMENT: Final = re.compile(rb"[\x21-\x7e]+")
_MAC_BYTES: Final = 32


class Stanza(NamedTuple):
    """One recipient: its `type`, further `arguments`, and the wrapped key."""

    type: str
    arguments: tuple[str, ...]
    body: bytes


class Header(NamedTuple):
    """`stanzas`, the `mac`, `signed` (the bytes the mac is of) and `size`, the bytes before the payload."""

    stanzas: tuple[Stanza, ...]
    mac: bytes
    signed: bytes
    size: int

    @property
    def passphrase(self) -> bool:
        """True for a file sealed with a passphrase."""
        return any(stanza.type == "scrypt" for stanza in self.stanzas)


def read_header(src: Any) -> Header:
    """The header at the position of `src`, of which exactly the header is read if it has ``readline``; else a little more may be.

    `SealError` for whatever is none.
    """
    return _Reader(src).header()


def b64(data: bytes) -> bytes:
    """Base64 as age writes it: without padding."""
    return base64.b64encode(data).rstrip(b"=")


def unb64(text: bytes) -> bytes:
    """What `b64` wrote; `SealError` for anything else, also for another text of the same bytes."""
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise broken("text that is no base64") from None
    if b64(data) != text:
        raise broken("text that is not base64 as it must be")
    return data


def broken(what: str) -> SealError:
    """The error for a header."""
    return SealError(what="this file", reason=f"its age header is damaged or cut: {what}")


class _Reader:
    def __init__(self, src: Any) -> None:
        self._src = src
        self._seen = bytearray()

    def header(self) -> Header:
        first = self._line(VERSION)
        if first + b"\n" != VERSION:
            raise SealError(what="this file", reason="it is not an age file")
        stanzas: list[Stanza] = []
        line = self._line()
        while line.startswith(b"-> "):
            stanza, line = self._stanza(line)
            stanzas.append(stanza)
        if not line.startswith(b"--- ") or not stanzas:
            raise broken("a line that is neither a recipient nor the end")
        signed = bytes(self._seen[: len(self._seen) - len(line) - 1 + 3])
        mac = unb64(line[4:])
        if len(mac) != _MAC_BYTES:
            raise broken("a checksum of a wrong length")
        if len(stanzas) > 1 and any(stanza.type == "scrypt" for stanza in stanzas):
            raise broken("a passphrase beside other recipients")
        return Header(tuple(stanzas), mac, signed, len(self._seen))

    def _stanza(self, line: bytes) -> tuple[Stanza, bytes]:
        arguments = line[3:].split(b" ")
        if not all(_ARGUMENT.fullmatch(each) for each in arguments):
            raise broken("a recipient of a form that is not known")
        text = []
        while True:
            body = self._line()
            if len(body) > _COLUMNS:
                raise broken("a line that is too long")
            text.append(unb64(body))
            if len(body) < _COLUMNS:
                break
        kind, *rest = (each.decode("ascii") for each in arguments)
        return Stanza(kind, tuple(rest), b"".join(text)), self._line()

    def _line(self, expected: bytes = b"") -> bytes:
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = self._src.read(1)
            if not byte or len(line) > MAX_LINE or len(self._seen) + len(line) > MAX_HEADER:
                raise SealError(what="this file", reason="it is not an age file") if expected else broken("it ends too early")
            line += byte
            if expected and not expected.startswith(line):
                raise SealError(what="this file", reason="it is not an age file")
        self._seen += line
        return bytes(line[:-1])
