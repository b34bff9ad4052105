"""What the indexes of OCI layouts reach: manifests, nested indexes, configs, layers, subjects, and referrers of all that.

An index that cannot be read means that nothing is known, so nothing may go. A blob that is named and missing is reported and is
never a reason to delete anything.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from mothball.errors import Busy, Corrupt
from mothball.ocicache.layouts import read_file, read_index
from mothball.ocicache.recognise import open_below
from mothball.ocicache.table import Digests, Texts
from mothball.ocicache.types import Tick
from mothball.store.foreign import MAX_DOCUMENT, read_json

SMALL: Final = 4 * 1024**2
"""A manifest is not larger: what registries accept."""
_MANIFEST: Final = re.compile(r"application/vnd\.(?:oci\.image\.(?:manifest|index)|docker\.distribution\.manifest)")
_LEAF: Final = re.compile(
    r"application/vnd\.oci\.(?:image\.(?:layer|config)|empty)|application/vnd\.docker\.(?:image\.rootfs|container\.image)|application/x-tar"
)
_DIGEST: Final = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-zA-Z=_-]{32,256}\Z")
_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_TRIES: Final = 5
_SHOWN: Final = 50
_TICKS: Final = 64
_MOST_VALUES: Final = 600_000
"""An index as large as can be read has fewer; a text of as many bytes can be made of millions, which take a gigabyte of memory."""


class Reach:
    """The blobs that are reachable from the indexes at one moment, and which of them are missing."""

    def __init__(self, pool: int, layouts: Callable[[], Iterator[tuple[str, int]]], tick: Tick | None = None) -> None:
        """`pool`: the folder of the blobs. `layouts` yields (name, descriptor, valid until the next) of each layout.

        `tick` is called now and then between two documents, with the number of what is reachable; what it raises ends the walk.
        """
        self._pool = pool
        self._layouts = layouts
        self._tick = tick
        self._read_so_far = 0
        self.fresh: Callable[[str], None] | None = None
        """Told of each blob (64 hex digits) that became reachable."""
        self.asides: list[int] = []
        """Folders of blobs that earlier runs moved: what an index names of them comes back, with all that it names."""
        self.reachable = Digests()
        self._others, self._followed = Texts(), Texts()
        self.missing: list[str] = []
        self.missing_count = 0
        self.state = b""

    def mark(self) -> None:
        """Walk from the indexes; afterwards they are what they were before. Raises `Corrupt`, `Busy`, `OSError`."""
        for _ in range(_TRIES):
            self.reachable, self.missing, self.missing_count = Digests(), [], 0
            self._others, self._followed = Texts(), Texts()
            before = self._indexes(self._walk)
            if before == self.signature():
                self.state = before
                return
        raise Busy(what="the layout", reason="its index changes while it is read; try again later")

    def again(self) -> None:
        """Add what is reachable by now, if an index changed. What was reachable before stays so for this run."""
        for _ in range(_TRIES):
            now = self.signature()
            if now == self.state:
                return
            self._followed = Texts()  # what was missing may be there by now
            self._indexes(self._walk)
            self.state = now
        raise Busy(what="the layout", reason="its index changes all the time; try again later")

    def signature(self) -> bytes:
        """Of all indexes together."""
        return self._indexes(lambda *_: None)

    def add(self, digest: str) -> None:
        """Count a blob (64 hex digits) and all it names as reachable: a referrer of something reachable."""
        self._mark(digest)
        # Also when something reachable names it already, as something that is not to be followed.
        self._follow([(f"sha256:{digest}", False)], "a referrer", None)

    def _mark(self, digest: str) -> bool:
        new = self.reachable.add(digest)
        if self.fresh is not None:
            self.fresh(digest)
        return new

    def _indexes(self, use: Callable[[str, int, bytes], None]) -> bytes:
        whole = hashlib.sha256()
        for name, fd in self._layouts():
            data = read_index(fd, name)
            if data is None:  # who removed it needs nothing of it
                continue
            whole.update(name.encode(errors="surrogateescape") + b"\0" + hashlib.sha256(data).digest())
            use(name, fd, data)
        return whole.digest()

    def _walk(self, name: str, fd: int, data: bytes) -> None:
        what = f"the index of the layout {name!r}"
        try:
            document = _document(data, what)
        except Corrupt as error:
            raise Corrupt(f"{error.message}; nothing was deleted. Pull what it is to hold into a new layout", what=what) from error
        named = document.get("manifests")
        if named is not None and not isinstance(named, list):  # umoci writes null when the last image is gone
            raise Corrupt(what=what, reason="its 'manifests' is no list; nothing was deleted")
        self._follow(list(self._named(document, fd)), what, fd)

    def _follow(self, todo: list[tuple[str, bool]], what: str, layout: int | None) -> None:
        while todo:
            digest, known = todo.pop()
            # By the whole digest and in secret: who makes an image must not choose what is taken for followed already.
            if not self._followed.add(f"{digest} {known}"):
                continue
            self._read_so_far += 1
            if self._tick is not None and not self._read_so_far % _TICKS:
                self._tick(len(self.reachable))
            data = self._read(digest, layout, MAX_DOCUMENT if known else SMALL, known=known)
            if data is None or (not known and data.lstrip()[:1] != b"{"):
                continue
            try:
                text = f"manifest {digest}, which {what} names,"
                document = _document(data, text, digest)
            except Corrupt as error:
                if known:  # what it names is unknown, so nothing can be said to be unreachable
                    raise Corrupt(f"{error.message}; nothing was deleted", what=text, digest=digest) from error
                continue
            todo.extend(self._named(document, layout))

    def _named(self, document: dict[str, Any], layout: int | None) -> Iterator[tuple[str, bool]]:
        """Mark all that `document` names; yields what may name others, and whether it is said to be a manifest.

        One digest may be named as two things; what it really is, is seen when it is read, however large it was said to be.
        """
        for digest, media, weak in descriptors(document):
            known = _MANIFEST.match(media) is not None
            fresh = self._mark(digest[7:]) if _SHA256.match(digest) else self._others.add(digest)
            if fresh and not weak and not self._there(digest, layout):
                self.missing_count += 1
                if len(self.missing) < _SHOWN:
                    self.missing.append(digest)
            if known or not _LEAF.match(media):
                yield digest, known

    def _there(self, digest: str, layout: int | None) -> bool:
        for folder in self._folders(digest, layout):
            try:
                os.stat(digest.partition(":")[2], dir_fd=folder, follow_symlinks=False)
            except OSError:
                continue
            return True
        return False

    def _read(self, digest: str, layout: int | None, limit: int, *, known: bool) -> bytes | None:
        """A blob; None when it is missing, or (not for a `known` manifest) no file or larger than `limit`.

        `Corrupt` when it is there and cannot be read.
        """
        for folder in self._folders(digest, layout):
            try:
                data = read_file(digest.partition(":")[2], folder, limit)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise Corrupt(what=f"blob {digest}", reason=f"{error.strerror}; nothing was deleted") from error
            if data is None and known:
                text = "it is to be a manifest, and is no file, or too large for one; nothing was deleted"
                raise Corrupt(what=f"blob {digest}", reason=text)
            return data
        return None

    def _folders(self, digest: str, layout: int | None) -> Iterator[int]:
        """Where the blob may lie: the folder of the blobs, asides of earlier runs, the layout's own. Each is closed by the next."""
        algorithm = digest.partition(":")[0]
        if algorithm == "sha256":
            yield self._pool
            yield from self.asides
        else:
            yield from _opened(f"../{algorithm}", self._pool)
        if layout is not None:
            yield from _opened(f"blobs/{algorithm}", layout)


