"""Writing the members of a crash package: the rootfs around the workspace, every text and every name redacted on the way."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeVar

from mothball.crash.big import BigBinaries
from mothball.crash.content import Contents, any_secret, apart, large_apart
from mothball.crash.facts import LISTED, Binary, LeftOut, PackageFacts
from mothball.crash.outfile import Move, OutFile, copied, shifted
from mothball.crash.renaming import Renaming, leads_out
from mothball.errors import Corrupt
from mothball.package.rootfs import WORKSPACE_DIR, RootEntry, skeleton
from mothball.redact.files import is_text
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.tarhead import BLOCK, END_OF_ARCHIVE, header, padded
from mothball.store.tree import Tree

if TYPE_CHECKING:
    from mothball.crash.looker import Look
    from mothball.redact.engine import Redactor

T = TypeVar("T")
ROOTFS: Final = b"rootfs/"
Binaries = Literal["include", "exclude"]
Key = tuple[bool, bytes]
"""A file: whether it is the workspace's own, and its path there."""
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
_PADDING: Final = bytes(BLOCK)


class Packed(NamedTuple):
    """What became of one file: where its member begins and its content, how long that is, and what was found in it."""

    start: int
    content: int
    size: int
    binary: bool
    apart: bool
    """It has to be scanned by itself."""
    counts: Counter[str] | None


