"""Writing the members of a crash package: the rootfs around the workspace, every text and every name redacted on the way."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from mothball.crash.big import Inside
from mothball.crash.content import Contents, batches, judged_apart
from mothball.crash.members import Key, Member, Packed
from mothball.crash.outfile import Move, OutFile, copied, shifted
from mothball.crash.renaming import Renaming, leads_out
from mothball.crash.staging import SEGMENT, WHOLE, Looks, Stage, Touched
from mothball.crash.tally import Tally
from mothball.errors import Corrupt
from mothball.package.rootfs import WORKSPACE_DIR, RootEntry, skeleton
from mothball.redact.files import HEAD, is_text
from mothball.store.merge import Found
from mothball.store.tarhead import BLOCK, END_OF_ARCHIVE, header, padded
from mothball.store.tree import Tree

if TYPE_CHECKING:
    from mothball.crash.facts import PackageFacts
    from mothball.redact.engine import Redactor

T = TypeVar("T")
ROOTFS: Final = b"rootfs/"
Binaries = Literal["include", "exclude"]
_KINDS: Final = {"f": b"0", "h": b"1", "d": b"5", "l": b"2"}
_FILE_BITS: Final = 0o777
_FOLDER_BITS: Final = 0o1777
"""Setuid and setgid are not packaged: all is root's there, and a program of a hostile workspace must not become root's."""
_NS: Final = 10**9
_SIZING: Final = 4 * 1024**3
_REPORT_ENTRIES: Final = 512
_REPORT_BYTES: Final = 4 * 1024**2
_PADDING: Final = bytes(BLOCK)
_new = tuple.__new__


class Packer:
    """Writes everything below ``rootfs/``, then the end of the archive.

    `progress` is called with ``entries=`` and ``bytes=`` now and then; what it raises ends the work. `looks` are asked what may be
    secret in what is written. `refused` are files in which rules fired before: they are left out.
    """

    def __init__(
        self,
        tree: Tree,
        out: OutFile,
        redactor: Redactor,
        *,
        binaries: Binaries,
        progress: Callable[..., None],
        looks: Looks,
        refused: Mapping[Key, list[str]],
    ) -> None:
        self._tree = tree
        self._out = out
        self._redactor = redactor
        self._wanted = binaries == "include"
        self._progress = progress
        self._looks = looks
        self._refused_before = refused
        self._stage: Stage
        self._inside: Inside | None = None
        self._told_bytes = out.place
        self._entries = self._told_entries = 0
        self._names = Renaming(redactor.name, lambda path: tree.locate(path) is not None)
        self._firsts: dict[tuple[int, bytes], bytes | None] = {}
        self._tally = Tally()
        self._base_name: str | None = None
        self.files: dict[Key, Packed] = {}
        self._begin = out.place

    def run(self, base: Iterable[RootEntry], base_name: str | None) -> dict[Key, list[str]]:
        """Write the members. Gives the files that are in the package and must not be, for rules fire in them, and which.

        Raises `Corrupt` for a damaged capture, `OSError`.
        """
        out, others = self._out, Renaming(self._redactor.name, lambda _: False)
        self._base_name = base_name
        with ExitStack() as stack:
            self._inside = stack.enter_context(Inside(self._looks.inside))
            self._stage = stack.enter_context(Stage(out, self._redactor, self._settle, self._looks))
            self._bare(header(ROOTFS, b"5", 0o755, 0, 0, 0, 0), b"")
            for entry in skeleton(base):
                if entry.path == WORKSPACE_DIR:
                    self._workspace()
                else:
                    self._base_entry(entry, others)
                    self._tell()
            self._stage.flush()
            out.write(END_OF_ARCHIVE)
            out.flush()
            return self._inside.fired(lambda: self._progress(entries=self._entries, bytes=out.place))

    def facts(self) -> PackageFacts:
        """What the package holds by now."""
        return self._tally.facts(self.files, self._base_name)

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
        self._out, self._names.plain, self._inside = spool, False, None
        again, shift, behind = set(keys), 0, 0
        moves: list[Move] = []
        new: list[tuple[int, int, int]] = []
        with Contents(self._tree, ahead=0) as contents, Stage(spool, self._redactor, self._settle, None) as self._stage:
            for key, file in sorted(self.files.items(), key=lambda item: item[1].start):
                if key not in again:
                    if shift:
                        self.files[key] = Packed(file.start + shift, file.content + shift, *file[2:])
                    continue
                moves.append(Move(behind, file.start, shift))
                behind = file.content + padded(file.size)
                self._tally.dropped(key, self.files.pop(key))
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

    # -- the workspace -------------------------------------------------------------------------------------------------

    def _workspace(self) -> None:
        with Contents(self._tree) as contents:
            for batch, secret in batches(self._tree.rows(), self._looks.names):
                self._names.plain = not secret
                for found in batch:
                    self._entry(found, contents)
                    self._tell()

    def _entry(self, found: Found, contents: Contents) -> None:
        row, tally, names = found.row, self._tally, self._names
        kind, mode = row.type, row.mode & _FILE_BITS
        seconds, rest = divmod(found.mtime_ns, _NS)
        if kind == "d":
            path = self._named(names.folder, row.path)
            tally.folders += bool(path)
            self._bare(header(_below(path) + b"/", b"5", row.mode & _FOLDER_BITS, 0, 0, 0, seconds, b"", rest), path)
            return
        path = self._named(names.file, row.path)
        if kind == "l":
            tally.symlinks += 1
            tally.links_outside += leads_out(row.path, row.link)
            target = row.link if names.plain else self._named(self._redactor.name, row.link)
            self._bare(header(_below(path), b"2", 0o777, 0, 0, 0, seconds, target, rest), path + b"\0" + target)
            return
        if kind == "h" and (first := self._first(found)) is not None:
            if (missing := tally.left.get((True, first))) is not None:
                tally.left_out((True, row.path), path, missing.reason, row.size, missing.rules)
                return
            tally.further_names += 1
            to = _below(names.file(first))
            self._bare(header(_below(path), b"1", mode, 0, 0, 0, seconds, to, rest), path + b"\0" + to)
            return

        def head(size: int) -> bytes:
            return header(_below(path), b"0", mode, 0, 0, size, seconds, b"", rest)

        key = (True, row.path)
        whole = contents.whole(found)
        if whole is None or len(whole) > SEGMENT:
            self._large(key, path, head, row.size, lambda: contents.pieces(found))
        else:
            self._small(key, path, head, whole)

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

            def head_of(size: int) -> bytes:
                return header(ROOTFS + path, b"0", entry.mode, 0, 0, size, seconds, b"", rest)

            if entry.size <= SEGMENT:
                self._small(key, b"/" + path, head_of, b"".join(entry.pieces()))
            else:
                self._large(key, b"/" + path, head_of, entry.size, entry.pieces)
            return
        link = b""
        if entry.kind == "h":
            if (missing := self._tally.left.get((False, entry.link))) is not None:
                self._tally.left_out(key, b"/" + path, missing.reason, 0, missing.rules)
                return
            link = ROOTFS + names.file(entry.link)
        elif entry.kind == "l":
            link = self._named(self._redactor.name, entry.link)
        slash = b"/" if entry.kind == "d" else b""
        head = header(ROOTFS + path + slash, _KINDS[entry.kind], entry.mode, 0, 0, 0, seconds, link, rest)
        self._bare(head, path + b"\0" + link)

    # -- content -------------------------------------------------------------------------------------------------------

    def _bare(self, head: bytes, names: bytes) -> None:
        """A header, behind which comes nothing or what is written in another way."""
        self._stage.put(Member(head, names, b"", None, b"", lambda _: head, binary=False, apart=False))

    def _small(self, key: Key, path: bytes, head: Callable[[int], bytes], data: bytes) -> None:
        """A file that is in memory."""
        begin = data[:HEAD]
        binary = 0 in begin and not is_text(begin)
        if binary and self._refused(key, path, len(data), lambda: (data,)):
            return
        single = binary or judged_apart(key[1], data)
        # Without the keyword handling of a named tuple, as below: this is done for every file.
        self._stage.put(_new(Member, (head(len(data)), path, data, key, path, head, binary, single)))

    def _settle(self, members: list[Member], touched: Touched) -> None:
        """Write members, and what was redacted in those that were `touched`."""
        out, files, looked = self._out, self.files, self._looks.looked
        for number, member in enumerate(members):
            start, counts = out.place, None
            head, _, data, key, path, _, binary, apart = member
            if number in touched:
                looked.touched.append(start)
                apart = True
                if (redacted := touched[number]) is not None and redacted.data is not None:
                    data, counts = redacted.data, Counter(redacted.counts)
                    head = member.head(len(data))
                    self._redactor.found(counts, redacted.values)
            size = len(data)
            out.write(head, data, _PADDING[: -size % BLOCK])
            if key is not None:
                packed = files[key] = _new(Packed, (start, start + len(head), size, binary, apart, counts))
                if binary or counts is not None:
                    self._tally.packed(key, path, packed)

    def _large(self, key: Key, path: bytes, head: Callable[[int], bytes], size: int, pieces: Callable[[], Iterator[bytes]]) -> None:
        """A file that is not looked at among others, or is in memory for that only."""
        begin = next(iter(pieces()), b"")[:HEAD]
        if is_text(begin) and size <= WHOLE:
            self._small(key, path, head, b"".join(pieces()))
            return
        if is_text(begin):
            self._stage.flush()
            self._large_text(key, path, head, size, pieces)
            return
        # Whether it may be packaged is known when it was looked at where it stands then; what must not be is taken out again.
        if self._refused(key, path, size, None if self._inside is not None else pieces):
            return
        first = head(size)
        self._bare(first, path)
        self._stage.flush()
        out, content = self._out, self._out.place
        for piece in self._watched(pieces()):
            out.write(piece)
        if out.place - content != size:
            raise Corrupt(what=f"capture {self._tree.digest}", reason="a file has another size than it says")
        self._pad(size)
        packed = self.files[key] = Packed(content - len(first), content, size, binary=True, apart=True, counts=None)
        self._tally.packed(key, path, packed)
        if self._inside is not None:
            out.drain()
            self._inside.begin(key, content, size)
            self._looks.looked.inside.add(content)
            self._looks.looked.add(content, out.place)

    def _large_text(
        self, key: Key, path: bytes, head: Callable[[int], bytes], size: int, pieces: Callable[[], Iterator[bytes]]
    ) -> None:
        def redacted() -> Iterator[bytes]:
            return self._redactor.stream(pieces(), key[1])

        if size > _SIZING:
            # The header of what may have 8 GiB and more has another length, so the size has to be known before.
            known = Counter(self._redactor.counts)
            size = sum(map(len, self._watched(redacted())))
            self._redactor.counts.clear()
            self._redactor.counts.update(known)
        start = self._out.place
        self._out.write(head(size))
        content = self._out.place

        def copy() -> None:
            for piece in self._watched(redacted()):
                self._out.write(piece)

        _, counts = self._counted(copy)
        written = self._out.place - content
        self._pad(written)
        if written != size:
            self._out.rewrite(start, head(written))
        packed = self.files[key] = Packed(start, content, written, binary=False, apart=True, counts=counts)
        self._tally.packed(key, path, packed)

    def _refused(self, key: Key, path: bytes, size: int, pieces: Callable[[], Iterable[bytes]] | None) -> bool:
        """True when a binary file is left out: it is packaged as it is or not at all. Without `pieces` it is looked at later."""
        if key[0] and not self._wanted:
            self._tally.left_out(key, path, "binary", size, [])
            return True
        rules = self._refused_before.get(key)
        if rules is None and pieces is not None:
            rules = sorted(self._redactor.binary(self._watched(pieces())))
        if rules:
            self._tally.left_out(key, path, "secret_in_binary", size, rules)
        return bool(rules)

    def _watched(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self._tell()

    # -- what is said of it --------------------------------------------------------------------------------------------

    def _named(self, change: Callable[[bytes], bytes], name: bytes) -> bytes:
        """`change` of a name, with what was redacted in it counted."""
        if self._names.plain:
            return change(name)
        new, counts = self._counted(change, name)
        if counts is not None:
            self._tally.redactions += counts
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


_WORKSPACE: Final = ROOTFS + WORKSPACE_DIR


def _below(path: bytes) -> bytes:
    """Where an entry of the workspace lies in the package."""
    return _WORKSPACE + b"/" + path if path else _WORKSPACE
