"""What the indexes of OCI layouts reach: manifests, nested indexes, configs, layers, subjects, and referrers of all that.

An index that cannot be read means that nothing is known, so nothing may go. A blob that is named and missing is reported and is
never a reason to delete anything.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from mothball.errors import Busy, Corrupt
from mothball.ocicache.recognise import HEX, open_below
from mothball.ocicache.system import open_file, open_folder
from mothball.ocicache.table import Digests
from mothball.store.foreign import MAX_DOCUMENT, read_json

INDEX: Final = "index.json"
SMALL: Final = 4 * 1024**2
"""A manifest is not larger: what registries accept."""
_MANIFEST: Final = re.compile(r"application/vnd\.(?:oci\.image\.(?:manifest|index)|docker\.distribution\.manifest)")
_LEAF: Final = re.compile(
    r"application/vnd\.oci\.(?:image\.(?:layer|config)|empty)|application/vnd\.docker\.(?:image\.rootfs|container\.image)|application/x-tar"
)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_TRIES: Final = 5
_WRITTEN_S: Final = 2.0
_DEPTH: Final = 3
"""How far below a folder of ``layouts=`` a layout may lie."""
_MAX_LAYOUTS: Final = 10_000
_SHOWN: Final = 50
_OWN: Final = frozenset({INDEX, "oci-layout", "blobs", "sha256"})


class Reach:
    """The blobs that are reachable from the indexes at one moment, and which of them are missing."""

    def __init__(self, pool: int, layouts: Callable[[], Iterator[tuple[str, int]]]) -> None:
        """`pool`: the folder of the blobs. `layouts` yields (name, descriptor, valid until the next) of each layout."""
        self._pool = pool
        self._layouts = layouts
        self.reachable = Digests()
        self.missing: list[str] = []
        self.missing_count = 0
        self.state = b""

    def mark(self) -> None:
        """Walk from the indexes; afterwards they are what they were before. Raises `Corrupt`, `Busy`, `OSError`."""
        for _ in range(_TRIES):
            self.reachable, self.missing, self.missing_count = Digests(), [], 0
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
            self._indexes(self._walk)
            self.state = now
        raise Busy(what="the layout", reason="its index changes all the time; try again later")

    def signature(self) -> bytes:
        """Of all indexes together."""
        return self._indexes(lambda *_: None)

    def add(self, digest: str) -> None:
        """Count a blob (64 hex digits) and all it names as reachable: a referrer of something reachable."""
        if self.reachable.add(digest):
            self._follow([(digest, "", 0)], "a referrer", None)

    def _indexes(self, use: Callable[[str, int, bytes], None]) -> bytes:
        whole = hashlib.sha256()
        for name, fd in self._layouts():
            data = read_index(fd, name)
            whole.update(name.encode(errors="surrogateescape") + b"\0" + hashlib.sha256(data).digest())
            use(name, fd, data)
        return whole.digest()

    def _walk(self, name: str, fd: int, data: bytes) -> None:
        what = f"the index of the layout {name!r}"
        try:
            document = read_json(data, dict[str, Any], what)
        except Corrupt as error:
            raise Corrupt(f"{error.message}; nothing was deleted. Pull what it is to hold into a new layout", what=what) from error
        named = document.get("manifests")
        if named is not None and not isinstance(named, list):  # umoci writes null when the last image is gone
            raise Corrupt(what=what, reason="its 'manifests' is no list; nothing was deleted")
        self._follow(list(self._named(document, fd)), what, fd)

    def _follow(self, todo: list[tuple[str, str, int]], what: str, layout: int | None) -> None:
        while todo:
            digest, media, _ = todo.pop()
            known = _MANIFEST.match(media) is not None
            data = self._read(digest, layout, MAX_DOCUMENT if known else SMALL)
            if data is None or (not known and data.lstrip()[:1] != b"{"):
                continue
            try:
                text = f"manifest sha256:{digest}, which {what} names,"
                document = read_json(data, dict[str, Any], text, digest=f"sha256:{digest}")
            except Corrupt:
                if known:
                    raise  # what it names is unknown, so nothing can be said to be unreachable
                continue
            todo.extend(self._named(document, layout))

    def _named(self, document: dict[str, Any], layout: int | None) -> Iterator[tuple[str, str, int]]:
        """Mark all that `document` names; yields what may name others and was not seen yet."""
        for digest, media, size, weak in descriptors(document):
            if not self.reachable.add(digest):
                continue
            leaf = _LEAF.match(media) is not None
            if not self._there(digest, layout):
                if not weak:
                    self.missing_count += 1
                    if len(self.missing) < _SHOWN:
                        self.missing.append(f"sha256:{digest}")
            elif not leaf and (size <= SMALL or _MANIFEST.match(media)):
                yield digest, media, size

    def _there(self, digest: str, layout: int | None) -> bool:
        try:
            os.stat(digest, dir_fd=self._pool, follow_symlinks=False)
        except FileNotFoundError:
            if layout is None:
                return False
            try:
                os.stat(f"blobs/sha256/{digest}", dir_fd=layout, follow_symlinks=False)
            except OSError:
                return False
        return True

    def _read(self, digest: str, layout: int | None, limit: int) -> bytes | None:
        """A blob; None when it is missing, or larger than `limit`. `Corrupt` when it is there and cannot be read."""
        try:
            return _read_file(digest, self._pool, limit)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Corrupt(what=f"blob sha256:{digest}", reason=f"{error.strerror}; nothing was deleted") from error
        if layout is not None:
            try:
                own = open_below(layout, "blobs/sha256")
            except OSError:
                return None
            try:
                return _read_file(digest, own, limit)
            except OSError:
                return None
            finally:
                os.close(own)
        return None


def descriptors(document: dict[str, Any]) -> Iterator[tuple[str, str, int, bool]]:
    """(digest, media type, size, may be missing) of everything in `document` that has a digest, whatever its type is."""
    todo: list[tuple[Any, bool]] = [(document, False)]
    while todo:
        item, weak = todo.pop()
        if isinstance(item, list):
            todo.extend((each, weak) for each in item)
            continue
        if not isinstance(item, dict):
            continue
        for key in ("digest", "blobSum"):
            digest = item.get(key)
            if isinstance(digest, str) and _DIGEST.match(digest):
                media, size = item.get("mediaType"), item.get("size")
                elsewhere = weak or bool(item.get("urls")) or bool(item.get("data"))
                yield digest[7:], media if isinstance(media, str) else "", size if isinstance(size, int) else 0, elsewhere
        todo.extend((value, weak or key == "subject") for key, value in item.items() if isinstance(value, (dict, list)))


def subject_of(name: str, fd: int) -> str | None:
    """The digest (64 hex digits) that the blob `name` refers to as its subject; None for what is no such manifest."""
    try:
        data = _read_file(name, fd, SMALL, first=b"{")
        if data is None or b'"subject"' not in data:
            return None
        document = read_json(data, dict[str, Any], name)
    except (OSError, Corrupt):
        return None
    subject = document.get("subject")
    digest = subject.get("digest") if isinstance(subject, dict) else None
    return digest[7:] if isinstance(digest, str) and _DIGEST.match(digest) else None


def read_index(fd: int, name: str) -> bytes:
    """The index of the layout. `Corrupt` when there is none, or it cannot be read, or it is no file.

    Other tools write it in place: what is no JSON yet is read again for up to `_WRITTEN_S`, for a pull may be in the middle of it.
    """
    deadline = time.monotonic() + _WRITTEN_S
    while True:
        data = _index(fd, name)
        if _is_json(data) or time.monotonic() > deadline:
            return data
        time.sleep(_WRITTEN_S / 20)


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def _index(fd: int, name: str) -> bytes:
    try:
        data = _read_file(INDEX, fd, MAX_DOCUMENT)
    except OSError as error:
        raise Corrupt(what=f"the index of the layout {name!r}", reason=f"{error.strerror}; nothing was deleted") from error
    if data is None:
        raise Corrupt(what=f"the index of the layout {name!r}", reason="it is no file, or too large; nothing was deleted")
    return data


def _read_file(name: str, folder: int, limit: int, *, first: bytes = b"") -> bytes | None:
    fd = open_file(name, folder)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            return None
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            if first and file.read(len(first)) != first:
                return None
            file.seek(0)
            data = bytearray()
            while len(data) <= limit and (piece := file.read(min(1 << 20, limit + 1 - len(data)))):
                data += piece
        return bytes(data) if len(data) <= limit else None
    finally:
        os.close(fd)


def layouts_in(folder: str, *, unfinished: bool = False) -> Iterator[tuple[str, int]]:
    """(path, descriptor) of every layout in `folder` or up to three levels below; the descriptor is closed after each.

    `unfinished`: instead, folders that are none yet: a pull writes a new layout's index last.
    `Corrupt` when the folder is missing, or holds what cannot be looked at: then nothing is known of what its layouts need.
    """
    try:
        fd = open_folder(folder)
    except OSError as error:
        text = f"the folder of layouts {folder!r}: {error.strerror}; without it nobody knows which blobs are needed"
        raise Corrupt(f"{text}, so nothing was deleted; look at layouts= in MOTHBALL_IMAGE_CACHES", path=folder) from error
    try:
        yield from _layouts_below(folder, fd, _DEPTH, unfinished)
    finally:
        os.close(fd)


def _layouts_below(path: str, fd: int, depth: int, unfinished: bool) -> Iterator[tuple[str, int]]:
    with os.scandir(fd) as entries:
        found = sorted((each.name, each.is_dir(follow_symlinks=False)) for each in entries)
    has_index = any(name == INDEX for name, _ in found)
    if has_index != unfinished:
        yield path, fd
    if has_index:
        return
    if len(found) > _MAX_LAYOUTS:
        text = f"it has more than {_MAX_LAYOUTS:,} entries; nothing was deleted"
        raise Corrupt(what=f"the folder of layouts {path!r}", reason=text)
    for name, is_folder in found:
        if not is_folder or not depth or HEX.match(name):
            continue
        try:
            deeper = open_folder(name, fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            text = f"{error.strerror}; a layout may lie in it, so nothing was deleted"
            raise Corrupt(what=f"the folder {path}/{name}", reason=text) from error
        try:
            yield from _layouts_below(f"{path}/{name}", deeper, depth - 1, unfinished)
        finally:
            os.close(deeper)


def busy_with(fd: int, since_ns: int, is_open: Callable[[int], bool]) -> str | None:
    """The name of something in the folder that is neither blob nor index and is open or was written after `since_ns`.

    That is how a pull in progress looks: skopeo, regclient and umoci write under other names first. Such a pull may count on blobs
    that it found here and that no index names yet.
    """
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.name in _OWN or HEX.match(entry.name) or entry.name.startswith(".mothball-"):
                continue
            try:
                seen = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                return entry.name
            young = max(seen.st_mtime_ns, seen.st_ctime_ns) > since_ns
            # A plain folder is where other layouts lie, or extra content, which a layout may have; umoci's begins with a dot.
            if (young or is_open(seen.st_ino)) and (entry.name.startswith(".") or not stat.S_ISDIR(seen.st_mode)):
                return entry.name
    return None
