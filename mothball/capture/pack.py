"""From entries to a layer: headers, content, rows of the table of contents, in one pass over the tree.

Small files go side by side into frames; a file larger than a frame is streamed over frames of its own, so memory does not
depend on it. What cannot be read becomes an omission, what does not hold still is marked torn.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from mothball.capture.reading import PAUSES, Content, Reader, TooBig, Unread, extents, fill_sparse, unread
from mothball.capture.types import Checkpoint, Entry, Omission
from mothball.store.layer import LayerWriter
from mothball.store.tarhead import BLOCK, END_OF_ARCHIVE, header, padded
from mothball.store.toc import MAX_EXTENTS, Row

ROOT = b"workspace"
_NS = 1_000_000_000
_STREAM_TRIES = 3
_ZEROS = bytes(BLOCK)
_ROUND = BLOCK - 1


class Packer:
    """Writes entries into one layer. After `run`: `rows`, `hashes` (path -> sha256), `read` (path -> entry as read)."""

    def __init__(self, writer: LayerWriter, reader: Reader, *, known: Container[str], checkpoint: Checkpoint) -> None:
        """`known`: paths of the parent; one that can no longer be read needs a whiteout, or its old content would show."""
        self._known = known
        self._writer = writer
        self._reader = reader
        self._checkpoint = checkpoint
        self.rows: list[Row] = []
        self.hashes: dict[str, bytes] = {}
        self._later: list[tuple[str, list[Any]]] = []
        self.read: dict[str, Entry] = {}
        self.omissions: list[Omission] = []
        self.torn: list[str] = []
        self.content = 0
        self.removed: list[bytes] = []
        self.links: dict[str, str] = {}
        self._first: dict[tuple[int, int], str] = {}
        self._copies: dict[str, tuple[Entry, Row]] = {}

    def whiteout(self, folder: str, name: str) -> None:
        """The tar's word for "`name` in `folder` is gone" (OCI image spec, layer.md, Whiteouts)."""
        path = b"/".join(part for part in (ROOT, os.fsencode(folder), b".wh." + os.fsencode(name)) if part)
        self._head(header(path, b"0", 0o644, 0, 0, 0, 0))

    def mtime(self, entry: Entry) -> None:
        """Only the mtime of `entry` is news: no tar member, only a row."""
        self.rows.append((os.fsencode(entry.path), "m", 0, 0, 0, entry.mtime_ns, 0, b"", b"", 0, 0))

    def add(self, entry: Entry) -> None:
        """One entry, in order."""
        kind = entry[1] & 0o170000
        if kind == stat.S_IFREG and not entry[8]:
            self._file(entry)
        elif kind == stat.S_IFDIR:
            path = ROOT + (b"/" + os.fsencode(entry.path) if entry.path else b"") + b"/"
            self._head(self._header(entry, path, b"5", 0))
            self.rows.append(self._row(entry, "d"))
        elif kind == stat.S_IFLNK:
            self._link(entry)
        elif entry.group and entry.group in self._first:
            self._hard_link(entry, self._first[entry.group])
        else:
            self._file(entry)

    def finish(self) -> None:
        """The end of the archive."""
        self._writer.append(END_OF_ARCHIVE)
        self._writer.drain()
        self.hashes.update((path, row[7]) for path, row in self._later)
        self._later.clear()
        self._checkpoint("write", {"bytes": self.content, "stored_bytes": self._writer.stored, "entries": len(self.rows)})

    def _header(self, entry: Entry, path: bytes, kind: bytes, size: int, link: bytes = b"") -> bytes:
        return header(path, kind, entry.mode & 0o7777, entry.uid, entry.gid, size, entry.mtime_ns // _NS, link)

    def _row(
        self, entry: Entry, kind: str, size: int = 0, sha: bytes = b"", link: bytes = b"", frame: int = 0, offset: int = 0
    ) -> Row:
        mode, uid, gid, mtime = entry.mode & 0o7777, entry.uid, entry.gid, entry.mtime_ns
        return (os.fsencode(entry.path), kind, mode, uid, gid, mtime, size, sha, link, frame, offset)

    def _head(self, data: bytes) -> None:
        if len(data) > self._writer.room():
            self._flush()
        self._writer.append(data)

    def _flush(self) -> None:
        self._writer.flush()
        self._checkpoint("write", {"bytes": self.content, "stored_bytes": self._writer.stored, "entries": len(self.rows)})

    def _omit(self, entry: Entry, why: Unread) -> None:
        self.omissions.append(Omission(entry.path, why.reason, entry.size, why.detail))
        if entry.path in self._known:
            folder, _, name = entry.path.rpartition("/")
            self.whiteout(folder, name)
            self.removed.append(os.fsencode(entry.path))

    def _link(self, entry: Entry) -> None:
        try:
            target = self._reader.link(entry.path)
        except Unread as why:
            self._omit(entry, why)
            return
        path = ROOT + b"/" + os.fsencode(entry.path)
        self._head(self._header(entry, path, b"2", 0, target))
        self.rows.append(self._row(entry, "l", link=target))
        self.hashes[entry.path] = sha256(target).digest()

    def _hard_link(self, entry: Entry, first: str) -> None:
        """Another name of a file that is already in this layer; its metadata is that of the first name, as on disk."""
        source, row = self._copies[first]
        path, target = ROOT + b"/" + os.fsencode(entry.path), os.fsencode(first)
        self._head(self._header(source, path, b"1", 0, ROOT + b"/" + target))
        self.rows.append((os.fsencode(entry.path), "h", *row[2:8], target, *row[9:]))
        self.hashes[entry.path] = self.hashes[first]
        self.links[entry.path] = first
        self.read[entry.path] = source._replace(path=entry.path)

    def _file(self, entry: Entry) -> None:
        """The hot path: one small file beside the others in the current frame."""
        raw, size, writer = os.fsencode(entry[0]), entry[4], self._writer
        if size + len(raw) + 8 * BLOCK > writer.frame_bytes:
            self._stream(entry)
            return
        uid, gid = entry[2:4]
        path = b"workspace/" + raw
        head = header(path, b"0", entry[1] & 0o7777, uid, gid, size, entry[5] // _NS)
        begin = writer.position
        if len(head) + size + BLOCK > writer.frame_bytes - begin:
            self._flush()
            begin = writer.position
        start = begin + len(head)
        view = writer.view
        got, torn = entry, False
        if size:  # of an empty file the walk saw all there is to know
            try:
                got, torn = self._reader.read_into(entry, view[start:])
            except TooBig:
                self._stream(entry)
                return
            except Unread as why:
                self._omit(entry, why)
                return
            if got is not entry:
                size = got.size
                head = self._header(got, path, b"0", size)
                if len(head) != start - begin:  # a time or an owner that needs more room than was kept
                    self._stream(entry)
                    return
        end = start + size
        stop = start + (size + _ROUND & -BLOCK)
        view[begin:start] = head
        view[end:stop] = _ZEROS[: stop - end]
        writer.position = stop
        frame, offset = (writer.frame, start) if size else (0, 0)
        if torn or got is not entry or entry[8]:
            sha = sha256(view[start:end]).digest()
            self._done(entry, Content(got, torn), self._row(got, "f", size, sha, b"", frame, offset), sha)
        else:
            row = [raw, "f", entry[1] & 0o7777, uid, gid, entry[5], size, b"", b"", frame, offset]
            writer.hashed_later.append((start, end, row))
            self._later.append((entry[0], row))
            self.rows.append(row)
            self.content += size

    def _done(self, planned: Entry, got: Content, row: Row, sha: bytes) -> None:
        entry = got.entry
        self.rows.append(row)
        self.hashes[entry.path] = sha
        self.content += entry.size
        if got.torn:
            self.torn.append(entry.path)
        if entry.group:
            self._first[entry.group] = entry.path
            self._copies[entry.path] = (entry, row)
        if got.entry is not planned:
            self.read[entry.path] = entry

    def _stream(self, entry: Entry) -> None:
        """A file larger than a frame: frames of its own, read again from the start when it changed meanwhile."""
        mark = self._writer.mark()
        for number in range(_STREAM_TRIES):
            if number:
                self._writer.rewind(mark)
                time.sleep(PAUSES[min(number, len(PAUSES) - 1)])
            try:
                got, row, sha = self._stream_once(entry)
            except Unread as why:
                self._writer.rewind(mark)
                self._omit(entry, why)
                return
            if not got.torn:
                break
        self._flush()
        self._done(entry, got, row, sha)

    def _stream_once(self, entry: Entry) -> tuple[Content, Row, bytes]:
        fd = self._reader.open(entry.path)
        try:
            with _only_the_source():
                before = os.fstat(fd)
                data = extents(fd, before.st_size) if entry.sparse else [(0, before.st_size)]
            if not stat.S_ISREG(before.st_mode):
                raise Unread("vanished", "something else has its name now")
            size = before.st_size
            current = self._reader.renew(entry, before, size)
            self._writer.append(self._header(current, ROOT + b"/" + os.fsencode(entry.path), b"0", size))
            frame, offset = self._writer.frame, self._writer.position
            shrunk = False
            sha, done = sha256(), 0
            while done < size:
                if not self._writer.room():
                    self._flush()
                start = self._writer.position
                view = self._writer.view[start : start + size - done]
                with _only_the_source():
                    got = fill_sparse(fd, done, view, data)
                view[got:] = bytes(len(view) - got)  # the file has shrunk: it is torn, the promised size must be kept
                shrunk = shrunk or got < len(view)
                sha.update(view)
                self._writer.position += len(view)
                done += len(view)
            self._writer.append(bytes(padded(size) - size))
            with _only_the_source():
                after = os.fstat(fd)
            stable = not shrunk and (after.st_mtime_ns, after.st_size, after.st_ctime_ns) == (
                before.st_mtime_ns, size, before.st_ctime_ns,
            )  # fmt: skip
        finally:
            os.close(fd)
        row = self._row(current, "f", size, sha.digest(), b"", frame if size else 0, offset if size else 0)
        if entry.sparse and len(data) <= MAX_EXTENTS and data != [(0, size)]:
            row = (*row[:11], tuple(data))
        return Content(current, not stable), row, sha.digest()


@contextmanager
def _only_the_source() -> Iterator[None]:
    """An error of the file that is read is an omission; one of the store must end the capture, or it would drop good files."""
    try:
        yield
    except OSError as error:
        raise unread(error) from error
