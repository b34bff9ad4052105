"""Finding layouts, reading their indexes, and seeing that a pull into one is in progress."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from mothball.errors import Corrupt
from mothball.ocicache.recognise import HEX
from mothball.ocicache.system import open_file, open_folder
from mothball.store.foreign import MAX_DOCUMENT

INDEX: Final = "index.json"
_WRITTEN_S: Final = 2.0
_DEPTH: Final = 3
"""How far below a folder of ``layouts=`` a layout may lie."""
_MAX_LAYOUTS: Final = 10_000
_OWN: Final = frozenset({INDEX, "oci-layout", "blobs", "sha256"})
_OURS: Final = re.compile(r"\.(?:.+\.)?mothball-(?:aside-[0-9a-f]{16}|deep-.*)\Z", re.DOTALL)
"""Asides, in the cache or beside it: what earlier prunes took is no layout, and this prune is no pull."""


def is_removed(folder: int) -> bool:
    """True when somebody removed the open `folder` meanwhile: a folder that is somewhere has a name. It is empty, then."""
    return not os.fstat(folder).st_nlink


def read_index(fd: int, name: str) -> bytes | None:
    """The index of the layout; None when the layout was removed meanwhile. `Corrupt` when there is none, or it is unreadable.

    Other tools write it in place: what is no JSON yet is read again for up to `_WRITTEN_S`, for a pull may be in the middle of it.
    So is one that is missing: who removes a layout may take its index first.
    """
    deadline = time.monotonic() + _WRITTEN_S
    while True:
        late = time.monotonic() > deadline
        if is_removed(fd):
            return None
        data = _index(fd, name, missing=late)
        if data is not None and (late or _is_json(data)):
            return data
        time.sleep(_WRITTEN_S / 20)


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def _index(fd: int, name: str, *, missing: bool) -> bytes | None:
    """None while there is none; with `missing` that is an error as well."""
    try:
        data = read_file(INDEX, fd, MAX_DOCUMENT)
    except FileNotFoundError as error:
        if not missing:
            return None
        text = "there is no index.json, so nobody knows what it needs; nothing was deleted. Delete the folder if no image is in it"
        raise Corrupt(what=f"the index of the layout {name!r}", reason=text) from error
    except OSError as error:
        raise Corrupt(what=f"the index of the layout {name!r}", reason=f"{error.strerror}; nothing was deleted") from error
    if data is None:
        raise Corrupt(what=f"the index of the layout {name!r}", reason="it is no file, or too large; nothing was deleted")
    return data


def read_file(name: str, folder: int, limit: int, *, first: bytes = b"") -> bytes | None:
    """The content of the file `name` in the open `folder`; None for what is no regular file, has more than `limit` bytes, or
    does not begin with `first`. Raises `OSError`."""
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
            (each.name, each.is_dir(follow_symlinks=False), each.is_symlink()) for each in entries if not _OURS.match(each.name)
        )
    is_layout = any(name in {INDEX, "oci-layout"} for name, *_ in found)
    if is_layout != unfinished:
        yield path, fd
    if len(found) > _MAX_LAYOUTS:
        text = f"it has more than {_MAX_LAYOUTS:,} entries; nothing was deleted. Name only folders of layouts in layouts="
        raise Corrupt(what=f"the folder of layouts {path!r}", reason=text)
    for name, is_folder, is_link in found:
        if is_link:
            _check_link(path, name, fd)
        if not is_folder or (is_layout and name == "blobs"):
            continue
        if not depth and not _may_hold_layout(name, fd):
            continue
        if not depth:
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


def _may_hold_layout(name: str, fd: int) -> bool:
    """False when the folder has neither an index nor folders: a tool's own, such as where it puts what it pulls."""
    try:
        deeper = open_folder(name, fd)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        with os.scandir(deeper) as entries:
            return any(each.name in {INDEX, "oci-layout"} or each.is_dir(follow_symlinks=False) for each in entries)
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
            if entry.name in _OWN or HEX.match(entry.name) or _OURS.match(entry.name):
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
