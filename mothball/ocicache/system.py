"""What the kernel does for a prune: two names exchanged in one step, a new name that never replaces another, mounts told apart."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from contextlib import suppress
from typing import Final

from mothball.store.below import FOLDER_FLAGS

_NOREPLACE: Final = 1
_EXCHANGE: Final = 2
_UNSUPPORTED: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})
"""A seccomp filter that does not know renameat2 answers EPERM; a plain rename says whether it really is forbidden."""
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_MOUNT: Final = re.compile(r"^mnt_id:\s*([0-9]+)$", re.MULTILINE)


def exchange(one: str, one_fd: int, other: str, other_fd: int) -> bool:
    """Let two names mean each other's files, in one step; False where the kernel or the file system cannot. Raises `OSError`."""
    return _renameat2(one, one_fd, other, other_fd, _EXCHANGE)


def rename_new(name: str, fd: int, target: str, target_fd: int) -> bool:
    """Rename, never over something that is there; False when it is. Raises `OSError`."""
    try:
        if _renameat2(name, fd, target, target_fd, _NOREPLACE):
            return True
    except FileExistsError:
        return False
    try:  # as good as it gets there: a file's second name never replaces, a folder replaces an empty folder at most
        os.link(name, target, src_dir_fd=fd, dst_dir_fd=target_fd, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP}:
            raise
        with suppress(FileNotFoundError):
            os.stat(target, dir_fd=target_fd, follow_symlinks=False)
            return False
        os.rename(name, target, src_dir_fd=fd, dst_dir_fd=target_fd)
        return True
    os.unlink(name, dir_fd=fd)
    return True


def _renameat2(one: str, one_fd: int, other: str, other_fd: int, flags: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        call = libc.renameat2
    except AttributeError:  # a C library from before 2018
        return False
    if call(one_fd, os.fsencode(one), other_fd, os.fsencode(other), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), one)


def mount_of(fd: int) -> tuple[int, int]:
    """(mount, device) of an open folder: between two mounts nothing can be renamed, were it one file system."""
    device = os.fstat(fd).st_dev
    with suppress(OSError):
        handle = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = _MOUNT.search(os.read(handle, 4096).decode("ascii", "replace"))
        finally:
            os.close(handle)
        if found:
            return int(found[1]), device
    return -1, device


def exists(name: str, fd: int) -> bool:
    """True when something of that name is in the open folder."""
    with suppress(FileNotFoundError):
        os.stat(name, dir_fd=fd, follow_symlinks=False)
        return True
    return False


def mounts_below(path: str) -> list[str]:
    """Where something is mounted below the folder `path`; empty where nobody can say."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123 - as bytes, names need not be text
            points = [line.split(b" ")[4] for line in file]
    except (OSError, IndexError):
        return []
    whole = [os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), each)) for each in points]
    return [each for each in whole if each.startswith(path.rstrip("/") + "/")]


def open_folder(name: str, fd: int | None = None) -> int:
    """A descriptor of a folder, never through a link; its own time of use stays as it is where that is allowed."""
    try:
        return os.open(name, FOLDER_FLAGS | os.O_NOATIME, dir_fd=fd)
    except PermissionError:
        return os.open(name, FOLDER_FLAGS, dir_fd=fd)


def open_file(name: str, fd: int) -> int:
    """A descriptor for reading a file, never through a link and never waiting; its times stay where that is allowed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=fd)
    except PermissionError:
        return os.open(name, flags, dir_fd=fd)


def dress(fd: int, model: int) -> bool:
    """Give the new folder `fd` the owner, mode and extended attributes of `model`; False when that is not permitted."""
    wanted, now = os.fstat(model), os.fstat(fd)
    try:
        if (wanted.st_uid, wanted.st_gid) != (now.st_uid, now.st_gid):
            os.fchown(fd, wanted.st_uid, wanted.st_gid)
        wanted_names = _attributes(model)
        for name in _attributes(fd):
            if name not in wanted_names:  # such as an ACL that the folder above gives to all that is made in it
                os.removexattr(fd, name)
        for name in wanted_names:
            os.setxattr(fd, name, os.getxattr(model, name))
        os.fchmod(fd, wanted.st_mode & 0o7777)
    except OSError:
        return False
    return True


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError:  # a file system without them
        return []
