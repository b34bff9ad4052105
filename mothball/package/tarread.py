"""Tars that somebody else wrote, read strictly and without unpacking: the only reader of foreign archives.

It takes what the tools of this world write (ustar, PAX, GNU long names and large numbers) and refuses what is cut, lies about
its lengths or needs more than bounded memory (B-114: a truncated bundle was accepted). Where a member may lie on a disk is not
decided here, only that its name can be one below a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple

from mothball.errors import Corrupt, InvalidParams, Oversize
from mothball.store.read import show

BLOCK: Final = 512
PIECE: Final = 1024**2
MAX_HEADER: Final = 1024**2
"""Largest extended header or long name, bytes."""
MAX_PATH: Final = 4096
MAX_COMPONENT: Final = 255
MAX_DEPTH: Final = 200
_ZEROS: Final = bytes(BLOCK)
_KINDS: Final[dict[bytes, Literal["f", "d", "l", "h", "x"]]] = {
    b"0": "f", b"\0": "f", b"7": "f", b"5": "d", b"2": "l", b"1": "h", b"3": "x", b"4": "x", b"6": "x",
}  # fmt: skip
_LARGEST: Final = 1 << 62
_DIGITS: Final = 20

Read = Callable[[int], bytes]
"""Bytes from the archive, at most as many as asked for; empty only at its end."""


class Limits(NamedTuple):
    """How much one archive may hold. `names`: bytes of all names together; `bytes`: of all content."""

    members: int = 2_000_000
    bytes: int = 1 << 40
    names: int = 512 * 1024**2


class TarMember(NamedTuple):
    """One member. `path` is clean (relative, no ``.`` or ``..``), ``b""`` is the root; kind ``x`` is a device or FIFO.

    `link`: as written for a symbolic link, a clean path for a hard link. `start`: where its content begins in the archive.
    """

    path: bytes
    kind: Literal["f", "d", "l", "h", "x"]
    mode: int
    mtime_ns: int
    size: int
    link: bytes
    start: int


class TarReader:
    """The members of one archive, in order. Content that was not read is skipped; `place` is how far it has been read.

    `Corrupt` names `what` for an archive that is damaged or cut, `InvalidParams` for a member that may not be in one, `Oversize`
    when it holds more than `limits`. With `strict` it must end as POSIX says, with two blocks of zeros and nothing but zeros
    after them; without, it may just end between two members, which makers of image layers do.
    """

    def __init__(self, read: Read, what: str, *, limits: Limits = Limits(), strict: bool = True) -> None:  # noqa: B008
        self.place = 0
        self._read = read
        self._what = what
        self._limits = limits
        self._strict = strict
        self._left = 0
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[TarMember]:
        members = names = content = 0
        pax: dict[bytes, bytes] = {}
        while (block := self._header()) is not None:
            kind, size = block[156:157], self._number(block[124:136], "size")
            self._check(block)
            if kind in {b"x", b"g", b"L", b"K"}:
                names += size
                if size > MAX_HEADER or names > self._limits.names:
                    raise self._fault(f"an extended header of {size} bytes")
                self._extended(kind, self._exactly(size), pax)
                self._padded(size)
                continue
            member = self._member(block, kind, size, {**self._globals, **pax})
            pax = {}
            members, names = members + 1, names + len(member.path) + len(member.link)
            content += member.size
            for count, limit, unit in (
                (members, self._limits.members, "members"),
                (content, self._limits.bytes, "bytes of content"),
                (names, self._limits.names, "bytes of names"),
            ):
                if count > limit:
                    raise Oversize(f"{self._what} holds more than {limit:,} {unit}", what=self._what, size=count, limit=limit)
            self._left, self._padding = member.size, -member.size % BLOCK
            yield member
            for _ in self.pieces():
                pass
            self._padded_rest()
        if pax:
            raise self._fault("an extended header without its member at the end")

    def pieces(self) -> Iterator[bytes]:
        """What is left of the current member's content."""
        while self._left:
            piece = self._some(min(self._left, PIECE))
            self._left -= len(piece)
            yield piece

    def jump(self) -> int:
        """Count the rest of the current member as read; returns where the archive goes on, to which the caller seeks."""
        self.place += self._left + self._padding
        self._left = self._padding = 0
        return self.place

    # -- headers -------------------------------------------------------------------------------------------------------

    def _header(self) -> bytes | None:
        """The next header; None at the end of the archive."""
        block = self._upto(BLOCK)
        if len(block) == BLOCK and block != _ZEROS:
            return block
        if block and len(block) < BLOCK:
            raise self._fault("it is cut in a header")
        if not block:
            if self._strict:
                raise self._fault("it is cut: the two blocks of zeros at its end are missing")
            return None
        if self._strict and self._upto(BLOCK) != _ZEROS:
            raise self._fault("it does not end with two blocks of zeros")
        while rest := self._upto(PIECE):  # tar pads to its record size; anything else would be content nobody looked at
            if rest.count(0) != len(rest):
                raise self._fault("it goes on after its end")
        return None

    def _member(self, block: bytes, flag: bytes, size: int, pax: dict[bytes, bytes]) -> TarMember:
        kind = _KINDS.get(flag)
        if kind is None or any(key.startswith(b"GNU.sparse") for key in pax):
            flag = b"sparse" if kind else flag
            raise InvalidParams(f"{self._what} has a member of the type {show(flag)}, which is not supported")
        prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else b""
        name = _text(block[:100])
        path = pax.get(b"path", prefix + b"/" + name if prefix else name)
        link = pax.get(b"linkpath", _text(block[157:257]))
        if b"size" in pax:
            size = self._decimal(pax[b"size"], "size")
        if flag in {b"0", b"\0"} and path.endswith(b"/"):
            kind = "d"  # before ustar a folder was a file whose name ends so
        if kind != "f":
            # POSIX lets a hard link carry content; no writer of images does, and readers disagree on where the next member is.
            if size and kind == "h":
                raise InvalidParams(f"{self._what} has a hard link with content of its own, which is not supported")
            if size:
                raise self._fault("content in a member that is no file")
        if kind == "h":
            link = self._clean(link, "a hard link to")
        elif kind == "l" and (not link or b"\0" in link or len(link) > MAX_PATH):
            raise self._fault("a symbolic link to nothing, or to what is no path")
        return TarMember(
            self._clean(path, "a member"), kind, self._number(block[100:108], "mode") & 0o7777, self._time(block, pax),
            size, link if kind in "lh" else b"", self.place,
        )  # fmt: skip

    def _clean(self, path: bytes, what: str) -> bytes:
        if path.startswith(b"/") and path != b"/":  # umoci names the root so
            raise InvalidParams(f"{self._what} has {what} with the absolute name {show(path[:200])!r}; it was not unpacked")
        parts = [part for part in path.split(b"/") if part not in {b"", b"."}]
        if b".." in parts:
            raise InvalidParams(f"{self._what} has {what} {show(path[:200])!r}, which leads out of its folder; it was not unpacked")
        clean = b"/".join(parts)
        if b"\0" in clean or len(clean) > MAX_PATH or len(parts) > MAX_DEPTH or any(len(part) > MAX_COMPONENT for part in parts):
            raise InvalidParams(f"{self._what} has {what} whose name no file can have: {show(path[:200])!r}")
        if not path:
            raise self._fault("a member without a name")
        return clean

    def _time(self, block: bytes, pax: dict[bytes, bytes]) -> int:
        text = pax.get(b"mtime")
        if text is None:
            return self._number(block[136:148], "time") * 10**9
        whole, _, rest = text.partition(b".")
        if len(rest) > _DIGITS or (rest and not rest.isdigit()):
            raise self._fault("a time that is none")
        sign = -1 if whole.startswith(b"-") else 1
        seconds = self._decimal(whole.removeprefix(b"-"), "time")
        value = sign * (seconds * 10**9 + int(rest[:9].ljust(9, b"0") or b"0"))
        if not -(1 << 62) < value < 1 << 62:
            raise self._fault("a time that no file can have")
        return value

    def _check(self, block: bytes) -> None:
        told = self._number(block[148:156], "checksum")
        rest = block[:148] + b" " * 8 + block[156:]
        total = sum(rest)
        # Old writers added up signed characters.
        if told != total and told != total - 256 * sum(1 for byte in rest if byte > 127):  # noqa: PLR2004
            raise self._fault("a header with a wrong checksum")

    def _number(self, field: bytes, what: str) -> int:
        if field[0] & 0x80:  # GNU: big-endian, the first bit marks it, the second is the sign
            if field[0] not in {0x80, 0xFF}:
                raise self._fault(f"a {what} that is too large")
            value = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int.from_bytes(field, "big", signed=True)  # noqa: PLR2004
            if value > _LARGEST or value < -_LARGEST or (value < 0 and what != "time"):
                raise self._fault(f"a {what} that is too large or negative")
            return value
        text = field.partition(b"\0")[0].strip(b" ")
        if text and (not text.isdigit() or b"8" in text or b"9" in text):
            raise self._fault(f"a {what} that is no number")
        return int(text, 8) if text else 0

    def _decimal(self, text: bytes, what: str) -> int:
        if not text.isdigit() or len(text) > _DIGITS or int(text) > _LARGEST:
            raise self._fault(f"a {what} that is no number")
        return int(text)

    def _extended(self, kind: bytes, body: bytes, pax: dict[bytes, bytes]) -> None:
        if kind in {b"L", b"K"}:
            key = b"path" if kind == b"L" else b"linkpath"
            pax.setdefault(key, body.rstrip(b"\0"))
            return
        into = pax if kind == b"x" else self._globals
        place = 0
        while place < len(body):
            length, space, _ = body[place : place + _DIGITS].partition(b" ")
            if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(body) - place:
                raise self._fault("an extended header of wrong lengths")
            key, equals, value = body[place + len(length) + 1 : place + int(length)].partition(b"=")
            if not equals or not value.endswith(b"\n"):
                raise self._fault("an extended header that cannot be read")
            if kind == b"g" and key in {b"path", b"linkpath", b"size"}:
                raise self._fault("a name or a size for all members")
            if key in {b"path", b"linkpath", b"size", b"mtime"} or key.startswith(b"GNU.sparse"):
                into[key] = value[:-1]
            place += int(length)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _fault(self, reason: str) -> Corrupt:
        return Corrupt(what=self._what, reason=f"as a tar at byte {self.place:,}: {reason}")

    def _upto(self, count: int) -> bytes:
        """`count` bytes, fewer only at the end of the archive."""
        data = self._read(count)
        while 0 < len(data) < count and (more := self._read(count - len(data))):
            data += more
        self.place += len(data)
        return data

    def _some(self, count: int) -> bytes:
        data = self._read(count)
        if not data:
            raise self._fault("it is cut in the content of a member")
        self.place += len(data)
        return data

    def _exactly(self, count: int) -> bytes:
        data = self._upto(count) if count else b""
        if len(data) != count:
            raise self._fault("it is cut in an extended header")
        return data

    def _padded(self, size: int) -> None:
        if len(self._upto(-size % BLOCK)) != -size % BLOCK:
            raise self._fault("it is cut behind an extended header")

    def _padded_rest(self) -> None:
        if self._padding and len(self._upto(self._padding)) != self._padding:
            raise self._fault("it is cut behind a member's content")
        self._padding = 0


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]
