"""age's armor: base64 between two lines, as mail and tickets carry it. Read strictly, line by line."""

from __future__ import annotations

import base64
import binascii
from typing import Any, BinaryIO, Final

from mothball.errors import SealError

BEGIN: Final = b"-----BEGIN AGE ENCRYPTED FILE-----"
_END: Final = b"-----END AGE ENCRYPTED FILE-----"
_COLUMNS: Final = 64
_LONGEST: Final = 128


def dearmored(src: BinaryIO) -> Any:
    """`src` itself, or what decodes its armor; it must be seekable. The result has only ``read``."""
    start = src.tell()
    head = src.read(len(BEGIN))
    src.seek(start)
    return Armored(src) if head == BEGIN else src


class Armored:
    """Reads what an armored file holds; `SealError` for whatever is not armor as age writes it."""

    def __init__(self, src: BinaryIO) -> None:
        self._src = src
        self._ready = b""
        self._short = self._over = False
        if self._line() != BEGIN:
            raise _broken()

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes, ``b""`` only at the end."""
        while not self._ready and not self._over:
            self._decode()
        if count < 0:
            parts = [self._ready]
            while not self._over:
                self._decode()
                parts.append(self._ready)
            self._ready = b""
            return b"".join(parts)
        data, self._ready = self._ready[:count], self._ready[count:]
        return data

    def _decode(self) -> None:
        line = self._line()
        if line == _END:
            if self._src.read(1024).strip(b" \t\r\n"):
                raise _broken()
            self._over, self._ready = True, b""
            return
        if self._short or not line or len(line) > _COLUMNS:  # only the last line may be short
            raise _broken()
        self._short = len(line) < _COLUMNS
        try:
            data = base64.b64decode(line, validate=True)
        except binascii.Error:
            raise _broken() from None
        if base64.b64encode(data) != line:  # bits that the padding hides: another text for the same bytes
            raise _broken()
        self._short = self._short or line.endswith(b"=")
        self._ready = data

    def _line(self) -> bytes:
        line = self._src.readline(_LONGEST)
        if not line.endswith(b"\n") and line != _END:
            raise _broken()
        return line.removesuffix(b"\n").removesuffix(b"\r")


def _broken() -> SealError:
    return SealError(what="this file", reason="its armor (the base64 text) is damaged or cut")
