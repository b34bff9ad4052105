"""The text of a change, as `git diff` writes it, so that `git apply` and every viewer of patches understand it."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

from mothball.store.diff import Change
from mothball.store.tree import Entry

TEXT_LIMIT: Final = 256 * 1024
"""Largest file that is compared line by line, bytes: the time of a comparison can grow with the square of the lines."""
_BINARY_LOOK: Final = 8000
"""git's rule: a NUL within so many first bytes makes a file binary."""
_KINDS: Final = {"file": stat.S_IFREG, "hardlink": stat.S_IFREG, "symlink": stat.S_IFLNK, "dir": stat.S_IFDIR}
_NOTHING: Final = b"/dev/null"

Read = Callable[[str], bytes]
"""The content of a file by its path."""


def patch(change: Change, read_before: Read, read_after: Read) -> Iterator[bytes]:
    """The lines of one change, each with its newline; none for a folder's time or for an owner, which a patch cannot say.

    A file over `TEXT_LIMIT` or with NUL bytes is only said to differ, and is read only when it is small enough.
    """
    before, after = change.before, change.after
    if change.kind == "type":
        yield from patch(Change(change.path, "deleted", before, None), read_before, read_after)
        yield from patch(Change(change.path, "added", None, after), read_before, read_after)
        return
    entry = after or before
    if entry is None or not (before is None or after is None or {"changed", "mode"} & {*change.aspects}):
        return
    if entry.type == "dir":
        yield from _folder(change)
        return
    one, other = quoted("a/" + change.path), quoted("b/" + change.path)
    yield b"diff --git %b %b\n" % (one, other)
    yield from _modes(before, after)
    if before is not None and after is not None and "changed" not in change.aspects:
        return
    sizes = [item.size for item in (before, after) if item is not None]
    if max(sizes) > TEXT_LIMIT:
        yield b"Files %b and %b differ (%d bytes; up to %d are compared line by line)\n" % (one, other, max(sizes), TEXT_LIMIT)
        return
    old, new = _content(before, read_before), _content(after, read_after)
    if b"\0" in old[:_BINARY_LOOK] or b"\0" in new[:_BINARY_LOOK]:
        yield b"Binary files %b and %b differ\n" % (one if before else _NOTHING, other if after else _NOTHING)
        return
    lines = difflib.diff_bytes(
        difflib.unified_diff, _lines(old), _lines(new), one if before else _NOTHING, other if after else _NOTHING
    )
    for line in lines:
        yield line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"


def quoted(name: str) -> bytes:
    """`name` as git writes it in a patch: in double quotes with escapes when it holds anything but printable ASCII."""
    raw = os.fsencode(name)
    if name.isascii() and name.isprintable() and not set('"\\') & set(name):
        return raw
    named = {
        0x07: b"\\a",
        0x08: b"\\b",
        0x09: b"\\t",
        0x0A: b"\\n",
        0x0B: b"\\v",
        0x0C: b"\\f",
        0x0D: b"\\r",
        0x22: b'\\"',
        0x5C: b"\\\\",
    }
    plain = range(0x20, 0x7F)
    return b'"' + b"".join(named.get(byte) or (bytes([byte]) if byte in plain else b"\\%03o" % byte) for byte in raw) + b'"'


def _folder(change: Change) -> Iterator[bytes]:
    """A line before the patches, which git does not read: it knows no folders, and an empty one must not pass unseen."""
    before, after = change.before, change.after
    name = quoted(change.path)
    if before is None and after is not None:
        yield b"new folder %b (mode %04o)\n" % (name, after.mode)
    elif before is not None and after is None:
        yield b"deleted folder %b\n" % name
    elif before is not None and after is not None:
        yield b"folder %b: mode %04o, was %04o\n" % (name, after.mode, before.mode)


def _modes(before: Entry | None, after: Entry | None) -> Iterator[bytes]:
    if before is None and after is not None:
        yield b"new file mode %06o\n" % _mode(after)
    elif before is not None and after is None:
        yield b"deleted file mode %06o\n" % _mode(before)
    elif before is not None and after is not None and _mode(before) != _mode(after):
        yield b"old mode %06o\nnew mode %06o\n" % (_mode(before), _mode(after))


def _mode(entry: Entry) -> int:
    return stat.S_IFLNK if entry.type == "symlink" else _KINDS[entry.type] | entry.mode


def _content(entry: Entry | None, read: Read) -> bytes:
    if entry is None:
        return b""
    return os.fsencode(entry.link or "") if entry.type == "symlink" else read(entry.path)


def _lines(data: bytes) -> list[bytes]:
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]  # what stands behind the last newline; nothing, most of the time
    return lines if lines[-1] else lines[:-1]
