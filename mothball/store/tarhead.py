"""Tar headers as bytes, the same for the same entry.

POSIX ustar; a PAX extended header only where ustar cannot say it (long names, sizes of 8 GiB and more, large ids, times
before 1970), as POSIX.1-2001 "pax Interchange Format" describes. Names are written as the bytes they are; a PAX name that
is not UTF-8 is announced with ``hdrcharset=BINARY``. In layers times are whole seconds, their table of contents has the
rest; an exported tar has no such table, so there a PAX header carries the nanoseconds.
"""

from __future__ import annotations

from functools import lru_cache
from zlib import adler32

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
_NAME, _PREFIX = 100, 155
_OCTAL_7, _OCTAL_11 = 0o7777777, 0o77777777777
_TAIL = b"ustar\x0000" + bytes(64) + b"0000000\x000000000\x00"
_PLAIN_TAIL = bytes(_NAME) + _TAIL + bytes(_PREFIX + 12)
_FIXED = sum(_TAIL) + 8 * 0x20


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return (size + BLOCK - 1) & -BLOCK


@lru_cache(maxsize=1024)
def _owner(mode: int, uid: int, gid: int) -> tuple[bytes, int]:
    """The three fields that most entries of a tree share, and their sum."""
    fields = b"%07o\0%07o\0%07o\0" % (mode, uid, gid)
    return fields, sum(fields)


def _block(name: bytes, prefix: bytes, kind: bytes, link: bytes, mode: int, uid: int, gid: int, size: int, mtime: int) -> bytes:
    owner, owner_sum = _owner(mode, uid, gid)
    numbers = b"%011o\0%011o\0" % (size, mtime)
    # The low half of Adler-32 is one more than the sum of the bytes while that is less than 65 521: a name and numbers have less.
    total = (adler32(name + numbers) & 0xFFFF) - 1 + kind[0] + owner_sum + _FIXED
    if not prefix and not link:
        return b"%b%b%b%06o\0 %b%b" % (name.ljust(_NAME, b"\0"), owner, numbers, total, kind, _PLAIN_TAIL)
    return b"%b%b%b%06o\0 %b%b%b%b" % (
        name.ljust(_NAME, b"\0"), owner, numbers, total + sum(prefix) + sum(link), kind,
        link.ljust(_NAME, b"\0"), _TAIL, prefix.ljust(_PREFIX + 12, b"\0"),
    )  # fmt: skip


def _split(path: bytes) -> tuple[bytes, bytes] | None:
    """(prefix, name) when ustar can hold `path`, else None."""
    if len(path) <= _NAME:
        return b"", path
    if len(path) > _PREFIX + 1 + _NAME:
        return None
    cut = path.find(b"/", len(path) - _NAME - 1)
    if cut < 1 or cut > _PREFIX or cut == len(path) - 1:
        return None
    return path[:cut], path[cut + 1 :]


def _record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    total = size + len(str(size))
    if len(str(total)) != len(str(size)):
        total = size + len(str(total))
    return b"%d %b=%b\n" % (total, key, value)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _time(seconds: int, nanoseconds: int) -> bytes:
    """A PAX time: decimal, no exponent, no zeros at the end; before 1970 the whole number is negative, not its two parts."""
    total = seconds * 10**9 + nanoseconds
    whole, rest = divmod(abs(total), 10**9)
    text = b"%d.%09d" % (whole, rest) if rest else b"%d" % whole
    return (b"-" if total < 0 else b"") + (text.rstrip(b"0") if rest else text)


@lru_cache(maxsize=64)
def _pax(size: int) -> bytes:
    """The header of the `size` bytes of records that precede a member."""
    return _block(b"PaxHeaders/0", b"", b"x", b"", 0o644, 0, 0, size, 0)


def _precise(seconds: int, nanoseconds: int) -> bytes:
    """What precedes a member of whose time nothing else but the nanoseconds needs telling: most members of an exported tar."""
    record = b"%d mtime=%b\n"
    time = (b"%d.%09d" % (seconds, nanoseconds)).rstrip(b"0")
    size = len(time) + len(b"00 mtime=\n")  # always two digits: a time has 3 to 22 characters
    return _pax(size) + (record % (size, time)).ljust(BLOCK, b"\0")


def header(
    path: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, link: bytes = b"", nanoseconds: int = 0
) -> bytes:
    """The header of one member, with its PAX header in front when needed.

    `kind` is the ustar type flag: ``0`` file, ``1`` hard link, ``2`` symbolic link, ``5`` folder. `mtime` is seconds, rounded
    down, `nanoseconds` what was rounded away (0 to leave it so).
    """
    split = _split(path)
    ordinary = 0 <= mtime <= _OCTAL_11 and len(link) <= _NAME and size <= _OCTAL_11 and uid <= _OCTAL_7 and gid <= _OCTAL_7
    if split and ordinary:
        block = _block(split[1], split[0], kind, link, mode, uid, gid, size, mtime)
        if not nanoseconds:
            return block
        if path.isascii() and link.isascii():
            return _precise(mtime, nanoseconds) + block
    plain = 0 <= mtime <= _OCTAL_11 and not nanoseconds
    records: list[bytes] = []
    if not (_is_utf8(path) and _is_utf8(link)):
        records.append(_record(b"hdrcharset", b"BINARY"))
    if not split:
        records.append(_record(b"path", path))
    if len(link) > _NAME:
        records.append(_record(b"linkpath", link))
    if size > _OCTAL_11:
        records.append(_record(b"size", b"%d" % size))
    if not plain:
        records.append(_record(b"mtime", _time(mtime, nanoseconds)))
    if uid > _OCTAL_7:
        records.append(_record(b"uid", b"%d" % uid))
    if gid > _OCTAL_7:
        records.append(_record(b"gid", b"%d" % gid))
    body = b"".join(records)
    prefix, name = split or (b"", path[:_NAME])
    return b"".join(
        (
            _pax(len(body)),
            body.ljust(padded(len(body)), b"\0"),
            _block(
                name, prefix, kind, link[:_NAME], mode, min(uid, _OCTAL_7), min(gid, _OCTAL_7),
                size if size <= _OCTAL_11 else 0, min(max(mtime, 0), _OCTAL_11),
            ),
        )
    )  # fmt: skip
