"""Writing the members of a crash package: the rootfs around the workspace, every text and every name redacted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import fdatasync
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

from mothball.crash.content import Contents
from mothball.crash.facts import LISTED, Binary, LeftOut, PackageFacts
from mothball.crash.renaming import Renaming, leads_out
from mothball.package.rootfs import WORKSPACE_DIR, RootEntry, skeleton
from mothball.redact.files import is_text
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.tarhead import END_OF_ARCHIVE, header, padded
from mothball.store.tree import Tree

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor

ROOTFS: Final = b"rootfs/"
Binaries = Literal["include", "exclude"]
_KINDS: Final = {"f": b"0", "h": b"1", "d": b"5", "l": b"2"}
_FILE_BITS: Final = 0o777
_FOLDER_BITS: Final = 0o1777
"""Setuid and setgid are not packaged: all is root's there, and a program of a hostile workspace must not become root's."""
_NS: Final = 10**9
_HEAD: Final = 8192
_SHOWN: Final = 300
_WHOLE: Final = 64 * 1024**2
_SIZING: Final = 4 * 1024**3
_REPORT_ENTRIES: Final = 512
_REPORT_BYTES: Final = 4 * 1024**2
_BUFFER: Final = 4 * 1024**2
_FLUSH: Final = 64 * 1024**2


class Packer:
    """Writes everything below ``rootfs/`` to `out` from where it stands, then the end of the archive. Used once.

    `progress` is called with ``entries=`` and ``bytes=`` now and then; what it raises ends the work.
    """

    def __init__(
        self, tree: Tree, out: BinaryIO, redactor: Redactor, *, binaries: Binaries, sync: bool, progress: Callable[..., None]
    ) -> None:
        self._tree = tree
        self._out = out
        self._redactor = redactor
        self._wanted = binaries == "include"
        self._progress = progress
        self._buffer = bytearray()
        self._place = out.tell()
        """Where the buffer begins in the file."""
        self._told = self._flushed = self._place
        self._entries = self._told_entries = 0
        self._names = Renaming(redactor.name, lambda path: tree.locate(path) is not None)
        self._firsts: dict[tuple[int, bytes], bytes | None] = {}
        self._missing: dict[bytes, LeftOut] = {}
        self._before = Counter(redactor.counts)
        self._counts: Counter[str] = Counter()
        self._binaries: list[Binary] = []
        self._left: list[LeftOut] = []
        self._left_counts: Counter[str] = Counter()
        self._sync = ThreadPoolExecutor(1, thread_name_prefix="package-sync") if sync else None
        self._syncing: Future[None] | None = None

    def run(self, base: Iterable[RootEntry], base_name: str | None) -> PackageFacts:
        """Write the members; raises `Corrupt` for a damaged capture, `OSError`."""
        try:
            self._write(header(ROOTFS, b"5", 0o755, 0, 0, 0, 0))
            others = Renaming(self._redactor.name, lambda _: False)
            for entry in skeleton(base):
                if entry.path == WORKSPACE_DIR:
                    self._workspace()
                else:
                    self._base_entry(entry, others)
            self._write(END_OF_ARCHIVE)
            self._flush()
        finally:
            if self._sync is not None:
                self._sync.shutdown(wait=True)
        if self._syncing is not None:
            self._syncing.result()
        counts = self._counts
        return PackageFacts(
            files=counts["files"], bytes=counts["bytes"], folders=counts["folders"], symlinks=counts["symlinks"],
            links_outside=counts["links_outside"], redacted_files=counts["redacted_files"],
            redactions=dict(sorted((Counter(self._redactor.counts) - self._before).items())),
            binaries=self._binaries, binary_files=counts["binary_files"], binary_bytes=counts["binary_bytes"],
            left_out=self._left, left_out_counts=dict(sorted(self._left_counts.items())), base=base_name,
        )  # fmt: skip

    # -- the workspace -------------------------------------------------------------------------------------------------

    def _workspace(self) -> None:
        with Contents(self._tree) as contents:
            for found in self._tree.rows():
                self._entry(found, contents)
                self._tell()

    def _entry(self, found: Found, contents: Contents) -> None:
        row, counts = found.row, self._counts
        kind, mode = row.type, row.mode & _FILE_BITS
        seconds, rest = divmod(found.mtime_ns, _NS)
        if kind == "d":
            path = self._names.folder(row.path)
            counts["folders"] += bool(path)
            self._write(header(_below(path) + b"/", b"5", row.mode & _FOLDER_BITS, 0, 0, 0, seconds, b"", rest))
            return
        path = self._names.file(row.path)
        if kind == "l":
            counts["symlinks"] += 1
            counts["links_outside"] += leads_out(row.path, row.link)
            self._write(header(_below(path), b"2", 0o777, 0, 0, 0, seconds, self._redactor.name(row.link), rest))
            return
        if kind == "h" and (first := self._first(found)) is not None:
            if (missing := self._missing.get(first)) is not None:
                self._leave_out(path, missing.reason, row.size, missing.rules)
                return
            counts["files"] += 1
            self._write(header(_below(path), b"1", mode, 0, 0, 0, seconds, _below(self._names.file(first)), rest))
            return

        def head(size: int) -> bytes:
            return header(_below(path), b"0", mode, 0, 0, size, seconds, b"", rest)

        data = contents.whole(found)
        if data is not None:
            out = self._small(head, row.path, path, data)
        else:
            out = self._large(head, row.path, path, row.size, lambda: contents.pieces(found))
        if out is None:
            counts["files"] += 1
        else:
            self._missing[row.path] = out

    def _first(self, found: Found) -> bytes | None:
        """The file of which this is a further name; None when it has to carry the content itself, and others then link to it."""
        key = (found.layer, found.row.link)
        known = self._firsts.get(key)
        if known is None:
            first = self._tree.first_name(found)
            known = self._firsts[key] = found.row.path if first is None else first
        return None if known == found.row.path else known

    # -- the base ------------------------------------------------------------------------------------------------------

    def _base_entry(self, entry: RootEntry, names: Renaming) -> None:
        path = ROOTFS + (names.folder(entry.path) if entry.kind == "d" else names.file(entry.path))
        seconds, rest = divmod(entry.mtime_ns, _NS)
        if entry.kind == "f":
            shown = b"/" + path[len(ROOTFS) :]

            def head(size: int) -> bytes:
                return header(path, b"0", entry.mode, 0, 0, size, seconds, b"", rest)

            if entry.size <= _WHOLE:
                out = self._small(head, entry.path, shown, b"".join(entry.pieces()), own=False)
            else:
                out = self._large(head, entry.path, shown, entry.size, entry.pieces, own=False)
            if out is not None:
                self._missing[b"/" + entry.path] = out
            self._tell()
            return
        link = b""
        if entry.kind == "h":
            if (missing := self._missing.get(b"/" + entry.link)) is not None:
                self._leave_out(b"/" + path[len(ROOTFS) :], missing.reason, 0, missing.rules)
                return
            link = ROOTFS + names.file(entry.link)
        elif entry.kind == "l":
            link = self._redactor.name(entry.link)
        else:
            path += b"/"
        self._write(header(path, _KINDS[entry.kind], entry.mode, 0, 0, 0, seconds, link, rest))
        self._tell()

    # -- content -------------------------------------------------------------------------------------------------------

    def _small(self, head: Callable[[int], bytes], name: bytes, path: bytes, data: bytes, *, own: bool = True) -> LeftOut | None:
        """A file that is in memory; what is said of it when it is left out."""
        if is_text(data[:_HEAD]):
            new = self._redactor.data(data, name)
            if own:
                self._counts["redacted_files"] += new != data
        else:
            new = data
            if (out := self._binary(path, len(data), lambda: (data,), own=own)) is not None:
                return out
        self._write(head(len(new)))
        self._write(new)
        self._pad(len(new))
        if own:
            self._counts["bytes"] += len(new)
        return None

    def _large(
        self,
        head: Callable[[int], bytes],
        name: bytes,
        path: bytes,
        size: int,
        pieces: Callable[[], Iterator[bytes]],
        *,
        own: bool = True,
    ) -> LeftOut | None:
        """A file that is never in memory as a whole; what is said of it when it is left out."""
        begin = next(iter(pieces()), b"")
        if not is_text(begin[:_HEAD]):
            if (out := self._binary(path, size, pieces, own=own)) is not None:
                return out
            redacted = pieces
        else:
            redacted = lambda: self._redactor.stream(pieces(), name)  # noqa: E731
            if size > _SIZING:
                # The header of what may have 8 GiB and more has another length, so the size has to be known before.
                counts = Counter(self._redactor.counts)
                size = sum(map(len, redacted()))
                self._redactor.counts.clear()
                self._redactor.counts.update(counts)
        self._flush()
        start, before = self._place, sum(self._redactor.counts.values())
        self._write(head(size))
        written = 0
        for piece in redacted():
            self._write(piece)
            written += len(piece)
            self._tell()
        self._pad(written)
        self._flush()
        if written != size:
            self._out.seek(start)
            self._out.write(head(written))
            self._out.seek(self._place)
        if own:
            self._counts["redacted_files"] += sum(self._redactor.counts.values()) != before
            self._counts["bytes"] += written
        return None

    def _binary(self, path: bytes, size: int, pieces: Callable[[], Iterable[bytes]], *, own: bool) -> LeftOut | None:
        """A binary file is packaged as it is or not at all."""
        if own and not self._wanted:
            return self._leave_out(path, "binary", size, [])
        if rules := sorted(self._redactor.binary(self._watched(pieces()))):
            return self._leave_out(path, "secret_in_binary", size, rules)
        if own:
            self._counts["binary_files"] += 1
            self._counts["binary_bytes"] += size
            if len(self._binaries) < LISTED:
                self._binaries.append(Binary(show(path)[:_SHOWN], size))
        return None

    def _watched(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self._tell()

    def _leave_out(self, path: bytes, reason: str, size: int, rules: list[str]) -> LeftOut:
        found = LeftOut(show(path)[:_SHOWN], reason, size, rules)
        self._left_counts[reason] += 1
        if len(self._left) < LISTED:
            self._left.append(found)
        return found

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > _BUFFER:
            self._flush()

    def _pad(self, size: int) -> None:
        self._buffer += bytes(padded(size) - size)

    def _flush(self) -> None:
        self._out.write(self._buffer)
        self._place += len(self._buffer)
        self._buffer.clear()
        if self._sync is not None and self._place - self._flushed > _FLUSH and (self._syncing is None or self._syncing.done()):
            # Begun now, the flush at the end has little left to wait for.
            if self._syncing is not None:
                self._syncing.result()
            self._out.flush()
            self._syncing = self._sync.submit(fdatasync, self._out.fileno())
            self._flushed = self._place

    def _tell(self) -> None:
        self._entries += 1
        now = self._place + len(self._buffer)
        if self._entries - self._told_entries >= _REPORT_ENTRIES or now - self._told >= _REPORT_BYTES:
            self._told_entries, self._told = self._entries, now
            self._progress(entries=self._entries, bytes=now)


def _below(path: bytes) -> bytes:
    """Where an entry of the workspace lies in the package."""
    return ROOTFS + WORKSPACE_DIR + b"/" + path if path else ROOTFS + WORKSPACE_DIR
