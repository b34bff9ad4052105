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
from mothball.ocicache.recognise import ASIDE, HEX, open_below
from mothball.ocicache.system import open_file, open_folder
from mothball.ocicache.table import Digests, Texts
from mothball.store.foreign import MAX_DOCUMENT, read_json

INDEX: Final = "index.json"
SMALL: Final = 4 * 1024**2
"""A manifest is not larger: what registries accept."""
_MANIFEST: Final = re.compile(r"application/vnd\.(?:oci\.image\.(?:manifest|index)|docker\.distribution\.manifest)")
_LEAF: Final = re.compile(
    r"application/vnd\.oci\.(?:image\.(?:layer|config)|empty)|application/vnd\.docker\.(?:image\.rootfs|container\.image)|application/x-tar"
)
_DIGEST: Final = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-zA-Z=_-]{32,256}\Z")
_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
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
        if self.reachable.add(digest):
            self._follow([(f"sha256:{digest}", False)], "a referrer", None)

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

    def _follow(self, todo: list[tuple[str, bool]], what: str, layout: int | None) -> None:
        while todo:
            digest, known = todo.pop()
            # By the whole digest and in secret: who makes an image must not choose what is taken for followed already.
            if not self._followed.add(f"{digest} {known}"):
                continue
            data = self._read(digest, layout, MAX_DOCUMENT if known else SMALL, known=known)
            if data is None or (not known and data.lstrip()[:1] != b"{"):
                continue
            try:
                text = f"manifest {digest}, which {what} names,"
                document = read_json(data, dict[str, Any], text, digest=digest)
            except Corrupt:
                if known:
                    raise  # what it names is unknown, so nothing can be said to be unreachable
                continue
            todo.extend(self._named(document, layout))

    def _named(self, document: dict[str, Any], layout: int | None) -> Iterator[tuple[str, bool]]:
        """Mark all that `document` names; yields what may name others, and whether it is said to be a manifest.

        One digest may be named as two things; what it really is, is seen when it is read, however large it was said to be.
        """
        for digest, media, weak in descriptors(document):
            known = _MANIFEST.match(media) is not None
            fresh = self.reachable.add(digest[7:]) if _SHA256.match(digest) else self._others.add(digest)
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
                data = _read_file(digest.partition(":")[2], folder, limit)
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
        data = _read_file(name, fd, SMALL, first=b"{")
        if data is None or b'"subject"' not in data.lower():
            return None
        document = read_json(data, dict[str, Any], name)
    except (OSError, Corrupt):
        return None
    subject = next((value for key, value in document.items() if key.lower() == "subject"), None)
    digest = subject.get("digest") if isinstance(subject, dict) else None
    return digest[7:] if isinstance(digest, str) and _SHA256.match(digest) else None


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


def layouts_in(folder: str, *, unfinished: bool = False, but: int | None = None) -> Iterator[tuple[str, int]]:
    """(path, descriptor) of every layout in `folder` or up to three levels below; the descriptor is closed after each.

    `but`: an open folder that is not entered, the cache itself.
    `unfinished`: instead, folders that are none yet: a pull writes a new layout's index last.
    `Corrupt` when the folder is missing, or holds what cannot be looked at: then nothing is known of what its layouts need.
    """
    try:
        fd = open_folder(folder)
    except OSError as error:
        text = f"the folder of layouts {folder!r}: {error.strerror}; without it nobody knows which blobs are needed"
        raise Corrupt(f"{text}, so nothing was deleted; look at layouts= in MOTHBALL_IMAGE_CACHES", path=folder) from error
    try:
        known = None if but is None else os.fstat(but)
        yield from _layouts_below(folder, fd, _DEPTH, unfinished, None if known is None else (known.st_dev, known.st_ino))
    finally:
        os.close(fd)


def _layouts_below(path: str, fd: int, depth: int, unfinished: bool, but: tuple[int, int] | None) -> Iterator[tuple[str, int]]:
    known = os.fstat(fd)
    if but == (known.st_dev, known.st_ino):
        return
    with os.scandir(fd) as entries:
        found = sorted(
            (each.name, each.is_dir(follow_symlinks=False), each.is_symlink()) for each in entries if ASIDE not in each.name
        )
    has_index = any(name == INDEX for name, *_ in found)
    if has_index != unfinished:
        yield path, fd
    if len(found) > _MAX_LAYOUTS:
        text = f"it has more than {_MAX_LAYOUTS:,} entries; nothing was deleted"
        raise Corrupt(what=f"the folder of layouts {path!r}", reason=text)
    for name, is_folder, is_link in found:
        if is_link:
            _check_link(path, name, fd)
        if not is_folder or (has_index and name == "blobs"):
            continue
        if not depth:
            if name.startswith("."):
                continue
            text = f"it lies more than {_DEPTH} levels deep, and a layout may be in it; nothing was deleted. Name it in layouts="
            raise Corrupt(what=f"the folder {path}/{name}", reason=text)
        try:
            deeper = open_folder(name, fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            text = f"{error.strerror}; a layout may lie in it, so nothing was deleted"
            raise Corrupt(what=f"the folder {path}/{name}", reason=text) from error
        try:
            yield from _layouts_below(f"{path}/{name}", deeper, depth - 1, unfinished, but)
        finally:
            os.close(deeper)


def _check_link(path: str, name: str, fd: int) -> None:
    """A link that leads out of the folder, to another one: a layout there would not be seen. Raises `Corrupt`."""
    try:
        target = os.readlink(name, dir_fd=fd)
        if not target.startswith("/") and ".." not in target.split("/"):
            return  # what it leads to is looked at where it lies
        is_folder = stat.S_ISDIR(os.stat(name, dir_fd=fd).st_mode)
    except OSError:  # it leads nowhere
        return
    if is_folder:
        text = f"it is a symbolic link, and a layout may be where it leads; nothing was deleted. Name {target!r} in layouts="
        raise Corrupt(what=f"{path}/{name}", reason=text)


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