def _opened(where: str, fd: int) -> Iterator[int]:
    try:
        found = open_below(fd, where)
    except OSError:
        return
    try:
        yield found
    finally:
        os.close(found)


def _document(data: bytes, what: str, digest: str = "") -> dict[str, Any]:
    """A JSON object; `Corrupt` when it is none, or one that would take more memory than a manifest can need."""
    if data.count(b",") + data.count(b"{") + data.count(b"[") > _MOST_VALUES:
        known = {"digest": digest} if digest else {}
        raise Corrupt(what=what, reason=f"it has more than {_MOST_VALUES:,} values", **known)
    return read_json(data, dict[str, Any], what, digest=digest)


def descriptors(document: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(digest, media type, may be missing) of everything in `document` that has a digest, whatever its type is.

    Names of fields count in any case: that is how Go's tools read them.
    """
    todo: list[tuple[Any, bool]] = [(document, False)]
    while todo:
        item, weak = todo.pop()
        if isinstance(item, list):
            todo.extend((each, weak) for each in item)
            continue
        if not isinstance(item, dict):
            continue
        media, elsewhere = "", weak
        digests = []
        for name, value in item.items():
            key = name.lower()
            if key in {"digest", "blobsum"} and isinstance(value, str) and _DIGEST.match(value):
                digests.append(value)
            elif key == "mediatype" and isinstance(value, str):
                media = value.lower()
            elif key in {"urls", "data"}:
                elsewhere = elsewhere or bool(value)
            if isinstance(value, (dict, list)):
                todo.append((value, weak or key == "subject"))
        for digest in digests:
            yield digest, media, elsewhere


def subject_of(name: str, fd: int) -> str | None:
    """The digest (64 hex digits) that the blob `name` refers to as its subject; None for what is no such manifest."""
    try:
        data = read_file(name, fd, SMALL, first=b"{")
        if data is None or b'"subject"' not in data.lower():
            return None
        document = _document(data, name)
    except (OSError, Corrupt):
        return None
    subject = next((value for key, value in document.items() if key.lower() == "subject"), None)
    digest = subject.get("digest") if isinstance(subject, dict) else None
    return digest[7:] if isinstance(digest, str) and _SHA256.match(digest) else None