class Packer:
    """Writes everything below ``rootfs/``, then the end of the archive.

    `progress` is called with ``entries=`` and ``bytes=`` now and then; what it raises ends the work. `look` says where something
    that may be a secret stands in a frame of the capture (see `Contents`), `look_inside` is `look_at_binary` for one of its paths.
    """

    def __init__(
        self,
        tree: Tree,
        out: OutFile,
        redactor: Redactor,
        *,
        binaries: Binaries,
        progress: Callable[..., None],
        look: Look,
        look_inside: Look,
    ) -> None:
        self._tree = tree
        self._out = out
        self._redactor = redactor
        self._wanted = binaries == "include"
        self._progress = progress
        self._look = look
        self._big = BigBinaries(look_inside if binaries == "include" else None)
        self._told_bytes = out.place
        self._entries = self._told_entries = 0
        self._names = Renaming(redactor.name, lambda path: tree.locate(path) is not None)
        self._firsts: dict[tuple[int, bytes], bytes | None] = {}
        self._counts: Counter[str] = Counter()
        self._redactions: Counter[str] = Counter()
        self._binaries: dict[Key, Binary] = {}
        self._base_name: str | None = None
        self.files: dict[Key, Packed] = {}
        self.left: dict[Key, LeftOut] = {}
        self._begin = out.place

    def run(self, base: Iterable[RootEntry], base_name: str | None) -> PackageFacts:
        """Write the members; raises `Corrupt` for a damaged capture, `OSError`."""
        out = self._out
        out.write(header(ROOTFS, b"5", 0o755, 0, 0, 0, 0))
        others = Renaming(self._redactor.name, lambda _: False)
        for entry in skeleton(base):
            if entry.path == WORKSPACE_DIR:
                self._workspace()
            else:
                self._base_entry(entry, others)
                self._tell()
        out.write(END_OF_ARCHIVE)
        out.flush()
        self._base_name = base_name
        return self.facts()

    def facts(self) -> PackageFacts:
        """What the package holds by now."""
        counts, left = self._counts, list(self.left.values())
        return PackageFacts(
            files=counts["files"], bytes=counts["bytes"], folders=counts["folders"], symlinks=counts["symlinks"],
            links_outside=counts["links_outside"], redacted_files=counts["redacted_files"],
            redactions=dict(sorted(self._redactions.items())),
            binaries=list(self._binaries.values()), binary_files=counts["binary_files"], binary_bytes=counts["binary_bytes"],
            left_out=left[:LISTED], left_out_counts=dict(sorted(Counter(each.reason for each in left).items())),
            base=self._base_name,
        )  # fmt: skip

    # -- a second time -------------------------------------------------------------------------------------------------

    def touched(self, offsets: Iterable[int]) -> list[Key] | None:
        """The files in whose content these places lie, by place; None unless each lies in one that can be written anew alone.

        A name cannot, for others may be renamed with it; nor can a file of the base, nor one that has further names.
        """
        packed = sorted(self.files.items(), key=lambda item: item[1].start)
        starts = [file.start for _, file in packed]
        found: dict[Key, None] = {}
        for offset in sorted(offsets):
            if offset < self._begin:
                continue  # the report, which is made anew anyway
            key, file = packed[max(0, bisect_right(starts, offset) - 1)] if packed else ((False, b""), None)
            inside = file is not None and file.content <= offset < file.content + padded(file.size)
            if not inside or not key[0] or key[1] in self._firsts.values():
                return None
            found[key] = None
        return list(found)

    def patch(self, keys: list[Key], package: int, spool: OutFile) -> None:
        """Write the files `keys` anew into `spool`, and from there into the written `package`, whose other members make room."""
        self._out, self._names.plain = spool, False
        again, shift, behind = set(keys), 0, 0
        moves: list[Move] = []
        new: list[tuple[int, int, int]] = []
        with Contents(self._tree, None, ahead=0) as contents:
            for key, file in sorted(self.files.items(), key=lambda item: item[1].start):
                if key not in again:
                    if shift:
                        self.files[key] = Packed(file.start + shift, file.content + shift, *file[2:])
                    continue
                moves.append(Move(behind, file.start, shift))
                behind = file.content + padded(file.size)
                self._drop(key, file)
                found = self._tree.locate(key[1])
                if found is None:
                    raise Corrupt(what=f"capture {self._tree.digest}", reason="it changed while it was packaged")
                begin, to = spool.place, file.start + shift
                self._entry(found, contents)
                if (now := self.files.get(key)) is not None:
                    self.files[key] = Packed(to + now.start - begin, to + now.content - begin, *now[2:])
                new.append((begin, spool.place, to))
                shift = to + spool.place - begin - behind
        spool.flush()
        end = os.fstat(package).st_size
        shifted(package, [*moves, Move(behind, end, shift)], lambda place: self._progress(entries=self._entries, bytes=place))
        for begin, stop, to in new:
            copied(spool.fd, package, begin, stop, to)
        os.truncate(package, end + shift)

    def _drop(self, key: Key, packed: Packed) -> None:
        """Forget what was said of a file of the workspace."""
        del self.files[key]
        self._binaries.pop(key, None)
        if packed.counts is not None:
            self._redactions -= packed.counts
        counts = self._counts
        counts["files"] -= 1
        counts["bytes"] -= packed.size
        counts["redacted_files"] -= packed.counts is not None
        if packed.binary:
            counts["binary_files"] -= 1
            counts["binary_bytes"] -= packed.size

    # -- the workspace -------------------------------------------------------------------------------------------------

    def _workspace(self) -> None:
        with Contents(self._tree, self._look) as contents, self._big:
            for batch in self._big.batches(self._tree.rows()):
                names = [name for found in batch for name in (found.row.path.rpartition(b"/")[2], found.row.link) if name]
                self._names.plain = not any_secret(self._redactor, names)
                for found in batch:
                    self._entry(found, contents)
                    self._tell()

    def _entry(self, found: Found, contents: Contents) -> None:
        row, counts, names = found.row, self._counts, self._names
        kind, mode = row.type, row.mode & _FILE_BITS
        seconds, rest = divmod(found.mtime_ns, _NS)
        if kind == "d":
            path = self._named(names.folder, row.path)
            counts["folders"] += bool(path)
            self._out.write(header(_below(path) + b"/", b"5", row.mode & _FOLDER_BITS, 0, 0, 0, seconds, b"", rest))
            return
        path = self._named(names.file, row.path)
        if kind == "l":
            counts["symlinks"] += 1
            counts["links_outside"] += leads_out(row.path, row.link)
            target = row.link if names.plain else self._named(self._redactor.name, row.link)
            self._out.write(header(_below(path), b"2", 0o777, 0, 0, 0, seconds, target, rest))
            return
        if kind == "h" and (first := self._first(found)) is not None:
            if (missing := self.left.get((True, first))) is not None:
                self._leave_out((True, row.path), path, missing.reason, row.size, missing.rules)
                return
            counts["files"] += 1
            self._out.write(header(_below(path), b"1", mode, 0, 0, 0, seconds, _below(names.file(first)), rest))
            return

        def head(size: int) -> bytes:
            return header(_below(path), b"0", mode, 0, 0, size, seconds, b"", rest)

        key = (True, row.path)
        whole = contents.whole(found)
        if whole is None:
            self._large(key, path, head, row.size, lambda: contents.pieces(found))
        else:
            self._small(key, path, head, whole.data, plain=whole.plain)

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
        path = self._named(names.folder if entry.kind == "d" else names.file, entry.path)
        seconds, rest = divmod(entry.mtime_ns, _NS)
        key = (False, entry.path)
        if entry.kind == "f":

            def head(size: int) -> bytes:
                return header(ROOTFS + path, b"0", entry.mode, 0, 0, size, seconds, b"", rest)

            if entry.size <= _WHOLE:
                self._small(key, b"/" + path, head, b"".join(entry.pieces()), plain=False)
            else:
                self._large(key, b"/" + path, head, entry.size, entry.pieces)
            return
        link = b""
        if entry.kind == "h":
            if (missing := self.left.get((False, entry.link))) is not None:
                self._leave_out(key, b"/" + path, missing.reason, 0, missing.rules)
                return
            link = ROOTFS + names.file(entry.link)
        elif entry.kind == "l":
            link = self._named(self._redactor.name, entry.link)
        slash = b"/" if entry.kind == "d" else b""
        self._out.write(header(ROOTFS + path + slash, _KINDS[entry.kind], entry.mode, 0, 0, 0, seconds, link, rest))

    # -- content -------------------------------------------------------------------------------------------------------

    def _small(self, key: Key, path: bytes, head: Callable[[int], bytes], data: bytes, *, plain: bool) -> None:
        """A file that is in memory. One that is `plain` has no secret, unless it has to be looked at by itself."""
        counts = None
        begin = data[:_HEAD]
        binary = 0 in begin and not is_text(begin)
        single = binary or apart(key[1], data)
        if binary:
            if self._refused(key, path, len(data), lambda: (data,)):
                return
        elif single or not plain:
            data, counts = self._counted(self._redactor.data, data, key[1])
            single = single or apart(key[1], data)
        out, size = self._out, len(data)
        start, member = out.place, head(size)
        out.write(member, data, _PADDING[: -size % BLOCK])
        self._note(key, path, Packed(start, start + len(member), size, binary, single, counts))

    def _large(self, key: Key, path: bytes, head: Callable[[int], bytes], size: int, pieces: Callable[[], Iterator[bytes]]) -> None:
        """A file that is never in memory as a whole."""
        counts: Counter[str] | None = None
        begin = next(iter(pieces()), b"")[:_HEAD]
        binary = not is_text(begin)
        if binary and self._refused(key, path, size, pieces):
            return

        def redacted() -> Iterator[bytes]:
            return pieces() if binary else self._redactor.stream(pieces(), key[1])

        if size > _SIZING and not binary:
            # The header of what may have 8 GiB and more has another length, so the size has to be known before.
            known = Counter(self._redactor.counts)
            size = sum(map(len, self._watched(redacted())))
            self._redactor.counts.clear()
            self._redactor.counts.update(known)
        start = self._out.place
        self._out.write(head(size))
        content = self._out.place

        def copy() -> None:
            for piece in redacted():
                self._out.write(piece)
                self._tell()

        _, counts = self._counted(copy)
        written = self._out.place - content
        self._pad(written)
        if written != size:
            self._out.rewrite(start, head(written))
        single = binary or large_apart(key[1], written, begin)
        self._note(key, path, Packed(start, content, written, binary, single, counts))

    def _refused(self, key: Key, path: bytes, size: int, pieces: Callable[[], Iterable[bytes]]) -> bool:
        """True when a binary file is left out: it is packaged as it is or not at all."""
        if key[0] and not self._wanted:
            self._leave_out(key, path, "binary", size, [])
        elif rules := self._rules_in(key, pieces):
            self._leave_out(key, path, "secret_in_binary", size, rules)
        else:
            return False
        return True

    def _rules_in(self, key: Key, pieces: Callable[[], Iterable[bytes]]) -> list[str]:
        """The rules that fire in a binary file."""
        if key[0]:
            found = self._big.found(key[1], lambda: self._progress(entries=self._entries, bytes=self._out.place))
            if found is not None:
                return found
        return sorted(self._redactor.binary(self._watched(pieces())))

    def _watched(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self._tell()

    # -- what is said of it --------------------------------------------------------------------------------------------

    def _note(self, key: Key, path: bytes, packed: Packed) -> None:
        self.files[key] = packed
        if packed.counts is not None:
            self._redactions += packed.counts
        if not key[0]:
            return
        counts = self._counts
        counts["files"] += 1
        counts["bytes"] += packed.size
        counts["redacted_files"] += packed.counts is not None
        if packed.binary:
            counts["binary_files"] += 1
            counts["binary_bytes"] += packed.size
            if len(self._binaries) < LISTED:
                self._binaries[key] = Binary(show(path)[:_SHOWN], packed.size)

    def _leave_out(self, key: Key, path: bytes, reason: str, size: int, rules: list[str]) -> None:
        self.left[key] = LeftOut(show(path)[:_SHOWN], reason, size, rules)

    def _named(self, change: Callable[[bytes], bytes], name: bytes) -> bytes:
        """`change` of a name, with what was redacted in it counted."""
        if self._names.plain:
            return change(name)
        new, counts = self._counted(change, name)
        if counts is not None:
            self._redactions += counts
        return new

    def _counted(self, work: Callable[..., T], *args: bytes) -> tuple[T, Counter[str] | None]:
        """What `work` gives, and what was redacted meanwhile; None for nothing."""
        before = Counter(self._redactor.counts)
        out = work(*args)
        counts = Counter(self._redactor.counts) - before
        return out, counts or None

    # -- writing -------------------------------------------------------------------------------------------------------

    def _pad(self, size: int) -> None:
        if rest := -size % BLOCK:
            self._out.write(_PADDING[:rest])

    def _tell(self) -> None:
        self._entries += 1
        now = self._out.place
        if self._entries - self._told_entries >= _REPORT_ENTRIES or now - self._told_bytes >= _REPORT_BYTES:
            self._told_entries, self._told_bytes = self._entries, now
            self._progress(entries=self._entries, bytes=now)


def _below(path: bytes) -> bytes:
    """Where an entry of the workspace lies in the package."""
    return ROOTFS + WORKSPACE_DIR + b"/" + path if path else ROOTFS + WORKSPACE_DIR
