"""Everything that is in a directory, without any rule: what a deletion may take, name by name, and who is still in there.

A deletion takes nothing that is not in the survey it was decided on. A name that appears later, a file that changes, a folder that
is moved in or has another file system mounted over it are not what was looked at, so they stay.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from mothball.errors import OperationFailed
from mothball.purge.receipt import Gap, Report
from mothball.store.below import FOLDER_FLAGS
from mothball.store.folders import Folders
from mothball.store.read import show

_CHECK_EVERY: Final = 4096
_GIT: Final = b".git"
_MAPPING: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+ .w.s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) ([0-9]+) ", re.MULTILINE)
"""A writable mapping that others share: what is written to it reaches the file, and no time of the file need show it."""
_WRITES: Final = os.O_WRONLY | os.O_RDWR


class Item(NamedTuple):
    """One name below the root, as it was when it was looked at. `path` is relative to the root, in bytes."""

    path: bytes
    mode: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    links: int

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def same(self, found: os.stat_result) -> bool:
        """True when `found` is still this very thing, unchanged. What is in a folder does not count for the folder."""
        if found.st_ino != self.inode or stat.S_IFMT(found.st_mode) != stat.S_IFMT(self.mode):
            return False
        if self.is_folder:
            return True
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            return False
        # A file with more names gets another ctime whenever one of them goes.
        return self.links > 1 or found.st_ctime_ns == self.ctime_ns


class Survey(NamedTuple):
    """`items` in an order in which a folder stands before what it holds; `gaps` is what could not or must not be entered."""

    device: int
    items: list[Item]
    gaps: list[Gap]

    def repositories(self) -> dict[bytes, int]:
        """Folders (relative paths) that hold a ``.git``, with the inode of that; in ignored folders and git folders as well."""
        parts = ((item.path.rpartition(b"/"), item.inode) for item in self.items)
        return {folder: inode for (folder, _, name), inode in parts if name == _GIT}


def survey(root_fd: int, report: Report) -> Survey:
    """Look at every name below `root_fd`, never through a link and never across a mount point, also one of the same file system."""
    root = os.fstat(root_fd)
    mount = mount_of(root_fd)
    items: list[Item] = []
    gaps: list[Gap] = []
    waiting = [b""]
    with Folders(root_fd) as folders:
        while waiting:
            path = waiting.pop()
            try:
                fd = folders.open(path)
                if mount_of(fd) != mount or os.fstat(fd).st_dev != root.st_dev:
                    gaps.append(Gap(show(path), "mount", "another file system is mounted there; unmount it first"))
                    continue
                # Not through a copy of `fd`: the listing of one descriptor has one position.
                again = os.open(b".", FOLDER_FLAGS, dir_fd=fd)
                try:
                    found = sorted(_entries(again, path))
                finally:
                    os.close(again)
            except FileNotFoundError:
                continue
            except OSError as error:
                gaps.append(Gap(show(path), "unreadable", f"cannot be listed: {error.strerror}"))
                continue
            items += found
            # Depth first, in the order of the names: the last one that is put on the pile is the first to be taken.
            waiting += [item.path for item in reversed(found) if item.is_folder]
            if len(items) % _CHECK_EVERY < len(found):
                report("look", {"entries": len(items)})
    return Survey(root.st_dev, items, gaps)


def _entries(fd: int, folder: bytes) -> Iterator[Item]:
    with os.scandir(fd) as scan:
        names = [os.fsencode(entry.name) for entry in scan]
    for name in names:
        with suppress(FileNotFoundError):
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            path = folder + b"/" + name if folder else name
            yield Item(path, st.st_mode, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_nlink)


def mount_of(fd: int) -> int:
    """The id of the mount that `fd` is on: a bind mount has the device of what it shows, but not its id."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text("utf-8").splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    raise OperationFailed(reason="this kernel does not say on which mount a folder lies, so nothing can be deleted safely")


def mounts_below(real: bytes) -> list[Gap]:
    """What is mounted on `real` (a path without links) or anywhere below it, single files too, as this process sees it."""
    gaps = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        point = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split(b" ")[4])
        if point == real or point.startswith(real.rstrip(b"/") + b"/"):
            gaps.append(Gap(show(point[len(real) :].lstrip(b"/")), "mount", "something is mounted there; unmount it first"))
    return gaps


def users_of(root: tuple[int, int], seen: Survey) -> list[Gap]:
    """Processes that could still write into the surveyed tree, whatever becomes of its path.

    These are the ones that stand in one of its folders, hold one open, have a file open for writing or a writable shared mapping of
    one. Of processes that this user may not look into nothing is known. `root` is (device, inode) of the tree itself.
    """
    folders = {item.inode for item in seen.items if item.is_folder} | {root[1]}
    files = {item.inode for item in seen.items if stat.S_ISREG(item.mode)}
    gaps = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208 -- names are all that is needed
        if pid == os.getpid():
            continue
        with suppress(OSError):
            what = _uses(pid, seen.device, folders, files)
            if what:
                gaps.append(Gap("", "in_use", f"process {pid} ({_name(pid)}) {what}"))
    return gaps


def _uses(pid: int, device: int, folders: set[int], files: set[int]) -> str:
    base = f"/proc/{pid}"
    for name in ("cwd", "root"):
        with suppress(OSError):
            found = Path(base, name).stat()
            if found.st_dev == device and found.st_ino in folders:
                return "works in it"
    for number in _numbers(f"{base}/fd"):
        with suppress(OSError):
            link = Path(base, "fd", number)
            if not os.readlink(link).startswith("/"):  # noqa: PTH115 -- a Path would cost as much as the call
                continue  # a socket, a pipe
            found = link.stat()
            if found.st_dev != device:
                continue
            if stat.S_ISDIR(found.st_mode) and found.st_ino in folders:
                return "has a folder of it open"
            if found.st_ino in files and _flags(f"{base}/fdinfo/{number}") & _WRITES:
                return "has a file of it open for writing"
    with suppress(OSError):
        for major, minor, inode in _MAPPING.findall(Path(f"{base}/maps").read_text("utf-8", "replace")):
            if os.makedev(int(major, 16), int(minor, 16)) == device and int(inode) in files:
                return "has a file of it mapped for writing"
    return ""


def _numbers(folder: str) -> Iterable[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 -- names are all that is needed
    except OSError:
        return ()  # of another user, or gone


def _flags(path: str) -> int:
    match = re.search(r"^flags:\s*([0-7]+)", Path(path).read_text("utf-8"), re.MULTILINE)
    return int(match[1], 8) if match else _WRITES


def _name(pid: int) -> str:
    try:
        return show(Path(f"/proc/{pid}/comm").read_bytes().strip())
    except OSError:
        return "?"
